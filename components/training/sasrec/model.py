"""SASRec: a causal transformer over item sequences with tied item embeddings (arXiv 1808.09781).

Architecture and loss only. Differences from the paper, all to make the baseline stronger or faster:
full-softmax cross-entropy over the catalogue in place of one sampled negative with BCE, pre-norm
residual blocks, a GELU feed-forward of 4d, no dropout on attention weights, an input embedding of
whether an event was positive, and on request output embeddings of their own: tied ones pull the
last item towards itself, which costs much where nobody consumes an item twice.

Shapes: B batch, L length, D width, H heads, N items, M predicted positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.training.sasrec.config import SasrecConfig


class Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, 4 * width)
        self.ffn_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        qkv = self.qkv(self.attention_norm(x_BLD)).view(B, L, 3, self.heads, D // self.heads)
        q_BHLd, k_BHLd, v_BHLd = qkv.permute(2, 0, 3, 1, 4)
        # Padding stands after the events, so the causal mask alone hides it.
        mixed = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=True)
        x_BLD = x_BLD + self.dropout(self.attention_out(mixed.transpose(1, 2).reshape(B, L, D)))
        hidden = F.gelu(self.ffn_in(self.ffn_norm(x_BLD)))
        return x_BLD + self.dropout(self.ffn_out(hidden))


class Sasrec(nn.Module):
    """SASRec over a catalogue of ``config.num_items`` items.

    Sequences are left-aligned: position 0 is the oldest event of the window.
    """

    def __init__(self, config: SasrecConfig) -> None:
        super().__init__()
        self.config = config
        self.item = nn.Embedding(config.num_items, config.width)
        self.output = None if config.tied else nn.Embedding(config.num_items, config.width)
        self.position = nn.Embedding(config.max_length, config.width)
        self.positive = nn.Embedding(2, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.dropout) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.width)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def output_weight(self) -> Tensor:
        """What states are multiplied by to score items: float32 [N, D]."""
        return self.item.weight if self.output is None else self.output.weight

    def forward(self, items_BL: Tensor, positive_BL: Tensor) -> Tensor:
        """State after every event.

        Args:
            items_BL: int64 item indices, any valid index as padding after the last event.
            positive_BL: bool, whether the event was positive.

        Returns:
            float32 [B, L, D]; its product with `output_weight` scores the next item.
        """
        L = items_BL.shape[1]
        x_BLD = self.item(items_BL) * self.config.width**0.5
        x_BLD = x_BLD + self.position.weight[:L] + self.positive(positive_BL.long())
        x_BLD = self.dropout(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.norm(x_BLD)

    def last_scores(self, items_BL: Tensor, positive_BL: Tensor, length_B: Tensor) -> Tensor:
        """Scores of all items after the last event of each sequence: float32 [B, N]."""
        state_BLD = self(items_BL, positive_BL)
        last_BD = state_BLD[torch.arange(len(length_B)), length_B - 1]
        return last_BD @ self.output_weight.T


class _FullSoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy of M states against N items without an M × N tensor.

    The gradient is taken chunk by chunk while the logits of that chunk are at hand, so memory is
    one chunk of logits and no logit is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, state_MD: Tensor, weight_ND: Tensor, target_M: Tensor, rows: int
    ) -> Tensor:
        loss = state_MD.new_zeros(())
        state_grad_MD = torch.empty_like(state_MD)
        weight_grad_ND = torch.zeros_like(weight_ND)
        count = len(target_M)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            state, target = state_MD[part], target_M[part]
            error_mN = torch.softmax(state @ weight_ND.T, dim=1)
            row = torch.arange(len(target), device=target.device)
            # A probability that underflows still has a finite loss; its gradient is exact.
            loss -= error_mN[row, target].clamp_min(1e-38).log().sum()
            error_mN[row, target] -= 1
            state_grad_MD[part] = error_mN @ weight_ND
            weight_grad_ND.addmm_(error_mN.T, state)
        ctx.save_for_backward(state_grad_MD.div_(count), weight_grad_ND.div_(count))
        return loss / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grad_outputs
        state_grad_MD, weight_grad_ND = ctx.saved_tensors
        return state_grad_MD * grad, weight_grad_ND * grad, None, None


def full_softmax_loss(
    state_MD: Tensor, weight_ND: Tensor, target_M: Tensor, logits_bytes: int = 8 << 20
) -> Tensor:
    """Mean cross-entropy over the whole catalogue, with at most ``logits_bytes`` of logits.

    Equals ``F.cross_entropy(state_MD @ weight_ND.T, target_M)``.

    Args:
        state_MD: float32 states whose next item is predicted, M > 0.
        weight_ND: float32 item embeddings.
        target_M: int64 item indices.
    """
    rows = max(1, logits_bytes // (4 * len(weight_ND)))
    return _FullSoftmaxLoss.apply(state_MD, weight_ND, target_M, rows)
