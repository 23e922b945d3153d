"""Streaming validation: where each row goes, who judges, and that both judges agree."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from components.pipeline import data_docs, validation
from components.pipeline.derived_columns import (
    SeenBefore,
)
from components.pipeline.errors import DataContractError, StageError
from components.pipeline.quarantine import QUARANTINE, records
from components.pipeline.rules import Parameter, Rule, Suite, broken_rows, rule_view
from components.pipeline.validation import TableReport, chunks, require, validate_table

DAY = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)


class MemoryTable:
    """A table in memory, read in batches of an odd size."""

    def __init__(self, table: pa.Table, rows: int = 1000) -> None:
        self._table, self._rows = table, rows

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    def batches(
        self, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[pa.RecordBatch]:
        table = self._table.select(columns) if columns else self._table
        return iter(table.to_batches(min(self._rows, batch_size)))


SUITE = Suite(
    table="views",
    derived={"again": SeenBefore(("user", "seconds"))},
    spans=("user",),
    means=("seconds",),
    row_rules=(
        Rule("user_missing", "user", "ExpectColumnValuesToNotBeNull", {}, "no user"),
        Rule(
            "seconds_range",
            "seconds",
            "ExpectColumnValuesToBeBetween",
            {"min_value": 0, "max_value": 100, "strict_max": True},
            "bad seconds",
        ),
        Rule("repeat", "again", "ExpectColumnValuesToBeInSet", {"value_set": [False]}, "again"),
        Rule(
            "long",
            "seconds",
            "ExpectColumnValuesToBeBetween",
            {"max_value": 50},
            "rather long",
            "warning",
        ),
    ),
    table_rules=(
        Rule(
            "too_many",
            "quarantined_share",
            "ExpectColumnValuesToBeBetween",
            {"max_value": Parameter("limit")},
            "too many rows are broken",
            remedy="mend the source",
        ),
        Rule(
            "mean_high",
            "mean_of_seconds",
            "ExpectColumnValuesToBeBetween",
            {"max_value": 60},
            "long on average",
            "warning",
        ),
    ),
)


def views(users: list[int | None], seconds: list[float | None]) -> pa.Table:
    return pa.table(
        {"user": pa.array(users, pa.int64()), "seconds": pa.array(seconds, pa.float32())}
    )


def messy_views(rows: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    seconds = random.choice([np.nan, np.inf, -np.inf, -1, 0, 30, 51, 99.5, 100, 1e30], rows)
    seconds = np.where(random.random(rows) < 0.5, random.random(rows) * 90, seconds)
    return pa.table(
        {
            "user": pa.array(random.integers(0, 50, rows), mask=random.random(rows) < 0.05),
            "seconds": pa.array(seconds.astype(np.float32), mask=random.random(rows) < 0.1),
        }
    )


def run(
    table: pa.Table, tmp_path: Path, suite: Suite | None = None, rows: int = 1000, **kwargs: object
) -> tuple[TableReport, pa.Table, pa.Table]:
    suite = suite or SUITE.bind(limit=1.0)
    passed: list[pa.RecordBatch] = []
    broken: list[pa.RecordBatch] = []
    report = validate_table(
        suite,
        MemoryTable(table, rows),
        passed.append,
        broken.append,
        scratch=tmp_path,
        **kwargs,  # type: ignore[arg-type]
    )
    schema = validation.passed_schema(suite, table.schema)
    return (
        report,
        pa.Table.from_batches(passed, schema),
        pa.Table.from_batches(broken, QUARANTINE),
    )


def test_each_row_goes_to_exactly_one_place_with_number_rule_and_reasons(tmp_path: Path) -> None:
    table = views([1, None, 2, 1, 3, None], [10, 10, 100, 10, None, -5])
    report, passed, broken = run(table, tmp_path)
    assert passed.to_pylist() == [{"user": 1, "seconds": 10}, {"user": 3, "seconds": None}]
    assert broken.select(["row", "rule", "reason"]).to_pylist() == [
        {"row": 1, "rule": "user_missing", "reason": "no user"},
        {"row": 2, "rule": "seconds_range", "reason": "bad seconds"},
        {"row": 3, "rule": "repeat", "reason": "again"},
        {"row": 5, "rule": "user_missing", "reason": "no user; bad seconds"},
    ]
    assert json.loads(broken["record"][3].as_py()) == {"user": None, "seconds": -5}
    assert (report.rows, report.passed, report.quarantined) == (6, 2, 4)
    assert not passed.schema.field("user").nullable


def test_nothing_depends_on_how_the_table_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = messy_views(5000, seed=1)
    whole = run(table, tmp_path, rows=5000)
    monkeypatch.setattr(validation, "CHUNK_ROWS", 257)
    for rows in (1, 100, 999):
        cut = run(table, tmp_path, rows=rows)
        assert cut[0].to_json() == whole[0].to_json()
        assert cut[1].equals(whole[1])
        assert cut[2].equals(whole[2])


def test_rows_match_a_plain_pandas_reading_of_the_rules(tmp_path: Path) -> None:
    table = messy_views(3000, seed=2)
    _, passed, broken = run(table, tmp_path)
    frame = pd.DataFrame(table.to_pylist(), dtype=object)
    bad = []
    seen: set[tuple[object, ...]] = set()
    for number, (user, seconds) in enumerate(zip(frame["user"], frame["seconds"], strict=True)):
        outside = seconds is not None and not 0 <= seconds < 100
        # NaN differs from itself in Python; as a stored value it equals itself.
        key = (user, repr(seconds))
        if user is None or outside or key in seen:
            bad.append(number)
        seen.add(key)
    assert broken["row"].to_pylist() == bad
    assert passed.num_rows == table.num_rows - len(bad)


def test_warning_is_counted_but_sends_no_row_off_and_stops_nothing(tmp_path: Path) -> None:
    report, passed, broken = run(views([1, 2, 3], [80, 90, 70]), tmp_path)
    counts = {v.rule.name: v.broken for v in report.verdicts}
    assert counts["long"] == 3
    assert counts["mean_high"] == 1
    assert (passed.num_rows, broken.num_rows) == (3, 0)
    assert report.stopping == []
    require(report)


def test_span_of_hashed_ids_is_measured(tmp_path: Path) -> None:
    spread = Rule(
        "spread", "span_of_user", "ExpectColumnValuesToBeBetween", {"min_value": 1}, "one user"
    )
    suite = dataclasses.replace(SUITE.bind(limit=1.0), table_rules=(spread,))
    report, _, _ = run(views([-(2**63), 2**63 - 1], [10, 10]), tmp_path, suite)
    assert report.verdicts[-1].observed == 2.0**64
    assert report.stopping == []


def test_broken_table_rule_names_table_rule_values_rows_and_remedy(tmp_path: Path) -> None:
    table = views([1, None, 2, 3], [10, 10, 200, 20])
    report, _, _ = run(table, tmp_path, SUITE.bind(limit=0.25))
    with pytest.raises(DataContractError) as caught:
        require(report, rejected=tmp_path / "rejected")
    text = str(caught.value)
    assert caught.value.exit_code == 3
    for part in (
        "table 'views'",
        "'too_many'",
        "quarantined_share is 0.5, allowed is at most 0.25",
        "4 rows came in, 2 passed, 2 would be quarantined",
        'row 2: {"user": 2, "seconds": 200}',
        "mend the source",
        str(tmp_path / "rejected"),
    ):
        assert part in text


def test_missing_column_is_named_before_any_row_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match=r"column 'seconds' is missing; the table has user"):
        run(pa.table({"user": [1]}), tmp_path)


def test_unbound_parameter_and_unknown_expectation_are_refused() -> None:
    with pytest.raises(KeyError, match="limit"):
        SUITE.bind()
    rule = Rule("x", "user", "ExpectColumnValuesToMatchRegex", {}, "")
    with pytest.raises(ValueError, match="ExpectColumnValuesToMatchRegex is none of"):
        broken_rows(rule, pa.array([1]))


def test_chunks_keep_rows_and_order() -> None:
    table = pa.table({"n": np.arange(1000)})
    for size, rows in ((1, 7), (64, 100), (1000, 64), (300, 300)):
        cut = list(chunks(table.to_batches(size), rows))
        assert all(len(c) == rows for c in cut[:-1])
        assert pa.Table.from_batches(cut).equals(table.combine_chunks())


def test_record_is_json_whatever_the_row_holds() -> None:
    far = pa.array([10**15, -(10**14), None], pa.timestamp("ms", tz="UTC"))
    batch = pa.record_batch(
        {
            'na"me': pa.array(['quo"te\n', None, "ü"]),
            "tags": pa.array([["a", None], None, []], pa.list_(pa.string())),
            "x": pa.array([np.nan, 0.1, -np.inf], pa.float32()),
            "yes": pa.array([True, None, False]),
            "day": pa.array([datetime.date(2024, 1, 2), None, None]),
            "far": far,
        }
    )
    rows = [json.loads(text) for text in records(batch).to_pylist()]
    assert rows[0]['na"me'] == 'quo"te\n'
    assert [row["x"] for row in rows] == ["nan", pytest.approx(0.1), "-inf"]
    assert [row["tags"] for row in rows] == [["a", None], None, []]
    assert [row["yes"] for row in rows] == [True, None, False]
    assert rows[0]["day"] == "2024-01-02"
    assert [row["far"] for row in rows] == [10**15, -(10**14), None]


def test_judge_that_disagrees_with_the_masks_stops_validation(tmp_path: Path) -> None:
    class Lenient:
        def judge_rows(self, view: pa.RecordBatch, first_row: int) -> dict[str, int]:
            return dict.fromkeys((rule.name for rule in SUITE.row_rules), 0)

        def judge_table(self, measures: pa.RecordBatch) -> dict[str, int]:
            return dict.fromkeys((rule.name for rule in SUITE.table_rules), 0)

    run(views([1], [1]), tmp_path, judge=Lenient())
    with pytest.raises(StageError, match="'user_missing' broken 0 times, its mask 1 times"):
        run(views([None], [1]), tmp_path, judge=Lenient())


class TestGreatExpectations:
    """The judge; Great Expectations is imported once, by the first of these tests."""

    def test_unexpected_rows_are_those_of_the_masks(self, tmp_path: Path) -> None:
        gx = data_docs.great_expectations()
        table = messy_views(2000, seed=4)
        derived = {"again": pa.array(np.arange(2000) % 3 == 0, mask=np.arange(2000) % 7 == 0)}
        view = rule_view(SUITE, table.combine_chunks().to_batches()[0], derived)
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        asset = context.data_sources.add_pandas("p").add_dataframe_asset("a")
        batch = asset.add_batch_definition_whole_dataframe("b").get_batch(
            batch_parameters={"dataframe": view.to_pandas()}
        )
        for rule in SUITE.row_rules:
            outcome = batch.validate(
                data_docs.expectation(rule), result_format={"result_format": "COMPLETE"}
            )
            rows = np.flatnonzero(broken_rows(rule, view.column(rule.column)))
            assert outcome.result["unexpected_index_list"] == rows.tolist()
            assert len(rows) > 10

    def test_chunks_add_up_to_one_result_and_the_site_needs_no_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(validation, "CHUNK_ROWS", 700)
        table = messy_views(2000, seed=5)
        suite = SUITE.bind(limit=1.0)
        sites = []
        for attempt, zone in (("first", "UTC"), ("second", "Asia/Kolkata")):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            docs = data_docs.DataDocs(tmp_path / attempt, DAY)
            report, _, _ = run(table, tmp_path, suite, judge=docs.judge(suite))
            docs.write()
            sites.append(
                {
                    page.relative_to(tmp_path / attempt).as_posix(): page.read_text()
                    for page in sorted((tmp_path / attempt).rglob("*"))
                    if page.is_file()
                }
            )
        monkeypatch.undo()
        time.tzset()
        assert sites[0] == sites[1]
        results = next(text for name, text in sites[0].items() if name.startswith("validations/"))
        for verdict in report.verdicts:
            if verdict.level == "row":
                assert f"{verdict.broken} unexpected values found" in results
        assert "of 2000 total rows" in results
        for name, text in sites[0].items():
            assert name.endswith(".html")
            for outside in ("<script", "<link", "<img", "url(", "@import", "<iframe"):
                assert outside not in text
