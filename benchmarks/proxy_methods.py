"""Every way to make a trial cheaper that `proxy_ranking` compares: how its rule is made.

A method is prepared once for a search, which may train small networks on all data to know features
or scores (`Reference`); what that takes is counted. Then each trial gets a rule of its own.

Shapes: N training images, C classes, D width of the features, k images of a subset.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.proxy_trials import Mlp, Task, Trial, outputs
from components.curation.asp import coresets
from components.curation.asp.asp_r import AspR
from components.curation.asp.config import AspConfig, ScheduleConfig
from components.curation.asp.draw import Strata
from components.curation.asp.portfolio import SIGNALS, Portfolio
from components.curation.asp.rules import Even, Given, Hardest, InfoBatch, shorter
from components.curation.asp.sampler import Sampler
from components.curation.asp.schedule import Schedule
from components.curation.asp.selector import Selector
from components.curation.asp.signals import Forward, signals_of

Int64 = npt.NDArray[np.int64]
Float = npt.NDArray[np.floating]
Rule = Callable[[int], Selector]

#: Trainings whose mean is a static score, and the epochs of each.
SCORERS, SCORER_EPOCHS = 10, 2
#: Of the networks that scores and features are of.
SCORER = {
    "optimiser": "sgd",
    "learning_rate": 0.02,
    "weight_decay": 5e-4,
    "width": 256,
    "depth": 2,
    "dropout": 0.0,
    "batch_size": 128,
    "augmentation": 0.5,
}
#: Seeds of these networks: those of no trial.
SCORER_SEED = 1_000
#: Width of the bins of P1, for ten classes.
BIN = 0.5


class Reference:
    """What small networks trained on all data say of it, each thing trained when first asked for.

    Args:
        epochs: of the network that features are of.
    """

    def __init__(self, task: Task, epochs: int, seed: int) -> None:
        self.task, self.epochs, self.seed = task, epochs, SCORER_SEED * (1 + seed)
        self.y_N: Int64 = task.train.y_N.numpy()
        self.strata = Strata(self.y_N)

    def score(self, name: str) -> Float:
        """Mean of a signal over short trainings: float32 [N]."""
        return self._scores[name]

    @functools.cached_property
    def _scores(self) -> Mapping[str, Float]:
        total: dict[str, Float] = {}
        for number in range(SCORERS):
            model = self._trained(SCORER_EPOCHS, self.seed + number)
            for name, value_N in self._signals(model).items():
                total[name] = total.get(name, 0) + value_N / SCORERS
        return total

    @functools.cached_property
    def model(self) -> Mlp:
        return self._trained(self.epochs, self.seed)

    @functools.cached_property
    def outputs(self) -> tuple[Float, Float]:
        """Logits [N, C] and features [N, D] of `model`."""
        logit_NC, feature_ND = outputs(self.model, self.task.train)
        return logit_NC.numpy(), feature_ND.numpy()

    @functools.cached_property
    def entropy(self) -> Float:
        return self._signals(self.model)["entropy"]

    @functools.cached_property
    def forgotten(self) -> Float:
        """How often each image went from right to wrong in one training."""
        schedule = Schedule.of(ScheduleConfig(ratio=1.0), len(self.y_N), self.epochs)
        config = AspConfig(signals={"forgetting": 1.0})
        rule = AspR(schedule, self.seed, config=config)
        self._train(rule)
        return rule.forgotten_N.astype(np.float32)

    def gradients(self) -> Float:
        """Of the weights and bias of the own class's logit: float32 [N, D + 1]."""
        logit_NC, feature_ND = self.outputs
        p_NC = torch.from_numpy(logit_NC).softmax(1).numpy()
        own_N = p_NC[np.arange(len(self.y_N)), self.y_N] - 1
        return own_N[:, None] * np.concatenate([feature_ND, np.ones((len(own_N), 1))], 1)

    def of_classes(
        self, choose: Callable[[Int64, int], tuple[Int64, Float | None]], k: int
    ) -> tuple[Int64, npt.NDArray[np.float32] | None]:
        """A choice of its share in each class, and the weights together, of mean 1."""
        index, weight = [], []
        for c, wanted in enumerate(self.strata.shares(k).tolist()):
            member_s = self.strata.members(c).astype(np.int64)
            place_k, weight_k = choose(member_s, wanted)
            index.append(member_s[place_k])
            weight.append(np.ones(len(place_k)) if weight_k is None else weight_k)
        index_S, weight_S = np.concatenate(index), np.concatenate(weight)
        order_S = np.argsort(index_S)
        weight_S = weight_S[order_S]
        return index_S[order_S], (weight_S / weight_S.mean()).astype(np.float32)

    def _trained(self, epochs: int, seed: int) -> Mlp:
        schedule = Schedule.of(ScheduleConfig(ratio=1.0), len(self.y_N), epochs)
        return self._train(Even(schedule, seed), seed)

    def _train(self, rule: Selector, seed: int | None = None) -> Mlp:
        trial = Trial(self.task, self.seed if seed is None else seed)
        return trial.trained(SCORER, Sampler(rule, SCORER["batch_size"]))  # type: ignore[arg-type]

    def _signals(self, model: Mlp) -> dict[str, Float]:
        logit_NC, feature_ND = outputs(model, self.task.train)
        forward = Forward(logit_NC, self.task.train.y_N, feature_ND)
        wanted = ("el2n", "grand_last", "margin", "entropy")
        return {name: x.numpy() for name, x in signals_of(forward, wanted).items()}


@dataclass(frozen=True)
class Setting:
    """What a method is prepared for.

    Attributes:
        seed: of the search: of static choices and of the networks behind them.
    """

    task: Task
    ratio: float
    epochs: int
    seed: int

    @property
    def schedule(self) -> Schedule:
        config = ScheduleConfig(ratio=self.ratio)
        return Schedule.of(config, len(self.task.train), self.epochs)

    @property
    def k(self) -> int:
        return self.schedule.count(1)

    @property
    def class_N(self) -> Int64:
        found: Int64 = self.task.train.y_N.numpy()
        return found

    @property
    def reference(self) -> Reference:
        return Reference(self.task, self.epochs, self.seed)

    def given(self, index_S: Int64, weight_S: npt.NDArray[np.float32] | None = None) -> Rule:
        """The same subset for every trial and epoch."""
        return lambda seed: Given(self.schedule, seed, index_S=index_S, weight_S=weight_S)


def full(setting: Setting) -> Rule:
    whole = Schedule.of(ScheduleConfig(ratio=1.0), len(setting.task.train), setting.epochs)
    return lambda seed: Even(whole, seed)


def short(setting: Setting) -> Rule:
    return lambda seed: Even(shorter(setting.schedule), seed)


def static_random(setting: Setting) -> Rule:
    # One subset for the whole search: candidates are compared on the same images.
    return lambda seed: Even(setting.schedule, setting.seed, static=True)


def static_stratified(setting: Setting) -> Rule:
    return lambda seed: Even(setting.schedule, setting.seed, static=True, class_N=setting.class_N)


def dynamic_random(setting: Setting) -> Rule:
    return lambda seed: Even(setting.schedule, seed)


def hard_top_k(setting: Setting) -> Rule:
    return lambda seed: Hardest(setting.schedule, seed)


def infobatch(setting: Setting) -> Rule:
    """Its sizes are its own: the ratio does not reach it."""
    whole = Schedule.of(ScheduleConfig(ratio=1.0), len(setting.task.train), setting.epochs)
    return lambda seed: InfoBatch(whole, seed)


def asp_r(**settings: object) -> Callable[[Setting], Rule]:
    """Our rule with some of its parameters changed."""

    def prepare(setting: Setting) -> Rule:
        config = AspConfig.model_validate(settings)
        class_N = setting.class_N if config.stratified else None
        return lambda seed: AspR(setting.schedule, seed, config=config, class_N=class_N)

    return prepare


def automatic(setting: Setting) -> Rule:
    config = AspConfig(signals=dict.fromkeys(SIGNALS, 1.0))
    return lambda seed: Portfolio(setting.schedule, seed, config=config)


def scored(name: str) -> Callable[[Setting], Rule]:
    """The largest means of a signal over short trainings, each class its share."""

    def prepare(setting: Setting) -> Rule:
        reference = setting.reference
        return setting.given(coresets.top(reference.score(name), setting.k, reference.strata))

    return prepare


def forgetting(setting: Setting) -> Rule:
    reference = setting.reference
    return setting.given(coresets.top(reference.forgotten, setting.k, reference.strata))


def entropy_histogram(setting: Setting) -> Rule:
    entropy_N = setting.reference.entropy
    return setting.given(coresets.entropy_histogram(entropy_N, setting.k, BIN, setting.seed))


def herding(setting: Setting) -> Rule:
    reference = setting.reference
    feature_ND = reference.outputs[1]
    return setting.given(
        *reference.of_classes(
            lambda member_s, k: (coresets.herding(feature_ND[member_s], k), None), setting.k
        )
    )


def k_center(setting: Setting) -> Rule:
    return setting.given(coresets.k_center(setting.reference.outputs[1], setting.k))


def craig(setting: Setting) -> Rule:
    reference = setting.reference
    gradient_ND = reference.gradients()
    return setting.given(
        *reference.of_classes(
            lambda member_s, k: coresets.craig(gradient_ND[member_s], k), setting.k
        )
    )


def grad_match(setting: Setting) -> Rule:
    reference = setting.reference
    gradient_ND = reference.gradients()
    return setting.given(
        *reference.of_classes(
            lambda member_s, k: coresets.grad_match(gradient_ND[member_s], k), setting.k
        )
    )


def glister(setting: Setting) -> Rule:
    reference, held_out = setting.reference, setting.task.held_out
    model = reference.model
    return setting.given(
        coresets.glister(
            reference.outputs[1],
            reference.y_N,
            outputs(model, held_out)[1].numpy(),
            held_out.y_N.numpy(),
            model.head.weight.detach().numpy(),
            model.head.bias.detach().numpy(),
            setting.k,
        )
    )


#: By name, ours first; the opponents that cost as much and know nothing come next.
METHODS: Mapping[str, Callable[[Setting], Rule]] = {
    "asp_r": asp_r(),
    "asp_r_stratified": asp_r(stratified=True),
    "asp_r_unbiased": asp_r(mode="unbiased"),
    "asp_r_infobatch": asp_r(mode="infobatch"),
    "asp_r_noise_guard": asp_r(noise_share=0.1),
    "asp_r_automatic": automatic,
    "short": short,
    "dynamic_random": dynamic_random,
    "static_random": static_random,
    "static_stratified": static_stratified,
    "hard_top_k": hard_top_k,
    "el2n": scored("el2n"),
    "grand": scored("grand_last"),
    "margin": scored("margin"),
    "entropy": scored("entropy"),
    "forgetting": forgetting,
    "entropy_histogram": entropy_histogram,
    "herding": herding,
    "k_center": k_center,
    "craig": craig,
    "grad_match": grad_match,
    "glister": glister,
    "infobatch": infobatch,
    "full": full,
}
