"""What the preference model reads of items, users and requests, and the labels it learns.

Everything is a function of the item, of the user's attributes, of the events before the exposure
and of its time. A signal that the source did not record is unknown, not negative: sequence tables
cannot tell the two apart, the interactions can.

Shapes: E events, U users, N items, B requests, L events of a history, O objectives, T tags of an
item, F features of a user.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from components.data.contracts import FEEDBACK
from components.data.hashing import splitmix64
from components.training.onerec.data import (
    POSITIVE_BIT,
    WATCH_RATIO_EDGES,
    Events,
    Sequences,
    assemble,
    duration_buckets,
)
from components.training.onerec.named_configs import plain_config

if TYPE_CHECKING:
    from components.training.onerec.reward.config import PScoreSize

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

#: Objectives S_o: the report's short names of the signals, and effective views by watched share.
OBJECTIVES = {
    "ctr": "click",
    "lvtr": "long_view",
    "ltr": "like",
    "wtr": "follow",
    "ftr": "forward",
    "cmtr": "comment",
    "ptr": "profile_enter",
}
VIEW, EFFECTIVE_VIEW = "vtr", 0.5
#: First bucket of the watched share that counts as an effective view.
VIEW_BUCKET = 1 + int(np.searchsorted(WATCH_RATIO_EDGES, EFFECTIVE_VIEW, side="right"))
MAX_TAGS = 8
HOURS, HOUR_MS = 24, 3_600_000
#: When a simulated request comes: tomorrow's feed.
REQUEST_AFTER_MS = 24 * HOUR_MS


@dataclass(frozen=True)
class Labels:
    """Labels of every event.

    Attributes:
        names: objectives.
        value_EO: bool.
        known_EO: bool; where it is False the value says nothing.
    """

    names: tuple[str, ...]
    value_EO: Bool
    known_EO: Bool


def known_signals(
    train: pa.Table, interactions: Iterable[pa.RecordBatch], item_ids: Int64
) -> npt.NDArray[np.uint8]:
    """Which signals of every train event the source recorded: uint8 [E], bit i = FEEDBACK[i].

    Args:
        train: train sequences; ``user_id, item_index, timestamp_ms`` are read.
        interactions: with ``user_id, item_id, timestamp`` and the signals that the source has.
        item_ids: of the catalogue, ascending.
    """
    keys = ("user", "item", "time")
    parts = []
    for batch in interactions:
        time = batch["timestamp"].cast(pa.timestamp("ms", tz="UTC")).cast(pa.int64())
        item = np.searchsorted(item_ids, batch["item_id"].to_numpy()).astype(np.int64)
        columns = [batch["user_id"].cast(pa.int64()), pa.array(item), time]
        absent = pa.repeat(False, len(batch))
        columns += [batch[n].is_valid() if n in batch.schema.names else absent for n in FEEDBACK]
        parts.append(pa.Table.from_arrays(columns, names=[*keys, *FEEDBACK]))
    length = train["item_index"].combine_chunks().value_lengths().to_numpy()
    events = pa.table(
        {
            "user": np.repeat(train["user_id"].to_numpy(), length),
            "item": train["item_index"].combine_chunks().flatten().cast(pa.int64()),
            "time": train["timestamp_ms"].combine_chunks().flatten(),
            "event": np.arange(int(length.sum())),
        }
    )
    # Of rows with the same keys nobody knows which one is the event: what one lacks is unknown.
    by_all = pa.concat_tables(parts).group_by(list(keys)).aggregate([(n, "all") for n in FEEDBACK])
    joined = events.join(by_all, keys=list(keys), join_type="left outer").sort_by("event")
    known_E = np.zeros(len(events), np.uint8)
    for bit, name in enumerate(FEEDBACK):
        known_E |= pc.fill_null(joined[f"{name}_all"], False).to_numpy().astype(np.uint8) << bit
    return known_E


def labels_of(sequences: Sequences, known_E: npt.NDArray[np.uint8]) -> Labels:
    """The label of every event for every objective of which anything is known."""
    values, known = {}, {}
    for name, signal in OBJECTIVES.items():
        bit = FEEDBACK.index(signal)
        values[name] = (sequences.feedback_E >> bit & 1).astype(bool)
        known[name] = (known_E >> bit & 1).astype(bool)
    values[VIEW] = sequences.watch_E >= VIEW_BUCKET
    known[VIEW] = sequences.watch_E > 0
    names = tuple(name for name in values if known[name].any())
    if not names:
        empty = np.zeros((len(sequences.item_E), 0), bool)
        return Labels((), empty, empty)
    value_EO, known_EO = (np.stack([x[name] for name in names], 1) for x in (values, known))
    return Labels(names, value_EO & known_EO, known_EO)


@dataclass(frozen=True)
class ItemFeatures:
    """What is known of every item, new ones too.

    Attributes:
        content_NC: float32 item embedding.
        id_N, author_N: int64 buckets of hashed ids; author 0: unknown.
        tags_NT: int64 buckets of hashed tags, 0 pads.
        duration_N: int64 buckets.
    """

    content_NC: Tensor
    id_N: Tensor
    author_N: Tensor
    tags_NT: Tensor
    duration_N: Tensor


def item_features(
    item_ids: Int64, items: pa.Table, content_NC: Tensor, size: PScoreSize
) -> ItemFeatures:
    """Features of the catalogue.

    Args:
        items: ``item_id, tags, author_id, duration_s``; items without a row know nothing.
    """
    row = pc.index_in(pa.array(item_ids), items["item_id"].combine_chunks())
    items = items.take(row)
    author = items["author_id"].combine_chunks()
    author_N = hashed(pc.fill_null(author, 0).to_numpy(), size.author_buckets)
    author_N[author.is_null().to_numpy(zero_copy_only=False)] = 0
    tags = items["tags"].combine_chunks()
    tags_NT = np.zeros((len(item_ids), MAX_TAGS), np.int64)
    count = pc.fill_null(tags.value_lengths(), 0).to_numpy()
    place = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    kept = place < MAX_TAGS
    flat = tags.flatten()
    tags_NT[np.repeat(np.arange(len(item_ids)), count)[kept], place[kept]] = _words(
        "tag", flat, size.tag_buckets
    )[kept]
    seconds = pc.fill_null(items["duration_s"].cast(pa.float32()), np.nan).to_numpy()
    return ItemFeatures(
        content_NC.float(),
        torch.from_numpy(hashed(item_ids, size.item_buckets)),
        torch.from_numpy(author_N),
        torch.from_numpy(tags_NT),
        torch.from_numpy(duration_buckets(seconds).astype(np.int64)),
    )


def user_features(user_ids: Int64, users: pa.Table, buckets: int) -> Int64:
    """Hashed categorical features of some users: int64 [U, F], 0 = unknown."""
    row = pc.index_in(pa.array(user_ids), users["user_id"].combine_chunks())
    names = [name for name in users.column_names if name != "user_id"]
    taken = users.select(names).take(row) if names else None
    if taken is None:
        return np.zeros((len(user_ids), 1), np.int64)
    return np.stack([_words(name, taken[name].combine_chunks(), buckets) for name in names], 1)


def hashed(ids: npt.NDArray[np.integer], buckets: int) -> Int64:
    """Bucket 1 … buckets - 1 of every id."""
    return 1 + (splitmix64(ids.astype(np.uint64)) % np.uint64(buckets - 1)).astype(np.int64)


def _words(column: str, values: pa.Array, buckets: int) -> Int64:
    """Bucket of every value of a categorical column; 0 for null."""
    encoded = values.cast(pa.string()).dictionary_encode()
    words = encoded.dictionary.to_pylist()
    of_word = [1 + zlib.crc32(f"{column}={word}".encode()) % (buckets - 1) for word in words]
    index = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return np.array([*of_word, 0], np.int64)[index]


@dataclass
class Requests:
    """What a score may depend on beside the item.

    Attributes:
        events: the newest events before the request.
        user_BF: int64 buckets of the user's features.
        hour_B: int64 hour of the day, UTC.
    """

    events: Events
    user_BF: Tensor
    hour_B: Tensor

    def to(self, device: str | torch.device) -> Requests:
        moved = (x.to(device, non_blocking=True) for x in (self.user_BF, self.hour_B))
        return Requests(self.events.to(device), *moved)

    def part(self, rows: slice) -> Requests:
        """Some of the requests."""
        values = (getattr(self.events, f.name) for f in fields(Events))
        events = Events(*(x if x is None else x[rows] for x in values))  # type: ignore[arg-type]
        return Requests(events, self.user_BF[rows], self.hour_B[rows])

    def __len__(self) -> int:
        return len(self.hour_B)


#: Nothing beside the newest events and what the log says of them.
_EVENTS_ALONE: Mapping[str, Any] = {
    "positive_feedback": 0,
    "lifelong": {"entries": 0},
    "static_rows": 0,
    "author_rows": 0,
    "tag_rows": 0,
    "content_width": 0,
}


def requests_at(
    sequences: Sequences,
    event_B: Int64,
    user_UF: Int64,
    codes_NQ: npt.NDArray[np.integer],
    history: int,
) -> Requests:
    """Requests at the time of some events; nothing else of those events is read.

    Args:
        user_UF: features of the users of ``sequences``, in their order.
    """
    config = plain_config({**_EVENTS_ALONE, "short_term": history})
    user_B = np.searchsorted(sequences.start_U1, event_B, side="right") - 1
    hour_B = sequences.time_ms_E[event_B] // HOUR_MS % HOURS
    return Requests(
        assemble(sequences, event_B, codes_NQ, config).pathways["short_term"],
        torch.from_numpy(user_UF[user_B]),
        torch.from_numpy(hour_B.astype(np.int64)),
    )


def split_users(user_ids: Int64, held_out_share: float, seed: int) -> Mapping[str, Bool]:
    """Three disjoint sets of users by a hash of their ids: bool [U] each.

    ``reward`` and ``judge`` train one model each, ``held_out`` none.
    """
    lot_U = hashed(user_ids + np.int64(seed) * 1_000_003, 1 << 31) / 2**31
    middle = (1 - held_out_share) / 2
    return {
        "reward": lot_U < middle,
        "judge": (lot_U >= middle) & (lot_U < 2 * middle),
        "held_out": lot_U >= 2 * middle,
    }


def requests_after(sequences: Sequences) -> Sequences:
    """Every user's whole history and, as its last event, a request a day after the newest one.

    As a table of examples has it, but without a target: item 0 stands there and nobody reads it.
    """
    end_U, begin_U = sequences.start_U1[1:], sequences.start_U1[:-1]
    now_U = sequences.time_ms_E[np.maximum(end_U - 1, 0)] + REQUEST_AFTER_MS
    fresh: dict[str, Any] = {
        "item_E": 0,
        "time_ms_E": now_U,
        "feedback_E": 0,
        "watch_E": 0,
        "duration_E": 0,
        "play_s_E": np.nan,
    }
    columns = {name: np.insert(getattr(sequences, name), end_U, new) for name, new in fresh.items()}
    start_U1 = sequences.start_U1 + np.arange(len(end_U) + 1)
    positive_E = columns["feedback_E"] >> POSITIVE_BIT
    assert (end_U > begin_U).all(), "a train user without any event"
    kind = sequences.positive_event.dtype
    return replace(
        sequences,
        **columns,
        start_U1=start_U1,
        positive_event=np.flatnonzero(positive_E).astype(kind),
        positives_before_E1=np.concatenate([[0], np.cumsum(positive_E, dtype=kind)]).astype(kind),
        side=None,
    )
