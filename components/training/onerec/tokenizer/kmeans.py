"""k-means: plain, and with clusters filled in turn. Knows points and centroids alone.

Memory: distances are taken in blocks of at most ``BLOCK_BYTES``, never N × K at once.

Shapes: N points, D width, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20
#: k-means++ looks at so many points a code at most; beyond, a random subset stands for all.
START_POINTS_PER_CODE = 64


def nearest(x_ND: Tensor, centroid_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Index int64 [N] of the nearest centroid and squared distance [N] to it."""
    half_norm_K = centroid_KD.square().sum(1) / 2
    code_N = torch.empty(len(x_ND), dtype=torch.long, device=x_ND.device)
    # One piece of memory for all blocks: fresh pages cost as much as the products.
    score_BK = x_ND.new_empty(min(len(x_ND), _block_rows(len(centroid_KD))), len(centroid_KD))
    for rows in blocks(len(x_ND), len(centroid_KD)):
        part_bD = x_ND[rows]
        score_bK = score_BK[: len(part_bD)]
        # ‖x‖² is the same for all centroids: argmin ‖x - c‖² = argmax x·c - ‖c‖²/2.
        torch.addmm(-half_norm_K, part_bD, centroid_KD.T, out=score_bK)
        code_N[rows] = score_bK.argmax(1)
    return code_N, (x_ND - centroid_KD[code_N]).square().sum(1)


def plus_plus(x_ND: Tensor, K: int, random: torch.Generator) -> Tensor:
    """k-means++ start (Arthur and Vassilvitskii 2007): centroids drawn by squared distance."""
    if len(x_ND) > START_POINTS_PER_CODE * K:
        chosen = torch.randperm(len(x_ND), generator=random)[: START_POINTS_PER_CODE * K]
        x_ND = x_ND[chosen.to(x_ND.device)]
    picks = torch.rand(K, generator=random, dtype=torch.float64).tolist()
    centroid_KD = x_ND.new_empty(K, x_ND.shape[1])
    centroid_KD[0] = x_ND[int(picks[0] * len(x_ND))]
    norm_N = x_ND.square().sum(1)
    distance_N = torch.full_like(norm_N, math.inf)
    for k in range(1, K):
        c_D = centroid_KD[k - 1]
        distance_N = torch.minimum(distance_N, norm_N + c_D @ c_D - 2 * (x_ND @ c_D)).clamp_min_(0)
        mass_N = distance_N.double().cumsum(0)
        drawn = torch.searchsorted(mass_N, picks[k] * mass_N[-1]).clamp_max_(len(x_ND) - 1)
        centroid_KD[k] = x_ND[drawn]
    return centroid_KD


def lloyd(x_ND: Tensor, centroid_KD: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    """Plain k-means from given centroids.

    An empty cluster is put on a point that lies farthest from its own centroid.

    Returns:
        centroids [K, D], codes int64 [N] (the nearest of these centroids), sum of squared
        distances.
    """
    code_N, distance_N = nearest(x_ND, centroid_KD)
    for _ in range(iterations):
        centroid_KD, count_K = means(x_ND, code_N, len(centroid_KD))
        empty_k = (count_K == 0).nonzero()[:, 0]
        if len(empty_k):
            centroid_KD[empty_k] = x_ND[distance_N.topk(len(empty_k)).indices]
        before_N = code_N
        code_N, distance_N = nearest(x_ND, centroid_KD)
        if torch.equal(code_N, before_N):
            break
    return centroid_KD, code_N, float(distance_N.double().sum())


def in_turn(x_ND: Tensor, centroid_KD: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    """k-means with buckets of equal size, filled in turn (arXiv 2502.18965, Algorithm 1).

    Every round each cluster in turn takes the nearest of the points that are left, its fair share
    of them, and its centroid moves to their mean; rounds end when no assignment changes.

    Returns:
        as `lloyd`, except that a point need not have the code of its nearest centroid.
    """
    N, K = len(x_ND), len(centroid_KD)
    share = [N // K + (k < N % K) for k in range(K)]
    code_N = torch.full((N,), -1, device=x_ND.device)
    for _ in range(iterations):
        before_N = code_N
        code_N = _equal_shares(x_ND, centroid_KD, share)
        centroid_KD, _ = means(x_ND, code_N, K)
        if torch.equal(code_N, before_N):
            break
    return centroid_KD, code_N, float((x_ND - centroid_KD[code_N]).double().square().sum())


def _equal_shares(x_ND: Tensor, centroid_KD: Tensor, share: list[int]) -> Tensor:
    """One round of Algorithm 1: cluster k takes the ``share[k]`` nearest points left over."""
    code_N = torch.empty(len(x_ND), dtype=torch.long, device=x_ND.device)
    left_n = torch.arange(len(x_ND), device=x_ND.device)
    half_norm_N = x_ND.square().sum(1) / 2
    k = 0
    while k < len(share):
        # Points taken within a block only lose their column; they leave the matrix after it.
        width = max(1, min(len(share) - k, 64, BLOCK_BYTES // (4 * max(1, len(left_n)))))
        # Among points, for one centroid: argmin ‖x - c‖² = argmax c·x - ‖x‖²/2.
        block_kn = centroid_KD[k : k + width] @ x_ND[left_n].T - half_norm_N[left_n]
        taken_n = torch.zeros(len(left_n), dtype=torch.bool, device=x_ND.device)
        for offset, closeness_n in enumerate(block_kn):
            closeness_n[taken_n] = -math.inf
            mine = closeness_n.topk(share[k + offset], sorted=False).indices
            taken_n[mine] = True
            code_N[left_n[mine]] = k + offset
        left_n = left_n[~taken_n]
        k += width
    return code_N


def means(x_ND: Tensor, code_N: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Mean [K, D] and count [K] of the points of every code; zeros where there is none."""
    count_K = torch.bincount(code_N, minlength=K)
    # Sorted segments instead of scattered adds: the same bits in every run, on every device.
    order = code_N.argsort(stable=True)
    total_KD = torch.segment_reduce(x_ND[order], "sum", lengths=count_K, initial=0.0)
    return total_KD / count_K.clamp_min(1)[:, None], count_K


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows whose scores against ``width`` centroids fill a block of memory."""
    step = _block_rows(width)
    return (slice(start, start + step) for start in range(0, rows, step))


def _block_rows(width: int) -> int:
    return max(1, BLOCK_BYTES // (4 * width))
