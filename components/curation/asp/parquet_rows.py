"""Rows of parquet files by number, read a row group at a time: subsets of data beyond memory.

An order that jumps over the whole data would read a row group for each row. `order` shuffles row
groups, and rows within a window of some groups: every group with a chosen row is read once an epoch
and a window is all that is held. Which rows are chosen is untouched; that rows of one group meet in
a window's batches is the price, small where files are written in a random order.

Shapes: S rows of a subset, G row groups, b rows of a batch.
"""

from __future__ import annotations

from collections import OrderedDict
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
    """

    def __init__(
        self,
        files: Sequence[str],
        columns: Sequence[str] | None = None,
        *,
        window: int = 16,
        filesystem: FileSystem | None = None,
    ) -> None:
        self._files = [pq.ParquetFile(file, filesystem=filesystem) for file in files]
        self._columns = None if columns is None else list(columns)
        sizes = []
        self._place_G: list[tuple[int, int]] = []
        for number, file in enumerate(self._files):
            for group in range(file.num_row_groups):
                sizes.append(file.metadata.row_group(group).num_rows)
                self._place_G.append((number, group))
        self._start_G1 = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))])
        self._window = window
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self.reads = 0

    def __len__(self) -> int:
        return int(self._start_G1[-1])

    def order(self, index_S: Int64, seed: int, epoch: int) -> Int64:
        """The rows of a subset in the order of an epoch, for `Sampler.order`."""
        group_S = self._groups(index_S)
        random = generator(seed, epoch, "order")
        turn_G = random.permutation(len(self._place_G))
        window_S = turn_G[group_S] // self._window
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
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        file, place = self._place_G[group]
        table = self._files[file].read_row_group(place, columns=self._columns)
        self.reads += 1
        self._held[group] = table
        # Beside a window's groups those of the next, into which a batch may reach.
        while len(self._held) > 2 * self._window:
            self._held.popitem(last=False)
        return table
