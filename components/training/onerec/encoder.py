"""The user encoder's pathways and layers (arXiv 2506.13695, section 2.2).

Shapes: B batch, L events of a pathway, S encoder positions, D width, F width of an event feature.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from components.training.onerec.attention import Attention, feed_forward
from components.training.onerec.config import OneRecConfig
from components.training.onerec.data import (
    DURATION_BUCKETS,
    FEEDBACK_BITS,
    GAP_BUCKETS,
    WATCH_BUCKETS,
    Batch,
    Events,
)
from components.training.onerec.tokens import TokenEmbedding


class Pathway(Protocol):
    """One source of encoder positions; `num_positions` of them at most.

    A further pathway (static, lifelong) is one more module of this face in `build_pathways`.
    """

    num_positions: int

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States float [B, L, D] and mask bool [B, L], L at most ``num_positions``."""
        ...


class EventEmbedding(nn.Module):
    """Features of an event: its item, feedback, age, watched share and duration, concatenated."""

    def __init__(self, config: OneRecConfig, tokens: TokenEmbedding) -> None:
        super().__init__()
        self.tokens = tokens
        self.vid = nn.Embedding(config.num_items, config.d_model) if config.vid else None
        self.item = nn.Linear(config.d_model, config.d_model)
        self.feedback = nn.Parameter(torch.empty(FEEDBACK_BITS, config.feature_width))
        self.gap = nn.Embedding(GAP_BUCKETS, config.feature_width)
        self.watch = nn.Embedding(WATCH_BUCKETS, config.feature_width)
        self.duration = nn.Embedding(DURATION_BUCKETS, config.feature_width)
        self.width = config.d_model + 4 * config.feature_width
        bits = 2 ** torch.arange(FEEDBACK_BITS, dtype=torch.uint8)
        self.register_buffer("bits", bits, persistent=False)

    def forward(self, events: Events) -> Tensor:
        set_BLb = (events.feedback_BL[..., None] & cast(Tensor, self.bits)) != 0
        item_BLD = self.tokens.items(events.sid_BLQ)
        if self.vid is not None:
            item_BLD = item_BLD + self.vid(events.item_BL)
        return torch.cat(
            [
                self.item(item_BLD),
                set_BLb.to(self.feedback.dtype) @ self.feedback,
                self.gap(events.gap_BL.int()),
                self.watch(events.watch_BL.int()),
                self.duration(events.duration_BL.int()),
            ],
            dim=-1,
        )


class EventPathway(nn.Module):
    """``h = Dense(LeakyReLU(Dense(f)))`` over the events of one pathway (section 2.2)."""

    def __init__(self, name: str, num_positions: int, events: EventEmbedding, d_model: int) -> None:
        super().__init__()
        self.name, self.num_positions = name, num_positions
        self.events = events
        self.project = nn.Sequential(
            nn.Linear(events.width, d_model), nn.LeakyReLU(), nn.Linear(d_model, d_model)
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        events = batch.pathways[self.name]
        return self.project(self.events(events)), events.mask_BL


def build_pathways(config: OneRecConfig, tokens: TokenEmbedding) -> nn.ModuleDict:
    """The encoder's pathways in the order of their positions."""
    events = EventEmbedding(config, tokens)
    lengths = {"short_term": config.short_term, "positive_feedback": config.positive_feedback}
    return nn.ModuleDict(
        {
            name: EventPathway(name, length, events, config.d_model)
            for name, length in lengths.items()
            if length
        }
    )


class EncoderLayer(nn.Module):
    """``z + SelfAttn(RMSNorm(z))``, ``z + FFN(RMSNorm(z))``; every position sees every other."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.ffn = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, z_BSD: Tensor, mask_B11S: Tensor) -> Tensor:
        normed_BSD = self.attention_norm(z_BSD)
        context = self.attention.keys_values(normed_BSD)
        z_BSD = z_BSD + self.dropout(self.attention(normed_BSD, context, mask_B11S))
        return z_BSD + self.dropout(self.ffn(self.ffn_norm(z_BSD)))
