"""k-means: plain, and with clusters of equal size in two ways. Knows points and centroids alone.

Memory: distances are taken in blocks of at most ``BLOCK_BYTES``, never N × K at once.

Shapes: N points, D width, K clusters, m candidates of a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20
#: k-means++ looks at so many points a code at most; beyond, a random subset stands for all.
START_POINTS_PER_CODE = 64
#: Prices are sought among the nearest clusters of each point, as many as fit into this memory.
CANDIDATE_BYTES = 1 << 30
CANDIDATES = 256
#: Movements of the centroids under prices, and of the prices between two of them.
PRICE_ROUNDS = 8
PRICE_STEPS = 25


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


def balanced(x_ND: Tensor, centroid_KD: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    """k-means with buckets whose sizes differ by at most one, at nearly the least error.

    Ours. Each cluster has a price, and a point goes where half its squared distance plus the price
    is least; prices rise where too many want in (the dual of the transport problem whose optimum is
    the cheapest balanced assignment) and centroids move to the means. What is still above its share
    at the end leaves where that costs least. Algorithm 1 of arXiv 2502.18965 (`in_turn`) gives the
    last clusters what nobody wanted; its error is far larger.

    Returns:
        as `lloyd`, except that a point need not have the code of its nearest centroid.
    """
    N, K = len(x_ND), len(centroid_KD)
    share = N / K
    price_K = x_ND.new_zeros(K)
    centroid_KD, _, _ = lloyd(x_ND, centroid_KD, iterations)
    for turn in range(PRICE_ROUNDS):
        score_Nm, cluster_Nm = _candidates(x_ND, centroid_KD, price_K)
        # A step as long as what a typical point gains by its choice: prices of any scale settle.
        gain = (score_Nm[:, 0] - score_Nm[:, min(1, K - 1)]).median()
        rise_K = torch.zeros_like(price_K)
        for step in range(PRICE_STEPS):
            choice_N = (score_Nm - rise_K[cluster_Nm]).argmax(1, keepdim=True)
            code_N = cluster_Nm.gather(1, choice_N)[:, 0]
            count_K = torch.bincount(code_N, minlength=K)
            rise_K += gain / (1 + step / 8) * ((count_K - share) / share).clamp(-1, 1)
        price_K += rise_K
        if turn < PRICE_ROUNDS - 1:
            mean_KD, count_K = means(x_ND, code_N, K)
            centroid_KD = torch.where((count_K > 0)[:, None], mean_KD, centroid_KD)
    code_N = _to_equal_shares(x_ND, centroid_KD, price_K, code_N)
    centroid_KD, _ = means(x_ND, code_N, K)
    return centroid_KD, code_N, float((x_ND - centroid_KD[code_N]).double().square().sum())


def _candidates(x_ND: Tensor, centroid_KD: Tensor, price_K: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``x·c - ‖c‖²/2 - price`` of the best clusters of each point, and which they are."""
    N, K = len(x_ND), len(centroid_KD)
    m = max(min(32, K), min(CANDIDATES, K, CANDIDATE_BYTES // (12 * N)))
    offset_K = -(centroid_KD.square().sum(1) / 2 + price_K)
    score_Nm = x_ND.new_empty(N, m)
    cluster_Nm = torch.empty(N, m, dtype=torch.long, device=x_ND.device)
    for rows in blocks(N, K):
        best = torch.addmm(offset_K, x_ND[rows], centroid_KD.T).topk(m, 1)
        score_Nm[rows], cluster_Nm[rows] = best.values, best.indices
    return score_Nm, cluster_Nm


def _to_equal_shares(x_ND: Tensor, centroid_KD: Tensor, price_K: Tensor, code_N: Tensor) -> Tensor:
    """Moves the fewest points that make sizes equal, those first that lose least by it."""
    N, K = len(x_ND), len(centroid_KD)
    code_N = code_N.clone()
    count_K = torch.bincount(code_N, minlength=K)
    share_K = torch.full_like(count_K, N // K)
    share_K[count_K.argsort(descending=True, stable=True)[: N % K]] += 1
    surplus_K, free_K = (count_K - share_K).clamp_min(0), (share_K - count_K).clamp_min(0)
    offset_K = -(centroid_KD.square().sum(1) / 2 + price_K)
    crowded = (surplus_K > 0)[code_N].nonzero()[:, 0]
    loss = x_ND.new_empty(len(crowded))
    for rows in blocks(len(crowded), K):
        part = crowded[rows]
        score_bK = torch.addmm(offset_K, x_ND[part], centroid_KD.T)
        stays_b = score_bK.gather(1, code_N[part, None])[:, 0]
        loss[rows] = stays_b - score_bK.masked_fill_(free_K == 0, -math.inf).amax(1)
    crowded = crowded[loss.argsort(stable=True)]
    left = crowded[_place_in_group(code_N[crowded]) < surplus_K[code_N[crowded]]]
    while len(left):
        best, goes = x_ND.new_empty(len(left), 2), torch.empty_like(left)
        for rows in blocks(len(left), K):
            score_bK = torch.addmm(offset_K, x_ND[left[rows]], centroid_KD.T)
            top = score_bK.masked_fill_(free_K == 0, -math.inf).topk(min(2, K), 1)
            best[rows], goes[rows] = top.values, top.indices[:, 0]
        # Who would lose most by the second choice chooses first.
        turn = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True)
        left, goes = left[turn], goes[turn]
        placed = _place_in_group(goes) < free_K[goes]
        code_N[left[placed]] = goes[placed]
        free_K = free_K - torch.bincount(goes[placed], minlength=K)
        left = left[~placed]
    return code_N


def _place_in_group(group_n: Tensor) -> Tensor:
    """How many before it have the same number, for each entry."""
    order = group_n.argsort(stable=True)
    ordered = group_n[order]
    place_n = torch.empty_like(group_n)
    position = torch.arange(len(group_n), device=group_n.device)
    place_n[order] = position - torch.searchsorted(ordered, ordered)
    return place_n


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
