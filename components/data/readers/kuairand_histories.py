"""Histories of a KuaiRand re-encoding: lists of videos a user was shown, turned into interactions.

The lists keep the order of events and no times; ``components.data.readers.kuairand`` says what
the events therefore mean.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from components.data.contracts import INTERACTIONS, TIMESTAMP
from components.data.readers.conform import conformed, milliseconds, plan_column, raw_schema
from components.data.readers.files import SourceFolder
from components.data.readers.parquet import parquet_batches, parquet_footer
from components.pipeline.errors import DataContractError

FILE = "user_histories.parquet"
LISTS = ("watch_seq", "like_seq", "long_watch_seq")
COLUMNS = ("user_id", "last_time_ms", *LISTS)

#: Where the log takes over: 2022-04-25 in Beijing.
HISTORY_END = datetime.datetime(2022, 4, 24, 16, tzinfo=datetime.UTC)
#: A user has up to 50 events: so many users make a batch of the usual size.
USERS_AT_ONCE = 5_000


def history_events(folder: SourceFolder) -> Iterator[pa.RecordBatch]:
    """Events of all histories in raw contract columns, each user's oldest first.

    Raises:
        DataContractError: a column has the wrong type or lacks a value.
    """
    seconds = _video_seconds(folder)
    kinds = parquet_footer(folder, FILE, COLUMNS).schema
    for name in LISTS:
        kind = kinds.field(name).type
        if not (pt.is_list(kind) and pt.is_integer(kind.value_type)):
            raise DataContractError(
                f"the column is {kind}",
                where=f"{folder.where(FILE)} column '{name}'",
                remedy="write it as lists of video ids (list<int32>)",
            )
    plans = [plan_column(n, n, kinds.field(n).type, pa.int64()) for n in COLUMNS[:2]]
    plans += [plan_column(n, n, kinds.field(n).type, kinds.field(n).type) for n in LISTS]
    schema = pa.schema([(plan.name, plan.type) for plan in plans])
    batches = parquet_batches(folder, FILE, COLUMNS, USERS_AT_ONCE)
    first_row = 0
    for batch in conformed(batches, plans, schema, where=folder.where(FILE)):
        for name in COLUMNS[:2]:
            if batch[name].null_count:
                raise DataContractError(
                    "a history lacks its user or time",
                    where=f"{folder.where(FILE)} column '{name}'",
                    remedy="correct or remove the row",
                )
        _require_past(batch["last_time_ms"], first_row, folder.where(FILE))
        first_row += batch.num_rows
        yield _events(batch, seconds)


def _require_past(times: pa.Array, first_row: int, where: str) -> None:
    """Refuse a history that reaches into the days of the log, which are those of the test."""
    late = pc.greater_equal(times, pa.scalar(int(HISTORY_END.timestamp() * 1000)))
    if not pc.any(late).as_py():
        return
    row = pc.index(late, True).as_py()
    moment = np.datetime64(times[row].as_py(), "ms")
    raise DataContractError(
        f"the history ends at {moment}Z, but from {HISTORY_END:%Y-%m-%dT%H:%M:%SZ} on its events "
        "are those of the log, which would be learnt from before they are predicted",
        where=f"{where} row {first_row + row} column 'last_time_ms'",
        remedy="cut the histories at that moment",
    )


def _video_seconds(folder: SourceFolder) -> np.ndarray:
    """Duration by video id, NaN where unknown; ids of the re-encoding are dense."""
    batches = parquet_batches(folder, "videos.parquet", ["video_id", "video_duration"])
    videos = pa.Table.from_batches(list(batches)).drop_null()
    if videos.num_rows == 0:
        return np.empty(0, np.float32)
    ids = videos["video_id"].to_numpy()
    seconds = np.full(int(ids.max()) + 1, np.nan, np.float32)
    seconds[ids] = milliseconds(videos["video_duration"].combine_chunks()).to_numpy()
    return seconds


def _events(batch: pa.RecordBatch, seconds: np.ndarray) -> pa.RecordBatch:
    watched = batch["watch_seq"]
    length = pc.list_value_length(watched).fill_null(0).to_numpy()
    row = np.repeat(np.arange(batch.num_rows), length)
    video = watched.flatten().to_numpy().astype(np.int64)
    newer = np.repeat(np.cumsum(length), length) - 1 - np.arange(len(row))
    duration = np.full(len(video), np.nan, np.float32)
    known = (video >= 0) & (video < len(seconds))
    duration[known] = seconds[video[known]]
    event = row << 32 | video
    values: dict[str, pa.Array] = {
        "user_id": pa.array(batch["user_id"].to_numpy()[row]),
        "item_id": pa.array(video),
        "timestamp": pa.array(batch["last_time_ms"].to_numpy()[row] - 1000 * newer).cast(TIMESTAMP),
        "duration_s": pa.array(duration, from_pandas=True),
        "like": _member(event, batch["like_seq"]),
        "long_view": _member(event, batch["long_watch_seq"]),
    }
    schema = raw_schema(INTERACTIONS)
    return pa.RecordBatch.from_arrays(
        [values.get(field.name, pa.nulls(len(row), field.type)) for field in schema], schema=schema
    )


def _member(event: np.ndarray, lists: pa.Array) -> pa.Array:
    """Whether the list of each event's user holds its video; ``event`` is row << 32 | video."""
    length = pc.list_value_length(lists).fill_null(0).to_numpy()
    row = np.repeat(np.arange(len(lists)), length)
    listed = row << 32 | lists.flatten().to_numpy().astype(np.int64)
    return pa.array(np.isin(event, listed))
