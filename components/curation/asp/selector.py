"""The interface of all selection rules: a subset for each epoch, and what was seen of it.

A rule's state is some arrays over all samples and a few facts that say what they are of, so that a
state is taken up only by the same rule over the same data. Epochs count from 1.

Shapes: N samples, S of a subset.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from components.curation.asp.schedule import Schedule
from components.pipeline.errors import StageError

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

#: Of no signal that goes well, and its square is still a float32.
LARGEST = 1e9


class Diverged(StageError):
    """Training gave what is not a number, or nearly so; a search goes on with other candidates."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what,
            where="data selection",
            remedy="training diverged: lower the learning rate, or clip the gradient",
        )

    def __reduce__(self) -> tuple[type[Diverged], tuple[str]]:
        return Diverged, (self.what,)


@dataclass(frozen=True)
class Subset:
    """What an epoch trains on.

    Attributes:
        index_S: int64, ascending and each once.
        weight_S: float32 weights of the losses, whose mean is then taken; None: all are 1.
        entropy: of the probabilities it was drawn by, in nats; None where nothing was drawn.
    """

    index_S: Int64
    weight_S: Float32 | None = None
    entropy: float | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the indices."""
        return hashlib.sha256(np.ascontiguousarray(self.index_S, "<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Seen:
    """What training saw of the samples of a subset.

    Attributes:
        index_S: int64, ascending and each once.
        signals: float32 [S] by name (`signals`).
        correct_S: bool, the most probable class was the target.
    """

    index_S: Int64
    signals: Mapping[str, Float32]
    correct_S: Bool

    def check(self, epoch: int) -> None:
        """Raise Diverged if a signal is not a number, or beyond all bounds."""
        for name, value_S in self.signals.items():
            wrong = np.flatnonzero(~(np.abs(value_S) <= LARGEST))
            if len(wrong):
                first = wrong[0]
                raise Diverged(
                    f"signal '{name}' of {len(wrong)} of {len(value_S)} samples is not a number up "
                    f"to {LARGEST:g} in epoch {epoch}, first of sample {self.index_S[first]}: "
                    f"{value_S[first]:g}"
                )


@dataclass(frozen=True)
class State:
    """All that a rule must remember.

    Attributes:
        epoch: the last one that was observed, 0: none.
        arrays: by name.
        facts: what the arrays are of, and the manifests up to then (`Sampler.state`).
    """

    epoch: int
    arrays: Mapping[str, npt.NDArray]
    facts: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """As a checkpoint holds it: safetensors."""
        from safetensors.numpy import save

        told = {"epoch": self.epoch, "facts": dict(self.facts)}
        arrays = {name: np.ascontiguousarray(x) for name, x in self.arrays.items()}
        return save(arrays, {"selection": json.dumps(told)})

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """What `to_bytes` gave.

        Raises:
            StageError: it is something else, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            told = json.loads(header["__metadata__"]["selection"])
            return cls(told["epoch"], arrays, told["facts"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise StageError(
                f"no state of a selection: {error}",
                where="data selection",
                remedy="begin without a state, or with an earlier one",
            ) from error


@dataclass
class Selector(ABC):
    """A rule. `select` is a function of seed, epoch and state; `observe` alone changes the state.

    Attributes:
        schedule: how many samples each epoch has.
        seed: of its random numbers, which are nobody else's.
        data_digest: of the samples and their order: a state of other data is refused.
        epoch: the last one that was observed.
        visit_N: int32, in how many epochs each sample was trained on.
    """

    schedule: Schedule
    seed: int
    data_digest: str = ""
    epoch: int = field(default=0, init=False)
    visit_N: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.visit_N = np.zeros(self.schedule.size, np.int32)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that `observe` wants of every batch."""
        return ()

    @property
    def wants_validation(self) -> bool:
        """Whether `judge` is to be called after each epoch."""
        return False

    def judge(self, loss: float) -> None:  # noqa: B027  (most rules are not told)
        """Take in the loss, after an epoch, on samples held out for this purpose alone."""

    @abstractmethod
    def select(self, epoch: int) -> Subset:
        """What an epoch trains on: the next one, or any that was observed just now again."""

    def observe(self, seen: Seen) -> None:
        """Take in what the next epoch's training saw.

        Raises:
            Diverged: a signal is not a number; the state is as before.
        """
        if self.epoch == self.schedule.epochs:
            raise ValueError(f"all {self.epoch} epochs of the schedule were observed")
        if missing := [name for name in self.signals if name not in seen.signals]:
            raise ValueError(f"the rule wants the signals {', '.join(missing)}, too")
        seen.check(self.epoch + 1)
        self.epoch += 1
        self.visit_N[seen.index_S] += 1
        self.learn(seen)

    def learn(self, seen: Seen) -> None:  # noqa: B027  (most rules learn nothing)
        """Update the state by the epoch that `epoch` now names."""

    def arrays(self) -> dict[str, npt.NDArray]:
        """The state's arrays by name, not copied; those of rules beside their own."""
        return {"visit_N": self.visit_N}

    def describe(self) -> str:
        """The rule with its parameters: equal for equal rules."""
        return type(self).__name__

    def facts(self) -> dict[str, str]:
        """What the state is of."""
        return {
            "rule": self.describe(),
            "seed": str(self.seed),
            "samples": str(self.schedule.size),
            "data": self.data_digest,
            "sizes": hashlib.sha256(self.schedule.count_T.tobytes()).hexdigest()[:16],
        }

    def state(self) -> State:
        """A copy of the state."""
        return State(
            self.epoch, {name: x.copy() for name, x in self.arrays().items()}, self.facts()
        )

    def restore(self, state: State) -> None:
        """Take up a state.

        Raises:
            StageError: it is of another rule, seed, schedule or data; nothing is taken up.
        """
        for fact, ours in self.facts().items():
            theirs = state.facts.get(fact)
            if theirs != ours:
                raise StageError(
                    f"the state of the selection has {fact} {theirs!r}, the call {ours!r}",
                    where="data selection",
                    remedy="give what the state was saved with, or begin without a state",
                )
        own = self.arrays()
        kinds = {name: (x.shape, x.dtype) for name, x in own.items()}
        theirs_kinds = {name: (x.shape, x.dtype) for name, x in state.arrays.items()}
        if kinds != theirs_kinds or not 0 <= state.epoch <= self.schedule.epochs:
            raise StageError(
                f"the state of the selection is of epoch {state.epoch} of "
                f"{self.schedule.epochs} and has {theirs_kinds}, not {kinds}",
                where="data selection",
                remedy="it is damaged: begin without a state, or with an earlier one",
            )
        for name, values in state.arrays.items():
            own[name][...] = values
        self.epoch = state.epoch


@dataclass(frozen=True)
class Manifest:
    """One line of the record of an epoch.

    Attributes:
        epoch: from 1.
        digest: SHA-256 of the ascending indices.
        samples: how many.
        entropy: of the probabilities, in nats; None where nothing was drawn.
        gini: of the visits of all samples up to now, 0: all alike.
        never_seen: share of the samples that were in no subset up to now.
    """

    epoch: int
    digest: str
    samples: int
    entropy: float | None
    gini: float
    never_seen: float

    @classmethod
    def of(cls, selector: Selector, subset: Subset) -> Manifest:
        """Of the epoch that was observed last."""
        visit_N = selector.visit_N
        return cls(
            selector.epoch,
            subset.digest,
            len(subset.index_S),
            subset.entropy,
            gini(visit_N),
            float(np.mean(visit_N == 0)),
        )


def gini(visit_N: npt.NDArray[np.integer]) -> float:
    """Gini coefficient of counts, by how often each count occurs."""
    often_V = np.bincount(visit_N).astype(np.float64)
    total = float(often_V @ np.arange(len(often_V)))
    if not total:
        return 0.0
    # Mean absolute difference of two samples, 2 Σ F (1 - F), over twice the mean.
    below_V = np.cumsum(often_V)[:-1] / often_V.sum()
    return float((below_V * (1 - below_V)).sum() / (total / often_V.sum()))
