"""Embeddings of semantic ids, which the encoder's input, the decoder and its heads share.

Shapes: B batch, L events, D width, K codebook size, Q quantiser levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig


class TokenEmbedding(nn.Module):
    """One row a code of every level, and one for BOS; encoder, decoder and heads share it."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.codebook_size, self.num_levels = config.codebook_size, config.num_levels
        self.weight = nn.Parameter(
            torch.empty(config.num_levels * config.codebook_size + 1, config.d_model)
        )
        start = torch.arange(config.num_levels) * config.codebook_size
        self.register_buffer("level_start_Q", start, persistent=False)

    @property
    def bos(self) -> int:
        return self.num_levels * self.codebook_size

    def forward(self, row: Tensor) -> Tensor:
        return F.embedding(row, self.weight)

    def rows(self, sid_xQ: Tensor) -> Tensor:
        """Row of every code, ``code + level · K``, for ids cut to any number of levels."""
        start_Q = cast(Tensor, self.level_start_Q)
        return sid_xQ + start_Q[: sid_xQ.shape[-1]]

    def items(self, sid_BLQ: Tensor) -> Tensor:
        """Sum of the level embeddings of each item: float [B, L, D]."""
        rows = self.rows(sid_BLQ)
        summed = F.embedding_bag(rows.flatten(0, -2), self.weight, mode="sum")
        return summed.unflatten(0, rows.shape[:-1])

    def level_weight(self, level: int) -> Tensor:
        """Rows of one level: float [K, D]."""
        return self.weight[level * self.codebook_size : (level + 1) * self.codebook_size]
