"""Popularity and bigram lists against counting by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from components.evaluation.ranking.baselines import (
    by_popularity,
    count_bigrams,
    rank_by_bigrams,
)

N = 15


def make_sequences(seed: int, users: int = 60) -> tuple[list[list[int]], list[list[bool]]]:
    rng = np.random.default_rng(seed)
    items = [rng.integers(0, N - 3, rng.integers(0, 12)).tolist() for _ in range(users)]
    return items, [(rng.random(len(row)) < 0.5).tolist() for row in items]


def as_table(items: list[list[int]], positive: list[list[bool]]) -> pa.Table:
    return pa.table(
        {
            "item_index": pa.array(items, pa.list_(pa.int32())),
            "positive": pa.array(positive, pa.list_(pa.bool_())),
        }
    )


def test_popularity_falls_and_equal_counts_stay_in_order() -> None:
    assert by_popularity(np.array([3, 9, 3, 0, 9])).tolist() == [1, 4, 0, 2, 3]


@pytest.mark.parametrize("positive_context", [False, True])
@pytest.mark.parametrize("positive_target", [False, True])
@pytest.mark.parametrize("k", [3, N, N + 5])
def test_bigram_lists_equal_a_full_sort(
    positive_context: bool, positive_target: bool, k: int
) -> None:
    items, positive = make_sequences(1)
    popularity = by_popularity(np.random.default_rng(2).integers(0, 9, N))
    place = {int(item): rank for rank, item in enumerate(popularity)}
    pairs: Counter[tuple[int, int]] = Counter()
    for row, flags in zip(items, positive, strict=True):
        events = list(zip(row, flags, strict=True))
        if positive_context:
            events = [e for e in events if e[1]]
        for (first, _), (second, liked) in itertools.pairwise(events):
            if liked or not positive_target:
                pairs[first, second] += 1
    bigrams = count_bigrams(
        as_table(items, positive).to_batches(max_chunksize=7),
        N,
        popularity,
        positive_context=positive_context,
        positive_target=positive_target,
    )
    context = np.arange(-1, N)
    lists = rank_by_bigrams(bigrams, popularity, context, k)
    assert lists.shape == (N + 1, min(k, N))
    for item, row in zip(context.tolist(), lists.tolist(), strict=True):
        # Followers by count, then everything else, ties and the rest by popularity.
        expected = sorted(range(N), key=lambda i: (-pairs[item, i], place[i]))
        assert row == expected[:k]


def test_without_any_pair_popularity_speaks() -> None:
    popularity = by_popularity(np.arange(N))
    bigrams = count_bigrams(
        as_table([[3]], [[True]]).to_batches(),
        N,
        popularity,
        positive_context=False,
        positive_target=False,
    )
    lists = rank_by_bigrams(bigrams, popularity, np.array([3, -1]), 4)
    assert lists.tolist() == [[14, 13, 12, 11]] * 2
