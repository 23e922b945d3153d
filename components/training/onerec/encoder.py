"""The user encoder's pathways and layers (arXiv 2506.13695, section 2.2).

Shapes: B batch, L events of a pathway, T tags, F static features, q queries, S encoder positions,
D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.training.onerec.attention import Attention, feed_forward
from components.training.onerec.data import (
    DURATION_BUCKETS,
    FEEDBACK_BITS,
    GAP_BUCKETS,
    WATCH_BUCKETS,
    Batch,
    Events,
)
from components.training.onerec.experts import MixtureOfExperts
from components.training.onerec.qformer import QFormer
from components.training.onerec.tokens import TokenEmbedding

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig


class Pathway(Protocol):
    """One source of encoder positions; `num_positions` of them at most."""

    num_positions: int

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States float [B, L, D] and mask bool [B, L], L at most ``num_positions``."""
        ...


class StaticPathway(nn.Module):
    """h_u: what is known of the user, one position; an embedding a feature, concatenated.

    In training a share of the users, the dropout rate, is read as unknown, so that the pathway
    knows what to say of users that it is told nothing about.
    """

    num_positions = 1

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        first_F = torch.tensor([0, *config.static_rows]).cumsum(0)
        self.feature = nn.Embedding(sum(config.static_rows), config.features.static_width)
        self.register_buffer("first_F", first_F[:-1], persistent=False)
        width = len(config.static_rows) * config.features.static_width
        self.project = two_layers(width, config.d_model)
        self.unknown_rate = config.dropout

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        static_BF = batch.static_BF
        if static_BF is None:
            raise ValueError("the model reads static features, and the batch has none")
        if self.training and self.unknown_rate:
            is_kept_B1 = torch.rand(len(static_BF), 1, device=static_BF.device) >= self.unknown_rate
            static_BF = static_BF * is_kept_B1
        f_BFw = self.feature(static_BF + cast(Tensor, self.first_F))
        h_B1D = self.project(f_BFw.flatten(1))[:, None]
        return h_B1D, torch.ones(h_B1D.shape[:2], dtype=torch.bool, device=h_B1D.device)


class EventEmbedding(nn.Module):
    """Features of an event, concatenated: item, author, tags, feedback, age, watched share, length.

    The play time of the report is the watched share beside the duration of the video.
    """

    def __init__(self, config: OneRecConfig, tokens: TokenEmbedding) -> None:
        super().__init__()
        features, width = config.features, config.feature_width
        self.tokens = tokens if config.item_input != "vid" else None
        has_vid = config.item_input != "sid"
        self.vid = nn.Embedding(config.num_items, config.d_model) if has_vid else None
        self.item = nn.Linear(config.d_model, config.d_model)
        self.content = self.author = self.tag = None
        if config.content_width:
            self.content = nn.Linear(config.content_width, config.d_model, bias=False)
        self.width = config.d_model + 4 * width
        if config.author_rows:
            self.author = nn.Embedding(config.author_rows, features.author_width)
            self.width += features.author_width
        if config.tag_rows:
            self.tag = nn.Embedding(config.tag_rows, width)
            self.width += width
        self.feedback = nn.Parameter(torch.empty(FEEDBACK_BITS, width))
        self.gap = nn.Embedding(GAP_BUCKETS, width)
        self.watch = nn.Embedding(WATCH_BUCKETS, width)
        self.duration = nn.Embedding(DURATION_BUCKETS, width)
        # Not of the type of the events: gloo sends no 16 bits, and buffers are sent to all workers.
        bits = 2 ** torch.arange(FEEDBACK_BITS, dtype=torch.int32)
        self.register_buffer("bits", bits, persistent=False)

    def forward(self, events: Events) -> Tensor:
        set_BLb = (events.feedback_BL[..., None] & cast(Tensor, self.bits)) != 0
        item_BLD = self.item(self._items(events))
        if self.content is not None:
            assert events.content_BLD is not None
            # Lengths of embeddings differ by an order of magnitude, and say little.
            content_BLD = F.rms_norm(events.content_BLD, events.content_BLD.shape[-1:])
            item_BLD = item_BLD + self.content(content_BLD.to(item_BLD.dtype))
        parts = [
            item_BLD,
            set_BLb.to(self.feedback.dtype) @ self.feedback,
            self.gap(events.gap_BL.int()),
            self.watch(events.watch_BL.int()),
            self.duration(events.duration_BL.int()),
        ]
        if self.author is not None:
            parts.append(self.author(events.author_BL))
        if self.tag is not None:
            assert events.tag_BLT is not None
            assert events.tag_weight_BLT is not None
            mean_ED = F.embedding_bag(
                events.tag_BLT.flatten(0, 1),
                self.tag.weight,
                mode="sum",
                per_sample_weights=events.tag_weight_BLT.flatten(0, 1).to(self.tag.weight.dtype),
            )
            parts.append(mean_ED.unflatten(0, events.tag_BLT.shape[:2]))
        return torch.cat(parts, dim=-1)

    def _items(self, events: Events) -> Tensor:
        if self.tokens is None:
            return cast(nn.Embedding, self.vid)(events.item_BL)
        item_BLD = self.tokens.items(events.sid_BLQ)
        return item_BLD if self.vid is None else item_BLD + self.vid(events.item_BL)


class EventPathway(nn.Module):
    """h_s, h_p: the events of one pathway, a position each."""

    def __init__(self, name: str, num_positions: int, events: EventEmbedding, d_model: int) -> None:
        super().__init__()
        self.name, self.num_positions = name, num_positions
        self.events = events
        self.project = two_layers(events.width, d_model)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        events = batch.pathways[self.name]
        # Padding has item 0 and its features: a request without any event, which must be let see
        # one position, would read them.
        h_BLD = self.project(self.events(events)) * events.mask_BL[..., None]
        return h_BLD, events.mask_BL


class LifelongPathway(nn.Module):
    """h_l: queries that read a long history, whose events stand for their clusters (`lifelong`).

    A row that stands for several events is read once, with the logarithm of their number added to
    its scores: softmax then gives it what it would give as many equal rows.
    """

    def __init__(self, config: OneRecConfig, events: EventEmbedding) -> None:
        super().__init__()
        self.num_positions = config.lifelong.queries
        self.events = events
        self.project = two_layers(events.width, config.d_model)
        self.qformer = QFormer(
            queries=config.lifelong.queries,
            width=config.d_model,
            states=config.d_model,
            blocks=config.lifelong.blocks,
            heads=config.heads,
            ffn=config.ffn,
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        events = batch.pathways["lifelong"]
        assert events.count_BL is not None
        v_BLD = self.project(self.events(events))
        has_any_B1 = events.mask_BL.any(1, keepdim=True)
        # Nobody reads what the queries of an empty history found; it must be a number all the same.
        score_BL = torch.where(has_any_B1, events.count_BL, 1.0).log()
        h_BqD = self.qformer(v_BLD, score_BL.to(v_BLD.dtype))
        return h_BqD, has_any_B1.expand(-1, self.num_positions)


def two_layers(width: int, d_model: int) -> nn.Sequential:
    """``h = Dense(LeakyReLU(Dense(f)))`` of every pathway (section 2.2)."""
    return nn.Sequential(nn.Linear(width, d_model), nn.LeakyReLU(), nn.Linear(d_model, d_model))


def build_pathways(config: OneRecConfig, tokens: TokenEmbedding) -> nn.ModuleDict:
    """The encoder's pathways in the order of their positions: ``[h_u; h_s; h_p; h_l]``."""
    events = EventEmbedding(config, tokens)
    pathways: dict[str, nn.Module] = {}
    if config.static_rows:
        pathways["static"] = StaticPathway(config)
    lengths = {"short_term": config.short_term, "positive_feedback": config.positive_feedback}
    for name, length in lengths.items():
        if length:
            pathways[name] = EventPathway(name, length, events, config.d_model)
    if config.lifelong.entries:
        pathways["lifelong"] = LifelongPathway(config, events)
    return nn.ModuleDict(pathways)


class EncoderLayer(nn.Module):
    """``z + SelfAttn(RMSNorm(z))``, ``z + FFN(RMSNorm(z))``; every position sees every other."""

    def __init__(self, config: OneRecConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.ffn = feed_forward(config, "encoder", layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, z_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        normed_BSD = self.attention_norm(z_BSD)
        context = self.attention.keys_values(normed_BSD)
        z_BSD = z_BSD + self.dropout(self.attention(normed_BSD, context, mask_B11S))
        normed_BSD = self.ffn_norm(z_BSD)
        if mask_B11S is not None and isinstance(self.ffn, MixtureOfExperts):
            return z_BSD + self.dropout(self.ffn(normed_BSD, mask_B11S[:, 0, 0]))
        return z_BSD + self.dropout(self.ffn(normed_BSD))
