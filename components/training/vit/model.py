"""A vision transformer (arXiv 2010.11929) in the form of DeiT (arXiv 2012.12877).

Architecture only; it knows nothing of images on disk, losses or optimisers. Everything that a
compression takes away stands alone: a head is ``head_width`` rows of query, key and value and as
many columns of ``proj``; a neuron is a row of ``fc1`` and a column of ``fc2``; a residual branch
has its norm inside; and no branch knows how many tokens there are. How many heads and neurons
there are is read from the weights, so a model whose matrices were cut runs as it is.

Shapes: B batch, C colours, N tokens (CLS first), D width, H heads, d width of a head, M neurons,
K classes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from components.training.vit.config import VitConfig

#: Standard deviation of weights, tokens and positions, which are cut off at two of them.
INIT_STD = 0.02
NORM_EPS = 1e-6


class Attention(nn.Module):
    """The branch of multi-head self-attention, with its norm."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.head_width = d_model // heads
        self.norm = nn.LayerNorm(d_model, NORM_EPS)
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x_BND: Tensor) -> Tensor:
        """What is added to the residual stream: float [B, N, D]."""
        h_BND = self.norm(x_BND)
        q_BHNd, k_BHNd, v_BHNd = (
            part(h_BND).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd)
        return self.proj(mixed_BHNd.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The branch of a feed-forward network, with its norm."""

    def __init__(self, d_model: int, neurons: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model, NORM_EPS)
        self.fc1 = nn.Linear(d_model, neurons)
        self.fc2 = nn.Linear(neurons, d_model)

    def forward(self, x_BND: Tensor) -> Tensor:
        """What is added to the residual stream: float [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(self.norm(x_BND))))


class StochasticDepth(nn.Module):
    """Leaves out a branch of some samples in training (arXiv 1603.09382).

    Those that keep it have it larger, so that its expectation is the branch of evaluation.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch_BND: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return branch_BND
        kept_B11 = torch.rand(len(branch_BND), 1, 1, device=branch_BND.device) >= self.rate
        return branch_BND * (kept_B11 / (1 - self.rate)).to(branch_BND.dtype)


class Block(nn.Module):
    """Attention and MLP, each added to what it reads."""

    def __init__(self, config: VitConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config.d_model, config.heads)
        self.mlp = Mlp(config.d_model, config.mlp)
        self.dropout = nn.Dropout(config.dropout)
        self.depth = StochasticDepth(config.stochastic_depth * layer / max(1, config.layers - 1))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.depth(self.dropout(self.attention(x_BND)))
        return x_BND + self.depth(self.dropout(self.mlp(x_BND)))


class Vit(nn.Module):
    """Classifies images by a CLS token that attends to their patches."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Linear(config.channels * config.patch**2, config.d_model)
        self.cls = nn.Parameter(torch.empty(config.d_model))
        self.position = nn.Parameter(torch.empty(config.tokens, config.d_model))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model, NORM_EPS)
        self.head = nn.Linear(config.d_model, config.classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated N(0, 0.02); of patches N(0, 1/fan-in): tokens begin as large as pixels are."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                is_input = module is self.patches
                std = 1 / math.sqrt(module.in_features) if is_input else INIT_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)
        for token in (self.cls, self.position):
            nn.init.trunc_normal_(token, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Tokens with their positions, CLS first, patches row by row: float [B, N, D]."""
        p = self.config.patch
        grid_BChpwp = image_BCHW.unflatten(3, (-1, p)).unflatten(2, (-1, p))
        patch_BPE = grid_BChpwp.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        cls_B1D = self.cls.expand(len(image_BCHW), 1, -1)
        x_BND = torch.cat([cls_B1D, self.patches(patch_BPE)], 1) + self.position
        return self.dropout(x_BND)

    def feature(self, x_BND: Tensor) -> Tensor:
        """What the last layer reads of the tokens after the blocks: float [B, D]."""
        return self.norm(x_BND[:, 0])

    def forward(
        self, image_BCHW: Tensor, with_feature: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores of the classes.

        Args:
            image_BCHW: float, normalised (`data.Normalisation`).
            with_feature: give also what the last layer reads.

        Returns:
            logits float [B, K]; and with features, float [B, D].
        """
        x_BND = self.embed(image_BCHW)
        for block in self.blocks:
            x_BND = block(x_BND)
        feature_BD = self.feature(x_BND)
        logit_BK = self.head(feature_BD)
        return (logit_BK, feature_BD) if with_feature else logit_BK
