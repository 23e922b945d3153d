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
from components.data.readers.footer import Footer, FooterError, decode_footer
from components.pipeline.errors import DataContractError

# Column chunks are read through buffers of this size: a row group may be as large as the file.
LOCAL_BUFFER = 1 << 20
REMOTE_BUFFER = 8 << 20
#: Footers are small requests: over a network they are fetched side by side.
FOOTERS_AT_ONCE = 16

MAGIC = b"PAR1"
#: The length of the footer (4 bytes, little endian) and ``MAGIC``.
TAIL = 8
TAIL_READ = 1 << 16


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
    with _opened(folder, name) as (parquet, footer):
        values: dict[str, int] = {}
        for group in footer.groups:
            for leaf, chunk in zip(footer.leaves, group.chunks, strict=True):
                values[leaf.path[0]] = values.get(leaf.path[0], 0) + chunk.values
        return ParquetFile(name, footer.rows, parquet.schema_arrow, values)


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
            remedy=f"add it; columns present: {', '.join(footer.schema.names)}",
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
    with _opened(folder, name) as (parquet, footer):
        promises = _promises(parquet.schema_arrow, footer, wanted)
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
def _opened(folder: SourceFolder, name: str) -> Iterator[tuple[pq.ParquetFile, Footer]]:
    buffer = LOCAL_BUFFER if folder.is_local else REMOTE_BUFFER
    with folder.reading(name), folder.open_file(name) as file:
        footer = _decoded(folder, name, file)
        try:
            parquet = pq.ParquetFile(
                file, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True
            )
            for field in parquet.schema_arrow:
                # Names of columns and of time zones are decoded only when they are looked at.
                _ = (field.name, field.type.tz if pt.is_timestamp(field.type) else None)
        except BROKEN as error:
            text = " ".join(str(error).split())
            raise DataContractError(
                f"the footer is damaged: {text}", where=folder.where(name), remedy=UNREADABLE
            ) from error
        with parquet:
            yield parquet, footer


def _decoded(folder: SourceFolder, name: str, file: pa.NativeFile) -> Footer:
    """The footer, or why there is none to be seen at the two ends of the file."""
    size, where = folder.sizes[name], folder.where(name)
    # One request gives all of most footers.
    file.seek(max(0, size - TAIL_READ))
    end = bytes(file.read(TAIL_READ))
    file.seek(0)
    start = bytes(file.read(512))
    if known := foreign(start, expected=MAGIC):
        raise DataContractError(f"this is {known[0]}", where=where, remedy=known[1])
    if not start.startswith(MAGIC):
        line = first_line(start)
        what = f"this is text, not parquet: {line!r}" if line else "this is not a parquet file"
        raise DataContractError(what, where=f"{where} byte 0", remedy=UNREADABLE)
    if not end.endswith(MAGIC):
        raise DataContractError(
            f"the file is cut off: its {size:,} bytes end without the footer",
            where=f"{where} byte {size}",
            remedy=UNREADABLE,
        )
    length = int.from_bytes(end[-TAIL:-4], "little")
    begin = size - TAIL - length
    if begin < len(MAGIC):
        raise DataContractError(
            f"the footer is damaged: its length of {length:,} bytes is more than the file has",
            where=f"{where} byte {size - TAIL}",
            remedy=UNREADABLE,
        )
    if length + TAIL <= len(end):
        data = end[-TAIL - length : -TAIL]
    else:
        file.seek(begin)
        data = bytes(file.read(length))
    try:
        footer = decode_footer(data, begin)
    except FooterError as error:
        raise DataContractError(
            f"the footer is damaged or of a kind that is not known: {error.what}",
            where=f"{where}{error.place or f' byte {begin}'}",
            remedy=UNREADABLE,
        ) from error
    file.seek(0)
    return footer


def _damage(
    folder: SourceFolder, name: str, columns: list[str] | None, done: int, error: Exception
) -> DataContractError:
    """The first row group and column that cannot be read; ``done`` rows before were."""
    with _opened(folder, name) as (parquet, footer):
        first = 0
        names = columns if columns is not None else parquet.schema_arrow.names
        for number, group in enumerate(footer.groups):
            last = first + group.rows
            for column in names if last > done else ():
                try:
                    for _ in parquet.iter_batches(row_groups=[number], columns=[column]):
                        pass
                except BROKEN as broken:
                    chunks = [
                        chunk
                        for leaf, chunk in zip(footer.leaves, group.chunks, strict=True)
                        if leaf.path[0] == column
                    ]
                    start = min(chunk.start for chunk in chunks)
                    end = max(chunk.start + chunk.size for chunk in chunks)
                    text = " ".join(str(broken).split())
                    return DataContractError(
                        f"the file cannot be read: rows {first} to {last - 1} are damaged in "
                        f"bytes {start} to {end - 1}: {text}",
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


def _promises(schema: pa.Schema, footer: Footer, columns: list[str] | None) -> list[_Promise]:
    """The promises about plain columns of numbers, flags and times."""
    place = {leaf.path: index for index, leaf in enumerate(footer.leaves)}
    promises = []
    for field in schema:
        index = place.get((field.name,))
        if index is None or not (columns is None or field.name in columns):
            continue
        if schema.names.count(field.name) > 1 or not _is_comparable(field.type):
            continue
        chunks = [group.chunks[index] for group in footer.groups]
        known = [chunk.nulls for chunk in chunks if chunk.nulls is not None]
        # A row group of nulls alone has no range.
        ranged = [chunk for chunk in chunks if chunk.nulls != chunk.values]
        low = high = None
        if ranged and all(chunk.low is not None and chunk.high is not None for chunk in ranged):
            low = _scalar(min(chunk.low for chunk in ranged), field.type)
            high = _scalar(max(chunk.high for chunk in ranged), field.type)
        nulls = sum(known) if len(known) == len(chunks) else None
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
