"""Which samples make a step of training, and in which order.

Shapes: E events, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.training.onerec.data import Int64, Sequences

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig


def context_lengths(sequences: Sequences, event_S: Int64, config: OneRecConfig) -> Int64:
    """Positions the encoder reads for each sample: what a step costs."""
    begin_S = sequences.start_U1[np.searchsorted(sequences.start_U1, event_S, side="right") - 1]
    short_S = np.minimum(event_S - begin_S, config.short_term)
    before = sequences.positives_before_E1
    positive_S = before[event_S].astype(np.int64) - before[begin_S]
    lifelong_S = np.minimum(event_S - begin_S, config.lifelong.entries)
    return short_S + np.minimum(positive_S, config.positive_feedback) + lifelong_S


@dataclass(frozen=True)
class EpochOrder:
    """Which samples make a step: a function of (seed, epoch, rank) and of nothing else.

    Samples are shuffled, sorted by context length inside large groups (so that a step pads
    little), and the steps shuffled again. A step's samples are dealt out to the workers in turn, so
    all workers together see the same steps whatever their number, and training resumes anywhere.
    A remainder smaller than a step is left out, another one every epoch.

    Attributes:
        event_S: training targets.
        length_S: their context lengths.
        batch_size: samples a step of all workers; a multiple of `world_size`.
    """

    event_S: Int64
    length_S: Int64
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    group_steps: int = 64

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch {self.batch_size} does not divide by {self.world_size} workers"
            )
        if not len(self.event_S):
            raise ValueError("no training target: no user has two events, or none is positive")

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return max(1, len(self.event_S) // self.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Int64]:
        """This worker's target events of every step from ``first_step`` of the epoch on."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.event_S))
        # Fewer samples than a step: some twice, so that every worker has its share.
        order = np.resize(order, self.steps * self.batch_size)
        group = np.arange(len(order)) // (self.group_steps * self.batch_size)
        order = order[np.lexsort((self.length_S[order], group))]
        for step in rng.permutation(self.steps)[first_step:]:
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.event_S[chosen[self.rank :: self.world_size]]
