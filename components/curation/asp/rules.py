"""The rules that ASP-R is measured against: without a model of importance, or with the simplest.

Training on all data for fewer epochs (`shorter`) and an even subset drawn anew each epoch are the
ones to beat.

Shapes: N samples, S of a subset.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from components.curation.asp import draw
from components.curation.asp.schedule import Schedule
from components.curation.asp.selector import Seen, Selector, Subset
from components.pipeline.errors import StageError


def shorter(schedule: Schedule) -> Schedule:
    """All data for as many epochs as cost what a schedule costs: one at least."""
    # Halves go up, as those of a schedule's sizes do.
    epochs = max(1, math.floor(schedule.cost * schedule.epochs + 0.5))
    return Schedule(schedule.size, np.full(epochs, schedule.size, np.int64), schedule.epochs)


@dataclass
class Even(Selector):
    """A subset drawn evenly, anew for every epoch or once for all.

    Attributes:
        static: all epochs have the subset of the first.
        class_N: each class has its share; None: as it falls.
    """

    static: bool = field(default=False, kw_only=True)
    class_N: npt.NDArray[np.integer] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.schedule.size
        self._strata = None if self.class_N is None else draw.Strata(self.class_N, size)

    def describe(self) -> str:
        classes = "" if self._strata is None else self._strata.digest
        return f"Even static={self.static} classes={classes}"

    def select(self, epoch: int) -> Subset:
        size, count = self.schedule.size, self.schedule.count(epoch)
        of = 1 if self.static else epoch
        wanted: int | npt.NDArray[np.int64] = count
        if self._strata is not None:
            wanted = self._strata.shares(count, draw.lot(self.seed, of, "shares"))
        even_N = np.zeros(size, np.float32)
        drawn = draw.draw(even_N, wanted, self.seed, of, self._strata, in_place=True)
        return Subset(drawn.index_S, entropy=math.log(size))


@dataclass
class Given(Selector):
    """The same subset in every epoch, chosen beforehand.

    Attributes:
        index_S: int64, ascending and each once, as many as the schedule's epochs have.
        weight_S: float32 weights of their losses; None: all are 1.
    """

    index_S: npt.NDArray[np.int64] = field(kw_only=True)
    weight_S: npt.NDArray[np.float32] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        size, index_S = self.schedule.size, self.index_S
        wrong = None
        if np.any(np.diff(index_S) <= 0):
            wrong = "indices are not ascending, or one is there twice"
        elif len(index_S) and not 0 <= index_S[0] <= index_S[-1] < size:
            wrong = f"indices from {index_S[0]} to {index_S[-1]} of {size} samples"
        elif np.any(self.schedule.count_T != len(index_S)):
            wrong = f"{len(index_S)} indices, the schedule has {self.schedule.count(1)}"
        elif self.weight_S is not None and len(self.weight_S) != len(index_S):
            wrong = f"{len(self.weight_S)} weights for {len(index_S)} indices"
        if wrong:
            remedy = "give what the choice returned, and the schedule that it was made for"
            raise StageError(f"the given subset: {wrong}", where="data selection", remedy=remedy)

    def describe(self) -> str:
        weights = b"" if self.weight_S is None else self.weight_S.tobytes()
        return f"Given {Subset(self.index_S).digest} {hashlib.sha256(weights).hexdigest()[:16]}"

    def select(self, epoch: int) -> Subset:
        return Subset(self.index_S, self.weight_S)


@dataclass
class Hardest(Selector):
    """The samples whose signal was largest when they were seen last; who never was, comes first.

    Attributes:
        signal: name of the signal.
        score_N: float32, +inf: never seen.
    """

    signal: str = field(default="el2n", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.score_N = np.full(self.schedule.size, np.inf, np.float32)

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def describe(self) -> str:
        return f"Hardest {self.signal}"

    def arrays(self) -> dict[str, npt.NDArray]:
        return super().arrays() | {"score_N": self.score_N}

    def learn(self, seen: Seen) -> None:
        self.score_N[seen.index_S] = seen.signals[self.signal]

    def select(self, epoch: int) -> Subset:
        # Of those that nobody has seen any are as good: a lot decides, not their place.
        lot_N = draw.generator(self.seed, epoch, "ties").permutation(self.schedule.size)
        place_S, _ = draw.largest(self.score_N[lot_N], self.schedule.count(epoch))
        return Subset(np.sort(lot_N[place_S]))


@dataclass
class InfoBatch(Selector):
    """Some of the samples below the mean loss left out at random, the others of them heavier.

    The rule of arXiv 2303.04947. Its sizes are its own, not the schedule's, which gives the number
    of epochs alone: what it costs is counted.

    Attributes:
        prune_share: of the samples below the mean that are left out.
        until: share of the epochs after which all data is trained on.
        loss_N: float32, of the last visit; 3 before the first.
    """

    prune_share: float = field(default=0.5, kw_only=True)
    until: float = field(default=0.875, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prune_share < 1:
            raise ValueError(f"prune_share is {self.prune_share}: a share of at least 0, below 1")
        self.loss_N = np.full(self.schedule.size, 3, np.float32)

    @property
    def signals(self) -> tuple[str, ...]:
        return ("loss",)

    def describe(self) -> str:
        return f"InfoBatch {self.prune_share} {self.until}"

    def arrays(self) -> dict[str, npt.NDArray]:
        return super().arrays() | {"loss_N": self.loss_N}

    def learn(self, seen: Seen) -> None:
        self.loss_N[seen.index_S] = seen.signals["loss"]

    def select(self, epoch: int) -> Subset:
        size = self.schedule.size
        if epoch > self.until * self.schedule.epochs:
            return Subset(np.arange(size), np.ones(size, np.float32))
        low_N = self.loss_N < self.loss_N.mean(dtype=np.float64)
        low = int(low_N.sum())
        kept = math.floor((1 - self.prune_share) * low)
        log_p_N = np.where(low_N, np.float32(0), np.float32(-np.inf))
        kept_S = draw.draw(log_p_N, kept, self.seed, epoch, in_place=True).index_S
        weight_N = np.where(low_N, np.float32(0), np.float32(1))
        weight_N[kept_S] = 1 / (1 - self.prune_share)
        index_S = np.flatnonzero(weight_N)
        return Subset(index_S, weight_N[index_S])
