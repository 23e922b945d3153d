"""Parquet files as streams of batches, in constant memory, each error naming the file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from components.data.readers.files import INTERACTION_ROWS, UNREADABLE, SourceFolder
from components.pipeline.errors import DataContractError

# Column chunks are read through buffers of this size: a row group may be as large as the file.
LOCAL_BUFFER = 1 << 20
REMOTE_BUFFER = 8 << 20
#: Footers are small requests: over a network they are fetched side by side.
FOOTERS_AT_ONCE = 16


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
        DataContractError: a file is empty, cut off or not parquet.
    """
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return list(pool.map(lambda name: _footer(folder, name), names))


def _footer(folder: SourceFolder, name: str) -> ParquetFile:
    with folder.reading(name), folder.open_file(name) as file, pq.ParquetFile(file) as parquet:
        metadata = parquet.metadata
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
        DataContractError: a page of the file is damaged.
    """
    buffer = LOCAL_BUFFER if folder.is_local else REMOTE_BUFFER
    with (
        folder.reading(name),
        folder.open_file(name) as file,
        pq.ParquetFile(file, buffer_size=buffer, pre_buffer=False) as parquet,
    ):
        yield from parquet.iter_batches(
            batch_size=rows, columns=None if columns is None else list(columns)
        )
