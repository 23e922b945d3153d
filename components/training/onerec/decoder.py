"""The decoder's layer (arXiv 2506.13695, section 2.3).

Shapes: B batch, S encoder positions, T decoder positions, W beams, D width, H heads, d width of a
head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from components.training.onerec.attention import Attention, KeysValues, feed_forward

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the encoder, feed-forward; a norm before each."""

    def __init__(self, config: OneRecConfig, layer: int) -> None:
        super().__init__()
        self.self_norm = nn.RMSNorm(config.d_model)
        self.self_attention = Attention(config)
        self.cross_norm = nn.RMSNorm(config.d_model)
        self.cross_attention = self.build_cross_attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.ffn = feed_forward(config, "decoder", layer)
        self.dropout = nn.Dropout(config.dropout)

    @staticmethod
    def build_cross_attention(config: OneRecConfig) -> nn.Module:
        """What reads the context."""
        return Attention(config)

    def forward(self, x_BTD: Tensor, context: KeysValues, mask_B11S: Tensor) -> Tensor:
        """All positions at once, each of which sees those before it."""
        return self.sublayers(x_BTD, self._attend_causally, context, mask_B11S)

    def step(
        self, x_BWD: Tensor, past: list[KeysValues], context: KeysValues, mask_B11S: Tensor
    ) -> Tensor:
        """The newest position of W beams; ``past`` (at most Q positions) grows by one.

        Args:
            past: keys and values [B, W or 1, H, d] of each earlier position of each beam; 1 where
                all beams share it.
            context: keys and values [B, H, S, d] of the encoder, one for all beams of a request.
        """
        return self.sublayers(x_BWD, partial(self._attend_past, past=past), context, mask_B11S)

    def sublayers(
        self,
        x_BTD: Tensor,
        attend_self: Callable[[Tensor], Tensor],
        context: KeysValues,
        mask_B11S: Tensor,
    ) -> Tensor:
        """The residual sublayers in their order."""
        x_BTD = x_BTD + self.dropout(attend_self(self.self_norm(x_BTD)))
        x_BTD = x_BTD + self.dropout(self.read_context(x_BTD, context, mask_B11S))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))

    def read_context(self, x_GTD: Tensor, context: KeysValues, mask_B11S: Tensor) -> Tensor:
        """Cross-attention; where a request has several rows of x, all read its one context."""
        x_BXD = self.cross_norm(x_GTD).unflatten(0, (len(context[0]), -1)).flatten(1, 2)
        return cast(Tensor, self.cross_attention(x_BXD, context, mask_B11S)).view_as(x_GTD)

    def _attend_causally(self, normed_BTD: Tensor) -> Tensor:
        own = self.self_attention.keys_values(normed_BTD)
        return cast(Tensor, self.self_attention(normed_BTD, own, causal=True))

    def _attend_past(self, normed_BWD: Tensor, past: list[KeysValues]) -> Tensor:
        attention = self.self_attention
        k_BHWd, v_BHWd = attention.keys_values(normed_BWD)
        past.append((k_BHWd.transpose(1, 2), v_BHWd.transpose(1, 2)))
        q_BWHd = attention.queries(normed_BWD).transpose(1, 2)
        # Three positions at most: products by position are cheaper than an attention kernel.
        score_TBWH = torch.stack([(q_BWHd * k).sum(-1) for k, _ in past]) * q_BWHd.shape[-1] ** -0.5
        weight_TBWH = score_TBWH.softmax(0)
        mixed = sum(w[..., None] * v for w, (_, v) in zip(weight_TBWH, past, strict=True))
        return cast(Tensor, attention.out(cast(Tensor, mixed).flatten(2)))
