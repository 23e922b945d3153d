"""Faults put in on purpose are the ones announced, and validation finds exactly those."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from components.data.expectations import SUITES, latest_timestamp
from components.data.simulator.config import SimulatorConfig
from components.data.simulator.corrupt import KINDS, ROW_KINDS, corrupt
from components.data.simulator.stream import simulate
from components.data.source import Source
from components.pipeline.errors import UsageError
from components.pipeline.validation import validate_table

CLEAN = SimulatorConfig(
    users=200, items=200, interactions=10_000, render_videos=False, dirty_rate=0.0
)


def read(source: Source, name: str) -> pa.Table:
    return pa.Table.from_batches(list(source.tables[name]()))


def faulty_rows(kind: str, table: pa.Table, items: int) -> int:
    """Counts a fault by looking at the values alone."""
    match kind:
        case "user_id_missing" | "item_id_missing":
            return int(table[kind.removesuffix("_missing")].null_count)
        case "timestamp_out_of_range":
            bad = pc.greater(table["timestamp"], datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
        case "watch_time_s_negative":
            bad = pc.less(table["watch_time_s"], 0)
        case "watched_too_often":
            bad = pc.greater(pc.divide(table["watch_time_s"], table["duration_s"]), 60)
        case "duration_s_not_positive":
            bad = pc.less_equal(table["duration_s"], 0)
        case "item_unknown":
            bad = pc.greater(table["item_id"], items)
        case "exact_duplicate":
            return int(table.num_rows - table.group_by(table.column_names).aggregate([]).num_rows)
        case "item_id_repeated" | "user_id_repeated":
            key = kind.removesuffix("_repeated")
            return int(table.num_rows - len(pc.unique(table[key])))
    return int(pc.sum(pc.cast(bad, pa.int64())).as_py())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_of_fault_is_found_as_often_as_announced(kind: str) -> None:
    clean = simulate(CLEAN, 0)
    source = corrupt(clean, [kind], 0.05, seed=9)
    table = read(source, KINDS[kind])
    announced = source.ground_truth["dirty"]
    assert set(announced) == {kind}
    assert faulty_rows(kind, table, CLEAN.items) == announced[kind] > 0
    assert table.num_rows == source.rows[KINDS[kind]]
    untouched = set(clean.tables) - {KINDS[kind]}
    assert all(read(source, name) == read(clean, name) for name in untouched)


def test_rate_is_the_share_of_faulty_rows() -> None:
    source = corrupt(simulate(CLEAN, 0), ROW_KINDS, 0.2, seed=1)
    rows = simulate(CLEAN, 0).rows["interactions"]
    # 4.5 standard errors of a binomial share.
    bound = 4.5 * np.sqrt(0.2 * 0.8 / rows)
    assert sum(source.ground_truth["dirty"].values()) / rows == pytest.approx(0.2, abs=bound)


def test_rows_without_a_fault_stay_as_they_were() -> None:
    clean = read(simulate(CLEAN, 0), "interactions")
    dirty = read(corrupt(simulate(CLEAN, 0), ["watch_time_s_negative"], 0.1), "interactions")
    kept = pc.greater_equal(dirty["watch_time_s"], 0)
    assert dirty.filter(kept) == clean.filter(kept)
    changed = pc.invert(kept)
    assert dirty.drop(["watch_time_s"]).filter(changed) == clean.drop(["watch_time_s"]).filter(
        changed
    )


def test_faults_do_not_depend_on_how_the_stream_is_cut() -> None:
    clean = simulate(CLEAN, 0)

    def recut() -> Iterator[pa.RecordBatch]:
        for batch in clean.tables["interactions"]():
            for first in range(0, batch.num_rows, 321):
                yield batch.slice(first, 321)

    cut = replace(clean, tables={**clean.tables, "interactions": recut})
    one, other = (read(corrupt(s, ROW_KINDS, 0.1, seed=4), "interactions") for s in (clean, cut))
    assert one == other
    assert one != read(corrupt(clean, ROW_KINDS, 0.1, seed=5), "interactions")


def test_an_unknown_fault_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="watch_time_s_negative"):
        corrupt(simulate(CLEAN, 0), ["typo"])


def test_kinds_are_names_of_row_rules() -> None:
    rules = {(t, rule.name) for t, suite in SUITES.items() for rule in suite.row_rules}
    assert {(table, kind) for kind, table in KINDS.items()} <= rules


class _Table:
    """A stream as validation reads it."""

    def __init__(self, source: Source, name: str) -> None:
        self._stream = source.tables[name]

    @property
    def schema(self) -> pa.Schema:
        return next(iter(self._stream())).schema

    def batches(
        self, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[pa.RecordBatch]:
        for batch in self._stream():
            yield batch.select(columns) if columns else batch


@pytest.mark.parametrize("rate", [0.0, 0.04])
def test_validation_quarantines_exactly_the_faults_of_the_embedded_run(
    rate: float, tmp_path: Path
) -> None:
    source = simulate(CLEAN.model_copy(update={"dirty_rate": rate}), 6)
    ids = {
        table: np.unique(read(source, table)[f"{table[:-1]}_id"].to_numpy())
        for table in ("items", "users")
    }
    found: Counter[str] = Counter()
    for name, suite in SUITES.items():
        today = datetime.datetime.now(datetime.UTC)
        report = validate_table(
            suite.bind(max_quarantine_share=0.05, latest=latest_timestamp(today)),
            _Table(source, name),
            lambda batch: None,
            lambda batch: found.update(batch["rule"].to_pylist()),
            scratch=tmp_path,
            references=ids,
        )
        assert not report.stopping
        assert report.rows == source.rows[name]
        broken = {v.rule.name: v.broken for v in report.verdicts if v.level == "row" and v.broken}
        if name == "interactions" and rate:
            assert broken == source.ground_truth["dirty"]
    assert found == (source.ground_truth["dirty"] if rate else {})
