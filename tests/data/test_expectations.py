"""Every rule of every contract table catches its bad row, and clean tables raise no alarm."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.data.contracts import CONTRACTS
from components.data.expectations import (
    EARLIEST,
    OPTIONAL,
    RARE,
    SUITES,
    latest_timestamp,
)
from components.pipeline.quarantine import QUARANTINE
from components.pipeline.rules import MASKS, Suite, allowed, broken_rows, rule_view
from components.pipeline.validation import TableReport, validate_table

NOW = datetime.datetime(2024, 5, 1, 13, 30, tzinfo=datetime.UTC)
ITEM_IDS = np.arange(0, 60, 2)
KNOWN = {"items": ITEM_IDS, "users": np.arange(40)}
PRESENT: dict[str, Any] = dict.fromkeys(OPTIONAL, True) | {
    "watch_time_s": 5.0,
    "duration_s": 60.0,
    "rating": 5.0,
}
NAN, INF = float("nan"), float("inf")


def bound(table: str, limit: float = 0.05) -> Suite:
    return SUITES[table].bind(max_quarantine_share=limit, latest=latest_timestamp(NOW))


def clean_rows(table: str, rows: int = 40) -> list[dict[str, Any]]:
    """Rows without a fault that touch what the rules allow: nulls, bounds, repeated pairs."""
    random = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    for row in range(rows):
        if table == "interactions":
            moment = EARLIEST + datetime.timedelta(days=20 * row, seconds=row)
            # Whole seconds: sixty times as long is then exact in float32.
            duration = float(random.integers(1, 60))
            made.append(
                {
                    # The same user and item come again, at another time.
                    "user_id": row % 7,
                    "item_id": int(ITEM_IDS[row % 5]),
                    "timestamp": moment,
                    "date": [None, (moment + datetime.timedelta(days=row % 2)).date()][row % 2],
                    "watch_time_s": [0.0, duration * 60, None, duration][row % 4],
                    "duration_s": duration if row % 3 else None,
                    "click": [True, False, None][row % 3],
                    "rating": [0.0, 10.0, None][row % 3],
                }
            )
        elif table == "items":
            made.append(
                {
                    "item_id": row * 10**12,
                    "title": f"item {row}" if row % 2 else "",
                    "tags": [["a b", "c"], [], None][row % 3] if row % 2 else ["d"],
                    "duration_s": [None, 0.5][row % 2],
                }
            )
        else:
            made.append(
                {"user_id": row, "gender": ["f", None][row % 2], "age": [0, None, 130][row % 3]}
            )
    return made


def as_table(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    fields = [field.with_nullable(True) for field in CONTRACTS[table].schema]
    if table == "users":
        fields += [pa.field("gender", pa.string()), pa.field("age", pa.int64())]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


class Memory:
    def __init__(self, table: pa.Table) -> None:
        self._table, self.schema = table, table.schema

    def batches(
        self, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[pa.RecordBatch]:
        return iter((self._table.select(columns) if columns else self._table).to_batches(7))


def judged(
    table: str, rows: list[dict[str, Any]], tmp_path: Path, limit: float = 0.05
) -> tuple[TableReport, pa.Table]:
    lines: list[pa.RecordBatch] = []
    report = validate_table(
        bound(table, limit),
        Memory(as_table(table, rows)),
        lambda batch: None,
        lines.append,
        scratch=tmp_path,
        references=KNOWN,
    )
    return report, pa.Table.from_batches(lines, QUARANTINE)


@pytest.mark.parametrize("table", sorted(SUITES))
def test_clean_table_breaks_no_rule(table: str, tmp_path: Path) -> None:
    report, lines = judged(table, clean_rows(table), tmp_path)
    assert [v.rule.name for v in report.verdicts if v.broken] == []
    assert lines.num_rows == 0
    assert report.passed == 40


BAD_VALUES: list[tuple[str, str, dict[str, Any]]] = [
    ("interactions", "user_id_missing", {"user_id": None}),
    ("interactions", "item_id_missing", {"item_id": None}),
    ("interactions", "timestamp_missing", {"timestamp": None}),
    ("interactions", "user_id_negative", {"user_id": -1}),
    ("interactions", "item_id_negative", {"item_id": -2}),
    # Seconds since 1970 read as milliseconds.
    ("interactions", "timestamp_out_of_range", {"timestamp": 1_650_812_741, "date": None}),
    ("interactions", "timestamp_out_of_range", {"timestamp": 1_714_694_400_000, "date": None}),
    # Microseconds read as milliseconds, and the ends of 64 bits: Python has no such years.
    ("interactions", "timestamp_out_of_range", {"timestamp": 1_650_812_741_000_000, "date": None}),
    ("interactions", "timestamp_out_of_range", {"timestamp": -(2**63), "date": None}),
    ("interactions", "timestamp_out_of_range", {"timestamp": 2**63 - 1, "date": None}),
    ("interactions", "date_out_of_range", {"date": datetime.date(1970, 1, 1)}),
    ("interactions", "date_out_of_range", {"date": 2**31 - 1}),
    ("interactions", "date_out_of_range", {"date": -(2**31)}),
    ("interactions", "watch_time_s_negative", {"watch_time_s": -0.001}),
    ("interactions", "watch_time_s_negative", {"watch_time_s": NAN}),
    ("interactions", "watch_time_s_negative", {"watch_time_s": INF}),
    ("interactions", "duration_s_not_positive", {"duration_s": 0.0}),
    ("interactions", "duration_s_not_positive", {"duration_s": NAN}),
    ("interactions", "duration_s_not_positive", {"duration_s": INF}),
    ("interactions", "watched_too_often", {"watch_time_s": 601.0, "duration_s": 10.0}),
    ("interactions", "rating_out_of_range", {"rating": 10.5}),
    ("interactions", "rating_out_of_range", {"rating": -1.0}),
    ("interactions", "rating_out_of_range", {"rating": NAN}),
    ("interactions", "item_unknown", {"item_id": 61}),
    ("interactions", "user_unknown", {"user_id": 40}),
    ("interactions", "date_disagrees", {"timestamp": NOW, "date": datetime.date(2024, 4, 29)}),
    (
        "interactions",
        "date_disagrees",
        {"timestamp": NOW - datetime.timedelta(days=2), "date": datetime.date(2024, 5, 1)},
    ),
    ("items", "item_id_missing", {"item_id": None}),
    ("items", "item_id_negative", {"item_id": -5}),
    ("items", "item_id_repeated", {"item_id": 10**12}),
    ("items", "duration_s_not_positive", {"duration_s": -3.0}),
    ("items", "tag_blank", {"tags": ["good", " "]}),
    ("items", "tag_blank", {"tags": [None]}),
    ("users", "user_id_missing", {"user_id": None}),
    ("users", "user_id_negative", {"user_id": -1}),
    ("users", "user_id_repeated", {"user_id": 2}),
]


@pytest.mark.parametrize(("table", "rule", "values"), BAD_VALUES)
def test_bad_row_goes_to_quarantine_with_its_number_and_reason(
    table: str, rule: str, values: dict[str, Any], tmp_path: Path
) -> None:
    rows = clean_rows(table)
    rows[23] |= values
    report, lines = judged(table, rows, tmp_path)
    assert lines["row"].to_pylist() == [23]
    assert lines["table"].to_pylist() == [table]
    # A negative item_id is unknown as well; the rule named is the first.
    assert lines["rule"].to_pylist() == [rule]
    reason = next(r.reason for r in SUITES[table].row_rules if r.name == rule)
    assert lines["reason"][0].as_py().startswith(reason)
    assert report.quarantined == 1
    assert report.stopping == []


def test_only_later_copies_of_a_row_are_quarantined(tmp_path: Path) -> None:
    rows = clean_rows("interactions")
    rows[30] = dict(rows[4])
    rows[33] = dict(rows[4])
    # Same user, item and time, but another watch time: an event of its own.
    rows[35] = rows[4] | {"watch_time_s": 1.25}
    _, lines = judged("interactions", rows, tmp_path, limit=1.0)
    assert lines.select(["row", "rule"]).to_pylist() == [
        {"row": 30, "rule": "exact_duplicate"},
        {"row": 33, "rule": "exact_duplicate"},
    ]


def same_value(column: str, value: Any) -> Any:
    return lambda rows: [row | {column: value} for row in rows]


def spoiled(column: str, value: Any, share: float) -> Any:
    return lambda rows: [
        row | {column: value} if n < share * len(rows) else row for n, row in enumerate(rows)
    ]


BAD_TABLES: list[tuple[str, str, Any]] = [
    ("interactions", "table_empty", lambda rows: []),
    ("interactions", "nothing_passes", same_value("user_id", None)),
    ("interactions", "quarantine_too_large", spoiled("watch_time_s", -1.0, 0.06)),
    ("interactions", "items_table_incomplete", spoiled("item_id", 61, 0.06)),
    ("interactions", "users_table_incomplete", spoiled("user_id", 40, 0.06)),
    ("interactions", "single_user", same_value("user_id", 3)),
    ("interactions", "single_item", same_value("item_id", 2)),
    (
        "interactions",
        "single_moment",
        lambda rows: [row | {"timestamp": NOW, "date": None} for row in rows],
    ),
    (
        "interactions",
        "events_contradicted",
        lambda rows: [*rows, *(row | {"like": True} for row in rows)],
    ),
    ("items", "table_empty", lambda rows: []),
    ("items", "nothing_passes", same_value("duration_s", 0.0)),
    ("items", "quarantine_too_large", spoiled("item_id", 0, 0.1)),
    ("items", "single_item", lambda rows: rows[:1]),
    ("users", "table_empty", lambda rows: []),
    ("users", "nothing_passes", same_value("user_id", -1)),
    ("users", "quarantine_too_large", spoiled("user_id", None, 0.06)),
    ("users", "single_user", lambda rows: rows[:1]),
]


def many(spoil: Any) -> Any:
    """Of many rows, since a share of a few says nothing; of users enough that one can dominate."""
    return lambda rows: spoil(
        [row | {"user_id": n % 7} for n, row in enumerate(clean_rows("interactions", 200))]
    )


def shifted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A third of the rows in the local time of Tokyo."""
    days = [NOW - datetime.timedelta(days=1, hours=n % 24) for n in range(len(rows))]
    ahead = [datetime.timedelta(hours=9 * (n % 3 == 0)) for n in range(len(rows))]
    return [
        row | {"timestamp": day + more, "date": day.date()}
        for row, day, more in zip(rows, days, ahead, strict=True)
    ]


WARNINGS: list[tuple[str, str, Any]] = [
    ("interactions", "watch_time_unit", lambda rows: [
        row | {"watch_time_s": 30_000.0, "duration_s": 40_000.0} for row in rows]),
    ("interactions", "duration_unit", same_value("duration_s", 40_000.0)),
    ("interactions", "watched_times_high", many(lambda rows: [
        row | {"watch_time_s": 30.0 + n, "duration_s": 10.0} for n, row in enumerate(rows)])),
    ("interactions", "two_time_zones", shifted),
    ("interactions", "gap_in_time", many(lambda rows: [
        row | {"timestamp": NOW - datetime.timedelta(days=10_000 * (n == 7), seconds=n),
               "date": None}
        for n, row in enumerate(rows)])),
    ("interactions", "user_dominates", lambda rows: [
        row | {"user_id": 3 if n % 2 else n % 40}
        for n, row in enumerate(clean_rows("interactions", 200))]),
    ("interactions", "item_dominates", lambda rows: [
        row | {"item_id": 2 if n % 3 else int(ITEM_IDS[n // 3 % 30])}
        for n, row in enumerate(clean_rows("interactions", 200))]),
    ("interactions", "watch_time_constant", many(same_value("watch_time_s", 2.0))),
    *[("interactions", f"{name}_nearly_always", many(same_value(name, True)))
      for name in RARE],
    *[("interactions", f"{name}_mostly_missing", many(
        lambda rows, name=name: [
            row | {name: PRESENT[name] if n < 15 else None} for n, row in enumerate(rows)]))
      for name in OPTIONAL],
    ("interactions", "event_contradicted", lambda rows: [*rows, rows[3] | {"like": True}]),
    ("users", "age_impossible", lambda rows: [rows[0] | {"age": -5}, *rows[1:]]),
    ("users", "age_impossible", lambda rows: [rows[0] | {"age": 10**15}, *rows[1:]]),
    ("items", "text_unreadable", lambda rows: [rows[0] | {"title": "a\x00b"}, *rows[1:]]),
    ("items", "text_unreadable", lambda rows: [rows[0] | {"tags": ["b", "\ufffd"]}, *rows[1:]]),
    ("items", "text_too_long", lambda rows: [rows[0] | {"caption": "long " * 20_001}, *rows[1:]]),
    ("items", "text_missing", lambda rows: [rows[0] | {"title": " ", "tags": []}, *rows[1:]]),
    ("items", "mostly_without_text", lambda rows: [
        row | {"title": None, "tags": None} for row in rows]),
]  # fmt: skip


@pytest.mark.parametrize(("table", "rule", "spoil"), BAD_TABLES)
def test_broken_table_rule_stops(table: str, rule: str, spoil: Any, tmp_path: Path) -> None:
    report, _ = judged(table, spoil(clean_rows(table)), tmp_path)
    assert rule in {v.rule.name for v in report.stopping}
    assert next(v.rule.remedy for v in report.stopping if v.rule.name == rule)


@pytest.mark.parametrize(("table", "rule", "spoil"), WARNINGS)
def test_warning_is_reported_and_stops_nothing(
    table: str, rule: str, spoil: Any, tmp_path: Path
) -> None:
    report, lines = judged(table, spoil(clean_rows(table)), tmp_path)
    assert rule in {v.rule.name for v in report.verdicts if v.broken}
    assert report.stopping == []
    assert lines.num_rows == 0


def test_share_at_the_limit_is_allowed(tmp_path: Path) -> None:
    rows = spoiled("watch_time_s", -1.0, 0.05)(clean_rows("interactions"))
    report, lines = judged("interactions", rows, tmp_path)
    assert lines.num_rows == 2
    assert report.stopping == []


def test_every_rule_has_a_bad_table_or_row_here() -> None:
    tested = {(table, rule) for table, rule, _ in [*BAD_VALUES, *BAD_TABLES, *WARNINGS]}
    tested.add(("interactions", "exact_duplicate"))
    declared = {
        (suite.table, rule.name)
        for suite in SUITES.values()
        for rule in (*suite.row_rules, *suite.table_rules)
    }
    assert declared == tested


def test_rules_are_named_once_explained_and_of_a_kind_that_has_a_mask() -> None:
    for suite in SUITES.values():
        rules = (*suite.row_rules, *suite.table_rules)
        assert len({rule.name for rule in rules}) == len(rules)
        assert all(rule.reason and rule.expectation in MASKS for rule in rules)
        assert all(rule.remedy for rule in suite.table_rules)


def test_allowed_values_are_said_in_words() -> None:
    words = {rule.name: allowed(rule) for rule in bound("interactions").row_rules}
    assert words["duration_s_not_positive"] == "above 0 and finite"
    assert words["rating_out_of_range"] == "at least 0 and at most 10"
    assert words["exact_duplicate"] == "False"
    assert words["user_id_missing"] == "a value"


def test_tomorrow_is_allowed_and_the_day_after_is_not() -> None:
    latest = latest_timestamp(NOW)
    assert latest == datetime.datetime(2024, 5, 3, tzinfo=datetime.UTC)


def test_a_source_of_impossible_times_alone_leaves_a_range_to_judge_by() -> None:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    assert latest_timestamp(epoch) == EARLIEST + datetime.timedelta(days=2)


@pytest.mark.parametrize("table", sorted(SUITES))
def test_great_expectations_finds_the_rows_that_the_masks_find(table: str, tmp_path: Path) -> None:
    from components.pipeline import data_docs
    from components.pipeline.derived_columns import Surroundings

    rows = clean_rows(table, 200)
    for number, (_, _, values) in enumerate(v for v in BAD_VALUES if v[0] == table):
        rows[5 * number + 3] |= values
    if table == "interactions":
        rows[190] = dict(rows[150])
    suite = bound(table)
    memory = Memory(as_table(table, rows))
    around = Surroundings(memory.batches, tmp_path, KNOWN)
    batch = as_table(table, rows).combine_chunks().to_batches()[0]
    derived = {name: how.bind(around)(batch, 0) for name, how in suite.derived.items()}
    view = rule_view(suite, batch, derived)

    gx = data_docs.great_expectations()
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    asset = context.data_sources.add_pandas("p").add_dataframe_asset("a")
    frame = asset.add_batch_definition_whole_dataframe("b").get_batch(
        batch_parameters={"dataframe": view.to_pandas()}
    )
    everything = gx.ExpectationSuite(
        table, expectations=[data_docs.expectation(rule) for rule in suite.row_rules]
    )
    outcome = frame.validate(everything, result_format={"result_format": "COMPLETE"})
    found = {
        result.expectation_config.meta["rule"]: result.result.get("unexpected_index_list") or []
        for result in outcome.results
    }
    masks = {
        rule.name: np.flatnonzero(broken_rows(rule, view.column(rule.column))).tolist()
        for rule in suite.row_rules
    }
    assert found == masks
    assert all(masks[rule.name] for rule in suite.row_rules if rule.severity == "critical")
