"""The decoder's layer (arXiv 2506.13695, section 2.3).

Shapes: B batch, S encoder positions, T decoder positions, W beams, D width, H heads, d width of a
head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from components.training.onerec.attention import Attention, KeysValues, feed_forward
from components.training.onerec.config import OneRecConfig


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the encoder, feed-forward; a norm before each."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.self_norm = nn.RMSNorm(config.d_model)
        self.self_attention = Attention(config)
        self.cross_norm = nn.RMSNorm(config.d_model)
        self.cross_attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.ffn = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, context: KeysValues, mask_B11S: Tensor) -> Tensor:
        normed_BTD = self.self_norm(x_BTD)
        own = self.self_attention.keys_values(normed_BTD)
        x_BTD = x_BTD + self.dropout(self.self_attention(normed_BTD, own, causal=True))
        return self._after_self_attention(x_BTD, context, mask_B11S)

    def step(
        self, x_BWD: Tensor, past: list[KeysValues], context: KeysValues, mask_B11S: Tensor
    ) -> Tensor:
        """The newest position of W beams; ``past`` (at most Q positions) grows by one.

        Args:
            past: keys and values [B, W or 1, H, d] of each earlier position of each beam; 1 where
                all beams share it.
            context: keys and values [B, H, S, d] of the encoder, one for all beams of a request.
        """
        attention = self.self_attention
        normed_BWD = self.self_norm(x_BWD)
        k_BHWd, v_BHWd = attention.keys_values(normed_BWD)
        past.append((k_BHWd.transpose(1, 2), v_BHWd.transpose(1, 2)))
        q_BWHd = attention.queries(normed_BWD).transpose(1, 2)
        # Three positions at most: products by position are cheaper than an attention kernel.
        score_TBWH = torch.stack([(q_BWHd * k).sum(-1) for k, _ in past]) * q_BWHd.shape[-1] ** -0.5
        weight_TBWH = score_TBWH.softmax(0)
        mixed = sum(w[..., None] * v for w, (_, v) in zip(weight_TBWH, past, strict=True))
        x_BWD = x_BWD + attention.out(cast(Tensor, mixed).flatten(2))
        return self._after_self_attention(x_BWD, context, mask_B11S)

    def _after_self_attention(
        self, x_BTD: Tensor, context: KeysValues, mask_B11S: Tensor
    ) -> Tensor:
        crossed_BTD = self.cross_attention(self.cross_norm(x_BTD), context, mask_B11S)
        x_BTD = x_BTD + self.dropout(crossed_BTD)
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
