"""What followed an item before, for the decoder to copy: the successor memory.

A narrow model learns which kinds of items follow each other, not every pair that it saw once or
twice; counts know exactly those. The memory keeps the most frequent training successors of every
item, recalls those of a request's newest events and lets the decoder copy their codes: at each
level the recalled items whose earlier codes agree with what is already written compete with the
codes that the model generates, in one softmax (after CopyNet, arXiv 1603.06393). It is an addition
of ours to arXiv 2506.13695, which has no such part; without it (``successors: 0``) the model is
the report's.

In training a sample must not find its own pair in the counts, or copying would always be right:
what the sample itself added is taken off before the look-up (leave one out).

Shapes: N items, R successors kept of each, B batch, E newest events, M = E · R recalled items,
W beams, K codebook size, Q quantiser levels, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from components.training.onerec.config import OneRecConfig
from components.training.onerec.data import Batch, Sequences

#: Buckets of a pair's weight: ``⌊4·log2(1 + weight)⌋``.
WEIGHT_BUCKETS, WEIGHT_STEPS = 40, 4
#: Buckets of a successor's share in all that followed the item: tenths.
SHARE_BUCKETS = 11
#: A pair counts this much less with every event in between.
DECAY = 0.5
#: Weights below this are what rounding left of a pair that only the sample itself had.
LEAST_WEIGHT = 1e-3
#: AdamW moves a table's entry by about the learning rate a step; scores must reach the size of
#: logits within some hundred steps.
SCORE_GAIN = 10.0
#: Pairs counted at a time.
CHUNK_TARGETS = 4_000_000


@dataclass(frozen=True)
class Successors:
    """The most frequent successors of every item.

    Attributes:
        item_NR: int32 item indices, largest weight first; -1 where there are fewer.
        weight_NR: float32, how often they followed, nearer ones counting more; 0 there.
        total_N: float32, the weights of all successors together, kept or not.
    """

    item_NR: npt.NDArray[np.int32]
    weight_NR: npt.NDArray[np.float32]
    total_N: npt.NDArray[np.float32]


def count_successors(
    train: Sequences,
    target_S: npt.NDArray[np.int64],
    num_items: int,
    *,
    successors: int,
    window: int,
) -> Successors:
    """Weigh pairs (event, training target at most ``window`` events later) of the same user.

    A pair weighs ``DECAY ** (events in between)``. Among equal weights the more frequent target
    comes first, then a fixed random order: an index may tell when an item first appeared.

    Args:
        target_S: events that are training targets.
    """
    key_P = np.zeros(0, np.int64)
    weight_P: npt.NDArray[np.float64] = np.zeros(0)
    for start in range(0, len(target_S), CHUNK_TARGETS):
        keys, weights = [key_P], [weight_P]
        event_S = target_S[start : start + CHUNK_TARGETS]
        begin_S = train.start_U1[np.searchsorted(train.start_U1, event_S, side="right") - 1]
        for distance in range(1, window + 1):
            kept_S = event_S - distance >= begin_S
            before_S = train.item_E[event_S[kept_S] - distance].astype(np.int64)
            keys.append(before_S * num_items + train.item_E[event_S[kept_S]])
            weights.append(np.full(len(before_S), DECAY ** (distance - 1)))
        key_P, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        summed = np.bincount(inverse, np.concatenate(weights), minlength=len(key_P))
        weight_P = summed.astype(np.float64)
    source_P, item_P = np.divmod(key_P, num_items)
    frequency_N = np.bincount(train.item_E[target_S], minlength=num_items)
    lot_N = np.random.default_rng(0).permutation(num_items)
    order_P = np.lexsort((lot_N[item_P], -frequency_N[item_P], -weight_P, source_P))
    source_P, item_P, weight_P = source_P[order_P], item_P[order_P], weight_P[order_P]
    place_P = np.arange(len(source_P)) - np.searchsorted(source_P, source_P)
    kept_P = place_P < successors
    item_NR = np.full((num_items, successors), -1, np.int32)
    weight_NR = np.zeros((num_items, successors), np.float32)
    item_NR[source_P[kept_P], place_P[kept_P]] = item_P[kept_P]
    weight_NR[source_P[kept_P], place_P[kept_P]] = weight_P[kept_P]
    total_N = np.bincount(source_P, weight_P, minlength=num_items).astype(np.float32)
    return Successors(item_NR, weight_NR, total_N)


@dataclass(frozen=True)
class Recall:
    """Recalled items of every request, and which of them each beam may still copy.

    Attributes:
        code_BMQ: int64 semantic ids of the recalled items.
        score_BMQ: their scores at every level, to be weighed against logits; -inf: no item.
        match_BWM: bool, the item's codes so far are those of the beam.
    """

    code_BMQ: Tensor
    score_BMQ: Tensor
    match_BWM: Tensor

    def blend(self, logits_BWK: Tensor, level: int) -> Tensor:
        """Logits float [B, W, K] after adding the mass of the copies to their codes' own."""
        if not self.code_BMQ.shape[1]:
            return logits_BWK
        score_BWM = self.score_BMQ[:, None, :, level].masked_fill(~self.match_BWM, -torch.inf)
        top_BW1 = torch.maximum(logits_BWK.amax(-1, True), score_BWM.amax(-1, True)).detach()
        mass_BWK = (logits_BWK - top_BW1).exp()
        code_BWM = self.code_BMQ[:, None, :, level].expand_as(score_BWM)
        mass_BWK = mass_BWK.scatter_add(2, code_BWM, (score_BWM - top_BW1).exp().to(mass_BWK.dtype))
        # A generated code may underflow beside a strong copy; its probability is then 0 anyway.
        return mass_BWK.clamp_min(torch.finfo(mass_BWK.dtype).tiny).log() + top_BW1

    def follow(self, parent_BW: Tensor | None, code_BW: Tensor, level: int) -> Recall:
        """The recall of new beams that extend ``parent_BW`` (None: each its own) by a code."""
        match_BWM = self.match_BWM
        if parent_BW is not None:
            match_BWM = match_BWM.gather(1, parent_BW[..., None].expand(-1, -1, match_BWM.shape[2]))
        same_BWM = self.code_BMQ[:, None, :, level] == code_BW[..., None]
        return Recall(self.code_BMQ, self.score_BMQ, match_BWM & same_BWM)


class SuccessorMemory(nn.Module):
    """Successors of every item, and how much each is worth copying.

    A recalled item's score is the sum of three learned entries: of its weight, of its share in all
    that followed the event's item, and of the event's place (newest first).
    """

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        memory, Q = config.memory, config.num_levels
        self.window = memory.window
        self.events = memory.events
        shape = (config.num_items, memory.successors)
        self.register_buffer("item_NR", torch.full(shape, -1, dtype=torch.int32))
        self.register_buffer("weight_NR", torch.zeros(shape))
        self.register_buffer("total_N", torch.zeros(config.num_items))
        self.register_buffer("code_NQ", torch.zeros(config.num_items, Q, dtype=torch.int32))
        self.weight_score = nn.Parameter(torch.zeros(WEIGHT_BUCKETS, Q))
        self.share_score = nn.Parameter(torch.zeros(SHARE_BUCKETS, Q))
        self.place_score = nn.Parameter(torch.zeros(memory.events, Q))

    def fill(self, successors: Successors, codes_NQ: npt.NDArray[np.integer]) -> None:
        """Take in the counts of the training data and the catalogue's semantic ids."""
        for name, values in (*vars(successors).items(), ("code_NQ", codes_NQ)):
            buffer = cast(Tensor, getattr(self, name))
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def forward(self, batch: Batch) -> Recall:
        """Recall for every request; in training without the sample's own pair."""
        recent_BE = batch.recent_BE[:, : self.events]
        known_BE = recent_BE >= 0
        source_BE = recent_BE.clamp_min(0)
        item_BER = cast(Tensor, self.item_NR)[source_BE]
        weight_BER = cast(Tensor, self.weight_NR)[source_BE]
        total_BE1 = cast(Tensor, self.total_N)[source_BE][..., None]
        if self.training:
            own_BE1 = self._own_weight(batch)[..., None]
            is_target_BER = item_BER == batch.target_item_B[:, None, None]
            weight_BER = weight_BER - own_BE1 * is_target_BER
            total_BE1 = total_BE1 - own_BE1
        real_BER = known_BE[..., None] & (item_BER >= 0) & (weight_BER > LEAST_WEIGHT)
        weight_BER = weight_BER.clamp_min(0)
        strength = (WEIGHT_STEPS * torch.log2(1 + weight_BER)).long().clamp_max(WEIGHT_BUCKETS - 1)
        share_BER = weight_BER / total_BE1.clamp_min(LEAST_WEIGHT)
        share = ((SHARE_BUCKETS - 1) * share_BER).long().clamp_max(SHARE_BUCKETS - 1)
        score_BERQ = SCORE_GAIN * (
            self.weight_score[strength]
            + self.share_score[share]
            + self.place_score[: recent_BE.shape[1], None]
        )
        score_BERQ = score_BERQ.masked_fill(~real_BER[..., None], -torch.inf)
        item_BM = item_BER.clamp_min(0).flatten(1)
        code_BMQ = cast(Tensor, self.code_NQ)[item_BM].long()
        everything_B1M = torch.ones_like(item_BM, dtype=torch.bool)[:, None]
        return Recall(code_BMQ, score_BERQ.flatten(1, 2), everything_B1M)

    def _own_weight(self, batch: Batch) -> Tensor:
        """What each sample itself added to the pairs (event's item, its target): float [B, E].

        An item that occurs twice in the window added twice to the same pair.
        """
        window_BW = batch.recent_BE[:, : self.window]
        weight_W = DECAY ** torch.arange(window_BW.shape[1], device=window_BW.device)
        recent_BE = batch.recent_BE[:, : self.events]
        same_BEW = (recent_BE[..., None] == window_BW[:, None]) & (window_BW >= 0)[:, None]
        return same_BEW.to(weight_W.dtype) @ weight_W


def nothing_recalled(batch_size: int, num_levels: int, device: torch.device) -> Recall:
    """The recall of a model without a memory."""
    code_BMQ = torch.zeros(batch_size, 0, num_levels, dtype=torch.long, device=device)
    match_BWM = torch.zeros(batch_size, 1, 0, dtype=torch.bool, device=device)
    return Recall(code_BMQ, code_BMQ.float(), match_BWM)
