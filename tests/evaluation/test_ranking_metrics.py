"""Ranking metrics against a full rank matrix, and intervals that cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from components.evaluation.ranking.metrics import (
    coverage,
    distinct_items,
    gains,
    hits,
    intervals,
    masked_target_ranks,
    mean_overlap,
    paired_difference,
    resampled_means,
    target_ranks,
)


def random_lists(rng: np.random.Generator, users: int, items: int, length: int) -> np.ndarray:
    return np.stack([rng.permutation(items)[:length] for _ in range(users)]).astype(np.int32)


def test_hr_and_ndcg_equal_brute_force_on_a_full_score_matrix() -> None:
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(50, 37)), rng.integers(0, 37, 50)
    lists = np.argsort(-scores, axis=1).astype(np.int32)
    rank = target_ranks(lists, target)
    for k in (1, 5, 10, 37):
        hit, gain = [], []
        for user in range(50):
            better = sum(scores[user, i] > scores[user, target[user]] for i in range(37))
            hit.append(better < k)
            gain.append(1 / math.log2(better + 2) if better < k else 0.0)
        assert hits(rank, k).mean() == pytest.approx(np.mean(hit))
        assert gains(rank, k).mean() == pytest.approx(np.mean(gain))


def test_target_outside_the_list_or_behind_padding_counts_as_a_miss() -> None:
    lists = np.array([[4, 2, -1], [0, 1, 2], [-1, -1, -1]], np.int32)
    rank = target_ranks(lists, np.array([2, 9, 3]))
    assert rank.tolist() == [2, 0, 0]
    assert hits(rank, 3).tolist() == [1, 0, 0]
    assert gains(rank, 3).tolist() == pytest.approx([1 / math.log2(3), 0, 0])


def test_random_ranker_hits_k_of_n() -> None:
    rng = np.random.default_rng(1)
    users, items = 20_000, 200
    rank = target_ranks(random_lists(rng, users, items, 20), rng.integers(0, items, users))
    for k in (5, 10, 20):
        share = k / items
        # Five standard errors of a binomial share.
        assert abs(hits(rank, k).mean() - share) < 5 * math.sqrt(share / users)


def test_masked_ranks_equal_ranks_in_lists_without_the_masked_items() -> None:
    rng = np.random.default_rng(2)
    lists, target = random_lists(rng, 300, 40, 25), rng.integers(0, 40, 300)
    seen = rng.random(lists.shape) < 0.4
    expected = []
    for row, struck, wanted in zip(lists.tolist(), seen.tolist(), target.tolist(), strict=True):
        left = [i for i, out in zip(row, struck, strict=True) if not out]
        expected.append(left.index(wanted) + 1 if wanted in left else 0)
    assert masked_target_ranks(lists, target, seen).tolist() == expected


def test_distinct_items_and_coverage_ignore_padding() -> None:
    lists = np.array([[1, 2, 3], [2, 1, -1]], np.int32)
    assert distinct_items(lists, 2) == 2
    assert distinct_items(lists, 3) == 3
    assert coverage(lists, 3, 12) == 0.25


def test_overlap_is_one_for_permuted_lists_and_chance_for_random_ones() -> None:
    rng = np.random.default_rng(3)
    lists = random_lists(rng, 2000, 100, 10)
    assert mean_overlap(lists, rng.permuted(lists, axis=1), 10) == 1
    assert mean_overlap(lists, random_lists(rng, 2000, 100, 10), 10) == pytest.approx(0.1, abs=0.01)


def test_resampled_means_equal_means_of_drawn_users() -> None:
    values = np.random.default_rng(4).normal(size=(30, 3))
    means = resampled_means(values, seed=5, resamples=40, memory_bytes=1 << 20)
    rng = np.random.default_rng(5)
    expected = values[rng.integers(0, 30, (40, 30))].mean(1)
    np.testing.assert_allclose(means, expected)


def test_interval_is_that_of_the_normal_distribution_for_many_users() -> None:
    values = np.random.default_rng(6).normal(3.0, 2.0, size=(4000, 1))
    (interval,) = intervals(values, seed=0)
    error = 1.96 * values.std() / math.sqrt(4000)
    assert interval.mean == pytest.approx(values.mean())
    # 1,000 resamples give a 2.5 % quantile to about 10 % of the half width.
    assert interval.low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_interval_covers_the_truth_about_95_times_of_100() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(200):
        (interval,) = intervals(rng.exponential(1.0, size=(150, 1)), seed)
        covered += interval.low <= 1.0 <= interval.high
    # 190 expected; four standard deviations of a binomial, and some for 150 skewed values.
    assert 172 <= covered <= 200


def test_paired_difference_is_far_tighter_than_unpaired_intervals() -> None:
    rng = np.random.default_rng(8)
    user = rng.normal(0, 10, 500)
    ours, theirs = user + 0.2 + rng.normal(0, 0.5, 500), user + rng.normal(0, 0.5, 500)
    gap = paired_difference(ours, theirs, seed=0)
    assert 0 < gap.low < 0.2 < gap.high + 0.1
    own, other = intervals(np.stack([ours, theirs], 1), seed=0)
    assert own.low < other.high


def test_no_difference_has_an_interval_around_zero() -> None:
    values = np.random.default_rng(9).random(100)
    gap = paired_difference(values, values, seed=0)
    assert (gap.mean, gap.low, gap.high) == (0, 0, 0)
