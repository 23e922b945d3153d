"""The three parts of reinforcement learning: who generates, who judges, who learns.

Each is a plain class with messages in and out, which may live in one process or be a Ray actor
each (`align.py`); what a step does is a function of weights, seed and step, so both ways give the
same bits.

Shapes: B users of a step, G items of a group, E events, S targets, X exposures of known play time,
N items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from components.pipeline.errors import StageError
from components.pipeline.moments import moments_of, restore_moments
from components.training.onerec.data import Sequences, assemble
from components.training.onerec.epochs import EpochOrder, context_lengths
from components.training.onerec.experts import balance_experts
from components.training.onerec.recommender import Recommender
from components.training.onerec.reward.features import requests_at
from components.training.onerec.reward.policy import advantages, early_clipped, policy_objective
from components.training.onerec.reward.pscore import PScore
from components.training.onerec.reward.rewards import (
    IndustrialReward,
    format_advantage,
    preference_reward,
)
from components.training.onerec.reward.rollout import Group, generate, item_log_probs
from components.training.onerec.train import (
    TrainingData,
    make_optimiser,
    practise,
    training_targets,
)

if TYPE_CHECKING:
    from components.training.onerec.reward.config import AlignConfig

Int64 = npt.NDArray[np.int64]
#: Streams of random numbers of one step.
USERS, POLICY, FORMAT, CHOICE, DROPOUT = range(5)
#: Stream of the seed alone, for equal play times.
TIES = 5


@dataclass(frozen=True)
class Rollouts:
    """What was generated for the users of a step.

    Attributes:
        event_B: the requests, events of the request sequences.
        version: steps of the trainer that the generating weights had seen.
        preferred: items for the preference reward.
        free: unconstrained samples, for the format reward and for the legality itself.
    """

    step: int
    version: int
    event_B: Int64
    preferred: Group
    free: Group


def stream(seed: int, step: int, which: int) -> torch.Generator:
    """A generator of random numbers of its own for every step and use."""
    state = np.random.SeedSequence([seed, step, which]).generate_state(1)[0].item()
    return torch.Generator().manual_seed(state)


class RolloutWorker:
    """Generates with the newest weights it was sent.

    Args:
        requests: histories, each with a request as its last event (`requests_after`).
        user_R: users whose requests are drawn.
    """

    def __init__(
        self,
        recommender: Recommender,
        requests: Sequences,
        user_R: Int64,
        config: AlignConfig,
        seed: int,
        threads: int | None = None,
    ) -> None:
        _limit(threads)
        self._recommender = replace(recommender, model=deepcopy(recommender.model))
        self._requests = with_features(recommender, requests)
        self._user_R, self._config, self._seed = user_R, config, seed
        self._version = 0
        trie = recommender.trie
        self._leaf_codes_VQ = torch.from_numpy(recommender.codes_NQ.astype(np.int64)).to(
            trie.items.device
        )[trie.items[trie.item_ptr[:-1]]]

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take over the trainer's weights after ``version`` steps."""
        self._recommender.model.load_state_dict(weights)
        self._version = version

    def rollout(self, step: int) -> Rollouts:
        """Items for the users of a step."""
        config, model, trie = self._config, self._recommender.model, self._recommender.trie
        rng = np.random.default_rng([self._seed, step, USERS])
        user_B = rng.choice(self._user_R, min(config.users, len(self._user_R)), replace=False)
        event_B = self._requests.start_U1[user_B + 1] - 1
        batch = assemble(self._requests, event_B, self._recommender.codes_NQ, model.config)
        batch = batch.to(trie.items.device)

        def made(size: int, sampler: Any, which: int) -> Group:
            generator = stream(self._seed, step, which)
            codes_VQ = self._leaf_codes_VQ
            return generate(model, trie, codes_VQ, batch, size, sampler, generator).cpu()

        preferred = made(config.group, config.sampler, POLICY)
        free = made(config.format_group, "sample", FORMAT)
        return Rollouts(step, self._version, event_B, preferred, free)


class RewardWorker:
    """Scores rollouts by the preference model, less what the industrial reward takes.

    Args:
        user_UF: features of the users of ``requests``.
        flagged_N: bool, items of the industrial reward.
    """

    def __init__(
        self,
        pscore: PScore,
        requests: Sequences,
        user_UF: Int64,
        codes_NQ: npt.NDArray[np.integer],
        flagged_N: Tensor,
        config: AlignConfig,
        threads: int | None = None,
    ) -> None:
        _limit(threads)
        self._pscore, self._requests = pscore.eval(), requests
        self._user_UF, self._codes_NQ = user_UF, codes_NQ
        self._industrial = IndustrialReward(flagged_N, config.viral_share, config.viral_alpha)

    def score(self, rollouts: Rollouts) -> Tensor:
        """Rewards of the preferred items: float32 [B, G], NaN for illegal ones."""
        history = self._pscore.size.history
        device = self._pscore.no_event.device
        requests = requests_at(
            self._requests, rollouts.event_B, self._user_UF, self._codes_NQ, history
        )
        item_BG = rollouts.preferred.item_BG.to(device)
        reward_BG = preference_reward(self._pscore, requests.to(device), item_BG)
        return self._industrial(reward_BG, item_BG).cpu()

    def exposed(self) -> float | None:
        """Share of flagged items lately: all that this worker remembers."""
        return self._industrial.exposed

    def restore(self, exposed: float | None) -> None:
        self._industrial.exposed = exposed


@dataclass
class TrainerState:
    """What a resumed trainer needs."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


class Trainer:
    """``L = L_NTP − λ_1 J_P − λ_2 J_format`` (section 3.3): policy objectives beside RSFT.

    One learning rate for all parameters, and by default a constant one, is ours: the report anneals
    two, of sparse and of dense parameters. Targets, and what the successor memory counts, are those
    that the recommender was trained with.

    Args:
        data: what the recommender was trained on, for the supervised loss.
        sft_S: its targets, those of `rsft_targets`.
    """

    def __init__(
        self,
        recommender: Recommender,
        data: TrainingData,
        sft_S: Int64,
        requests: Sequences,
        config: AlignConfig,
        seed: int,
        threads: int | None = None,
    ) -> None:
        _limit(threads)
        self._model = deepcopy(recommender.model)
        self._requests = with_features(recommender, requests)
        self._config, self._seed = config, seed
        self._device = self._model.position.device
        target_S = training_targets(data, recommender.targets)
        self._fold_E = None
        if self._model.memory is not None:
            # What serves stays as it was loaded: rollout workers have the same.
            self._fold_E = practise(self._model.memory, data, target_S, self._model.config, seed)
            self._model.to(self._device)
        self._sft_S, self._targets = sft_S, len(target_S)
        features = recommender.features
        self._train = features.attach(data.train, self._sft_S, self._model.config)
        self._codes_NQ = data.codes_NQ
        self._optimiser = make_optimiser(self._model, config)
        self._step = 0
        self._supervised = self._supervised_batches()

    def fine_tuned_on(self) -> str:
        """Which of the training targets the supervised loss has, in words."""
        kept, drop = len(self._sft_S), self._config.rsft_drop
        if kept == self._targets:
            why = "nothing was to be dropped" if drop == 0 else "none was known to be played least"
            return f"supervised fine-tuning has all {kept} training targets: {why}"
        return (
            f"supervised fine-tuning has {kept} of {self._targets} training targets "
            f"({1 - kept / self._targets:.1%} dropped): those among the {1 - drop:.0%} of "
            "exposures that were played longest; of unknown play time are none"
        )

    def weights(self) -> dict[str, Tensor]:
        """A copy, to be sent to the rollout workers."""
        return {name: x.detach().cpu().clone() for name, x in self._model.state_dict().items()}

    def state(self) -> TrainerState:
        return TrainerState(self._step, self.weights(), moments_of(self._model, self._optimiser))

    def restore(self, state: TrainerState) -> None:
        self._step = state.step
        self._model.load_state_dict(state.weights)
        restore_moments(self._model, self._optimiser, state.moments)
        self._supervised = self._supervised_batches()

    def step(self, rollouts: Rollouts, reward_BG: Tensor) -> dict[str, float]:
        """One update; returns what the curve shows.

        Raises:
            StageError: the loss is no longer a number.
        """
        config, model = self._config, self._model
        preferred, free = rollouts.preferred, rollouts.free
        advantage_BG = advantages(reward_BG).to(self._device)
        chosen_BG = format_advantage(
            free.legal_BG,
            free.log_old_BG,
            config.format_k,
            config.format_choice,
            stream(self._seed, rollouts.step, CHOICE),
        )
        gain_p, gain_format, log_p_BG = self._gains(rollouts, advantage_BG, chosen_BG)
        event_B = next(self._supervised)
        batch = assemble(self._train, event_B, self._codes_NQ, model.config, self._fold_E)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self._seed, rollouts.step, DROPOUT).initial_seed())
            model.train()
            ntp = model(batch.to(self._device)).sum()
            model.eval()
        loss = ntp - config.preference_weight * gain_p - config.format_weight * gain_format
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip or torch.inf))
        if not np.isfinite(norm):
            raise StageError(
                f"the gradient is no longer a number at step {self._step}",
                where="stage 'align_recommender'",
                remedy="lower align_recommender.learning_rate, or set a clip",
            )
        for part in self._optimiser.param_groups:
            part["lr"] = rate_at(self._step, config)
        self._optimiser.step()
        balance_experts(model, config.balance_rate)
        staleness = self._step - rollouts.version
        self._step += 1
        legal = free.legal_BG.float()
        early = early_clipped(
            log_p_BG,
            preferred.log_old_BG.to(self._device),
            advantage_BG,
            config.epsilon,
            config.delta,
        )
        return {
            "reward": float(reward_BG.nanmean()),
            "legality": float(legal.mean()),
            "staleness": float(staleness),
            "gradient_norm": norm,
            "early_clipped": early,
            "equal_groups": float((advantage_BG == 0).all(1).float().mean()),
            "distinct_items": _distinct_share(preferred),
            "sft_loss": float(ntp.detach()),
            "preference_gain": float(gain_p.detach()),
            "format_gain": float(gain_format.detach()),
        }

    def _gains(
        self, rollouts: Rollouts, advantage_BG: Tensor, chosen_BG: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """J_P, J_format and log π_θ of the preferred items, with dropout off: π_θ is the policy
        that generates."""
        config, preferred, free = self._config, rollouts.preferred, rollouts.free
        batch = assemble(self._requests, rollouts.event_B, self._codes_NQ, self._model.config).to(
            self._device
        )
        self._model.eval()
        sid_BGQ = torch.cat([preferred.sid_BGQ, free.sid_BGQ], 1).to(self._device)
        log_p_BG = item_log_probs(self._model, batch, sid_BGQ)
        split = preferred.sid_BGQ.shape[1]
        gains = [
            policy_objective(
                log_p_BG[:, part],
                group.log_old_BG.to(self._device),
                adv_BG.to(self._device),
                config.objective,
                epsilon=config.epsilon,
                delta=config.delta,
            )
            for part, group, adv_BG in (
                (slice(None, split), preferred, advantage_BG),
                (slice(split, None), free, chosen_BG),
            )
        ]
        return gains[0], gains[1], log_p_BG[:, :split]

    def _supervised_batches(self) -> Iterator[Int64]:
        lengths = context_lengths(self._train, self._sft_S, self._model.config)
        order = EpochOrder(self._sft_S, lengths, self._config.sft_batch, self._seed)
        epoch, first = divmod(self._step, order.steps)
        while True:
            yield from order.epoch(epoch, first)
            epoch, first = epoch + 1, 0


def rsft_targets(train: Sequences, target_S: Int64, drop: float, seed: int) -> Int64:
    """Training targets among the exposures that are left without the ``drop`` played least.

    The report drops the half of all exposures that was played least (3.3), whatever was liked of
    it: most targets are beyond the median exposure. What follows is ours. Nobody knows in which
    half an exposure of unknown play time is, so it is no target; where the play time of no target
    is known, all stay. Of equal times a lot decides: the order of events is that of users.

    Args:
        target_S: events to learn as targets, ascending.
        drop: share of the exposures of known play time; 0: all targets stay.

    Returns:
        int64, ascending.

    Raises:
        StageError: all targets of known play time are among those played least.
    """
    known_E = np.isfinite(train.play_s_E)
    if drop == 0 or not known_E[target_S].any():
        return target_S
    exposure_X = np.flatnonzero(known_E)
    lot_X = np.random.default_rng([seed, TIES]).permutation(len(exposure_X))
    order = np.lexsort((lot_X, train.play_s_E[exposure_X]))
    left_E = np.zeros(len(known_E), bool)
    left_E[exposure_X[order[int(drop * len(order)) :]]] = True
    left_S = target_S[left_E[target_S]]
    if not len(left_S):
        raise StageError(
            f"nothing is left to fine-tune on: each of {known_E[target_S].sum()} training targets "
            f"of known play time is among the {drop:.0%} of exposures that were played least",
            where="parameter align_recommender.rsft_drop",
            remedy="lower align_recommender.rsft_drop; 0 keeps all targets",
        )
    return left_S


def rate_at(step: int, config: AlignConfig) -> float:
    """Learning rate of a step 0 … steps - 1: a straight line down to its last share."""
    done = step / max(1, config.steps - 1)
    return config.learning_rate * (1 - (1 - config.last_rate) * done)


def with_features(recommender: Recommender, requests: Sequences) -> Sequences:
    """Requests with what the policy reads beside their events."""
    model = recommender.model.config
    return recommender.features.attach(requests, requests.example_targets(), model)


def with_weights(recommender: Recommender, weights: Mapping[str, Tensor]) -> Recommender:
    """The same recommender with other weights."""
    model = deepcopy(recommender.model)
    model.load_state_dict(weights)
    return replace(recommender, model=model.eval())


def _distinct_share(group: Group) -> float:
    """Different legal items of a group, as a share of its places; the mean over groups."""
    item_BG = group.item_BG.sort(1).values
    first_BG = torch.cat([item_BG[:, :1] >= 0, item_BG[:, 1:] > item_BG[:, :-1]], 1)
    return float((first_BG & (item_BG >= 0)).float().mean())


def _limit(threads: int | None) -> None:
    """In a process of its own: as many threads as the CPUs it was given."""
    if threads is not None:
        torch.set_num_threads(threads)
