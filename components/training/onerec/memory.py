"""What followed an item before, for the decoder to copy: the successor memory.

A narrow model learns which kinds of items follow each other, not every pair that it saw once or
twice; counts know exactly those. The memory keeps the most frequent training successors of every
item, recalls those of a request's newest events and lets the decoder copy their codes: at each
level the recalled items whose earlier codes agree with what is already written compete with the
codes that the model generates, in one softmax (after CopyNet, arXiv 1603.06393). It is an addition
of ours to arXiv 2506.13695, which has no such part; without it (``successors: 0``) the model is
the report's.

In training a sample must find what a request will find: counts without its own pairs, and where a
request comes after all that was counted, without those of its future. So training targets are dealt
into folds and every fold has a table of its own (`Folds`); the table of all of them serves.

Shapes: N items, R successors kept of each, B batch, E newest events, M = E · R recalled items,
W beams, K codebook size, Q quantiser levels, P pairs, S training targets, F folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from components.training.onerec.data import Batch, Sequences

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig

#: Buckets of a pair's weight: ``⌊4·log2(1 + weight)⌋``.
WEIGHT_BUCKETS, WEIGHT_STEPS = 40, 4
#: Buckets of a successor's share in all that followed the item: tenths.
SHARE_BUCKETS = 11
#: A pair counts this much less with every event in between.
DECAY = 0.5
#: Tables of training; each sample does without about so small a share of the counts.
FOLDS = 8
#: AdamW moves a table's entry by about the learning rate a step; scores must reach the size of
#: logits within some hundred steps.
SCORE_GAIN = 10.0
#: Fields of `Successors`, as buffers are named.
TABLE = ("item_FNR", "weight_FNR", "total_FN")
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
    counted = _Pairs(np.zeros(0, np.int64), np.zeros(0))
    waiting: list[_Pairs] = []
    for start in range(0, len(target_S), CHUNK_TARGETS):
        keys, weights = [], []
        event_S = target_S[start : start + CHUNK_TARGETS]
        begin_S = train.start_U1[np.searchsorted(train.start_U1, event_S, side="right") - 1]
        for distance in range(1, window + 1):
            kept_S = event_S - distance >= begin_S
            before_S = train.item_E[event_S[kept_S] - distance].astype(np.int64)
            keys.append(before_S * num_items + train.item_E[event_S[kept_S]])
            weights.append(np.full(len(before_S), DECAY ** (distance - 1)))
        waiting.append(_Pairs.summed(keys, weights))
        # Merged only when as much is waiting again: a pair is then sorted a few times, not always.
        if sum(len(pairs.key_P) for pairs in waiting) > len(counted.key_P):
            counted, waiting = _Pairs.merged([counted, *waiting]), []
    counted = _Pairs.merged([counted, *waiting])
    key_P, weight_P = counted.key_P, counted.weight_P
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
class _Pairs:
    """Weights of pairs, ``source · N + successor``, each pair once."""

    key_P: npt.NDArray[np.int64]
    weight_P: npt.NDArray[np.float64]

    @classmethod
    def summed(
        cls, keys: list[npt.NDArray[np.int64]], weights: list[npt.NDArray[np.float64]]
    ) -> _Pairs:
        key_P, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        weight_P = np.bincount(inverse, np.concatenate(weights), minlength=len(key_P))
        return cls(key_P, weight_P.astype(np.float64))

    @classmethod
    def merged(cls, parts: list[_Pairs]) -> _Pairs:
        return cls.summed([part.key_P for part in parts], [part.weight_P for part in parts])


@dataclass(frozen=True)
class Folds:
    """Which training targets a sample may know of.

    Attributes:
        fold_E: uint8, the fold of every event.
        by_time: a fold knows of all earlier folds; otherwise of all other folds.
    """

    fold_E: npt.NDArray[np.uint8]
    by_time: bool

    def known_to(self, fold: int, target_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The training targets that samples of a fold may know of."""
        fold_S = self.fold_E[target_S]
        return target_S[fold_S < fold if self.by_time else fold_S != fold]


def deal_folds(
    train: Sequences, target_S: npt.NDArray[np.int64], *, by_time: bool, seed: int
) -> Folds:
    """Folds of about equal size: spans of time, or users drawn at random.

    Args:
        by_time: requests come after everything that is counted.
    """
    if by_time:
        edges = np.quantile(train.time_ms_E[target_S], np.arange(1, FOLDS) / FOLDS)
        fold_E = np.searchsorted(edges, train.time_ms_E, side="right")
    else:
        fold_U = np.random.default_rng(seed).integers(0, FOLDS, train.num_users)
        fold_E = np.repeat(fold_U, np.diff(train.start_U1))
    return Folds(fold_E.astype(np.uint8), by_time)


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
        # At the first level all beams of a request share one row of matches.
        match_BWM = self.match_BWM.expand(-1, logits_BWK.shape[1], -1)
        score_BWM = self.score_BMQ[:, None, :, level].masked_fill(~match_BWM, -torch.inf)
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
        memory, N, Q = config.memory, config.num_items, config.num_levels
        self.events = memory.events
        code_NQ = torch.zeros(N, Q, dtype=torch.int32)
        self.register_buffer("code_NQ", code_NQ, persistent=False)
        for table in ("served", "practised"):
            self._register(table, _nothing(N, memory.successors))
        self.weight_score = nn.Parameter(torch.zeros(WEIGHT_BUCKETS, Q))
        self.share_score = nn.Parameter(torch.zeros(SHARE_BUCKETS, Q))
        self.place_score = nn.Parameter(torch.zeros(memory.events, Q))

    def fill(self, successors: Successors, codes_NQ: npt.NDArray[np.integer]) -> None:
        """Take in what serves: the counts of all training targets, the catalogue's semantic ids."""
        cast(Tensor, self.code_NQ).copy_(torch.from_numpy(np.ascontiguousarray(codes_NQ)))
        self._register("served", _stacked([successors]))

    def drop_practice(self) -> None:
        """Let go of the tables of training, which nothing that serves reads."""
        successors = cast(Tensor, self.served_item_FNR).shape[2]
        self._register("practised", _nothing(0, successors))

    def practise_on(self, tables: Sequence[Successors]) -> None:
        """Take in the tables of training, one a fold."""
        self._register("practised", _stacked(tables))

    def _register(self, table: str, tensors: tuple[Tensor, ...]) -> None:
        # Counts are no weights: they are kept beside them, not in every checkpoint.
        for name, values in zip(TABLE, tensors, strict=True):
            self.register_buffer(f"{table}_{name}", values, persistent=False)

    def forward(self, batch: Batch) -> Recall:
        """Recall for every request; in training from the table of the sample's fold."""
        recent = batch.pathways["short_term"]
        source_BE = recent.item_BL[:, : self.events]
        known_BE = recent.mask_BL[:, : self.events]
        table = "practised" if self.training else "served"
        fold_B1 = batch.fold_B[:, None] if self.training else torch.zeros_like(source_BE[:, :1])
        item_BER, weight_BER, total_BE = (
            cast(Tensor, getattr(self, f"{table}_{name}"))[fold_B1, source_BE] for name in TABLE
        )
        real_BER = known_BE[..., None] & (item_BER >= 0)
        strength = (WEIGHT_STEPS * torch.log2(1 + weight_BER)).long().clamp_max(WEIGHT_BUCKETS - 1)
        share_BER = weight_BER / total_BE[..., None].clamp_min(torch.finfo(torch.float32).tiny)
        share = ((SHARE_BUCKETS - 1) * share_BER).long().clamp_max(SHARE_BUCKETS - 1)
        score_BERQ = SCORE_GAIN * (
            self.weight_score[strength]
            + self.share_score[share]
            + self.place_score[: source_BE.shape[1], None]
        )
        score_BERQ = score_BERQ.masked_fill(~real_BER[..., None], -torch.inf)
        item_BM = item_BER.clamp_min(0).flatten(1)
        code_BMQ = cast(Tensor, self.code_NQ)[item_BM].long()
        everything_B1M = torch.ones_like(item_BM, dtype=torch.bool)[:, None]
        return Recall(code_BMQ, score_BERQ.flatten(1, 2), everything_B1M)


def _nothing(items: int, successors: int) -> tuple[Tensor, ...]:
    """One table without a successor of any item."""
    item_1NR = torch.full((1, items, successors), -1, dtype=torch.int32)
    return item_1NR, torch.zeros(item_1NR.shape), torch.zeros(1, items)


def _stacked(tables: Sequence[Successors]) -> tuple[Tensor, ...]:
    """Item [F, N, R], weight [F, N, R] and total [F, N] of some tables."""
    columns = zip(*(vars(table).values() for table in tables), strict=True)
    return tuple(torch.from_numpy(np.stack(column)) for column in columns)


def nothing_recalled(batch_size: int, num_levels: int, device: torch.device) -> Recall:
    """The recall of a model without a memory."""
    code_BMQ = torch.zeros(batch_size, 0, num_levels, dtype=torch.long, device=device)
    match_BWM = torch.zeros(batch_size, 1, 0, dtype=torch.bool, device=device)
    return Recall(code_BMQ, code_BMQ.float(), match_BWM)
