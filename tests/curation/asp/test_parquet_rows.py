"""Claims about rows of parquet files by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.curation.asp.parquet_rows import ParquetRows
from components.pipeline.errors import DataContractError

GROUP = 50


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """1,025 rows in 21 row groups of two files; ``row`` is the number."""
    found, first = [], 0
    for name, rows in (("a", 600), ("b", 425)):
        table = pa.table(
            {"row": np.arange(first, first + rows), "text": [f"{name}{i}" for i in range(rows)]}
        )
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=GROUP)
        found.append(str(tmp_path / f"{name}.parquet"))
        first += rows
    return found


def test_rows_come_in_the_order_asked_for(files: list[str]) -> None:
    rows = ParquetRows(files, ["row"], window=2)
    assert len(rows) == 1025
    index_b = np.random.default_rng(0).integers(0, 1025, 80)
    taken = rows.take(index_b)
    assert taken.column_names == ["row"]
    assert taken["row"].to_pylist() == index_b.tolist()
    assert rows.take(np.zeros(0, np.int64)).num_rows == 0
    assert ParquetRows(files).take(np.array([600]))["text"].to_pylist() == ["b0"]


def test_an_epoch_reads_each_row_group_once_and_holds_a_few(files: list[str]) -> None:
    rows = ParquetRows(files, window=3)
    index_S = np.sort(np.random.default_rng(0).choice(1025, 200, replace=False))
    order_S = rows.order(index_S, 0, 1)
    assert np.array_equal(np.sort(order_S), index_S)
    got = []
    for first in range(0, len(order_S), 16):
        got += rows.take(order_S[first : first + 16])["row"].to_pylist()
        assert len(rows._held) <= 6
    assert got == order_S.tolist()
    # Twelve of the first file, nine of the second; all have a chosen row.
    assert rows.reads == 21
    # Neighbours in the order are seldom neighbours in the files, and the next epoch is another.
    assert np.mean(np.abs(np.diff(order_S)) == 1) < 0.1
    assert not np.array_equal(rows.order(index_S, 0, 2), order_S)
    assert np.array_equal(ParquetRows(files, window=3).order(index_S, 0, 1), order_S)


def test_groups_without_a_chosen_row_are_not_read(files: list[str]) -> None:
    rows = ParquetRows(files, window=3)
    rows.take(rows.order(np.array([3, 7, 1024]), 0, 1))
    assert rows.reads == 2


@pytest.mark.parametrize("index", [-1, 1025])
def test_a_row_that_is_not_there_is_told(files: list[str], index: int) -> None:
    with pytest.raises(DataContractError, match=f"no row {index}: the files have 1025 rows"):
        ParquetRows(files).take(np.array([0, index]))
