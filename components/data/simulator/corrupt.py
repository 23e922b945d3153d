"""Puts known faults into a source: the truth that validation is tested against.

A kind of fault is named after the row rule it breaks, and a faulty row breaks that rule alone, so
that the counts here are the counts a quarantine must show.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.data.contracts import CONTRACTS
from components.data.simulator import world as w
from components.data.source import Source
from components.pipeline.errors import UsageError

Array = np.ndarray

#: Kinds that spoil a row where it stands: kind → (table, column → new values from the batch).
_Spoil = Callable[[pa.RecordBatch], dict[str, pa.Array | pa.Scalar]]

_CENTURY = datetime.timedelta(days=36_525)
_UNKNOWN_ID = 1_000_000_000_000
_CHUNK = 1 << 20


def _null(column: str) -> _Spoil:
    return lambda batch: {column: pa.scalar(None, batch.schema.field(column).type)}


def _scaled(column: str, by: str, factor: float) -> _Spoil:
    return lambda batch: {
        column: pc.multiply(batch[by], pa.scalar(factor, pa.float32())),
    }


def _future(batch: pa.RecordBatch) -> dict[str, pa.Array | pa.Scalar]:
    # Without its day, which would be far away or out of range, and at a moment of its own, which no
    # other row of that user and item has: the row shall break one rule.
    return {
        "timestamp": pc.add(batch["timestamp"], pa.scalar(_CENTURY, pa.duration("ms"))),
        "date": pa.scalar(None, pa.date32()),
    }


def _unknown_item(batch: pa.RecordBatch) -> dict[str, pa.Array | pa.Scalar]:
    return {"item_id": pc.add(batch["item_id"], _UNKNOWN_ID)}


_SPOILS: dict[str, tuple[str, _Spoil]] = {
    "user_id_missing": ("interactions", _null("user_id")),
    "item_id_missing": ("interactions", _null("item_id")),
    "timestamp_out_of_range": ("interactions", _future),
    "watch_time_s_negative": (
        "interactions",
        lambda batch: {"watch_time_s": pa.scalar(-1.0, pa.float32())},
    ),
    "watched_too_often": ("interactions", _scaled("watch_time_s", "duration_s", 100.0)),
    "duration_s_not_positive": ("interactions", _scaled("duration_s", "duration_s", -1.0)),
    "item_unknown": ("interactions", _unknown_item),
}
#: Kinds that put a copy of the row behind it: kind → table.
_REPEATS = {
    "exact_duplicate": "interactions",
    "item_id_repeated": "items",
    "user_id_repeated": "users",
}
#: Every kind and the table it is found in.
KINDS: dict[str, str] = {kind: table for kind, (table, _) in _SPOILS.items()} | _REPEATS
#: Kinds of faulty interactions.
ROW_KINDS: tuple[str, ...] = tuple(k for k, table in KINDS.items() if table == "interactions")


@dataclass(frozen=True, eq=False)
class Faults:
    """Which rows [F] of a clean table get which fault: ``kind`` indexes ``kinds``; rows ascend."""

    kinds: tuple[str, ...]
    row: Array
    kind: Array

    @property
    def counts(self) -> dict[str, int]:
        count = np.bincount(self.kind, minlength=len(self.kinds))
        return {kind: int(n) for kind, n in zip(self.kinds, count, strict=True)}

    @property
    def added_rows(self) -> int:
        return sum(n for kind, n in self.counts.items() if kind in _REPEATS)


def draw_faults(rows: int, kinds: Sequence[str], rate: float, seed: int) -> Faults:
    """Each of ``rows`` rows is faulty with probability ``rate``, in a kind drawn evenly."""
    rng = w.generator(seed, w.DIRT, len(kinds))
    hits = [
        first + np.flatnonzero(rng.random(min(_CHUNK, rows - first)) < rate)
        for first in range(0, rows, _CHUNK)
    ]
    row = np.concatenate([np.zeros(0, dtype=np.int64), *hits])
    return Faults(tuple(kinds), row, rng.integers(max(1, len(kinds)), size=len(row)))


def corrupt(
    source: Source,
    kinds: Sequence[str] = ROW_KINDS,
    rate: float = 0.001,
    seed: int = 0,
    rows: Mapping[str, int] | None = None,
) -> Source:
    """``source`` with faults in about ``rate`` of the rows of the tables that ``kinds`` name.

    ``ground_truth["dirty"]`` of the result counts them: kind → rows. Which rows are hit depends on
    the number of rows and on ``seed``, not on how the stream is cut into batches. Memory grows by
    16 bytes a faulty row.

    Args:
        rows: exact number of rows of a table where it is known; otherwise the table is read once
            to count.

    Raises:
        UsageError: unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UsageError(
            f"there is no fault '{unknown[0]}'", remedy=f"faults: {', '.join(sorted(KINDS))}"
        )
    tables = dict(source.tables)
    counts: dict[str, int] = {}
    new_rows = dict(source.rows)
    for table in CONTRACTS:
        mine = tuple(kind for kind in kinds if KINDS[kind] == table)
        if not mine:
            continue
        stream = source.tables[table]
        known = rows.get(table) if rows is not None else None
        number = sum(batch.num_rows for batch in stream()) if known is None else known
        faults = draw_faults(number, mine, rate, seed)
        tables[table] = partial(_spoiled, stream, faults)
        counts |= faults.counts
        new_rows[table] = number + faults.added_rows
    truth = dict(source.ground_truth) | {"dirty": counts}
    return replace(source, tables=tables, rows=new_rows, ground_truth=truth)


def _spoiled(
    stream: Callable[[], Iterator[pa.RecordBatch]], faults: Faults
) -> Iterator[pa.RecordBatch]:
    first = 0
    for batch in stream():
        low, high = np.searchsorted(faults.row, [first, first + batch.num_rows])
        if low < high:
            yield _spoil(batch, faults.row[low:high] - first, faults.kind[low:high], faults.kinds)
        else:
            yield batch
        first += batch.num_rows


def _spoil(
    batch: pa.RecordBatch, row: Array, kind: Array, kinds: tuple[str, ...]
) -> pa.RecordBatch:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    copies = [np.arange(batch.num_rows)]
    for number, name in enumerate(kinds):
        hit = row[kind == number]
        if len(hit) == 0:
            continue
        if name in _REPEATS:
            copies.append(hit)
            continue
        mask = np.zeros(batch.num_rows, dtype=np.bool_)
        mask[hit] = True
        for column, values in _SPOILS[name][1](batch).items():
            columns[column] = pc.if_else(pa.array(mask), values, columns[column])
    spoiled = pa.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema)
    if len(copies) == 1:
        return spoiled
    return spoiled.take(pa.array(np.sort(np.concatenate(copies), kind="stable")))
