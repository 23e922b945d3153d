"""Rows that repeat an earlier row, against pandas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from components.pipeline.seen_before import RowBits, repeated_rows, row_hashes


def messy_frame(rows: int) -> pd.DataFrame:
    random = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "a": pd.array(random.integers(-5, 5, rows), "Int64"),
            "t": pd.to_datetime(random.integers(0, 3, rows), unit="ms", utc=True),
            "x": random.choice(np.array([0.5, 1.5, 2.5], np.float32), rows),
            "yes": pd.array(random.random(rows) < 0.5, "boolean"),
            "n": random.integers(0, 2, rows).astype(np.int16),
        }
    ).mask(random.random((rows, 5)) < 0.1)


@pytest.mark.parametrize("batch_rows", [1, 333, 5000])
def test_same_rows_as_pandas_duplicated(tmp_path: Path, batch_rows: int) -> None:
    frame = messy_frame(3000 if batch_rows > 1 else 200)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    batches = table.to_batches(batch_rows)
    found = repeated_rows(batches, table.column_names, tmp_path)
    quicker = repeated_rows(
        batches, table.column_names, tmp_path, repeated_rows(batches, ["a", "t"], tmp_path)
    )
    expected = frame.duplicated().to_numpy()
    assert expected.any()
    assert not expected.all()
    for one in (found, quicker):
        np.testing.assert_array_equal(one.later.between(0, len(frame)), expected)
        every = frame.duplicated(keep=False).to_numpy()
        np.testing.assert_array_equal(one.all.between(0, len(frame)), every)
    assert list(tmp_path.iterdir()) == []


def test_null_is_not_zero_and_columns_do_not_swap() -> None:
    batch = pa.record_batch(
        {
            "a": pa.array([0, None, 1, 2], pa.int64()),
            "b": pa.array([None, 0, 2, 1], pa.int64()),
        }
    )
    assert len(set(row_hashes(batch, ["a", "b"]).tolist())) == 4


def test_hash_of_one_integer_column_is_one_to_one() -> None:
    ids = np.concatenate([np.arange(200_000), 2**62 + np.arange(200_000) * 64])
    hashes = row_hashes(pa.record_batch({"id": ids}), ["id"])
    assert len(np.unique(hashes)) == len(ids)


def test_column_without_fixed_width_is_refused() -> None:
    with pytest.raises(TypeError, match="'name' of type string"):
        row_hashes(pa.record_batch({"name": ["x"]}), ["name"])


def test_row_bits_of_any_window() -> None:
    bits = RowBits(100)
    rows = np.array([0, 7, 8, 63, 64, 99])
    bits.add(rows)
    full = np.isin(np.arange(100), rows)
    for first in range(20):
        np.testing.assert_array_equal(bits.between(first, 75), full[first : first + 75])
