"""Spreads an interaction stream over files of whole users, in user order and constant memory.

Knows Arrow and NumPy, and nothing of stages. The stream is read twice: `scan` learns who and
what is in it, `scatter` encodes its rows and spreads them. Memory is bounded by one batch and by
the number of distinct users and items, never by the number of interactions.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.data.contracts import FEEDBACK
from components.pipeline.errors import DataContractError

#: Feedback that makes an event positive by itself.
ENGAGEMENT = ("long_view", "like", "follow", "forward", "comment", "profile_enter")

#: A view counts as long from this many seconds on, whatever the length of the video.
LONG_WATCH_S = 18.0
POSITIVE_RATING = 4.0
DAY_MS = 86_400_000

#: Files open at the same time; usual limits of a process are 1024 and more.
MAX_BUCKETS = 512

#: What is kept of an event, in the order of the list columns of sequence tables.
EVENT_COLUMNS = (
    ("item_index", pa.int32()),
    ("timestamp_ms", pa.int64()),
    ("feedback", pa.uint8()),
    ("positive", pa.bool_()),
    ("watch_time_s", pa.float32()),
    ("duration_s", pa.float32()),
)
_BUCKET_SCHEMA = pa.schema([("user_id", pa.int64()), ("day", pa.int32()), *EVENT_COLUMNS])

#: Columns `scan` and `scatter` read; those a source lacks count as unknown.
SCAN_COLUMNS = ("user_id", "item_id", "timestamp", "date")
SCATTER_COLUMNS = (*SCAN_COLUMNS, "watch_time_s", "duration_s", *FEEDBACK, "rating")

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Facts:
    """What one pass over the stream tells.

    Attributes:
        rows: number of interactions.
        user_ids, user_rows: distinct users, ascending, and the interactions of each.
        item_ids: distinct items, ascending.
        first_day, last_day: days since 1970-01-01 of the oldest and newest interaction.
    """

    rows: int
    user_ids: Int64
    user_rows: Int64
    item_ids: Int64
    first_day: int
    last_day: int


@dataclass(frozen=True)
class Signals:
    """Which signals of preference occur anywhere in the stream; decides what is positive."""

    preference: bool
    click: bool


def scan(batches: Iterable[pa.RecordBatch]) -> Facts:
    """Counts users, items and days of a stream with the columns `SCAN_COLUMNS`.

    Raises:
        DataContractError: the stream holds no row.
    """
    users: list[pa.Table] = []
    items: list[pa.Array] = []
    rows, pending, first, last = 0, 0, np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for batch in batches:
        if batch.num_rows == 0:
            continue
        rows += batch.num_rows
        counts = pc.value_counts(batch["user_id"])
        users.append(pa.table({"user_id": counts.field("values"), "rows": counts.field("counts")}))
        items.append(pc.unique(batch["item_id"]))
        day = _day(batch)
        first, last = min(first, int(day.min())), max(last, int(day.max()))
        pending += users[-1].num_rows + len(items[-1])
        if pending > 4_000_000:  # distinct values of many batches, mostly the same ones
            users, items = [_merge_users(users)], [pc.unique(pa.chunked_array(items))]
            pending = 0
    if rows == 0:
        raise DataContractError(
            "no interaction is left to split",
            where="interactions",
            remedy="look at the quarantine table of the validate stage for why rows were refused",
        )
    table = _merge_users(users).sort_by("user_id")
    return Facts(
        rows=rows,
        user_ids=table["user_id"].to_numpy(),
        user_rows=table["rows"].to_numpy(),
        item_ids=np.sort(pc.unique(pa.chunked_array(items)).to_numpy()),
        first_day=first,
        last_day=last,
    )


def _merge_users(parts: list[pa.Table]) -> pa.Table:
    merged = pa.concat_tables(parts).group_by("user_id").aggregate([("rows", "sum")])
    return merged.select(["user_id", "rows_sum"]).rename_columns(["user_id", "rows"])


def bucket_bounds(facts: Facts, rows_per_bucket: int) -> Int64:
    """First user id of every bucket but the first: ranges of users with about equal rows.

    Ranges rather than hashes, so that the buckets one after the other are sorted by user.
    """
    buckets = min(MAX_BUCKETS, max(1, -(-facts.rows // rows_per_bucket)))
    ends = np.cumsum(facts.user_rows)
    cuts = np.searchsorted(ends, facts.rows * np.arange(1, buckets) // buckets)
    return np.unique(facts.user_ids[np.minimum(cuts + 1, len(ends) - 1)])


def scatter(
    batches: Iterable[pa.RecordBatch],
    item_ids: Int64,
    bounds: Int64,
    folder: Path,
    positive_watch_ratio: float,
) -> tuple[list[Path], Signals]:
    """Spreads the stream over ``len(bounds) + 1`` Arrow files of whole users, in user order.

    Args:
        batches: the stream with those of `SCATTER_COLUMNS` that the source has.
        item_ids: the catalogue, ascending; a row keeps the index of its item.
        bounds: from `bucket_bounds`.
        folder: emptied and filled.
        positive_watch_ratio: watched share of the duration from which a view is positive, where
            the source has no long_view of its own.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = [folder / f"{bucket:05d}.arrow" for bucket in range(len(bounds) + 1)]
    preference = click = False
    writers = [pa.ipc.new_file(str(path), _BUCKET_SCHEMA) for path in paths]
    try:
        for batch in batches:
            if batch.num_rows == 0:
                continue
            known = {name for name in batch.schema.names if batch[name].null_count < batch.num_rows}
            preference |= bool(known & {*ENGAGEMENT, "watch_time_s", "rating"})
            click |= "click" in known
            rows = _bucket_rows(batch, item_ids, positive_watch_ratio)
            bucket = np.searchsorted(bounds, rows["user_id"].to_numpy(), side="right")
            order = np.argsort(bucket, kind="stable")
            rows = rows.take(pa.array(order))
            ends = np.cumsum(np.bincount(bucket, minlength=len(paths)))
            for writer, start, end in zip(writers, [0, *ends[:-1]], ends, strict=True):
                if end > start:
                    writer.write_batch(rows.slice(start, end - start))
    finally:
        for writer in writers:
            writer.close()
    return paths, Signals(preference=preference, click=click)


def _bucket_rows(
    batch: pa.RecordBatch, item_ids: Int64, positive_watch_ratio: float
) -> pa.RecordBatch:
    bits = np.zeros(batch.num_rows, np.uint8)
    for bit, name in enumerate(FEEDBACK):
        bits |= _true(batch, name).astype(np.uint8) << bit
    watch, duration = _seconds(batch, "watch_time_s"), _seconds(batch, "duration_s")
    return pa.RecordBatch.from_arrays(
        [
            batch["user_id"],
            pa.array(_day(batch).astype(np.int32)),
            pa.array(np.searchsorted(item_ids, batch["item_id"].to_numpy()).astype(np.int32)),
            pa.array(_timestamp_ms(batch)),
            pa.array(bits),
            pa.array(_positive(batch, watch, duration, positive_watch_ratio)),
            pa.array(watch),
            pa.array(duration),
        ],
        schema=_BUCKET_SCHEMA,
    )


def _positive(
    batch: pa.RecordBatch,
    watch_s: npt.NDArray[np.float32],
    duration_s: npt.NDArray[np.float32],
    ratio: float,
) -> Bool:
    positive = np.zeros(batch.num_rows, bool)
    for name in ENGAGEMENT:
        positive |= _true(batch, name)
    # NaN compares false: an unknown watch time or duration makes nothing positive.
    watched = (watch_s >= LONG_WATCH_S) | ((duration_s > 0) & (watch_s >= ratio * duration_s))
    if "long_view" in batch.schema.names:
        watched &= batch["long_view"].is_null().to_numpy(zero_copy_only=False)
    positive |= watched
    if "rating" in batch.schema.names:
        positive |= _seconds(batch, "rating") >= POSITIVE_RATING
    return positive


def _true(batch: pa.RecordBatch, name: str) -> Bool:
    if name not in batch.schema.names:
        return np.zeros(batch.num_rows, bool)
    return pc.fill_null(batch[name], False).to_numpy(zero_copy_only=False)


def _seconds(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.float32]:
    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan, np.float32)
    return pc.fill_null(batch[name], np.float32(np.nan)).to_numpy(zero_copy_only=False)


def _timestamp_ms(batch: pa.RecordBatch) -> Int64:
    return batch["timestamp"].cast(pa.timestamp("ms", tz="UTC")).cast(pa.int64()).to_numpy()


def _day(batch: pa.RecordBatch) -> Int64:
    """Business day where the source has one, else the UTC day of the timestamp."""
    day = _timestamp_ms(batch) // DAY_MS
    if "date" in batch.schema.names and batch["date"].null_count < batch.num_rows:
        date = batch["date"].cast(pa.int32())
        known = date.is_valid().to_numpy(zero_copy_only=False)
        day = np.where(known, pc.fill_null(date, 0).to_numpy(), day)
    return day


def read_buckets(paths: Iterable[Path]) -> Iterator[pa.Table]:
    """The bucket files, one in memory at a time."""
    for path in paths:
        with pa.memory_map(str(path)) as source:
            yield pa.ipc.open_file(source).read_all()
