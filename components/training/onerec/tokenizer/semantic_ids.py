"""Item embeddings to semantic ids, by whatever quantiser.

A quantiser has codebooks and the space they quantise; encoding, telling colliding items apart and
the measures are the same for all of them. Knows embeddings and codes, nothing of items, users or
training.

Shapes: N items, D embedding width (d of the latent space), K codebook size, Q quantiser levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from components.data.content_digest import content_digest
from components.pipeline.errors import DataContractError, ParamsError
from components.training.onerec.tokenizer import kmeans, rq_kmeans, rq_vae

if TYPE_CHECKING:
    from components.training.onerec.config import TokenizerConfig


class Quantizer(Protocol):
    """Codebooks float32 [Q, K, d], frozen: they encode new items too."""

    @property
    def codebooks_QKD(self) -> Tensor: ...

    def latent(self, x_ND: Tensor) -> Tensor:
        """Embeddings [N, D] in the space that is quantised [N, d]."""

    def rebuild(self, z_ND: Tensor) -> Tensor:
        """Sums of codes [N, d] as embeddings [N, D]."""

    def state(self) -> dict[str, Tensor]:
        """All that it learned, by name (`load`)."""


@dataclass(frozen=True)
class SemanticIds:
    """What the tokenizer learned and what it gave every item.

    Attributes:
        codes_NQ: int32, the semantic id of every item.
        clustered_N: int32, the last code as it was before items with the same codes were told
            apart.
    """

    quantizer: Quantizer
    codes_NQ: Tensor
    clustered_N: Tensor

    @property
    def version(self) -> str:
        """Of the quantiser and the number of levels: codes of others mean something else."""
        state = {name: value.cpu().numpy() for name, value in self.quantizer.state().items()}
        return content_digest(state, self.codes_NQ.shape[1])


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
            apart (``TokenizerConfig.collisions``).
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


def fit(x_ND: Tensor, config: TokenizerConfig, seed: int) -> SemanticIds:
    """Learn a quantiser on ``x_ND`` and encode it.

    Args:
        x_ND: float32 embeddings, on the device to compute on.

    Raises:
        DataContractError: fewer than two items, or an embedding whose length is not finite.
        ParamsError: more codes than items.
    """
    N = len(x_ND)
    if N < 2:
        raise DataContractError(
            f"a catalogue of {N} item{'' if N else 's'} has nothing to tell apart",
            where="artifact 'catalogue'",
            remedy="give data with two items or more",
        )
    broken_n = (~torch.isfinite(x_ND.square().sum(1))).nonzero()[:, 0]
    if len(broken_n):
        # Nothing is nearest to it: what balances clusters would look for a place for ever.
        raise DataContractError(
            f"{len(broken_n)} items have an embedding whose length is not finite",
            where=f"artifact 'aligned_embedding' row {int(broken_n[0])}",
            remedy="run item_features and align_items again with --force",
        )
    K = config.codebook_size or codebook_size_for(N, config.num_levels)
    if K > N:
        raise ParamsError(
            f"{K} codes a level, but only {N} items",
            where="params.yaml semantic_ids.codebook_size",
            remedy="choose fewer codes, or null for a size that fits the catalogue",
        )
    quantizer: Quantizer
    if config.method == "rq_vae":
        quantizer, codes_NQ = rq_vae.fit(x_ND, K, config, seed)
    else:
        quantizer, codes_NQ = rq_kmeans.fit(x_ND, K, config, seed)
    ids = SemanticIds(quantizer, codes_NQ.int(), codes_NQ[:, -1].int())
    if config.collisions == "next_free":
        return told_apart(x_ND, ids)
    return numbered(ids) if config.collisions == "extra_digit" else ids


def told_apart(x_ND: Tensor, ids: SemanticIds) -> SemanticIds:
    """Semantic ids whose last codes tell items apart that had the same (`next_free_codes`)."""
    codes_NQ = ids.codes_NQ.long()
    _, prefix_N = torch.unique(codes_NQ[:, :-1], dim=0, return_inverse=True)
    residual_ND = ids.quantizer.latent(x_ND) - _sum_of_codes(codes_NQ[:, :-1], ids.quantizer)
    last_KD = ids.quantizer.codebooks_QKD[-1]
    codes_NQ[:, -1] = next_free_codes(residual_ND, last_KD, prefix_N, codes_NQ[:, -1])
    return SemanticIds(ids.quantizer, codes_NQ.int(), ids.clustered_N)


def numbered(ids: SemanticIds) -> SemanticIds:
    """Semantic ids of one level more, on which items with the same codes are numbered.

    TIGER's way (arXiv 2305.05065). The last level has no codebook: a new item's number is not a
    function of its embedding. Numbers stay below the codebook size, as all codes do, so a larger
    bucket goes on colliding.
    """
    K = ids.quantizer.codebooks_QKD.shape[1]
    _, bucket_N = torch.unique(ids.codes_NQ, dim=0, return_inverse=True)
    order_N = bucket_N.argsort(stable=True)
    place_N = torch.arange(len(order_N), device=order_N.device)
    sorted_N = bucket_N[order_N]
    number_N = torch.empty_like(place_N)
    number_N[order_N] = place_N - torch.searchsorted(sorted_N, sorted_N)
    number_N = (number_N % K).int()
    return SemanticIds(
        ids.quantizer, torch.cat([ids.codes_NQ, number_N[:, None]], 1), torch.zeros_like(number_N)
    )


def load(method: str, state: Mapping[str, Tensor], config: TokenizerConfig) -> Quantizer:
    """The quantiser whose `Quantizer.state` was kept, to encode new items with."""
    if method != "rq_vae":
        return rq_kmeans.RQKMeans(state["codebooks"])
    levels, K, _ = state["codebooks"].shape
    model = rq_vae.RQVAE(state["encoder.0.weight"].shape[1], levels, K, config.rq_vae)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def encode(x_ND: Tensor, quantizer: Quantizer) -> Tensor:
    """Nearest code of every level under a frozen quantiser: int32 [N, Q].

    An item's codes do not depend on what else is encoded, except where two codes are equally near
    up to the rounding of float32, whose products are summed up otherwise in blocks of other sizes.
    """
    return rq_kmeans.nearest_codes(quantizer.latent(x_ND), quantizer.codebooks_QKD).int()


def decode(codes_NQ: Tensor, quantizer: Quantizer) -> Tensor:
    """Reconstruction of embeddings from the first levels of semantic ids: float32 [N, D].

    Args:
        codes_NQ: all levels, or the first of them.
    """
    return quantizer.rebuild(_sum_of_codes(codes_NQ, quantizer))


def _sum_of_codes(codes_NQ: Tensor, quantizer: Quantizer) -> Tensor:
    levels = zip(quantizer.codebooks_QKD, codes_NQ.long().T, strict=False)
    return torch.stack([centroid_KD[code_N] for centroid_KD, code_N in levels]).sum(0)


def measure(x_ND: Tensor, ids: SemanticIds) -> TokenizerStats:
    """Reconstruction, use of the codes and collisions of semantic ids on the items they encode."""
    codes_NQ, K = ids.codes_NQ.long(), ids.quantizer.codebooks_QKD.shape[1]
    variance = float((x_ND - x_ND.mean(0)).square().mean())
    mse, utilisation, entropy = [], [], []
    for level, code_N in enumerate(codes_NQ.T, 1):
        rebuilt_ND = decode(codes_NQ[:, :level], ids.quantizer)
        mse.append(float((x_ND - rebuilt_ND).square().mean()))
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
        for part in kmeans.blocks(len(items), K):
            free_bK = ~taken_mK[rows[part]]
            distance_bK = torch.cdist(residual_ND[items[part]], centroid_KD)
            chosen_b = distance_bK.masked_fill_(~free_bK, math.inf).argmin(1)
            placed_b = free_bK.any(1)
            code_N[items[part][placed_b]] = chosen_b[placed_b]
            taken_mK[rows[part][placed_b], chosen_b[placed_b]] = True
    return code_N
