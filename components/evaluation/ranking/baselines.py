"""Baselines that count: popularity, and what followed the last item (bigram).

Any learned model must be shown against both. What is counted (all events or positive ones) is
chosen on validation by the caller.

Shapes: E events, N items, B examples, K length of a list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def by_popularity(count_N: npt.NDArray[np.integer]) -> Int32:
    """Item indices by falling count; equal counts by index."""
    return np.argsort(-count_N.astype(np.int64), kind="stable").astype(np.int32)


@dataclass(frozen=True)
class Bigrams:
    """Successors of every item, most frequent first: CSR over items.

    Attributes:
        start_N1: int64 [N + 1] offsets.
        successor: int32 item indices; among equal counts the more popular first.
        count: int64 how often.
    """

    start_N1: Int64
    successor: Int32
    count: Int64


def count_bigrams(
    batches: Iterable[pa.RecordBatch],
    num_items: int,
    popularity: Int32,
    *,
    positive_context: bool,
    positive_target: bool,
) -> Bigrams:
    """Counts pairs (item, next item) within users.

    Args:
        batches: train sequences with the columns ``item_index`` and ``positive``.
        popularity: all items, most popular first: breaks ties.
        positive_context: drop events that are not positive before pairing.
        positive_target: count a pair only if its second event is positive.
    """
    pairs: list[tuple[Int64, Int64]] = []
    pending = 0
    for batch in batches:
        column = batch.column("item_index")
        length = column.value_lengths().to_numpy(zero_copy_only=False)
        user = np.repeat(np.arange(len(length)), length)
        item = column.flatten().to_numpy().astype(np.int64)
        positive = batch.column("positive").flatten().to_numpy(zero_copy_only=False)
        if positive_context:
            user, item, positive = user[positive], item[positive], positive[positive]
        follows = user[1:] == user[:-1]
        if positive_target:
            follows &= positive[1:]
        pairs.append(
            np.unique(item[:-1][follows] * num_items + item[1:][follows], return_counts=True)
        )
        pending += len(pairs[-1][0])
        if pending > 8_000_000:
            pairs, pending = [_merge(pairs)], 0
    key, count = _merge(pairs)
    context, successor = key // num_items, key % num_items
    place = np.empty(num_items, np.int64)
    place[popularity] = np.arange(num_items)
    order = np.lexsort((place[successor], -count, context))
    start = np.searchsorted(context, np.arange(num_items + 1))
    return Bigrams(start, successor[order].astype(np.int32), count[order])


def _merge(pairs: list[tuple[Int64, Int64]]) -> tuple[Int64, Int64]:
    if not pairs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    key, inverse = np.unique(np.concatenate([k for k, _ in pairs]), return_inverse=True)
    count = np.bincount(inverse, np.concatenate([c for _, c in pairs]), minlength=len(key))
    return key, count.astype(np.int64)


def rank_by_bigrams(bigrams: Bigrams, popularity: Int32, context_B: Int64, k: int) -> Int32:
    """The ``k`` most frequent successors of each context, filled up by popularity.

    Args:
        context_B: last item index of each example, -1 for none (popularity alone).

    Returns:
        int32 [B, min(k, N)], no item twice.
    """
    k = min(k, len(popularity))
    known_B = context_B >= 0
    start_B = bigrams.start_N1[np.where(known_B, context_B, 0)]
    end_B = bigrams.start_N1[np.where(known_B, context_B + 1, 0)]
    column_K = np.arange(k)
    inside_BK = known_B[:, None] & (column_K < (end_B - start_B)[:, None])
    take_BK = np.where(inside_BK, start_B[:, None] + column_K, 0)
    followers_BK = np.full(inside_BK.shape, -1, np.int32)
    if len(bigrams.successor):
        followers_BK = np.where(inside_BK, bigrams.successor[take_BK], -1)
    popular_BK = np.broadcast_to(popularity[:k], inside_BK.shape)
    # k followers at most repeat k popular items, so the two lists together always fill k places.
    row_B1 = np.arange(len(context_B))[:, None] * len(popularity)
    repeated_BK = np.isin(popular_BK + row_B1, (followers_BK + row_B1)[inside_BK])
    both = np.concatenate([followers_BK, popular_BK], axis=1)
    dropped = np.concatenate([~inside_BK, repeated_BK], axis=1)
    order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(both, order, axis=1).astype(np.int32)
