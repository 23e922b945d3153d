"""k-means with clusters of equal size by prices, of which each takes one of a group. Ours.

Memory: scores of m candidates a point. Up to 256 clusters these are all clusters; beyond, all K
scores are there only of a block of points at a time (`kmeans.blocks`).

Shapes: N points, D width, K clusters, m candidates of a point, n some of the points, b a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from components.training.onerec.tokenizer.kmeans import blocks, lloyd, means

#: Prices are sought among the nearest clusters of each point: at most so many, fewer where those of
#: all points would take more than this memory, but never fewer than the least that balance.
CANDIDATE_BYTES = 1 << 30
CANDIDATES, LEAST_CANDIDATES = 256, 32
#: Movements of the centroids under prices, and of the prices between two of them.
PRICE_ROUNDS = 8
PRICE_STEPS = 25
#: Points among which one is sought that makes room for another.
ROOM_MAKERS = 65_536


def balanced(
    x_ND: Tensor, centroid_KD: Tensor, iterations: int, prefix_N: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """k-means with buckets whose sizes differ by at most one, at nearly the least error.

    Ours. Each cluster has a price, and a point goes where half its squared distance plus the price
    is least; prices rise where too many want in (the dual of the transport problem whose optimum is
    the cheapest balanced assignment) and centroids move to the means. What is still above its share
    at the end leaves where that costs least. Algorithm 1 of arXiv 2502.18965 (`in_turn`) gives the
    last clusters what nobody wanted; its error is far larger.

    Balance knows no identity: more points of one place than a cluster's share are scattered over
    other clusters, however near theirs is. Under frozen centroids (`semantic_ids.encode`) all
    points of one place have one code, so a new item finds only some of its duplicates under it.

    Args:
        prefix_N: int64 groups. Points of one group compete for clusters, each of which takes one of
            them: who would lose least by going elsewhere is turned away. Two stay together only
            where the balance leaves no other place.

    Returns:
        as `lloyd`, except that a point need not have the code of its nearest centroid.
    """
    N, K = len(x_ND), len(centroid_KD)
    share = N / K
    price_K = x_ND.new_zeros(K)
    groups = None if prefix_N is None else _Groups(prefix_N)
    centroid_KD, _, _ = lloyd(x_ND, centroid_KD, iterations)
    for turn in range(PRICE_ROUNDS):
        score_Nm, cluster_Nm = _candidates(x_ND, centroid_KD, price_K)
        # A step as long as what a typical point gains by its choice: prices of any scale settle.
        gain = (score_Nm[:, 0] - score_Nm[:, min(1, K - 1)]).median()
        rise_K = torch.zeros_like(price_K)
        for step in range(PRICE_STEPS):
            asked_Nm = score_Nm - rise_K[cluster_Nm]
            if groups is not None:
                groups.turn_away(asked_Nm, score_Nm, cluster_Nm, K)
            choice_N = asked_Nm.argmax(1, keepdim=True)
            code_N = cluster_Nm.gather(1, choice_N)[:, 0]
            count_K = torch.bincount(code_N, minlength=K)
            rise_K += gain / (1 + step / 8) * ((count_K - share) / share).clamp(-1, 1)
        price_K += rise_K
        if turn < PRICE_ROUNDS - 1:
            mean_KD, count_K = means(x_ND, code_N, K)
            centroid_KD = torch.where((count_K > 0)[:, None], mean_KD, centroid_KD)
    code_N = _to_equal_shares(x_ND, centroid_KD, price_K, code_N, groups)
    centroid_KD, _ = means(x_ND, code_N, K)
    return centroid_KD, code_N, float((x_ND - centroid_KD[code_N]).double().square().sum())


def _candidates(x_ND: Tensor, centroid_KD: Tensor, price_K: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``x·c - ‖c‖²/2 - price`` of the best clusters of each point, and which they are."""
    N, K = len(x_ND), len(centroid_KD)
    m = max(min(LEAST_CANDIDATES, K), min(CANDIDATES, K, CANDIDATE_BYTES // (12 * N)))
    offset_K = -(centroid_KD.square().sum(1) / 2 + price_K)
    score_Nm = x_ND.new_empty(N, m)
    cluster_Nm = torch.empty(N, m, dtype=torch.long, device=x_ND.device)
    for rows in blocks(N, K):
        best = torch.addmm(offset_K, x_ND[rows], centroid_KD.T).topk(m, 1)
        score_Nm[rows], cluster_Nm[rows] = best.values, best.indices
    return score_Nm, cluster_Nm


class _Groups:
    """Points of one group, of which a cluster takes one."""

    def __init__(self, prefix_N: Tensor) -> None:
        self.prefix_N = prefix_N
        self.order_N = prefix_N.argsort(stable=True)
        ordered = prefix_N[self.order_N]
        self.first_N = torch.searchsorted(ordered, prefix_N)
        self.size_N = torch.searchsorted(ordered, prefix_N, right=True) - self.first_N
        #: Points that are not alone.
        self.several_n = (self.size_N > 1).nonzero()[:, 0]

    def turn_away(
        self, asked_Nm: Tensor, score_Nm: Tensor, cluster_Nm: Tensor, num_clusters: int
    ) -> None:
        """Of the points of a group that ask for one cluster all but one lose it for good.

        Who loses most by his second choice stays. Both score tables are changed in place.
        """
        n = self.several_n
        if not len(n) or asked_Nm.shape[1] < 2:
            return
        top = asked_Nm[n].topk(2, 1)
        choice_n = top.indices[:, 0]
        wanted_n = cluster_Nm[n, choice_n]
        margin_n = (top.values[:, 0] - top.values[:, 1]).nan_to_num(-math.inf)
        turn = margin_n.argsort(descending=True, stable=True)
        late = place_in_group((self.prefix_N[n] * num_clusters + wanted_n)[turn]) > 0
        loser = turn[late]
        for table_Nm in (asked_Nm, score_Nm):
            table_Nm[n[loser], choice_n[loser]] = -math.inf

    def forbid(self, score_bK: Tensor, point_b: Tensor, code_N: Tensor) -> Tensor:
        """Scores, -inf for clusters that another point of the group has (code -1: has none)."""
        size_b = self.size_N[point_b]
        row = torch.arange(len(point_b), device=point_b.device).repeat_interleave(size_b)
        within = torch.arange(len(row), device=row.device)
        within -= (size_b.cumsum(0) - size_b)[row]
        other = self.order_N[self.first_N[point_b][row] + within]
        taken = (code_N[other] >= 0) & (other != point_b[row])
        score_bK[row[taken], code_N[other[taken]]] = -math.inf
        return score_bK


def _to_equal_shares(
    x_ND: Tensor, centroid_KD: Tensor, price_K: Tensor, code_N: Tensor, groups: _Groups | None
) -> Tensor:
    """Moves the fewest points that make sizes equal, those first that lose least by it."""
    N, K = len(x_ND), len(centroid_KD)
    code_N = code_N.clone()
    count_K = torch.bincount(code_N, minlength=K)
    share_K = torch.full_like(count_K, N // K)
    share_K[count_K.argsort(descending=True, stable=True)[: N % K]] += 1
    offset_K = -(centroid_KD.square().sum(1) / 2 + price_K)

    def scores(point_b: Tensor, free_K: Tensor) -> Tensor:
        """Of the clusters that a point may go to, -inf for others."""
        score_bK = torch.addmm(offset_K, x_ND[point_b], centroid_KD.T)
        if groups is not None:
            groups.forbid(score_bK, point_b, code_N)
        return score_bK.masked_fill_(free_K == 0, -math.inf)

    left = code_N.new_empty(0)
    if groups is not None:
        # Of a group in one cluster the nearest stays.
        score_N = (x_ND * centroid_KD[code_N]).sum(1) + offset_K[code_N]
        order = score_N.argsort(descending=True, stable=True)
        left = order[place_in_group((groups.prefix_N * K + code_N)[order]) > 0]
        code_N[left] = -1
    count_K = torch.bincount(code_N[code_N >= 0], minlength=K)
    surplus_K, free_K = (count_K - share_K).clamp_min(0), (share_K - count_K).clamp_min(0)
    placed_N = code_N >= 0
    crowded = (placed_N & (surplus_K > 0)[code_N]).nonzero()[:, 0]
    loss = x_ND.new_empty(len(crowded))
    for rows in blocks(len(crowded), K):
        part = crowded[rows]
        stays_b = (x_ND[part] * centroid_KD[code_N[part]]).sum(1) + offset_K[code_N[part]]
        loss[rows] = stays_b - scores(part, free_K).amax(1)
    crowded = crowded[loss.argsort(stable=True)]
    moved = crowded[place_in_group(code_N[crowded]) < surplus_K[code_N[crowded]]]
    code_N[moved] = -1
    free_K = share_K - torch.bincount(code_N[code_N >= 0], minlength=K)
    left = torch.cat([left, moved])
    stuck = []
    while len(left):
        best, goes = x_ND.new_empty(len(left), 2), torch.empty_like(left)
        for rows in blocks(len(left), K):
            top = scores(left[rows], free_K).topk(min(2, K), 1)
            best[rows], goes[rows] = top.values, top.indices[:, 0]
        possible = best[:, 0] > -math.inf
        stuck.append(left[~possible])
        left, best, goes = left[possible], best[possible], goes[possible]
        # Who would lose most by the second choice chooses first.
        turn = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True)
        left, goes = left[turn], goes[turn]
        placed = place_in_group(goes) < free_K[goes]
        if groups is not None:
            placed &= place_in_group(groups.prefix_N[left] * K + goes) == 0
        code_N[left[placed]] = goes[placed]
        free_K = free_K - torch.bincount(goes[placed], minlength=K)
        left = left[~placed]
    if groups is not None:
        for point in torch.cat(stuck).tolist() if stuck else ():
            _make_room(x_ND, centroid_KD, offset_K, code_N, free_K, groups, point)
    return code_N


def _make_room(
    x_ND: Tensor,
    centroid_KD: Tensor,
    offset_K: Tensor,
    code_N: Tensor,
    free_K: Tensor,
    groups: _Groups,
    point: int,
) -> None:
    """Places a point whose group has every cluster that is free; in place.

    Another point goes to a free cluster and leaves its own, whichever pair of moves costs least.
    Where there is none the point shares a cluster with its group.
    """
    N = len(x_ND)
    mine = torch.tensor([point], device=code_N.device)
    own_K = groups.forbid((x_ND[mine] @ centroid_KD.T + offset_K), mine, code_N)[0]
    others = torch.arange(0, N, max(1, N // ROOM_MAKERS), device=code_N.device)
    others = others[(code_N[others] >= 0) & (groups.prefix_N[others] != groups.prefix_N[point])]
    others = others[own_K[code_N[others]] > -math.inf]
    best, moves = -math.inf, None
    for rows in blocks(len(others), len(centroid_KD)):
        part = others[rows]
        score_bK = x_ND[part] @ centroid_KD.T + offset_K
        stays_b1 = score_bK.gather(1, code_N[part][:, None])
        gain_bK = groups.forbid(score_bK, part, code_N) - stays_b1 + own_K[code_N[part]][:, None]
        gain_bK.masked_fill_(free_K == 0, -math.inf)
        value, at = gain_bK.flatten().max(0)
        if float(value) > best:
            best = float(value)
            moves = (int(part[at // len(free_K)]), int(at % len(free_K)))
    if moves is None:
        goes = int(
            (x_ND[point] @ centroid_KD.T + offset_K).masked_fill(free_K == 0, -math.inf).argmax()
        )
        code_N[point] = goes
    else:
        other, goes = moves
        code_N[point] = code_N[other]
        code_N[other] = goes
    free_K[goes] -= 1


def place_in_group(group_n: Tensor) -> Tensor:
    """How many before it have the same number, for each entry."""
    order = group_n.argsort(stable=True)
    ordered = group_n[order]
    place_n = torch.empty_like(group_n)
    position = torch.arange(len(group_n), device=group_n.device)
    place_n[order] = position - torch.searchsorted(ordered, ordered)
    return place_n
