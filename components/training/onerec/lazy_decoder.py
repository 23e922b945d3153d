"""The lazy decoder: a history is embedded once and never encoded (after arXiv 2508.20900).

Nearly all of an encoder-decoder's work goes into its context. Here the context has no layers and
the decoder no projections of keys and values: one product maps each position of the history to
slices that are, normed, the keys and values of several decoder layers and query heads at once.
We know the method from a public summary of the report. `model.OneRec` puts it together; pathways,
embeddings, memory and loss are those of the encoder-decoder.

Shapes: B batch, S positions of the history, T decoder positions, D width, d width of a head, H
heads of queries, G heads of keys, L groups of layers, V slices of a group (1: values are the keys).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import Tensor, nn

from components.training.onerec.attention import KeysValues, residual, split_heads
from components.training.onerec.decoder import DecoderLayer

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig


class LazyContext(nn.Module):
    """Keys and values of every decoder layer: ``k_l = RMSNorm(slice)``, ``v_l = k_l`` or its own.

    The history is mapped to ``d_ctx = S_kv · L_kv · G_kv · d_head`` and cut.
    """

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        lazy, self.width = config.lazy, config.d_model // config.heads
        self.groups, self.heads = lazy.key_layers, lazy.key_heads
        self.slices = 1 if lazy.values == "keys" else 2
        self.layers_a_group = config.decoder_layers // self.groups
        cut = self.groups * self.slices
        self.project = nn.Linear(config.d_model, cut * self.heads * self.width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(self.heads * self.width) for _ in range(cut))

    def forward(self, z_BSD: Tensor) -> list[KeysValues]:
        """For each decoder layer two times [B, G, S, d]; layers of a group share them."""
        slices = self.project(z_BSD).chunk(len(self.norms), -1)
        normed = [
            norm(x_BSC).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
            for norm, x_BSC in zip(self.norms, slices, strict=True)
        ]
        pairs = [
            (normed[i], normed[i + self.slices - 1]) for i in range(0, len(normed), self.slices)
        ]
        return [pair for pair in pairs for _ in range(self.layers_a_group)]


class GroupedQueryAttention(nn.Module):
    """Attention to given keys and values, each head of which serves several heads of queries."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out = residual(nn.Linear(config.d_model, config.d_model, bias=False))

    def forward(self, x_BTD: Tensor, context: KeysValues, mask_B11S: Tensor) -> Tensor:
        """Attention of each position to a context, two times [B, G, S, d]."""
        q_BHTd = split_heads(self.query(x_BTD), self.heads)
        # Queries of one key head stand in a row, so that no key is repeated for them.
        q_BGtd = q_BHTd.unflatten(1, (context[0].shape[1], -1)).flatten(2, 3)
        mixed_BGtd = F.scaled_dot_product_attention(q_BGtd, *context, attn_mask=mask_B11S)
        mixed_BHTd = mixed_BGtd.unflatten(2, (-1, x_BTD.shape[1])).flatten(1, 2)
        return cast(Tensor, self.out(mixed_BHTd.transpose(1, 2).flatten(2)))


class LazyDecoderLayer(DecoderLayer):
    """Cross-attention without projections of keys and values, self-attention, feed-forward."""

    @staticmethod
    def build_cross_attention(config: OneRecConfig) -> nn.Module:
        return GroupedQueryAttention(config)

    def sublayers(
        self,
        x_BTD: Tensor,
        attend_self: Callable[[Tensor], Tensor],
        context: KeysValues,
        mask_B11S: Tensor,
    ) -> Tensor:
        """The residual sublayers in their order: the history is read first."""
        x_BTD = x_BTD + self.dropout(self.read_context(x_BTD, context, mask_B11S))
        x_BTD = x_BTD + self.dropout(attend_self(self.self_norm(x_BTD)))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
