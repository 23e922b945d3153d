"""Rows of parquet files by number, read a row group at a time: subsets of data beyond memory.

An order that jumps over the whole data would read a row group for each row. `order` shuffles row
groups, and rows within a window of some groups: each process reads a group with a chosen row once
an epoch, and holds those of the windows that a batch has rows of. Which rows are chosen is
untouched; that rows of one group meet in a window's batches is the price, small where files are
written in a random order.

Shapes: S rows of a subset, G row groups, b rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from components.curation.asp.draw import generator
from components.pipeline.errors import DataContractError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

Int64 = npt.NDArray[np.int64]


class ParquetRows:
    """Files one after the other, as one table.

    Args:
        files: paths, in the order that numbers rows.
        columns: those that are read; None: all.
        window: row groups that are shuffled together, and held.
        filesystem: where the files are; None: here.

    Attributes:
        reads: row groups read up to now.

    Raises:
        DataContractError: no file, one that is not there or no parquet file, or one whose columns
            are others than the first one's.
    """

    def __init__(
        self,
        files: Sequence[str],
        columns: Sequence[str] | None = None,
        *,
        window: int = 16,
        filesystem: FileSystem | None = None,
    ) -> None:
        self._files = _opened(files, filesystem)
        self._columns = None if columns is None else list(columns)
        sizes = []
        self._place_G: list[tuple[int, int]] = []
        for number, file in enumerate(self._files):
            for group in range(file.num_row_groups):
                sizes.append(file.metadata.row_group(group).num_rows)
                self._place_G.append((number, group))
        self._start_G1 = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))])
        self._window = window
        #: Window of each group in the epoch that goes on; None: rows are asked for in any order.
        self._window_G: Int64 | None = None
        self._held: dict[int, pa.Table] = {}
        self.reads = 0

    @property
    def digest(self) -> str:
        """Which data: SHA-256 of what the footers say (rows, sizes, places, extremes)."""
        told = hashlib.sha256()
        for file in self._files:
            told.update(repr(file.schema_arrow).encode())
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                columns = [meta.column(c).to_dict() for c in range(meta.num_columns)]
                told.update(repr((meta.num_rows, columns)).encode())
        return told.hexdigest()

    def __len__(self) -> int:
        return int(self._start_G1[-1])

    def order(self, index_S: Int64, seed: int, epoch: int) -> Int64:
        """The rows of a subset in the order of an epoch, for `Sampler.order`.

        Until the next call rows are taken in this order, or every nth of them.
        """
        group_S = self._groups(index_S)
        random = generator(seed, epoch, "order")
        turn_G = random.permutation(len(self._place_G))
        self._window_G = turn_G // self._window
        window_S = self._window_G[group_S]
        self._held.clear()
        return index_S[np.lexsort((random.random(len(index_S)), window_S))]

    def take(self, index_b: Int64) -> pa.Table:
        """Rows by number, in the order asked for.

        Raises:
            DataContractError: there is no such row.
        """
        if len(index_b) and not 0 <= int(index_b.min()) <= int(index_b.max()) < len(self):
            wrong = int(index_b.max()) if int(index_b.min()) >= 0 else int(index_b.min())
            raise DataContractError(
                f"there is no row {wrong}: the files have {len(self)} rows",
                where="data selection",
                remedy="the data changed since it was selected from: select again",
            )
        group_b = self._groups(index_b)
        self._drop(group_b)
        parts, places = [], []
        for group in np.unique(group_b).tolist():
            place = np.flatnonzero(group_b == group)
            parts.append(self._read(group).take(pa.array(index_b[place] - self._start_G1[group])))
            places.append(place)
        if not parts:
            return self._read(0).slice(0, 0)
        return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))

    def _groups(self, index_b: Int64) -> Int64:
        return np.searchsorted(self._start_G1, index_b, side="right") - 1

    def _read(self, group: int) -> pa.Table:
        if group not in self._held:
            file, place = self._place_G[group]
            self._held[group] = self._files[file].read_row_group(place, columns=self._columns)
            self.reads += 1
        return self._held[group]

    def _drop(self, group_b: Int64) -> None:
        """Let go of groups that nobody will ask for: windows come one after the other."""
        if not len(group_b):
            return
        if self._window_G is None:
            gone = [*self._held][: max(0, len(self._held) - self._window)]
        else:
            oldest = self._window_G[group_b].min()
            gone = [group for group in self._held if self._window_G[group] < oldest]
        for group in gone:
            del self._held[group]


def _opened(files: Sequence[str], filesystem: FileSystem | None) -> list[pq.ParquetFile]:
    if not files:
        raise DataContractError(
            "no file to read rows of", where="data selection", remedy="name one parquet file"
        )
    opened: list[pq.ParquetFile] = []
    for file in files:
        try:
            opened.append(pq.ParquetFile(file, filesystem=filesystem))
        except FileNotFoundError as error:
            remedy = "the data changed since it was listed: list it again"
            raise DataContractError("there is no such file", where=file, remedy=remedy) from error
        except pa.ArrowInvalid as error:
            raise DataContractError(
                f"no parquet file: {error}", where=file, remedy="write it again"
            ) from error
        ours, first = opened[-1].schema_arrow, opened[0].schema_arrow
        if not ours.equals(first):
            raise DataContractError(
                f"its columns are {_said(ours)}, those of {files[0]} {_said(first)}",
                where=file,
                remedy="select from files of one table",
            )
    return opened


def _said(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
