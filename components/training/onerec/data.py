"""Behaviour sequences as flat arrays, and batches of the encoder's pathways cut out of them.

A sample is one event: the encoder reads what its user did *before* it and the decoder writes its
item's semantic id (point-wise, arXiv 2506.13695 section 2.3). Nothing of the event itself but its
time (that of the request) is read; no later event is. Everything is NumPy over whole batches.

Shapes: E events, U users, N items, Q levels, S samples, B batch, L events of a pathway, T tags, F
static features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from components.training.onerec.features import UNKNOWN_USER, SideInformation

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig


Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
#: Events that are learned as targets.
Targets = Literal["positive", "all"]

#: Bits of `feedback` in sequence tables (components.data.contracts.FEEDBACK), and behind them that
#: of `positive`.
POSITIVE_BIT = 8
FEEDBACK_BITS = POSITIVE_BIT + 1
#: Upper edges of the watched share of a video; bucket 0 = unknown.
WATCH_RATIO_EDGES = np.array(
    [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0]
)
WATCH_BUCKETS = len(WATCH_RATIO_EDGES) + 2
#: ``2 + ⌊2·log2(duration)⌋`` up to 2^11.5 s; bucket 0 = unknown.
DURATION_BUCKETS = 24
#: ``1 + ⌊log2(1 + gap)⌋``: seconds to beyond ten years; bucket 0 = padding.
GAP_BUCKETS = 32


@dataclass(frozen=True)
class Sequences:
    """Events of many users, one after the other, each user's oldest first: 20 bytes an event.

    Attributes:
        item_E: int32 item index.
        time_ms_E: int64.
        feedback_E: int16 bits: bit i = FEEDBACK[i], bit 8 = positive.
        watch_E, duration_E: uint8 buckets.
        play_s_E: float32 seconds of play time, NaN where it is not known.
        start_U1: int64 [U + 1], events of user u are ``start_U1[u] … start_U1[u + 1] - 1``.
        positive_event: int32 or int64, events that are positive, ascending.
        positives_before_E1: as many positive events lie before event e, of all users.
        user_id_U: int64, `UNKNOWN_USER` where it is not known.
        side: what is known beside the events (`Features.attach`); None: nothing is.
    """

    item_E: Int32
    time_ms_E: Int64
    feedback_E: npt.NDArray[np.int16]
    watch_E: UInt8
    duration_E: UInt8
    play_s_E: Float32
    start_U1: Int64
    positive_event: npt.NDArray[np.integer]
    positives_before_E1: npt.NDArray[np.integer]
    user_id_U: Int64
    side: SideInformation | None = None

    @property
    def num_users(self) -> int:
        return len(self.start_U1) - 1

    def train_targets(self, which: Targets) -> Int64:
        """Events to learn as targets: all but each user's first, or the positive ones of them."""
        wanted_E = np.ones(len(self.item_E), bool)
        if which == "positive":
            wanted_E = self.feedback_E >> POSITIVE_BIT == 1
        begin = self.start_U1[:-1]
        wanted_E[begin[begin < len(wanted_E)]] = False
        return np.flatnonzero(wanted_E)

    def example_targets(self) -> Int64:
        """The last event of every user: the target of a table of examples."""
        return self.start_U1[1:] - 1


def read_sequences(batches: Iterable[pa.RecordBatch]) -> Sequences:
    """Sequences of a train table, or of a table of examples whose target becomes the last event.

    Args:
        batches: rows with the list columns ``item_index, timestamp_ms, feedback, positive,
            watch_time_s, duration_s``, for examples ``target, target_timestamp_ms``, and
            ``user_id`` where it is known.
    """
    parts: dict[str, list[npt.NDArray]] = {}
    for batch in batches:
        for name, values in _read_batch(batch).items():
            parts.setdefault(name, []).append(values)
    if not parts:
        parts = {name: [np.zeros(0, kind)] for name, kind in _EVENT_TYPES.items()}
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    positive_E = columns["feedback"] >> POSITIVE_BIT
    index = np.int32 if len(positive_E) < 2**31 else np.int64
    return Sequences(
        item_E=columns["item"],
        time_ms_E=columns["time_ms"],
        feedback_E=columns["feedback"],
        watch_E=columns["watch"],
        duration_E=columns["duration"],
        play_s_E=columns["play_s"],
        start_U1=np.concatenate([[0], np.cumsum(columns["length"])]).astype(np.int64),
        positive_event=np.flatnonzero(positive_E).astype(index),
        positives_before_E1=np.concatenate([[0], np.cumsum(positive_E, dtype=index)]).astype(index),
        user_id_U=columns["user_id"],
    )


_EVENT_TYPES: dict[str, Any] = {
    "length": np.int64,
    "user_id": np.int64,
    "item": np.int32,
    "time_ms": np.int64,
    "feedback": np.int16,
    "watch": np.uint8,
    "duration": np.uint8,
    "play_s": np.float32,
}


def _read_batch(batch: pa.RecordBatch) -> dict[str, npt.NDArray]:
    length = batch.column("item_index").value_lengths().to_numpy(zero_copy_only=False)

    def events(name: str) -> npt.NDArray:
        return batch.column(name).flatten().to_numpy(zero_copy_only=False)

    watch_s, duration_s = events("watch_time_s"), events("duration_s")
    flags = events("feedback").astype(np.int16)
    columns: dict[str, npt.NDArray] = {
        "item": events("item_index").astype(np.int32),
        "time_ms": events("timestamp_ms").astype(np.int64),
        "feedback": flags | events("positive").astype(np.int16) << POSITIVE_BIT,
        "watch": watch_buckets(watch_s, duration_s),
        "duration": duration_buckets(duration_s),
        "play_s": watch_s,
    }
    if "target" in batch.schema.names:
        # The target's own signals are unknown to a request: zero in bits and buckets.
        targets = {
            "item": batch.column("target").to_numpy(),
            "time_ms": batch.column("target_timestamp_ms").to_numpy(),
            "play_s": np.nan,
        }
        ends = np.cumsum(length)
        columns = {
            name: np.insert(values, ends, targets.get(name, 0)) for name, values in columns.items()
        }
        length = length + 1
    columns["length"] = length
    columns["user_id"] = np.full(len(length), UNKNOWN_USER)
    if "user_id" in batch.schema.names:
        columns["user_id"] = batch.column("user_id").fill_null(UNKNOWN_USER).to_numpy()
    return {name: columns[name].astype(kind) for name, kind in _EVENT_TYPES.items()}


def watch_buckets(watch_s: npt.NDArray, duration_s: npt.NDArray) -> UInt8:
    """Bucket of the watched share; 0 where it is unknown (NaN, or no duration)."""
    known = np.isfinite(watch_s) & (duration_s > 0)
    ratio = np.where(known, watch_s, 0) / np.where(known, duration_s, 1)
    return np.where(known, 1 + np.digitize(ratio, WATCH_RATIO_EDGES), 0).astype(np.uint8)


def duration_buckets(duration_s: npt.NDArray) -> UInt8:
    """Bucket of a video's duration; 0 where it is unknown."""
    known = np.isfinite(duration_s) & (duration_s > 0)
    octave = np.floor(2 * np.log2(np.where(known, duration_s, 1)))
    return np.where(known, np.clip(2 + octave, 1, DURATION_BUCKETS - 1), 0).astype(np.uint8)


def gap_buckets(gap_ms: Int64) -> UInt8:
    """Bucket of the time from an event to the request; an event is never in the future."""
    seconds = np.maximum(gap_ms, 0) / 1000.0
    return np.minimum(1 + np.log2(1 + seconds), GAP_BUCKETS - 1).astype(np.uint8)


@dataclass
class Events:
    """Events of one pathway, newest first, padding behind.

    Attributes:
        item_BL: int64 item indices (padding: 0).
        sid_BLQ: int64 codes (padding: 0).
        feedback_BL: int16 bits (padding: 0).
        gap_BL, watch_BL, duration_BL: uint8 buckets (padding: 0).
        mask_BL: bool, True = a real event.
        author_BL: int64 rows of authors (0: unknown); None where the model reads none.
        tag_BLT: int64 rows of tags (0: none); None where the model reads none.
        tag_weight_BLT: float32 weights of the tags, which sum to 1 or are all 0.
        content_BLD: float32 embeddings of the items; None where the model reads none.
        count_BL: float32 events that a row stands for; None: one each. Their order says nothing.
    """

    item_BL: Tensor
    sid_BLQ: Tensor
    feedback_BL: Tensor
    gap_BL: Tensor
    watch_BL: Tensor
    duration_BL: Tensor
    mask_BL: Tensor
    author_BL: Tensor | None = None
    tag_BLT: Tensor | None = None
    tag_weight_BLT: Tensor | None = None
    content_BLD: Tensor | None = None
    count_BL: Tensor | None = None

    def to(self, device: str | torch.device) -> Events:
        values = (_moved(getattr(self, f.name), device) for f in fields(self))
        return Events(*values)  # type: ignore[arg-type]


@dataclass
class Batch:
    """Requests and the semantic ids to write.

    Attributes:
        pathways: input of every pathway of events, by its name.
        target_BQ: int64 codes of the targets; or n of each request, one request's after another's.
        fold_B: int64, the table of the successor memory that a training sample may read.
        static_BF: int64 rows of the users' static features; None where the model reads none.
        is_padded: whether any encoder position may be padding; known where batches are made,
            because a device would have to be waited for to be asked.
    """

    pathways: dict[str, Events]
    target_BQ: Tensor
    fold_B: Tensor
    static_BF: Tensor | None = None
    is_padded: bool = True

    def to(self, device: str | torch.device) -> Batch:
        pathways = {name: events.to(device) for name, events in self.pathways.items()}
        moved = {f.name: _moved(getattr(self, f.name), device) for f in fields(self)[1:4]}
        return Batch(pathways, **moved, is_padded=self.is_padded)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.target_BQ)


def _moved(values: Tensor | None, device: str | torch.device) -> Tensor | None:
    return None if values is None else values.to(device, non_blocking=True)


def _has_padding(pathway: str, events: Events) -> bool:
    """Whether positions of a pathway are padding; a lifelong one is read by queries, if at all."""
    mask_BL = events.mask_BL
    return not bool(mask_BL.any(1).all() if pathway == "lifelong" else mask_BL.all())


def assemble(
    sequences: Sequences,
    event_B: Int64,
    codes_NQ: npt.NDArray[np.integer],
    config: OneRecConfig,
    fold_E: UInt8 | None = None,
) -> Batch:
    """The batch of some samples.

    Args:
        sequences: with side information, if the model reads any.
        event_B: target events; their users' earlier events are the history.
        codes_NQ: semantic ids of the catalogue.
        fold_E: the fold of every event, for training.

    Raises:
        ValueError: the model reads side information that the sequences lack.
    """
    user_B = np.searchsorted(sequences.start_U1, event_B, side="right") - 1
    begin_B = sequences.start_U1[user_B]
    reader = _Reader(sequences, sequences.time_ms_E[event_B], codes_NQ, config)
    newest_BL = event_B[:, None] - 1 - np.arange(config.short_term)
    pathways = {"short_term": reader.events(newest_BL, newest_BL >= begin_B[:, None])}
    if config.positive_feedback:
        before_B = sequences.positives_before_E1[event_B].astype(np.int64)
        first_B = sequences.positives_before_E1[begin_B].astype(np.int64)
        nth_BL = before_B[:, None] - 1 - np.arange(config.positive_feedback)
        inside_BL = nth_BL >= first_B[:, None]
        positive = sequences.positive_event
        event_BL = positive[np.where(inside_BL, nth_BL, 0)] if len(positive) else nth_BL
        pathways["positive_feedback"] = reader.events(event_BL, inside_BL)
    if config.lifelong.entries:
        pathways["lifelong"] = reader.lifelong(event_B)
    static_BF = None
    if config.static_rows:
        static_BF = torch.from_numpy(reader.side.static_SF[user_B].astype(np.int64))
    target_BQ = codes_NQ[sequences.item_E[event_B]].astype(np.int64)
    fold_B = np.zeros(len(event_B), np.int64) if fold_E is None else fold_E[event_B]
    return Batch(
        pathways,
        torch.from_numpy(target_BQ),
        torch.from_numpy(fold_B.astype(np.int64)),
        static_BF,
        is_padded=any(map(_has_padding, pathways, pathways.values())),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads events as features, for requests at some times."""

    sequences: Sequences
    now_B: Int64
    codes_NQ: npt.NDArray[np.integer]
    config: OneRecConfig

    @property
    def side(self) -> SideInformation:
        if self.sequences.side is None:
            raise ValueError(
                "the model reads features that these sequences lack: call Features.attach first"
            )
        return self.sequences.side

    def events(self, event_BL: npt.NDArray[np.integer], inside_BL: Bool) -> Events:
        """Events as they are; beyond the longest row there is nothing."""
        longest = max(1, int(inside_BL.sum(1).max(initial=0)))
        inside_BL = inside_BL[:, :longest]
        event_BL = np.where(inside_BL, event_BL[:, :longest], 0)
        tags = None
        if self.config.tag_rows:
            items, item_BL = self.side.items, self.sequences.item_E[event_BL]
            tags = items.tag_NT[item_BL], items.tag_weight_NT[item_BL] * inside_BL[..., None]
        return self._features(
            event_BL,
            inside_BL,
            self.sequences.time_ms_E[event_BL],
            self.sequences.watch_E[event_BL],
            self.sequences.duration_E[event_BL],
            tags,
        )

    def lifelong(self, event_B: Int64) -> Events:
        """The newest events as their clusters, an event of none as it is."""
        clusters, sequences = self.side.clusters, self.sequences
        if clusters is None or clusters.config != self.config.lifelong:
            raise ValueError("the model reads other lifelong clusters: call Features.attach for it")
        rows = clusters.rows(sequences.start_U1, event_B)
        event_BL, is_one_BL = rows.event_BL, rows.cluster_BL < 0
        tags = None
        if self.config.tag_rows:
            items, item_BL = self.side.items, sequences.item_E[event_BL]
            tags = clusters.tags(rows.cluster_BL, items, item_BL)

        def mean_or_own(mean_C: npt.NDArray, own_E: npt.NDArray) -> npt.NDArray:
            mean_BL = np.append(mean_C, own_E[:1])[rows.cluster_BL]
            return np.where(is_one_BL, own_E[event_BL], mean_BL)

        read = self._features(
            event_BL,
            rows.count_BL > 0,
            mean_or_own(clusters.time_ms_C, sequences.time_ms_E),
            mean_or_own(clusters.watch_C, sequences.watch_E),
            mean_or_own(clusters.duration_C, sequences.duration_E),
            tags,
        )
        read.count_BL = torch.from_numpy(rows.count_BL.astype(np.float32))
        return read

    def _features(
        self,
        event_BL: npt.NDArray[np.integer],
        inside_BL: Bool,
        time_ms_BL: Int64,
        watch_BL: UInt8,
        duration_BL: UInt8,
        tags: tuple[npt.NDArray[np.integer], npt.NDArray[np.floating]] | None,
    ) -> Events:
        real_BL = inside_BL.astype(np.uint8)
        item_BL = self.sequences.item_E[event_BL].astype(np.int64) * inside_BL
        sid_BLQ = self.codes_NQ[item_BL].astype(np.int64) * inside_BL[..., None]
        gap_BL = gap_buckets(self.now_B[:, None] - time_ms_BL)
        author_BL = tag_BLT = weight_BLT = content_BLD = None
        if self.config.author_rows:
            author_BL = torch.from_numpy(self.side.items.author_N[item_BL] * inside_BL)
        if tags is not None:
            tag_BLT = torch.from_numpy(tags[0].astype(np.int64) * inside_BL[..., None])
            weight_BLT = torch.from_numpy(tags[1].astype(np.float32) * inside_BL[..., None])
        if self.config.content_width:
            if self.side.items.content_ND is None:
                raise ValueError("the model reads items' content, and their features have none")
            content_BLD = torch.from_numpy(
                self.side.items.content_ND[item_BL] * inside_BL[..., None].astype(np.float32)
            )
        return Events(
            torch.from_numpy(item_BL),
            torch.from_numpy(sid_BLQ),
            torch.from_numpy(self.sequences.feedback_E[event_BL] * real_BL),
            torch.from_numpy(gap_BL * real_BL),
            torch.from_numpy(watch_BL * real_BL),
            torch.from_numpy(duration_BL * real_BL),
            torch.from_numpy(inside_BL),
            author_BL,
            tag_BLT,
            weight_BLT,
            content_BLD,
        )
