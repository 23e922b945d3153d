"""What an arm of the reward benchmark makes of a seed's models (`reward_data.py`).

Shapes: U users of one kind, F features of a user, R users of rollouts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.kept import kept, short_digest
from benchmarks.reward_data import (
    HELD_OUT,
    MODELS,
    Place,
    examples_of,
    groups_of,
    load_recommender,
    read_data,
    train_preferences,
    train_recommender,
)
from components.training.onerec.reward.choice import CHOSEN_BY, spread
from components.training.onerec.reward.stage import REWARD

if TYPE_CHECKING:
    from torch import Tensor

    from components.training.onerec.data import Sequences
    from components.training.onerec.recommender import Recommender
    from components.training.onerec.reward.align import Parts, Progress
    from components.training.onerec.reward.config import AlignConfig
    from components.training.onerec.reward.evaluation import Lists, Offered
    from components.training.onerec.reward.pscore import PScore
    from components.training.onerec.train import TrainingData

Float = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

CURVE = "curve"
#: Of chosen weights: the step after which they were kept, 0 for those before the first.
KEPT_STEP = "kept_step"
MEASURED = "measured.npz"


@dataclass(frozen=True)
class Arm:
    """What an arm changes of the stage's defaults.

    Attributes:
        settings: of `AlignConfig`; None: nothing is trained.
        shuffled: the rewards of a group are dealt out to other items of it.
        chooses: also measured with weights chosen as the stage chooses, as ``<name>_chosen``.
        selects: also measured with its longest lists in the order of the reward model, as
            ``<name>_selected``.
        all_seeds: trained with every seed, else with the first one alone.
        offers: whether its lists are measured; else what its steps said is all.
    """

    settings: Mapping[str, Any] | None = field(default_factory=dict)
    shuffled: bool = False
    chooses: bool = False
    selects: bool = False
    all_seeds: bool = False
    offers: bool = True


@dataclass(frozen=True)
class World:
    """Data, models and users of the arms of a seed.

    Attributes:
        data: valid are the examples of users with a model.
        test: examples of users without one.
        train_UF, valid_UF, test_UF: features of the users of each.
        user_R: train users for whom rollouts are made.
        choose_U, test_U: the events that choose weights, and those that figures are of.
    """

    place: Place
    seed: int
    data: TrainingData
    test: Sequences
    recommender: Recommender
    pscores: Mapping[str, PScore]
    train_UF: Int64
    valid_UF: Int64
    test_UF: Int64
    user_R: Int64
    choose_U: Int64
    test_U: Int64

    @classmethod
    @functools.lru_cache(maxsize=1)
    def load(cls, place: Place, seed: int) -> World:
        """Train what is not there yet and read it all."""
        import pyarrow.parquet as pq

        from components.training.onerec.reward import features
        from components.training.onerec.reward.pscore import load_pscore

        files, size = place.files, place.size
        data = read_data(place)
        recommender = load_recommender(train_recommender(place, seed), data)
        folder = train_preferences(place, seed)
        pscores = {name: load_pscore(folder, name) for name in MODELS}
        test = examples_of(files.test_examples, size, held_out=True)
        users = pq.read_table(files.users)
        buckets = pscores[REWARD].size.user_buckets
        train_ids = data.train.user_id_U
        train_UF, valid_UF, test_UF = (
            features.user_features(ids, users, buckets)
            for ids in (train_ids, data.valid.user_id_U, test.user_id_U)
        )
        held_U = groups_of(train_ids, size)[HELD_OUT]
        return cls(
            place, seed, data, test, recommender, pscores, train_UF, valid_UF, test_UF,
            user_R=np.flatnonzero(~held_U),
            choose_U=spread(data.valid.example_targets(), size.valid_users),
            test_U=spread(test.example_targets(), size.test_users),
        )  # fmt: skip

    def lists(self, recommender: Recommender, *, choosing: bool = False) -> Lists:
        """What a policy offers: test users without a model, or those whose part it is to choose."""
        from components.training.onerec.reward.evaluation import offer

        sequences, event_U, user_UF = (
            (self.data.valid, self.choose_U, self.valid_UF)
            if choosing
            else (self.test, self.test_U, self.test_UF)
        )
        return offer(
            recommender, self.pscores, sequences, event_U, user_UF,
            width=max(self.place.size.widths), samples=self.place.size.samples, seed=self.seed,
        )  # fmt: skip

    def figures(self, name: str, arm: Arm, recommender: Recommender) -> dict[str, dict[str, Float]]:
        """Of a policy, and of its lists in the order of the reward model.

        An order changes neither the longest lists nor the samples: of these nothing is said twice.
        """
        widths, lists = self.place.size.widths, self.lists(recommender)
        found = {name: by_figure(lists.offered(widths))}
        if arm.selects:
            selected = by_figure(lists.selected(REWARD).offered(widths[:-1]))
            del selected["legality"]
            found[f"{name}_selected"] = selected
        return found

    def measured(self, name: str, arm: Arm) -> dict[str, dict[str, Float]]:
        """Figures of an arm, kept once they are there.

        Returns:
            by policy (the arm's name, with its chosen weights and its selected items too) and by
            figure: float64 [U], of figures of a whole policy [1]; and as ``curve`` what every step
            said, float64 [steps]. Of an arm that broke in its first step that is ``step`` alone.
        """
        made_of = short_digest(asdict(arm))

        def make(folder: Path) -> None:
            print(f"arm {name}, seed {self.seed}", flush=True)
            found = self._measure(name, arm)
            flat = {f"{part}/{key}": x for part, of in found.items() for key, x in of.items()}
            np.savez(folder / MEASURED, allow_pickle=False, **flat)

        folder = kept(self.place.folder / f"{name}_{self.seed}_{made_of}", make)
        parts: dict[str, dict[str, Float]] = {}
        with np.load(folder / MEASURED) as stored:
            for key in stored.files:
                part, _, figure = key.partition("/")
                parts.setdefault(part, {})[figure] = stored[key]
        return parts

    def _measure(self, name: str, arm: Arm) -> dict[str, dict[str, Float]]:
        from components.training.onerec.reward.workers import with_weights

        if arm.settings is None:
            return self.figures(name, arm, self.recommender)
        progress, weights = self.aligned(arm)
        found: dict[str, dict[str, Float]] = {}
        if arm.offers:
            found |= self.figures(name, arm, with_weights(self.recommender, weights))
        if arm.chooses:
            best = progress.best_weights
            chosen = with_weights(self.recommender, best) if best else self.recommender
            kept_step = {KEPT_STEP: np.array([float(progress.best_step)])}
            offered = self.lists(chosen).offered(self.place.size.widths)
            found[f"{name}_chosen"] = by_figure(offered) | kept_step
        names = progress.curve[0] if progress.curve else ("step",)
        curve = {key: np.array([row[key] for row in progress.curve], float) for key in names}
        return {**found, CURVE: curve}

    def aligned(self, arm: Arm) -> tuple[Progress, Mapping[str, Tensor]]:
        """All steps of an arm, and the weights after the last one.

        An arm whose gradient stops being a number ends there, with the weights it has.
        """
        from components.pipeline.errors import StageError
        from components.training.onerec.reward.align import Progress, align, in_process
        from components.training.onerec.reward.choice import keep_if_better
        from components.training.onerec.reward.config import AlignConfig
        from components.training.onerec.reward.workers import with_weights

        config = AlignConfig(**(arm.settings or {}))
        crew = in_process(self._parts(config))
        if arm.shuffled:
            crew.reward.score = shuffled(crew.reward.score, self.seed)
        before = self._choosing(self.recommender) if arm.chooses else None
        progress = Progress()

        def checkpoint(now: Progress) -> None:
            if before is not None and now.trainer is not None:
                policy = with_weights(self.recommender, now.trainer.weights)
                keep_if_better(now, self._choosing(policy), before)

        try:
            align(crew, config, progress, checkpoint=checkpoint)
        except StageError as error:
            print(f"seed {self.seed}: {error}", flush=True)
        return progress, crew.trainer.weights()

    def _choosing(self, recommender: Recommender) -> Offered:
        return self.lists(recommender, choosing=True).offered((CHOSEN_BY[1],))

    def _parts(self, config: AlignConfig) -> Parts:
        import torch

        from components.training.onerec.reward.align import Parts

        return Parts.of(
            self.recommender,
            self.data,
            self.pscores[REWARD],
            config,
            self.seed,
            user_UF=self.train_UF,
            user_R=self.user_R,
            flagged_N=torch.zeros(len(self.data.codes_NQ), dtype=torch.bool),
        )


def by_figure(offered: Offered) -> dict[str, Float]:
    """Per-user figures of a policy by name."""
    best = {f"{model}_best_of_{k}": x_U for (model, k), x_U in offered.best.items()}
    mean = {f"{model}_mean_of_{k}": x_U for (model, k), x_U in offered.mean.items()}
    alone = {"ndcg_at_10": offered.ndcg_U, "legality": offered.legality_U}
    return {**best, **mean, **alone, "distinct_at_10": np.array([float(offered.distinct)])}


def shuffled(score: Callable[[Any], Tensor], seed: int) -> Callable[[Any], Tensor]:
    """Rewards dealt out anew within each group: the control that must not gain."""
    import torch

    lot = torch.Generator().manual_seed(seed)

    def dealt(rollouts: Any) -> Tensor:
        reward_BG = score(rollouts)
        order_BG = torch.rand(reward_BG.shape, generator=lot).argsort(1)
        return reward_BG.gather(1, order_BG)

    return dealt
