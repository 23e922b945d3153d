"""RQ-VAE: residual quantisation of a learned latent space (arXiv 2305.05065; 2203.01941).

The tokenizer of TIGER, which RQ-KMeans is measured against. An encoder maps embeddings to a latent
space whose residuals K codes a level quantise; a decoder maps the sum of the codes back:
``L = ‖x - x̂‖² + Σ_l ‖sg[r_l] - e_l‖² + β ‖r_l - sg[e_l]‖²``, gradients pass the quantiser straight
through. Codebooks begin with k-means of the latents, and a code that an epoch left unused is put on
a random residual; without either a few codes take everything.

Shapes: N items, D embedding width, d latent width, K codebook size, Q quantiser levels, B batch.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from components.training.onerec.tokenizer import kmeans
from components.training.onerec.tokenizer.rq_kmeans import nearest_codes

if TYPE_CHECKING:
    from components.training.onerec.config import RQVAEConfig, TokenizerConfig

START_ITERATIONS = 5


class RQVAE(nn.Module):
    """Encoder, codebooks and decoder (a `tokenizer.Quantizer` once trained)."""

    def __init__(self, width: int, levels: int, K: int, config: RQVAEConfig) -> None:
        super().__init__()
        widths = [width, *config.hidden, config.latent]
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])
        self.codebooks = nn.Parameter(torch.zeros(levels, K, config.latent))

    @property
    def codebooks_QKD(self) -> Tensor:
        return self.codebooks.detach()

    @torch.no_grad()
    def latent(self, x_ND: Tensor) -> Tensor:
        z_Nd: Tensor = self.encoder(x_ND)
        return z_Nd

    @torch.no_grad()
    def rebuild(self, z_ND: Tensor) -> Tensor:
        x_ND: Tensor = self.decoder(z_ND)
        return x_ND

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.state_dict().items()}

    def loss(self, x_BD: Tensor, commitment: float) -> tuple[Tensor, Tensor]:
        """Mean loss an entry, and the codes int64 [B, Q] that were chosen."""
        z_Bd = self.encoder(x_BD)
        residual_Bd, total_Bd = z_Bd, torch.zeros_like(z_Bd)
        loss, codes = x_BD.new_zeros(()), []
        for codebook_Kd in self.codebooks:
            code_B, _ = kmeans.nearest(residual_Bd.detach(), codebook_Kd.detach())
            code_Bd = codebook_Kd[code_B]
            loss = loss + (residual_Bd.detach() - code_Bd).square().mean()
            loss = loss + commitment * (residual_Bd - code_Bd.detach()).square().mean()
            total_Bd = total_Bd + code_Bd
            residual_Bd = residual_Bd - code_Bd.detach()
            codes.append(code_B)
        straight_Bd = z_Bd + (total_Bd - z_Bd).detach()
        loss = loss + (self.decoder(straight_Bd) - x_BD).square().mean()
        return loss, torch.stack(codes, 1)


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit(x_ND: Tensor, K: int, config: TokenizerConfig, seed: int) -> tuple[RQVAE, Tensor]:
    """Train on all embeddings for ``config.rq_vae.epochs``.

    Returns:
        the quantiser, and int64 codes [N, Q] of the embeddings, the nearest of each level.
    """
    own = config.rq_vae
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RQVAE(x_ND.shape[1], config.num_levels, K, own)
    model.to(x_ND.device)
    _start(model, x_ND, random)
    optimizer = torch.optim.AdamW(model.parameters(), lr=own.learning_rate, weight_decay=1e-4)
    for _ in range(own.epochs):
        used_QK = torch.zeros(config.num_levels, K, dtype=torch.long, device=x_ND.device)
        for rows in torch.randperm(len(x_ND), generator=random).split(own.batch_size):
            loss, codes_BQ = model.loss(x_ND[rows.to(x_ND.device)], own.commitment)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for used_K, code_B in zip(used_QK, codes_BQ.T, strict=True):
                used_K += torch.bincount(code_B, minlength=K)
        _revive(model, x_ND, used_QK, random)
    return model, nearest_codes(model.latent(x_ND), model.codebooks_QKD)


@torch.no_grad()
def _start(model: RQVAE, x_ND: Tensor, random: torch.Generator) -> None:
    residual_Nd = model.latent(x_ND)
    for codebook_Kd in model.codebooks:
        start_Kd = kmeans.plus_plus(residual_Nd, len(codebook_Kd), random)
        centroid_Kd, code_N, _ = kmeans.lloyd(residual_Nd, start_Kd, START_ITERATIONS)
        codebook_Kd.copy_(centroid_Kd)
        residual_Nd = residual_Nd - centroid_Kd[code_N]


@torch.no_grad()
def _revive(model: RQVAE, x_ND: Tensor, used_QK: Tensor, random: torch.Generator) -> None:
    if bool((used_QK > 0).all()):
        return
    residual_Nd = model.latent(x_ND)
    for codebook_Kd, used_K in zip(model.codebooks, used_QK, strict=True):
        dead = (used_K == 0).nonzero()[:, 0]
        drawn = torch.randint(len(x_ND), (len(dead),), generator=random)
        codebook_Kd[dead] = residual_Nd[drawn.to(x_ND.device)]
        code_N, _ = kmeans.nearest(residual_Nd, codebook_Kd)
        residual_Nd = residual_Nd - codebook_Kd[code_N]
