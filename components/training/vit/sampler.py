"""What a training loop asks of a sampler, and the sampler of plain training.

A sampler says which images each step of an epoch trains on, this worker's share of them, and how
much each of their losses counts; it is told what the forward pass showed. One that chooses images
by what it is told lives elsewhere (`components.curation.asp.sampler`) and fits as it is.

Shapes: b images of a worker's batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from components.pipeline.errors import StageError

Int64 = npt.NDArray[np.int64]


class Batch(Protocol):
    """A worker's share of a step; all workers have equally many images."""

    @property
    def index_b(self) -> Int64:
        """Images by number."""

    @property
    def weight_b(self) -> npt.NDArray[np.float32]:
        """Weight of each loss, 0 of an image that only fills up."""

    @property
    def size(self) -> int:
        """Images of all workers, by which the sum of all weighted losses is divided."""


class Epoch(Protocol):
    """One pass, numbered from 1."""

    @property
    def number(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def record(self, batch: Any, forward: Any) -> None:
        """Keep what the forward pass of a batch showed."""

    def finish(self) -> object:
        """Learn from all that was recorded, by all workers."""


class Schedule(Protocol):
    """How many images epochs have."""

    @property
    def epochs(self) -> int: ...

    def steps(self, batch_size: int) -> int:
        """Updates of all epochs."""


class Rule(Protocol):
    """Which images epochs have."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def wants_validation(self) -> bool:
        """Whether it is to be told the loss on images held out for it, after each epoch."""

    def judge(self, loss: float) -> None: ...


class State(Protocol):
    """What a sampler must remember: arrays by name, and facts that say what they are of."""

    @property
    def epoch(self) -> int: ...

    @property
    def arrays(self) -> Mapping[str, npt.NDArray]: ...

    @property
    def facts(self) -> Mapping[str, str]: ...


class Sampler(Protocol):
    """A rule, and which part of its batches is this worker's."""

    @property
    def selector(self) -> Rule: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def epochs(self) -> Iterator[Epoch]:
        """Those that are left; each is finished before the next one."""

    def state(self) -> State: ...

    def restore(self, state: Any) -> None: ...


@dataclass(frozen=True)
class SavedState:
    """A `State` as it was read back."""

    epoch: int
    arrays: Mapping[str, npt.NDArray]
    facts: Mapping[str, str]


@dataclass(frozen=True)
class PlainBatch:
    """A `Batch` of images that count alike."""

    index_b: Int64
    weight_b: npt.NDArray[np.float32]
    size: int


@dataclass(frozen=True)
class EverySample:
    """The rule and the schedule of plain training: every epoch has all images."""

    size: int
    epochs: int
    wants_validation: bool = False

    @property
    def schedule(self) -> EverySample:
        return self

    def steps(self, batch_size: int) -> int:
        return self.epochs * -(-self.size // batch_size)

    def judge(self, loss: float) -> None:
        """Nothing is to be learned."""


@dataclass
class PlainSampler:
    """All images once an epoch, in an order that is a function of (seed, epoch).

    Workers share out the same batches, whatever their number.
    """

    selector: EverySample
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    epoch: int = field(default=0, init=False)

    def order(self, epoch: int) -> Int64:
        """Images in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.selector.size)

    def epochs(self) -> Iterator[PlainEpoch]:
        while self.epoch < self.selector.epochs:
            yield PlainEpoch(self, self.epoch + 1)

    def state(self) -> SavedState:
        facts = {"rule": "plain", "seed": str(self.seed), "images": str(self.selector.size)}
        return SavedState(self.epoch, {}, facts)

    def restore(self, state: State) -> None:
        """Go on after the state's epoch.

        Raises:
            StageError: it is of another rule, seed or number of images.
        """
        for fact, ours in self.state().facts.items():
            theirs = state.facts.get(fact)
            if theirs != ours:
                raise StageError(
                    f"the state of the sampler has {fact} {theirs!r}, the call {ours!r}",
                    where="training of a vision transformer",
                    remedy="give what the state was saved with, or begin without a state",
                )
        self.epoch = state.epoch


@dataclass
class PlainEpoch:
    """One pass over all images."""

    sampler: PlainSampler
    number: int

    def __iter__(self) -> Iterator[PlainBatch]:
        sampler, order_N = self.sampler, self.sampler.order(self.number)
        for first in range(0, len(order_N), sampler.batch_size):
            index_B = order_N[first : first + sampler.batch_size]
            # Equally many for each worker: all of them take part in every sum of gradients.
            even = len(index_B) + -len(index_B) % sampler.world_size
            weight_B = (np.arange(even) < len(index_B)).astype(np.float32)
            share = slice(sampler.rank, None, sampler.world_size)
            yield PlainBatch(np.resize(index_B, even)[share], weight_B[share], len(index_B))

    def record(self, batch: PlainBatch, forward: object) -> None:
        """Nothing is chosen by it."""

    def finish(self) -> None:
        self.sampler.epoch = self.number
