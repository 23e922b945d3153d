"""Ranking metrics from 1-based ranks, and bootstrap intervals over users.

One relevant item a user: HR@K = share of users whose target has rank ≤ K, NDCG@K = mean of
``1 / log2(1 + rank)`` over the same users (the ideal DCG is 1). Rank 0 says "not in the list".

Shapes: U users, N length of a list, M measured quantities, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.integer]

RESAMPLES = 1000

#: What a paired interval says of our method.
Outcome = Literal["beats", "is worse than", "does not beat"]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % percentile interval over resampled users."""

    mean: float
    low: float
    high: float


def outcome(low: float, high: float) -> Outcome:
    """The words for an interval of a difference: above 0, below 0, or with 0 in it."""
    if low > 0:
        return "beats"
    return "is worse than" if high < 0 else "does not beat"


def target_ranks(lists_UN: Int, target_U: Int) -> npt.NDArray[np.int32]:
    """1-based place of each target in its list, 0 where it is not there.

    Args:
        lists_UN: item indices, best first, no item twice; -1 pads.
    """
    hit_UN = lists_UN == target_U[:, None]
    return np.where(hit_UN.any(1), hit_UN.argmax(1) + 1, 0).astype(np.int32)


def masked_target_ranks(lists_UN: Int, target_U: Int, seen_UN: npt.NDArray[np.bool_]) -> Int:
    """`target_ranks` after striking out the marked entries; a struck target has rank 0."""
    hit_UN = (lists_UN == target_U[:, None]) & ~seen_UN
    place_UN = np.cumsum(~seen_UN, axis=1)
    return np.where(hit_UN, place_UN, 0).max(1, initial=0).astype(np.int32)


def hits(rank_U: Int, k: int) -> Float:
    """1.0 for every user whose target is among the first ``k``: their mean is HR@K."""
    return ((rank_U >= 1) & (rank_U <= k)).astype(np.float64)


def gains(rank_U: Int, k: int) -> Float:
    """Discounted gain of every user's target among the first ``k``: their mean is NDCG@K."""
    return hits(rank_U, k) / np.log2(1.0 + np.maximum(rank_U, 1))


def distinct_items(lists_UN: Int, k: int) -> int:
    """How many different items occur among all first ``k`` recommendations."""
    top = np.unique(lists_UN[:, :k])
    return int((top >= 0).sum())


def coverage(lists_UN: Int, k: int, num_items: int) -> float:
    """Share of the catalogue that occurs among all first ``k`` recommendations."""
    return distinct_items(lists_UN, k) / num_items


def mean_overlap(lists_UN: Int, others_UN: Int, k: int) -> float:
    """Mean share of the first ``k`` items of a list that are among the first ``k`` of another."""
    mine, theirs = lists_UN[:, :k], others_UN[:, :k]
    common = (mine[:, :, None] == theirs[:, None, :]) & (mine >= 0)[:, :, None]
    return float(common.any(2).sum() / max(1, (mine >= 0).sum()))


def resampled_means(
    values_UM: Float, seed: int, resamples: int = RESAMPLES, memory_bytes: int = 64 << 20
) -> Float:
    """Means of every column over users drawn with replacement: float64 [R, M].

    All columns share the same draws, so that the difference of two columns is a paired one.
    """
    users = len(values_UM)
    rng = np.random.default_rng(seed)
    rows = max(1, min(resamples, memory_bytes // (16 * users)))
    means = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(0, users, (count, users)) + users * np.arange(count)[:, None]
        weight = np.bincount(drawn.ravel(), minlength=count * users).reshape(count, users)
        means.append(weight @ values_UM / users)
    return np.concatenate(means)


def intervals(values_UM: Float, seed: int, resamples: int = RESAMPLES) -> list[Interval]:
    """Mean and 95 % percentile interval of every column."""
    resampled = resampled_means(values_UM, seed, resamples)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return [
        Interval(float(m), float(lo), float(hi))
        for m, lo, hi in zip(values_UM.mean(0), low, high, strict=True)
    ]


def paired_difference(ours_U: Float, theirs_U: Float, seed: int) -> Interval:
    """Mean difference over the same users, with its 95 % percentile interval."""
    return intervals((ours_U - theirs_U)[:, None], seed)[0]
