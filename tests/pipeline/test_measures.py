"""Measures of a table equal those of an exact count, in chunks of any size."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from components.pipeline.measures import KEPT, Measures
from components.pipeline.rules import Suite

SUITE = Suite(
    table="t",
    row_rules=(),
    table_rules=(),
    spans=("seconds",),
    means=("seconds", "flag"),
    shares=("key",),
    gaps=("moment",),
)
DAY_MS = 86_400_000


def measured(table: pa.Table, chunk: int) -> dict[str, float | None]:
    measures = Measures(SUITE)
    for batch in table.to_batches(chunk):
        measures.add(batch.num_rows, batch, batch)
    row: dict[str, float | None] = measures.record({}).to_pylist()[0]
    return row


def a_table(rows: int, keys: np.ndarray, days: np.ndarray) -> pa.Table:
    random = np.random.default_rng(1)
    return pa.table(
        {
            "key": keys,
            "moment": pa.array(days * DAY_MS).cast(pa.timestamp("ms", "UTC")),
            "seconds": pa.array(random.random(rows), mask=random.random(rows) < 0.25),
            "flag": random.random(rows) < 0.3,
        }
    )


@pytest.mark.parametrize("chunk", [977, 100_000])
def test_the_most_frequent_of_many_values_is_found_within_the_bound(chunk: int) -> None:
    random = np.random.default_rng(0)
    rows = 60_000
    # Far more values than are followed, one of them a bot with a fifth of the rows.
    keys = np.where(random.random(rows) < 0.2, 7, random.integers(100, 10**15, rows))
    share = measured(a_table(rows, keys, np.zeros(rows, int)), chunk)["largest_share_of_key"]
    true = float((keys == 7).mean())
    assert share is not None
    assert true - 2 / KEPT <= share <= true


@pytest.mark.parametrize("chunk", [33, 10_000])
def test_measures_do_not_depend_on_chunks(chunk: int) -> None:
    rows = 1000
    table = a_table(
        rows, np.arange(rows) % 50, np.arange(rows) // 20 + 40 * (np.arange(rows) > 700)
    )
    got = measured(table, chunk)
    seconds = table["seconds"].to_pandas()
    assert got["largest_share_of_key"] == pytest.approx(1 / 50)
    assert got["mean_of_seconds"] == pytest.approx(seconds.mean())
    assert got["missing_share_of_seconds"] == pytest.approx(seconds.isna().mean())
    assert got["span_of_seconds"] == pytest.approx(seconds.max() - seconds.min())
    # Rows on days 0 to 35 and 75 to 89.
    assert got["gap_share_of_moment"] == pytest.approx(39 / 89)


def test_little_is_not_judged() -> None:
    few = measured(a_table(50, np.zeros(50, int), np.zeros(50, int)), 50)
    assert few["largest_share_of_key"] is None
    assert few["missing_share_of_seconds"] is None
    assert few["gap_share_of_moment"] is None
    # Two users of two are no sign of a bot.
    two = measured(a_table(500, np.arange(500) % 2, np.zeros(500, int)), 500)
    assert two["largest_share_of_key"] is None
