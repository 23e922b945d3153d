"""Columns that a rule needs and a table does not have: ratios, repeats, references.

Each is declared as data and computed in Arrow, chunk by chunk, so that the rule on it stays one
plain expectation on one column. Null means "not to be judged".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.pipeline.seen_before import Repeats, repeated_rows

#: Computes the column of a batch whose first row has the given number in the table.
Compute = Callable[[pa.RecordBatch, int], pa.Array]

_SCAN_ROWS = 128 * 1024
_LOOKUP_BYTES = 64 * 2**20


class ReadBatches(Protocol):
    def __call__(
        self, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[pa.RecordBatch]: ...


@dataclass(frozen=True)
class Surroundings:
    """What a derived column may look at beside the batch.

    Attributes:
        batches: reads the table from its start.
        scratch: folder for temporary files.
        references: sorted identifiers (int64) of other tables, by table name.
    """

    batches: ReadBatches
    scratch: Path
    references: Mapping[str, np.ndarray]
    _repeats: dict[tuple[str, ...], Repeats] = field(default_factory=dict)

    def repeats(self, columns: tuple[str, ...], key: tuple[str, ...] = ()) -> Repeats:
        """Rows whose ``columns`` all equal those of another row; the table is read once.

        Args:
            key: some of the columns, if few rows share them: the others are compared there alone.
        """
        if columns not in self._repeats:
            among = self.repeats(key) if key else None
            if among is not None and not among.all.any():
                self._repeats[columns] = among
            else:
                scan = self.batches(columns=list(columns), batch_size=_SCAN_ROWS)
                self._repeats[columns] = repeated_rows(scan, columns, self.scratch, among)
        return self._repeats[columns]


class Derived(Protocol):
    """A declared column; ``columns`` are those of the table that it is made of."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def bind(self, around: Surroundings) -> Compute: ...


@dataclass(frozen=True)
class Ratio:
    """``numerator / denominator`` (float32); null where the denominator is not positive."""

    numerator: str
    denominator: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.numerator, self.denominator)

    def bind(self, around: Surroundings) -> Compute:
        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            top, bottom = batch.column(self.numerator), batch.column(self.denominator)
            usable = pc.and_(pc.is_finite(top), pc.greater(bottom, 0))
            return pc.if_else(usable, pc.divide(top, bottom), pa.scalar(None, top.type))

        return compute


@dataclass(frozen=True)
class Midnight:
    """The UTC midnight (timestamp[ms, UTC]) that ``date`` begins with, to compare as a moment."""

    date: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.date,)

    def bind(self, around: Surroundings) -> Compute:
        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            return batch.column(self.date).cast(pa.timestamp("ms")).cast(pa.timestamp("ms", "UTC"))

        return compute


@dataclass(frozen=True)
class HoursAfter:
    """Hours (float64) from the UTC midnight that ``date`` begins with to ``moment``."""

    moment: str
    date: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.moment, self.date)

    def bind(self, around: Surroundings) -> Compute:
        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            # As floats: a difference of moments that nobody lived to see overflows 64 bits.
            moment = batch.column(self.moment).cast(pa.timestamp("ms", "UTC")).cast(pa.int64())
            days = batch.column(self.date).cast(pa.int32()).cast(pa.float64())
            hours = pc.divide(moment.cast(pa.float64(), safe=False), 3_600_000.0)
            return pc.subtract(hours, pc.multiply(days, 24.0))

        return compute


@dataclass(frozen=True)
class BlankElements:
    """How many elements of a list of strings are null or only white space (int64)."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def bind(self, around: Surroundings) -> Compute:
        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            lists = batch.column(self.column)
            texts = pc.list_flatten(lists)
            blank = pc.equal(pc.utf8_trim_whitespace(texts), "").fill_null(True)
            owner = pc.list_parent_indices(lists).filter(blank).to_numpy(zero_copy_only=False)
            return pa.array(np.bincount(owner, minlength=len(lists)).astype(np.int64))

        return compute


@dataclass(frozen=True)
class AnyText:
    """Whether any of ``columns`` (strings or lists of strings) says something."""

    columns: tuple[str, ...]

    def bind(self, around: Surroundings) -> Compute:
        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            said = pa.array(np.zeros(batch.num_rows, bool))
            for name in self.columns:
                column = batch.column(name)
                length = (
                    pc.list_value_length(column)
                    if pa.types.is_list(column.type)
                    else pc.utf8_length(pc.utf8_trim_whitespace(column))
                )
                said = pc.or_(said, pc.greater(length, 0).fill_null(False))
            return said

        return compute


#: What no writer means to write: control characters other than tab and line ends, and U+FFFD,
#: which decoders put in the place of bytes that they could not read.
_UNREADABLE = "[\\x00-\\x08\\x0B\\x0C\\x0E-\\x1F\\x7F\\x{FFFD}]"


@dataclass(frozen=True)
class Unreadable:
    """Whether any of ``columns`` (strings or lists of strings) has characters of no script."""

    columns: tuple[str, ...]

    def bind(self, around: Surroundings) -> Compute:
        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            found = np.zeros(batch.num_rows, bool)
            for name in self.columns:
                texts, owner = _texts(batch.column(name))
                hit = pc.match_substring_regex(texts, _UNREADABLE).fill_null(False)
                found[owner[hit.to_numpy(zero_copy_only=False)]] = True
            return pa.array(found)

        return compute


@dataclass(frozen=True)
class LongestText:
    """Characters (int64) of the longest text in ``columns`` (strings or lists of strings)."""

    columns: tuple[str, ...]

    def bind(self, around: Surroundings) -> Compute:
        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            longest = np.zeros(batch.num_rows, np.int64)
            for name in self.columns:
                texts, owner = _texts(batch.column(name))
                length = pc.utf8_length(texts).fill_null(0).to_numpy(zero_copy_only=False)
                np.maximum.at(longest, owner, length)
            return pa.array(longest)

        return compute


def _texts(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The strings of a column of strings or lists of strings, and the row of each."""
    if pa.types.is_list(column.type):
        rows = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        return pc.list_flatten(column), rows
    return column, np.arange(len(column))


@dataclass(frozen=True)
class SeenBefore:
    """Whether an earlier row has the same ``columns``; null where the first of them is null.

    Attributes:
        key: some of the columns, where few rows share them: it spares reading the others.
    """

    columns: tuple[str, ...]
    key: tuple[str, ...] = ()

    def bind(self, around: Surroundings) -> Compute:
        repeated = around.repeats(self.columns, self.key).later

        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            first = batch.column(self.columns[0])
            seen = repeated.between(first_row, batch.num_rows)
            if not first.null_count:
                return pa.array(seen)
            return pa.array(seen, mask=first.is_null().to_numpy(zero_copy_only=False))

        return compute


@dataclass(frozen=True)
class Contradicts:
    """Whether an earlier row has the same ``key`` and no earlier row all the same ``columns``.

    Null where a column of the key is null.
    """

    key: tuple[str, ...]
    columns: tuple[str, ...]

    def bind(self, around: Surroundings) -> Compute:
        same_key = around.repeats(self.key).later
        same = around.repeats(self.columns, self.key).later

        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            other = ~same.between(first_row, batch.num_rows)
            found = pa.array(same_key.between(first_row, batch.num_rows) & other)
            for name in self.key:
                if batch.column(name).null_count:
                    found = pc.if_else(batch.column(name).is_valid(), found, None)
            return found

        return compute


@dataclass(frozen=True)
class NumberIfAny:
    """The numbers (float64) of a column that a table may have; null where it has none."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def bind(self, around: Surroundings) -> Compute:
        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            at = batch.schema.get_field_index(self.column)
            if at < 0 or not pa.types.is_integer(batch.schema.field(at).type):
                return pa.nulls(batch.num_rows, pa.float64())
            return pc.cast(batch.column(at), pa.float64(), safe=False)

        return compute


@dataclass(frozen=True)
class KnownIn:
    """Whether ``column`` (int64) is an identifier of another table that passed its own rules."""

    column: str
    table: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def bind(self, around: Surroundings) -> Compute:
        contains = _membership(around.references[self.table])

        def compute(batch: pa.RecordBatch, first_row: int) -> pa.Array:
            column = batch.column(self.column)
            if not column.null_count:
                return pa.array(contains(column.to_numpy()))
            found = contains(column.fill_null(0).to_numpy())
            return pa.array(found, mask=column.is_null().to_numpy(zero_copy_only=False))

        return compute


def _membership(known: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from int64 values to whether ``known`` (sorted, int64) has them."""
    if not len(known):
        return lambda wanted: np.zeros(len(wanted), bool)
    low, span = known[0], int(known[-1]) - int(known[0]) + 1
    if span > _LOOKUP_BYTES:
        return lambda wanted: (
            known[np.minimum(np.searchsorted(known, wanted), len(known) - 1)] == (wanted)
        )
    # Dense identifiers, the common case: one look-up instead of a search, ten times as fast.
    held = np.zeros(span + 1, bool)
    held[known - low] = True

    def look_up(wanted: np.ndarray) -> np.ndarray:
        # What lies below wraps round to above, so that one comparison catches both.
        at = (wanted - low).view(np.uint64)
        return np.asarray(held[np.minimum(at, np.uint64(span)).view(np.int64)])

    return look_up
