"""Parquet files as streams of batches, in constant memory, each error naming the place.

A file tells of damage in four ways, and all are listened to: its two ends, the numbers in its
footer that must agree with each other, the checksums of its pages (where the writer left them),
and the range and count of nulls that the footer gives of each column. What changes a value within
its range in a page without a checksum leaves no trace in the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from components.data.readers.content import first_line, foreign
from components.data.readers.files import BROKEN, INTERACTION_ROWS, UNREADABLE, SourceFolder
from components.pipeline.errors import DataContractError

# Column chunks are read through buffers of this size: a row group may be as large as the file.
LOCAL_BUFFER = 1 << 20
REMOTE_BUFFER = 8 << 20
#: Footers are small requests: over a network they are fetched side by side.
FOOTERS_AT_ONCE = 16

MAGIC = b"PAR1"
#: The length of the footer (4 bytes, little endian) and ``MAGIC``.
TAIL = 8


@dataclass(frozen=True)
class ParquetFile:
    """What the footer of one file says.

    Attributes:
        values: for a column of lists, how many elements they have in all (an empty or null list
            counts as one).
    """

    name: str
    rows: int
    schema: pa.Schema
    values: Mapping[str, int]


def parquet_footers(folder: SourceFolder, names: Collection[str]) -> list[ParquetFile]:
    """The footers of files, in the order of ``names``.

    Raises:
        DataContractError: a file is empty, cut off, damaged or not parquet.
    """
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return list(pool.map(lambda name: _footer(folder, name), names))


def _footer(folder: SourceFolder, name: str) -> ParquetFile:
    with _opened(folder, name) as parquet:
        metadata = parquet.metadata
        _agreeing(folder, name, metadata)
        values: dict[str, int] = {}
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                column = chunk.path_in_schema.partition(".")[0]
                values[column] = values.get(column, 0) + chunk.num_values
        return ParquetFile(name, metadata.num_rows, parquet.schema_arrow, values)


def parquet_footer(folder: SourceFolder, name: str, columns: Collection[str]) -> ParquetFile:
    """The footer of one file that must hold rows and these columns.

    Raises:
        DataContractError: it does not, or cannot be read.
    """
    footer = parquet_footers(folder, [name])[0]
    missing = [column for column in columns if column not in footer.schema.names]
    if missing:
        raise DataContractError(
            f"the column '{missing[0]}' is missing",
            where=folder.where(name),
            remedy=f"columns present: {', '.join(footer.schema.names)}",
        )
    if footer.rows == 0:
        raise DataContractError("the file has no rows", where=folder.where(name), remedy=UNREADABLE)
    return footer


def parquet_batches(
    folder: SourceFolder,
    name: str,
    columns: Collection[str] | None = None,
    rows: int = INTERACTION_ROWS,
) -> Iterator[pa.RecordBatch]:
    """Batches of at most ``rows`` rows, in file order.

    Raises:
        DataContractError: a page of the file is damaged; names row group, column and bytes, or the
            row of a value that the footer excludes.
    """
    wanted = None if columns is None else list(columns)
    done = 0
    with _opened(folder, name) as parquet:
        promises = _promises(parquet, wanted)
        try:
            for batch in parquet.iter_batches(batch_size=rows, columns=wanted):
                for promise in promises:
                    promise.check(batch, done, folder.where(name))
                done += batch.num_rows
                yield batch
        except BROKEN as error:
            raise _damage(folder, name, wanted, done, error) from error
        for promise in promises:
            promise.check_nulls(folder.where(name))


@contextmanager
def _opened(folder: SourceFolder, name: str) -> Iterator[pq.ParquetFile]:
    buffer = LOCAL_BUFFER if folder.is_local else REMOTE_BUFFER
    with folder.reading(name), folder.open_file(name) as file:
        try:
            parquet = pq.ParquetFile(
                file, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True
            )
        except BROKEN as error:
            raise _no_footer(folder, name, error) from error
        with parquet:
            yield parquet


def _no_footer(folder: SourceFolder, name: str, error: Exception) -> DataContractError:
    """Why a file cannot be opened, from its two ends."""
    size, where = folder.sizes[name], folder.where(name)
    with folder.open_file(name) as file:
        start = bytes(file.read(512))
        file.seek(max(0, size - TAIL))
        tail = bytes(file.read(TAIL))
    if known := foreign(start, expected=MAGIC):
        return DataContractError(f"this is {known[0]}", where=where, remedy=known[1])
    if not start.startswith(MAGIC):
        line = first_line(start)
        what = f"this is text, not parquet: {line!r}" if line else "this is not a parquet file"
        return DataContractError(what, where=f"{where} byte 0", remedy=UNREADABLE)
    if not tail.endswith(MAGIC):
        return DataContractError(
            f"the file is cut off: its {size:,} bytes end without the footer",
            where=f"{where} byte {size}",
            remedy=UNREADABLE,
        )
    length = int.from_bytes(tail[:4], "little")
    text = " ".join(str(error).split())
    return DataContractError(
        f"the footer of {length:,} bytes is damaged or of a kind that is not known: {text}",
        where=f"{where} byte {max(0, size - TAIL - length)}",
        remedy=UNREADABLE,
    )


def _agreeing(folder: SourceFolder, name: str, metadata: pq.FileMetaData) -> None:
    """Refuse a footer whose numbers contradict each other: one of them was altered."""

    def refuse(what: str, group: int | None = None) -> None:
        place = folder.where(name) + ("" if group is None else f" row group {group}")
        raise DataContractError(
            f"the footer contradicts itself: {what}", where=place, remedy=UNREADABLE
        )

    end = folder.sizes[name] - TAIL
    rows = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows += group.num_rows
        for index in range(metadata.num_columns):
            chunk, column = group.column(index), metadata.schema.column(index)
            if chunk.path_in_schema != column.path:
                refuse(f"column {index} is '{column.path}' and '{chunk.path_in_schema}'", number)
            if not column.max_repetition_level and chunk.num_values != group.num_rows:
                refuse(
                    f"{group.num_rows:,} rows, {chunk.num_values:,} values of '{column.path}'",
                    number,
                )
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            if not 0 <= start <= start + chunk.total_compressed_size <= end:
                refuse(f"column '{column.path}' lies outside of the file", number)
    if rows != metadata.num_rows:
        refuse(f"{metadata.num_rows:,} rows, {rows:,} in its row groups")


def _damage(
    folder: SourceFolder, name: str, columns: list[str] | None, done: int, error: Exception
) -> DataContractError:
    """The first row group and column that cannot be read; ``done`` rows before were."""
    with _opened(folder, name) as parquet:
        metadata, first = parquet.metadata, 0
        names = columns if columns is not None else parquet.schema_arrow.names
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            last = first + group.num_rows
            if last <= done:
                first = last
                continue
            for column in names:
                try:
                    for _ in parquet.iter_batches(row_groups=[number], columns=[column]):
                        pass
                except BROKEN as broken:
                    chunks = [
                        group.column(i)
                        for i in range(metadata.num_columns)
                        if group.column(i).path_in_schema.partition(".")[0] == column
                    ]
                    start = min(c.dictionary_page_offset or c.data_page_offset for c in chunks)
                    size = sum(c.total_compressed_size for c in chunks)
                    text = " ".join(str(broken).split())
                    return DataContractError(
                        f"the file cannot be read: rows {first} to {last - 1} are damaged in "
                        f"bytes {start} to {start + size - 1}: {text}",
                        where=f"{folder.where(name)} row group {number} column '{column}'",
                        remedy=UNREADABLE,
                    )
            first = last
    text = " ".join(str(error).split())
    return DataContractError(
        f"the file cannot be read after row {done}: {text}",
        where=folder.where(name),
        remedy=UNREADABLE,
    )


@dataclass
class _Promise:
    """What the footer promises of one column: its range and its nulls.

    Attributes:
        low, high: smallest and largest value of the column, in the file's own type; None if the
            footer does not say.
        nulls: how many there are; None if the footer does not say.
    """

    column: str
    low: pa.Scalar | None
    high: pa.Scalar | None
    nulls: int | None
    found: int = 0

    def check(self, batch: pa.RecordBatch, first_row: int, where: str) -> None:
        values = batch.column(self.column)
        self.found += values.null_count
        if self.low is None or self.high is None:
            return
        ends = pc.min_max(values)
        if not (_less(ends["min"], self.low) or _less(self.high, ends["max"])):
            return
        outside = pc.or_(pc.less(values, self.low), pc.greater(values, self.high))
        row = pc.index(outside.fill_null(False), True).as_py()
        low, high = _plain(self.low), _plain(self.high)
        raise DataContractError(
            f"the value {_plain(values[row])} is damaged: the footer promises {low} to {high}",
            where=f"{where} row {first_row + row} column '{self.column}'",
            remedy=UNREADABLE,
        )

    def check_nulls(self, where: str) -> None:
        if self.nulls is not None and self.found != self.nulls:
            raise DataContractError(
                f"the column is damaged: {self.found:,} values are null, the footer promises "
                f"{self.nulls:,}",
                where=f"{where} column '{self.column}'",
                remedy=UNREADABLE,
            )


def _less(one: pa.Scalar, other: pa.Scalar) -> bool:
    return bool(pc.less(one, other).as_py())


def _plain(value: pa.Scalar) -> object:
    """A value for a message: Python has no moments outside the years 1 to 9999."""
    return value.cast(pa.int64()).as_py() if pt.is_temporal(value.type) else value.as_py()


def _promises(parquet: pq.ParquetFile, columns: list[str] | None) -> list[_Promise]:
    """The promises about plain columns of numbers, flags and times."""
    metadata = parquet.metadata
    if metadata.num_row_groups == 0:
        return []
    place = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    promises = []
    for field in parquet.schema_arrow:
        if field.name not in place or (columns is not None and field.name not in columns):
            continue
        if parquet.schema_arrow.names.count(field.name) > 1 or not _is_comparable(field.type):
            continue
        statistics = [
            metadata.row_group(group).column(place[field.name]).statistics
            for group in range(metadata.num_row_groups)
        ]
        known = [s for s in statistics if s is not None]
        if len(known) < len(statistics):
            continue
        nulls = sum(s.null_count for s in known) if all(s.has_null_count for s in known) else None
        # A row group of nulls alone has no range.
        ranged = [s for s in known if s.num_values]
        low = high = None
        if ranged and all(s.has_min_max for s in ranged):
            low = _scalar(min(s.min_raw for s in ranged), field.type)
            high = _scalar(max(s.max_raw for s in ranged), field.type)
        promises.append(_Promise(field.name, low, high, nulls))
    return promises


def _is_comparable(kind: pa.DataType) -> bool:
    # Unsigned integers, and what Arrow converts on reading, are stored in another order or unit.
    stored_as_is = pt.is_signed_integer(kind) or pt.is_boolean(kind) or pt.is_date32(kind)
    # Writers disagree on where NaN belongs in a range; Arrow's own leave it out.
    return stored_as_is or pt.is_timestamp(kind) or pt.is_float32(kind) or pt.is_float64(kind)


def _scalar(raw: object, kind: pa.DataType) -> pa.Scalar:
    if pt.is_date32(kind):
        return pa.scalar(raw, pa.int32()).cast(kind)
    if pt.is_timestamp(kind):
        return pa.scalar(raw, pa.int64()).cast(kind)
    return pa.scalar(raw, kind)
