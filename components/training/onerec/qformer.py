"""A query transformer: a few learned queries read many states (arXiv 2506.13695, 2.1 and 2.2).

It compresses an item's tokens for the tokenizer and a user's lifelong history for the encoder.

Shapes: B batch, S states, D their width, q queries, d width of a query, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QFormerBlock(nn.Module):
    """``Q ← CrossAttn(Q, M, M)``, ``Q ← FFN(RMSNorm(Q))``.

    The report prints neither residual connections nor a norm before the attention. Both are here
    by default, because several blocks train badly without; ``residual=False`` is as printed.
    """

    def __init__(self, width: int, states: int, heads: int, ffn: int, residual: bool) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        self.query_norm = nn.RMSNorm(width) if residual else nn.Identity()
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(states, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn, bias=False), nn.GELU(), nn.Linear(ffn, width, bias=False)
        )

    def forward(self, query_BqD: Tensor, state_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        q_BHqd = self.query(self.query_norm(query_BqD)).unflatten(-1, (self.heads, -1))
        k_BSHd, v_BSHd = self.key_value(state_BSD).unflatten(-1, (2, self.heads, -1)).unbind(2)
        mixed_BHqd = F.scaled_dot_product_attention(
            q_BHqd.transpose(1, 2), k_BSHd.transpose(1, 2), v_BSHd.transpose(1, 2), mask_B11S
        )
        mixed_BqD = self.out(mixed_BHqd.transpose(1, 2).flatten(2))
        query_BqD = query_BqD + mixed_BqD if self.residual else mixed_BqD
        after_BqD = self.ffn(self.ffn_norm(query_BqD))
        return query_BqD + after_BqD if self.residual else after_BqD


class QFormer(nn.Module):
    """Learned queries after some blocks.

    Args:
        queries: how many, N_q.
        width: of a query, d; a multiple of ``heads``.
        states: width of the states that are read, D.
        blocks: cross-attention blocks, N_c or N_l.
        ffn: hidden width of a feed-forward.
    """

    def __init__(
        self,
        *,
        queries: int,
        width: int,
        states: int,
        blocks: int,
        heads: int,
        ffn: int,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        nn.init.normal_(self.query, std=width**-0.5)
        self.blocks = nn.ModuleList(
            QFormerBlock(width, states, heads, ffn, residual) for _ in range(blocks)
        )

    def forward(self, state_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Float [B, q, d]; ``mask_BS`` bool, True = a real state, or float, added to scores.

        A row without any real state must be let see one by the caller: softmax over nothing is
        not a number.
        """
        query_BqD = self.query.expand(len(state_BSD), -1, -1)
        mask_B11S = None if mask_BS is None else mask_BS[:, None, None]
        for block in self.blocks:
            query_BqD = block(query_BqD, state_BSD, mask_B11S)
        return query_BqD
