"""Attention and feed-forward: what encoder and decoder layers are made of.

Shapes: B batch, S positions of a context, T positions, D width, H heads, d width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from components.training.onerec.experts import MixtureOfExperts, has_experts

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig

KeysValues = tuple[Tensor, Tensor]


def feed_forward(
    config: OneRecConfig, part: Literal["encoder", "decoder"], layer: int
) -> nn.Module:
    """The feed-forward of a layer of one part of the model: dense, or a mixture of experts."""
    if has_experts(config, part, layer):
        return MixtureOfExperts(config)
    return nn.Sequential(
        nn.Linear(config.d_model, config.ffn, bias=False),
        nn.GELU(),
        residual(nn.Linear(config.ffn, config.d_model, bias=False)),
    )


def residual(linear: nn.Linear) -> nn.Linear:
    """Marks a projection that is added to the residual stream: it starts smaller."""
    linear.weight.is_residual = True  # type: ignore[attr-defined]
    return linear


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """[B, H, T, d]"""
    return x_BTD.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be computed once and used many times."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key_value = nn.Linear(config.d_model, 2 * config.d_model, bias=False)
        self.out = residual(nn.Linear(config.d_model, config.d_model, bias=False))

    def queries(self, x_BTD: Tensor) -> Tensor:
        """[B, H, T, d]"""
        return split_heads(self.query(x_BTD), self.heads)

    def keys_values(self, x_BSD: Tensor) -> KeysValues:
        """Two times [B, H, S, d]."""
        both = self.key_value(x_BSD).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return both[0], both[1]

    def forward(
        self, x_BTD: Tensor, context: KeysValues, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attention of each position to a context; ``mask`` bool, broadcast to [B, H, T, S]."""
        mixed_BHTd = F.scaled_dot_product_attention(
            self.queries(x_BTD), *context, attn_mask=mask, is_causal=causal
        )
        return self.out(mixed_BHTd.transpose(1, 2).flatten(2))
