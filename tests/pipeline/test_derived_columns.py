"""Columns that rules are put to and tables do not have."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from components.pipeline.derived_columns import (
    AnyText,
    BlankElements,
    Derived,
    HoursAfter,
    KnownIn,
    LongestText,
    Midnight,
    Ratio,
    Surroundings,
    Unreadable,
)


def compute(how: Derived, columns: dict[str, pa.Array], tmp_path: Path) -> list[object]:
    batch = pa.record_batch(columns)
    around = Surroundings(
        lambda columns=None, batch_size=0: iter([batch]),
        tmp_path,
        {
            "dense": np.array([2, 5], np.int64),
            "sparse": np.array([-(2**62), 2, 5, 2**61], np.int64),
            "none": np.empty(0, np.int64),
        },
    )
    bound = how.bind(around)
    # A slice has an offset, which buffers read directly would overlook.
    both = [bound(batch, 0), bound(batch.slice(1), 1)]
    assert both[0].to_pylist()[1:] == both[1].to_pylist()
    result: list[object] = both[0].to_pylist()
    return result


def test_ratio_is_null_without_a_positive_denominator(tmp_path: Path) -> None:
    columns = {
        "w": pa.array([6, 6, 6, None, np.inf, np.nan], pa.float32()),
        "d": pa.array([2, 0, -1, 2, 2, 2], pa.float32()),
    }
    assert compute(Ratio("w", "d"), columns, tmp_path) == [3, None, None, None, None, None]


def test_midnight_of_a_date(tmp_path: Path) -> None:
    days = [datetime.date(2022, 4, 25), None, datetime.date(1969, 12, 31)]
    found = compute(Midnight("d"), {"d": pa.array(days, pa.date32())}, tmp_path)
    assert found == [
        datetime.datetime(2022, 4, 25, tzinfo=datetime.UTC),
        None,
        datetime.datetime(1969, 12, 31, tzinfo=datetime.UTC),
    ]


def test_hours_after_a_date_do_not_overflow(tmp_path: Path) -> None:
    moments = [90_000_000, None, -3_600_000, 2**63 - 1]
    days = [datetime.date(1970, 1, 2), datetime.date(1970, 1, 1), datetime.date(1970, 1, 1), None]
    columns = {
        "m": pa.array(moments).cast(pa.timestamp("ms", "UTC")),
        "d": pa.array(days, pa.date32()),
    }
    assert compute(HoursAfter("m", "d"), columns, tmp_path) == [1.0, None, -1.0, None]
    far = {
        "m": pa.array([-(2**63), 2**63 - 1]).cast(pa.timestamp("ms", "UTC")),
        "d": pa.array([2**31 - 1, -(2**31)], pa.int32()).cast(pa.date32()),
    }
    before, after = compute(HoursAfter("m", "d"), far, tmp_path)
    assert before < -(10**12) < 10**12 < after


TEXTS = {
    "title": pa.array(["plain\ttext\n", None, "nul\x00", "", "del\x7f"]),
    "tags": pa.array([["a", None], None, [], ["na\ufffdve", "long text"], ["ü"]]),
}


def test_unreadable_characters(tmp_path: Path) -> None:
    how = Unreadable(("title", "tags"))
    assert compute(how, TEXTS, tmp_path) == [False, False, True, True, True]


def test_longest_text(tmp_path: Path) -> None:
    assert compute(LongestText(("title", "tags")), TEXTS, tmp_path) == [11, 0, 4, 9, 4]


def test_blank_elements(tmp_path: Path) -> None:
    lists = [["a", ""], None, [], [" \t", None, "b"], ["c"]]
    columns = {"tags": pa.array(lists, pa.list_(pa.string()))}
    assert compute(BlankElements("tags"), columns, tmp_path) == [1, 0, 0, 2, 0]


def test_any_text(tmp_path: Path) -> None:
    columns = {
        "title": pa.array(["x", " ", None, None, ""]),
        "tags": pa.array([None, [], ["y"], None, []], pa.list_(pa.string())),
    }
    found = compute(AnyText(("title", "tags")), columns, tmp_path)
    assert found == [True, False, True, False, False]


def test_known_in_another_table(tmp_path: Path) -> None:
    ids = pa.array([5, 3, None, 2, 2**60, -(2**63), 2**63 - 1, 1, 6], pa.int64())
    expected = [True, False, None, True, False, False, False, False, False]
    for table in ("dense", "sparse"):
        assert compute(KnownIn("id", table), {"id": ids}, tmp_path) == expected
    nothing = compute(KnownIn("id", "none"), {"id": ids}, tmp_path)
    assert set(nothing) == {False, None}
