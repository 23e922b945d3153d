"""RQ-KMeans: items to semantic ids by residual k-means, coarse to fine.

arXiv 2506.13695, section 2.1: ``R^(1) = x``; level l clusters the residuals, ``s^l`` is the nearest
centroid and ``R^(l+1) = R^(l) - c_{s^l}``. The balanced variant clusters by arXiv 2502.18965,
Algorithm 1. Knows embeddings and codes, nothing of items, users or training.

Memory: distances are taken in blocks of at most ``BLOCK_BYTES``, never N × K at once.

Shapes: N items, D embedding width, K codebook size, Q quantiser levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from components.pipeline.errors import DataContractError, ParamsError
from components.training.onerec.config import RQKMeansConfig

BLOCK_BYTES = 64 << 20
#: k-means++ looks at so many points a code at most; beyond, a random subset stands for all.
START_POINTS_PER_CODE = 64


@dataclass(frozen=True)
class SemanticIds:
    """What the tokenizer learned and what it gave every item.

    Attributes:
        codes_NQ: int32, the semantic id of every item.
        codebooks_QKD: float32 centroids; frozen, they encode new items too (`encode`).
        clustered_N: int32, the last code as clustering gave it, before items with the same codes
            were told apart.
    """

    codes_NQ: Tensor
    codebooks_QKD: Tensor
    clustered_N: Tensor


@dataclass(frozen=True)
class TokenizerStats:
    """Quality of a tokenizer (section 4.4 of the report, and collisions).

    Attributes:
        mse: mean squared error an embedding entry after 1, 2, … levels.
        relative_error: `mse` divided by the variance of the embedding.
        utilisation: share of the codes of each level that are used.
        entropy: of each level's code distribution, natural logarithm, at most ln K.
        distinct: different semantic ids.
        colliding: items that share theirs with another item.
        largest: items of the largest such bucket.
        colliding_before, largest_before: the same before the last codes were changed to tell items
            apart (``RQKMeansConfig.collisions``).
        moved: items whose last code was changed so.
    """

    mse: tuple[float, ...]
    relative_error: tuple[float, ...]
    utilisation: tuple[float, ...]
    entropy: tuple[float, ...]
    distinct: int
    colliding: int
    largest: int
    colliding_before: int
    largest_before: int
    moved: int

    def flat(self) -> dict[str, float]:
        """One number a name: ``entropy_1`` … for metrics."""
        numbers: dict[str, float] = {}
        for name, value in asdict(self).items():
            if isinstance(value, tuple):
                numbers |= {f"{name}_{level}": v for level, v in enumerate(value, 1)}
            else:
                numbers[name] = float(value)
        return numbers


def codebook_size_for(num_items: int, num_levels: int) -> int:
    """Codes a level: a power of two with ``K^L >= 100 N`` and ``K <= N / 16``.

    Where both cannot hold a centroid keeps its mass (``K <= N / 16``), down to 16 codes; a
    catalogue of fewer than 16 items has as many codes as items.
    """
    room = 2 ** math.ceil(math.log2((100 * num_items) ** (1 / num_levels)))
    mass = 2 ** math.floor(math.log2(max(1.0, num_items / 16)))
    return min(max(16, min(room, mass)), num_items)


def fit(x_ND: Tensor, config: RQKMeansConfig, seed: int) -> SemanticIds:
    """Learn codebooks on ``x_ND`` and encode it.

    Args:
        x_ND: float32 embeddings, on the device to compute on.

    Raises:
        DataContractError: fewer than two items.
        ParamsError: more codes than items.
    """
    N = len(x_ND)
    if N < 2:
        raise DataContractError(
            f"a catalogue of {N} item{'' if N else 's'} has nothing to tell apart",
            where="artifact 'catalogue'",
            remedy="give data with two items or more",
        )
    K = config.codebook_size or codebook_size_for(N, config.num_levels)
    if K > N:
        raise ParamsError(
            f"{K} codes a level, but only {N} items",
            where="params.yaml semantic_ids.codebook_size",
            remedy="choose fewer codes, or null for a size that fits the catalogue",
        )
    random = torch.Generator().manual_seed(seed)
    residual_ND = x_ND.clone()
    codes: list[Tensor] = []
    codebooks: list[Tensor] = []
    for level in range(config.num_levels):
        runs = [_cluster(residual_ND, K, config, random) for _ in range(config.restarts)]
        centroid_KD, code_N, _ = min(runs, key=lambda run: run[2])
        clustered_N = code_N
        last = level == config.num_levels - 1
        if last and config.collisions == "next_free" and codes:
            _, prefix_N = torch.unique(torch.stack(codes, 1), dim=0, return_inverse=True)
            code_N = next_free_codes(residual_ND, centroid_KD, prefix_N, code_N)
        residual_ND -= centroid_KD[code_N]
        codes.append(code_N)
        codebooks.append(centroid_KD)
    return SemanticIds(torch.stack(codes, 1).int(), torch.stack(codebooks), clustered_N.int())


def encode(x_ND: Tensor, codebooks_QKD: Tensor) -> Tensor:
    """Nearest code of every level under frozen codebooks: int32 [N, Q].

    A pure function of each row: an item's codes do not depend on what else is encoded.
    """
    residual_ND = x_ND.clone()
    codes = []
    for centroid_KD in codebooks_QKD:
        code_N, _ = nearest(residual_ND, centroid_KD)
        residual_ND -= centroid_KD[code_N]
        codes.append(code_N)
    return torch.stack(codes, 1).int()


def decode(codes_NQ: Tensor, codebooks_QKD: Tensor) -> Tensor:
    """Reconstruction ``Σ_l c^(l)`` of semantic ids: float32 [N, D]."""
    levels = zip(codebooks_QKD, codes_NQ.long().T, strict=True)
    return torch.stack([centroid_KD[code_N] for centroid_KD, code_N in levels]).sum(0)


def measure(x_ND: Tensor, ids: SemanticIds) -> TokenizerStats:
    """Reconstruction, use of the codes and collisions of semantic ids on the items they encode."""
    codes_NQ, K = ids.codes_NQ.long(), ids.codebooks_QKD.shape[1]
    variance = float((x_ND - x_ND.mean(0)).square().mean())
    residual_ND = x_ND.clone()
    mse, utilisation, entropy = [], [], []
    for centroid_KD, code_N in zip(ids.codebooks_QKD, codes_NQ.T, strict=True):
        residual_ND -= centroid_KD[code_N]
        mse.append(float(residual_ND.square().mean()))
        share_K = torch.bincount(code_N, minlength=K).double() / len(code_N)
        utilisation.append(float((share_K > 0).double().mean()))
        entropy.append(float(-torch.special.xlogy(share_K, share_K).sum()))
    _, bucket = torch.unique(codes_NQ, dim=0, return_counts=True)
    before_NQ = torch.cat([codes_NQ[:, :-1], ids.clustered_N.long()[:, None]], 1)
    _, bucket_before = torch.unique(before_NQ, dim=0, return_counts=True)
    return TokenizerStats(
        mse=tuple(mse),
        relative_error=tuple(m / max(variance, 1e-12) for m in mse),
        utilisation=tuple(utilisation),
        entropy=tuple(entropy),
        distinct=len(bucket),
        colliding=int(bucket[bucket > 1].sum()),
        largest=int(bucket.max()),
        colliding_before=int(bucket_before[bucket_before > 1].sum()),
        largest_before=int(bucket_before.max()),
        moved=int((ids.clustered_N != ids.codes_NQ[:, -1]).sum()),
    )


def nearest(x_ND: Tensor, centroid_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Index int64 [N] of the nearest centroid and squared distance [N] to it."""
    half_norm_K = centroid_KD.square().sum(1) / 2
    code_N = torch.empty(len(x_ND), dtype=torch.long, device=x_ND.device)
    for rows in _blocks(len(x_ND), len(centroid_KD)):
        # ‖x‖² is the same for all centroids: argmin ‖x - c‖² = argmax x·c - ‖c‖²/2.
        code_N[rows] = torch.addmm(-half_norm_K, x_ND[rows], centroid_KD.T).argmax(1)
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
        centroid_KD, count_K = _means(x_ND, code_N, len(centroid_KD))
        empty_k = (count_K == 0).nonzero()[:, 0]
        if len(empty_k):
            centroid_KD[empty_k] = x_ND[distance_N.topk(len(empty_k)).indices]
        before_N = code_N
        code_N, distance_N = nearest(x_ND, centroid_KD)
        if torch.equal(code_N, before_N):
            break
    return centroid_KD, code_N, float(distance_N.double().sum())


def balanced(x_ND: Tensor, centroid_KD: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    """k-means with buckets whose sizes differ by at most one (arXiv 2502.18965, Algorithm 1).

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
        centroid_KD, _ = _means(x_ND, code_N, K)
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


def next_free_codes(
    residual_ND: Tensor, centroid_KD: Tensor, prefix_N: Tensor, code_N: Tensor
) -> Tensor:
    """Codes of the last level without collisions, as far as a prefix has codes to give.

    Items of one prefix that chose the same code: the nearest keeps it, the others take the nearest
    code that is free under the prefix, nearer items first. A prefix with more items than codes
    keeps the rest as they were.

    Args:
        prefix_N: int64 number of each item's prefix (all levels but the last).
        code_N: int64 codes of the last level with collisions.
    """
    K = len(centroid_KD)
    code_N = code_N.clone()
    distance_N = (residual_ND - centroid_KD[code_N]).square().sum(1)
    order_N = distance_N.argsort(stable=True)
    order_N = order_N[(prefix_N * K + code_N)[order_N].argsort(stable=True)]
    key_N = (prefix_N * K + code_N)[order_N]
    first_N = torch.ones(len(key_N), dtype=torch.bool, device=key_N.device)
    first_N[1:] = key_N[1:] != key_N[:-1]
    crowded_m = torch.unique(prefix_N[order_N[~first_N]])
    if not len(crowded_m):
        return code_N
    row_P = torch.full((int(prefix_N.max()) + 1,), -1, device=key_N.device)
    row_P[crowded_m] = torch.arange(len(crowded_m), device=key_N.device)
    taken_mK = torch.zeros(len(crowded_m), K, dtype=torch.bool, device=key_N.device)
    settled = order_N[first_N]
    settled = settled[row_P[prefix_N[settled]] >= 0]
    taken_mK[row_P[prefix_N[settled]], code_N[settled]] = True
    waiting = order_N[~first_N]
    # One loser of every prefix a round, nearest first: rounds = losers of the fullest prefix.
    waiting = waiting[distance_N[waiting].argsort(stable=True)]
    waiting = waiting[prefix_N[waiting].argsort(stable=True)]
    row_w = row_P[prefix_N[waiting]]
    turn_w = torch.arange(len(row_w), device=row_w.device) - torch.searchsorted(row_w, row_w)
    by_turn = turn_w.argsort(stable=True)
    # Codes of a prefix run out after K turns at the latest.
    for group in by_turn.split(torch.bincount(turn_w).tolist())[:K]:
        items, rows = waiting[group], row_w[group]
        for part in _blocks(len(items), K):
            free_bK = ~taken_mK[rows[part]]
            distance_bK = torch.cdist(residual_ND[items[part]], centroid_KD)
            chosen_b = distance_bK.masked_fill_(~free_bK, math.inf).argmin(1)
            placed_b = free_bK.any(1)
            code_N[items[part][placed_b]] = chosen_b[placed_b]
            taken_mK[rows[part][placed_b], chosen_b[placed_b]] = True
    return code_N


def _cluster(
    x_ND: Tensor, K: int, config: RQKMeansConfig, random: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    start_KD = plus_plus(x_ND, K, random)
    if config.method == "balanced":
        return balanced(x_ND, start_KD, config.iterations)
    return lloyd(x_ND, start_KD, config.iterations)


def _means(x_ND: Tensor, code_N: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Mean [K, D] and count [K] of the points of every code; zeros where there is none."""
    count_K = torch.bincount(code_N, minlength=K)
    # Sorted segments instead of scattered adds: the same bits in every run, on every device.
    order = code_N.argsort(stable=True)
    total_KD = torch.segment_reduce(x_ND[order], "sum", lengths=count_K, initial=0.0)
    return total_KD / count_K.clamp_min(1)[:, None], count_K


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (4 * width))
    return (slice(start, start + step) for start in range(0, rows, step))
