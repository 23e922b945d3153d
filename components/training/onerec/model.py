"""OneRec's encoder-decoder over semantic ids (arXiv 2506.13695, sections 2.2 and 2.3).

Architecture and point-wise next-token loss only; it knows nothing of tables, tries or optimisers.
What the report leaves open and is chosen here: RMSNorm before every sublayer and at the end
(printed only before the feed-forward), the sum of an item's level embeddings as its input, a GELU
feed-forward with two matrices (the report's parameter counts fit two, not three), and output heads
that share their weights with the token embedding. What the decoder may copy besides comes from the
successor memory, an addition of ours.

Shapes: B batch, L events of a pathway, S encoder positions, T decoder positions, W beams, D width,
H heads, d width of a head, K codebook size, Q quantiser levels, F width of an event feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.training.onerec.config import OneRecConfig
from components.training.onerec.data import (
    DURATION_BUCKETS,
    FEEDBACK_BITS,
    GAP_BUCKETS,
    WATCH_BUCKETS,
    Batch,
    Events,
)
from components.training.onerec.memory import Recall, SuccessorMemory, nothing_recalled

KeysValues = tuple[Tensor, Tensor]

#: Standard deviation of weights at the report's width.
INIT_STD, INIT_WIDTH = 0.02, 1024


class Pathway(Protocol):
    """One source of encoder positions; `num_positions` of them at most.

    A further pathway (static, lifelong) is one more module of this face in `build_pathways`.
    """

    num_positions: int

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States float [B, L, D] and mask bool [B, L], L at most ``num_positions``."""
        ...


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


def feed_forward(config: OneRecConfig) -> nn.Module:
    """The feed-forward of a layer: the one place where a mixture of experts is put in."""
    return nn.Sequential(
        nn.Linear(config.d_model, config.ffn, bias=False),
        nn.GELU(),
        _residual(nn.Linear(config.ffn, config.d_model, bias=False)),
    )


def _residual(linear: nn.Linear) -> nn.Linear:
    """Marks a projection that is added to the residual stream: it starts smaller."""
    linear.is_residual = True  # type: ignore[assignment]
    return linear


class Attention(nn.Module):
    """Multi-head attention whose keys and values may be computed once and used many times."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key_value = nn.Linear(config.d_model, 2 * config.d_model, bias=False)
        self.out = _residual(nn.Linear(config.d_model, config.d_model, bias=False))

    def queries(self, x_BTD: Tensor) -> Tensor:
        """[B, H, T, d]"""
        return self.query(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)

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


class OneRec(nn.Module):
    """Writes the semantic id of the next item, coarse to fine, from what a user did."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = TokenEmbedding(config)
        self.pathways = build_pathways(config, self.tokens)
        positions = sum(cast(Pathway, p).num_positions for p in self.pathways.values())
        self.position = nn.Parameter(torch.empty(positions, config.d_model))
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.RMSNorm(config.d_model)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.RMSNorm(config.d_model)
        self.memory = SuccessorMemory(config) if config.memory.successors else None
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02) at width 1024 and wider in narrower layers, so that signals keep their size.

        Projections into the residual stream are smaller by √(2 · layers). The memory starts
        without preferences, and what no user met keeps the embedding of its semantic id alone.
        """
        layers = self.config.encoder_layers + self.config.decoder_layers
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", ".vid.weight")) or name.startswith("memory."):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(
                    parameter, std=INIT_STD * math.sqrt(INIT_WIDTH / parameter.shape[1])
                )
        for module in self.modules():
            if isinstance(module, nn.Linear) and getattr(module, "is_residual", False):
                module.weight.data /= math.sqrt(2 * layers)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Encoder output float [B, S, D] and its mask bool [B, 1, 1, S]."""
        states, masks, offset = [], [], 0
        for module in self.pathways.values():
            pathway = cast(Pathway, module)
            h_BLD, mask_BL = pathway(batch)
            states.append(h_BLD + self.position[offset : offset + h_BLD.shape[1]])
            masks.append(mask_BL)
            offset += pathway.num_positions
        mask_BS = torch.cat(masks, 1)
        # Without any event there is nothing to attend to: let such a request see one padding.
        mask_BS[:, 0] |= ~mask_BS.any(1)
        mask_B11S = mask_BS[:, None, None]
        z_BSD = self.dropout(torch.cat(states, 1))
        for layer in self.encoder:
            z_BSD = layer(z_BSD, mask_B11S)
        return self.encoder_norm(z_BSD), mask_B11S

    def contexts(self, z_BSD: Tensor) -> list[KeysValues]:
        """Keys and values of the encoder output for every decoder layer, once a request."""
        return [cast(DecoderLayer, x).cross_attention.keys_values(z_BSD) for x in self.decoder]

    def recall(self, batch: Batch) -> Recall:
        """What the decoder may copy, once a request."""
        if self.memory is None:
            return nothing_recalled(len(batch), self.config.num_levels, self.position.device)
        return cast(Recall, self.memory(batch))

    def start_rows(self, batch_size: int) -> Tensor:
        """The BOS token of every request: int64 [B, 1]."""
        return torch.full((batch_size, 1), self.tokens.bos, device=self.position.device)

    def step(
        self,
        row_BW: Tensor,
        past: Sequence[list[KeysValues]],
        contexts: Sequence[KeysValues],
        mask_B11S: Tensor,
    ) -> Tensor:
        """States float [B, W, D] after one more token of every beam; ``past`` grows in place."""
        x_BWD = self.tokens(row_BW)
        for module, own, context in zip(self.decoder, past, contexts, strict=True):
            x_BWD = cast(DecoderLayer, module).step(x_BWD, own, context, mask_B11S)
        return self.decoder_norm(x_BWD)

    def logits(self, x_BTD: Tensor, level: int, recall: Recall) -> Tensor:
        """Scores of the K codes of one level, generated and copied: float32 [B, T, K]."""
        return recall.blend((x_BTD @ self.tokens.level_weight(level).T).float(), level)

    def level_logits(
        self, z_BSD: Tensor, mask_B11S: Tensor, sid_BQ: Tensor, recall: Recall
    ) -> list[Tensor]:
        """Teacher-forced scores [B, K] of every level: input [BOS, s¹ … s^(Q-1)]."""
        rows = self.tokens.rows(sid_BQ[:, :-1])
        x_BTD = self.dropout(self.tokens(torch.cat([self.start_rows(len(sid_BQ)), rows], 1)))
        for layer, context in zip(self.decoder, self.contexts(z_BSD), strict=True):
            x_BTD = layer(x_BTD, context, mask_B11S)
        x_BTD = self.decoder_norm(x_BTD)
        logits = []
        for level in range(self.config.num_levels):
            logits.append(self.logits(x_BTD[:, level : level + 1], level, recall)[:, 0])
            recall = recall.follow(None, sid_BQ[:, level : level + 1], level)
        return logits

    def sid_log_probs(self, batch: Batch, sid_BQ: Tensor) -> Tensor:
        """``log P(s^l | s^<l, user)`` of every level: float [B, Q]."""
        logits = self.level_logits(*self.encode(batch), sid_BQ, self.recall(batch))
        picked = [-F.cross_entropy(x_BK, s, reduction="none") for x_BK, s in zip(logits, sid_BQ.T)]
        return torch.stack(picked, 1)

    def forward(self, batch: Batch) -> Tensor:
        """Next-token loss of every level, mean over the batch: float [Q]; L_NTP is their sum."""
        return -self.sid_log_probs(batch, batch.target_BQ).float().mean(0)
