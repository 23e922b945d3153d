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
        assert len(rows._held) <= 6  # two windows
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


@pytest.mark.parametrize(("batch", "ranks"), [(150, 1), (64, 4), (16, 4)])
def test_large_batches_and_shares_of_ranks_read_each_group_once(
    files: list[str], batch: int, ranks: int
) -> None:
    index_S = np.arange(0, 1025, 3)
    for rank in range(ranks):
        rows = ParquetRows(files, window=2)
        for epoch in (1, 2):
            order_S = rows.order(index_S, 0, epoch)
            for first in range(0, len(order_S), batch):
                share_b = order_S[first : first + batch][rank::ranks]
                assert rows.take(share_b)["row"].to_pylist() == share_b.tolist()
            assert rows.reads == 21 * epoch


def test_rows_in_any_order_hold_a_window(files: list[str]) -> None:
    rows = ParquetRows(files, window=2)
    for first in range(0, 1000, 100):
        rows.take(np.arange(first, first + 100))
        assert len(rows._held) <= 2 + 2


def test_the_digest_tells_other_data(files: list[str], tmp_path: Path) -> None:
    whole = ParquetRows(files).digest
    assert ParquetRows(files).digest == whole
    assert ParquetRows(files[::-1]).digest != whole
    assert ParquetRows(files[:1]).digest != whole
    table = pq.read_table(files[0])
    values = table["row"].to_numpy().copy()
    values[0] = 10_000
    altered = table.set_column(0, "row", pa.array(values))
    pq.write_table(altered, tmp_path / "a.parquet", row_group_size=GROUP)
    assert ParquetRows(files).digest != whole


def test_files_that_are_none_or_of_another_table_are_told(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match="no file to read"):
        ParquetRows([])
    gone, text, other = (str(tmp_path / name) for name in ("gone", "text", "other"))
    with pytest.raises(DataContractError, match="no such file") as refused:
        ParquetRows([*files, gone])
    assert refused.value.where == gone
    Path(text).write_text("row\n1\n")
    with pytest.raises(DataContractError, match="no parquet file"):
        ParquetRows([text])
    pq.write_table(pa.table({"row": [1.5]}), other)
    with pytest.raises(
        DataContractError, match=r"its columns are row \(double\), those of .*a.parq"
    ):
        ParquetRows([*files, other])
