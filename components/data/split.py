"""Cuts the events of whole users into train sequences, validation and test examples.

Works on one bucket of users at a time (`components.data.buckets`), with no Python per row or per
user; knows Arrow and NumPy, and nothing of stages.

What "before" means. Within a user, events are ordered by period (train, validation, test), then
timestamp; equal timestamps are shuffled by a hash of the seed and the event itself, so that no
order of the source file leaks into the targets and the same events in any file order give the
same split.

Notation: E events of a bucket, U users of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.data.buckets import EVENT_COLUMNS, Facts, Signals
from components.data.contracts import FEEDBACK
from components.data.hashing import splitmix64
from components.pipeline.errors import ParamsError

Protocol = Literal["leave_one_out", "temporal"]

SEQUENCE_SCHEMA = pa.schema(
    [("user_id", pa.int64()), *((name, pa.list_(kind)) for name, kind in EVENT_COLUMNS)]
)
EXAMPLE_SCHEMA = pa.schema(
    [*SEQUENCE_SCHEMA, ("target", pa.int32()), ("target_timestamp_ms", pa.int64())]
)
CATALOGUE_SCHEMA = pa.schema(
    [
        ("item_index", pa.int32()),
        ("item_id", pa.int64()),
        ("train_count", pa.int64()),
        ("train_positive_count", pa.int64()),
    ]
)

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """Where the periods begin.

    Attributes:
        protocol: ``temporal`` by day, ``leave_one_out`` by position from the end.
        valid_from, test_from: first day (days since 1970-01-01) of the validation and of the
            test period; unused by ``leave_one_out``.
        min_history: an example with a shorter history is dropped and counted.
        max_history: at most so many newest events are kept as an example's history.
        seed: shuffles events of one user with equal timestamps.
    """

    protocol: Protocol
    valid_from: int
    test_from: int
    min_history: int
    max_history: int
    seed: int


@dataclass(frozen=True)
class BucketSplit:
    """The split of one bucket, rows ascending by user; `dropped_*` count excluded examples."""

    train: pa.Table
    valid: pa.Table
    test: pa.Table
    train_items: npt.NDArray[np.int32]
    train_positive: Bool
    dropped_valid: int
    dropped_test: int


def temporal_days(facts: Facts, valid_from: int | None, test_from: int | None) -> tuple[int, int]:
    """First day of the validation and of the test period.

    A boundary that is None is put at 10 % of the time span before the end (test) and 5 % of the
    span before the test period (validation), at least one day each.

    Raises:
        ParamsError: the days leave the train or the test period without a day.
    """
    span = facts.last_day - facts.first_day + 1
    test = facts.last_day + 1 - max(1, round(0.10 * span)) if test_from is None else test_from
    valid = test - max(1, round(0.05 * span)) if valid_from is None else valid_from
    if not facts.first_day < valid < test <= facts.last_day:
        days = [str(np.datetime64(d, "D")) for d in (facts.first_day, facts.last_day, valid, test)]
        raise ParamsError(
            f"the interactions run from {days[0]} to {days[1]}; valid_from {days[2]} and test_from "
            f"{days[3]} do not cut them into train < validation < test",
            where="params.yaml split.valid_from, split.test_from",
            remedy="choose days inside the time span, or set split.protocol: leave_one_out",
        )
    return valid, test


def split_bucket(bucket: pa.Table, cut: Cut, signals: Signals, item_ids: Int64) -> BucketSplit:
    """Cuts the events of whole users.

    ``temporal``: train = days before ``valid_from``; the validation target is the first positive
    event of the days [valid_from, test_from) and its history every train event; the test target
    is the first positive event from ``test_from`` on and its history every event before
    ``test_from``. ``leave_one_out``: the last event is the test target, the one before it the
    validation target, the rest trains.
    """
    if bucket.num_rows == 0:
        empty = EXAMPLE_SCHEMA.empty_table()
        return BucketSplit(
            SEQUENCE_SCHEMA.empty_table(),
            empty,
            empty,
            np.zeros(0, np.int32),
            np.zeros(0, bool),
            0,
            0,
        )
    columns = {name: bucket[name].to_numpy() for name in bucket.schema.names}
    if not signals.preference:
        # What was seen or clicked is then all the preference there is, unless it was disliked.
        clicked, disliked = (
            (columns["feedback"] >> FEEDBACK.index(name) & 1).astype(bool)
            for name in ("click", "dislike")
        )
        columns["positive"] = ~disliked & (clicked if signals.click else True)
    period = np.zeros(bucket.num_rows, np.int8)
    if cut.protocol == "temporal":
        day = columns["day"]
        period = (day >= cut.valid_from).astype(np.int8) + (day >= cut.test_from).astype(np.int8)
    tie = _tie_break(columns, item_ids, cut.seed)
    order = np.lexsort((tie, columns["timestamp_ms"], period, columns["user_id"]))
    columns = {name: values[order] for name, values in columns.items()}
    period = period[order]

    user = columns["user_id"]
    start = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    end = np.append(start[1:], len(user))
    of_user = np.repeat(np.arange(len(start)), end - start)
    if cut.protocol == "leave_one_out":
        from_end = end[of_user] - np.arange(len(user))
        period = np.where(from_end == 1, 2, np.where(from_end == 2, 1, 0)).astype(np.int8)
        eligible = np.ones(len(user), bool)
    else:
        eligible = columns["positive"]
    train_end = start + np.bincount(of_user[period == 0], minlength=len(start))
    valid_end = start + np.bincount(of_user[period <= 1], minlength=len(start))

    kept = train_end > start
    train = _sequences(columns, start[kept], train_end[kept])
    in_train = period == 0
    valid, dropped_valid = _examples(
        columns, start, train_end, _first(eligible & (period == 1), of_user, len(start)), cut
    )
    test, dropped_test = _examples(
        columns, start, valid_end, _first(eligible & (period == 2), of_user, len(start)), cut
    )
    return BucketSplit(
        train=train,
        valid=valid,
        test=test,
        train_items=columns["item_index"][in_train],
        train_positive=columns["positive"][in_train],
        dropped_valid=dropped_valid,
        dropped_test=dropped_test,
    )


def _first(mask_E: Bool, of_user_E: Int64, users: int) -> Int64:
    """Position of the first marked event of every user, -1 where there is none."""
    first = np.full(users, -1, np.int64)
    marked = np.flatnonzero(mask_E)[::-1]
    first[of_user_E[marked]] = marked  # the last write, i.e. the earliest event, stays
    return first


def _sequences(columns: dict[str, npt.NDArray], start_U: Int64, end_U: Int64) -> pa.Table:
    length = end_U - start_U
    offsets = np.concatenate([[0], np.cumsum(length)])
    take = np.repeat(start_U - offsets[:-1], length) + np.arange(offsets[-1])
    lists = {
        name: pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(columns[name][take], kind)
        )
        for name, kind in EVENT_COLUMNS
    }
    return pa.table({"user_id": columns["user_id"][start_U], **lists}, schema=SEQUENCE_SCHEMA)


def _examples(
    columns: dict[str, npt.NDArray], start_U: Int64, end_U: Int64, target_U: Int64, cut: Cut
) -> tuple[pa.Table, int]:
    wanted = target_U >= 0
    kept = wanted & (end_U - start_U >= cut.min_history)
    end, target = end_U[kept], target_U[kept]
    table = _sequences(columns, np.maximum(start_U[kept], end - cut.max_history), end)
    table = table.append_column("target", pa.array(columns["item_index"][target], pa.int32()))
    table = table.append_column(
        "target_timestamp_ms", pa.array(columns["timestamp_ms"][target], pa.int64())
    )
    return table.cast(EXAMPLE_SCHEMA), int(wanted.sum() - kept.sum())


def _tie_break(
    columns: dict[str, npt.NDArray], item_ids: Int64, seed: int
) -> npt.NDArray[np.uint64]:
    """A hash of the seed and of the event: an order that no source file can influence."""
    key = np.full(len(columns["user_id"]), np.uint64(seed), np.uint64)
    for values in (
        columns["user_id"].astype(np.uint64),
        item_ids[columns["item_index"]].astype(np.uint64),
        columns["timestamp_ms"].astype(np.uint64),
        columns["watch_time_s"].view(np.uint32).astype(np.uint64),
        columns["feedback"].astype(np.uint64),
    ):
        key = splitmix64(key ^ values)
    return key
