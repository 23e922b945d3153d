"""Sequences as flat arrays, and batches of windows of similar length.

Shapes: E events, U users, W windows, B windows of a batch, L events of the longest window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """Events of many users in two flat arrays: five bytes an event.

    Attributes:
        items_E: int32 item indices, users one after the other, oldest first.
        positive_E: bool.
        start_U, end_U: int64 range of each user's events.
    """

    items_E: npt.NDArray[np.int32]
    positive_E: npt.NDArray[np.bool_]
    start_U: Int64
    end_U: Int64

    def __len__(self) -> int:
        return len(self.start_U)


@dataclass(frozen=True)
class Batch:
    """Windows of events, left-aligned, zero after the last event.

    Attributes:
        items_BL: int64; positive_BL: bool; length_B: int64, at least 1.
    """

    items_BL: Int64
    positive_BL: npt.NDArray[np.bool_]
    length_B: Int64


def read_sequences(batches: Iterable[pa.RecordBatch], newest: int) -> Sequences:
    """The `newest` events of every row of a sequence or example table.

    Args:
        batches: rows with the list columns ``item_index`` and ``positive``.
    """
    items: list[npt.NDArray[np.int32]] = []
    positive: list[npt.NDArray[np.bool_]] = []
    lengths: list[Int64] = []
    for batch in batches:
        column = batch.column("item_index")
        length = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        kept = np.minimum(length, newest)
        take = _ranges(np.cumsum(length) - kept, kept)
        items.append(column.flatten().to_numpy()[take].astype(np.int32))
        flags = batch.column("positive").flatten().to_numpy(zero_copy_only=False)
        positive.append(flags[take].astype(bool))
        lengths.append(kept)
    length_U = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    end_U = np.cumsum(length_U)
    return Sequences(
        np.concatenate(items) if items else np.zeros(0, np.int32),
        np.concatenate(positive) if positive else np.zeros(0, bool),
        end_U - length_U,
        end_U,
    )


def _ranges(start: Int64, length: Int64) -> Int64:
    """The numbers ``start[i] … start[i] + length[i] - 1`` of all i, one after the other."""
    offset = np.cumsum(length) - length
    return np.repeat(start - offset, length) + np.arange(int(length.sum()))


def gather(sequences: Sequences, start_B: Int64, length_B: Int64) -> Batch:
    """The events ``[start, start + length)`` of the flat arrays as one padded batch."""
    L = max(1, int(length_B.max(initial=1)))
    column_L = np.arange(L)
    inside_BL = column_L < length_B[:, None]
    take_BL = np.where(inside_BL, start_B[:, None] + column_L, 0)
    return Batch(
        np.where(inside_BL, sequences.items_E[take_BL], 0).astype(np.int64),
        inside_BL & sequences.positive_E[take_BL],
        length_B,
    )


def newest_windows(sequences: Sequences, length: int, rows: slice | Int64) -> Batch:
    """The last ``length`` events of some users: what a next-item score is computed from."""
    end = sequences.end_U[rows]
    size = np.minimum(end - sequences.start_U[rows], length)
    return gather(sequences, end - size, size)


@dataclass(frozen=True)
class Windows:
    """Pieces of sequences, in the batches of one epoch: `batches` yields them filled."""

    sequences: Sequences
    start_W: Int64
    length_W: Int64
    batch_size: int
    first: Int64

    def __len__(self) -> int:
        return len(self.first)

    def batches(self) -> Iterator[Batch]:
        for first in self.first:
            rows = slice(first, first + self.batch_size)
            yield gather(self.sequences, self.start_W[rows], self.length_W[rows])


def epoch_windows(
    sequences: Sequences, length: int, batch_size: int, rng: np.random.Generator
) -> Windows:
    """One epoch: every event but a user's first is the successor of another exactly once.

    A window has up to ``length + 1`` events: inputs and, one later, targets. A sequence longer
    than a window is cut at a random phase each epoch, so that each event is predicted from
    contexts of all lengths. Batches hold windows of similar length, in random order.
    """
    size_U = sequences.end_U - sequences.start_U
    # A short sequence is one window; a long one begins with a window of random length.
    phase_U = np.where(size_U - 1 > length, rng.integers(0, length, len(size_U)), 0)
    count_U = np.maximum(0, -(-(size_U - 1 + phase_U) // length))
    user_W = np.repeat(np.arange(len(size_U)), count_U)
    nth_W = _ranges(np.zeros_like(count_U), count_U)
    begin_W = np.maximum(0, nth_W * length - phase_U[user_W])
    end_W = np.minimum(size_U[user_W], (nth_W + 1) * length - phase_U[user_W] + 1)
    start_W, length_W = sequences.start_U[user_W] + begin_W, end_W - begin_W

    # Sorting by length within large random groups keeps padding low and batches diverse.
    group_W = rng.permutation(len(user_W)) // (batch_size * 64)
    order = np.lexsort((length_W, group_W))
    first = rng.permutation(np.arange(0, len(order), batch_size))
    return Windows(sequences, start_W[order], length_W[order], batch_size, first)
