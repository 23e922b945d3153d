"""RQ-KMeans: residual k-means, level by level (arXiv 2506.13695, section 2.1).

``R^(1) = x``; level l clusters the residuals, ``s^l`` is the centroid's number and
``R^(l+1) = R^(l) - c_{s^l}``. Knows embeddings, nothing of items, users or training.

Shapes: N items, D embedding width, K codebook size, Q quantiser levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from components.training.onerec.tokenizer import kmeans
from components.training.onerec.tokenizer.balanced import balanced

if TYPE_CHECKING:
    from components.training.onerec.config import TokenizerConfig

Cluster = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, float]]
CLUSTER: dict[str, Cluster] = {
    "plain": kmeans.lloyd,
    "balanced": balanced,
    "in_turn": kmeans.in_turn,
}


@dataclass(frozen=True)
class RQKMeans:
    """Codebooks that quantise embeddings as they are (a `tokenizer.Quantizer`)."""

    codebooks_QKD: Tensor

    def latent(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def rebuild(self, z_ND: Tensor) -> Tensor:
        return z_ND

    def state(self) -> dict[str, Tensor]:
        return {"codebooks": self.codebooks_QKD}


def nearest_codes(z_ND: Tensor, codebooks_QKD: Tensor) -> Tensor:
    """The nearest code of the residual at every level: int64 [N, Q]."""
    residual_ND, codes = z_ND.clone(), []
    for centroid_KD in codebooks_QKD:
        code_N, _ = kmeans.nearest(residual_ND, centroid_KD)
        residual_ND -= centroid_KD[code_N]
        codes.append(code_N)
    return torch.stack(codes, 1)


def fit(x_ND: Tensor, K: int, config: TokenizerConfig, seed: int) -> tuple[RQKMeans, Tensor]:
    """Learn codebooks of K codes.

    Returns:
        the quantiser, and int64 codes [N, Q] as clustering gave them, which under balance need not
        be the nearest.
    """
    random = torch.Generator().manual_seed(seed)
    cluster: Cluster = CLUSTER[config.method]
    residual_ND = x_ND.clone()
    codes: list[Tensor] = []
    codebooks: list[Tensor] = []
    for level in range(config.num_levels):
        if config.method == "balanced" and 0 < level == config.num_levels - 1:
            # At the last level the items of a prefix compete, or they would have the same id.
            _, prefix_N = torch.unique(torch.stack(codes, 1), dim=0, return_inverse=True)
            cluster = partial(balanced, prefix_N=prefix_N)
        starts = (kmeans.plus_plus(residual_ND, K, random) for _ in range(config.restarts))
        runs = [cluster(residual_ND, start_KD, config.iterations) for start_KD in starts]
        centroid_KD, code_N, _ = min(runs, key=lambda run: run[2])
        residual_ND -= centroid_KD[code_N]
        codes.append(code_N)
        codebooks.append(centroid_KD)
    return RQKMeans(torch.stack(codebooks)), torch.stack(codes, 1)
