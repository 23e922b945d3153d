"""The `validate` stage on real artifacts: what it writes, when it stops, and on real data."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from stage_harness import Bench

from benchmarks.ingest import measure_in_child, write_tables
from components.data.contracts import CONTRACTS, INTERACTIONS, TIMESTAMP
from components.data.simulator.config import SimulatorConfig
from components.data.simulator.corrupt import KINDS, corrupt
from components.data.simulator.stream import simulate
from components.data.source import open_source
from components.data.validate_stage import ValidateParams, validate
from components.pipeline.errors import DataContractError

MASKS_ONLY = ValidateParams(great_expectations=False)
ROWS = 400


def raw_tables() -> dict[str, pa.Table]:
    """A clean data set as ingest writes it: contract columns, every field nullable."""
    random = np.random.default_rng(0)
    columns = {
        "interactions": {
            "user_id": random.integers(0, 30, ROWS),
            "item_id": random.integers(0, 20, ROWS),
            "timestamp": pa.array(1_600_000_000_000 + np.arange(ROWS) * 1000).cast(TIMESTAMP),
            "watch_time_s": pa.array(random.random(ROWS) * 20, pa.float32()),
            "duration_s": pa.array(np.full(ROWS, 10), pa.float32()),
            "like": random.random(ROWS) < 0.1,
        },
        "items": {
            "item_id": np.arange(20),
            "title": [f"video {n}" for n in range(20)],
            "tags": pa.array([["cats"]] * 20, pa.list_(pa.string())),
        },
        "users": {"user_id": np.arange(30)},
    }
    tables = {}
    for name, contract in CONTRACTS.items():
        given = columns[name]
        rows = len(next(iter(given.values())))
        schema = pa.schema([field.with_nullable(True) for field in contract.schema])
        tables[name] = pa.table(
            {f.name: given.get(f.name, pa.nulls(rows, f.type)) for f in schema}, schema=schema
        )
    tables["users"] = tables["users"].append_column("city", pa.array(["x", None, "y"] * 10))
    return tables


def replaced(table: pa.Table, column: str, values: dict[int, Any]) -> pa.Table:
    cells = table[column].to_pylist()
    for row, value in values.items():
        cells[row] = value
    at = table.schema.get_field_index(column)
    return table.set_column(
        at, table.schema.field(at), pa.array(cells, table.schema.field(at).type)
    )


def bench_with(folder: Path, tables: dict[str, pa.Table], day: str = "2025-06-01") -> Bench:
    bench = Bench(folder)
    bench.give("source", lambda output: output.write_json({"newest_day": day}))
    for name, table in tables.items():
        bench.give(f"raw_{name}", lambda output, t=table: output.write_table(t))
    return bench


def broken_tables() -> dict[str, pa.Table]:
    tables = raw_tables()
    interactions = replaced(tables["interactions"], "watch_time_s", {3: -1.0, 9: float("nan")})
    interactions = replaced(interactions, "user_id", {17: None})
    tables["interactions"] = pa.concat_tables([interactions, interactions.slice(0, 2)])
    # The item goes to quarantine, and so does what refers to it.
    tables["items"] = replaced(tables["items"], "duration_s", {5: -2.0})
    return tables


def test_rows_are_parted_and_counted_and_the_site_is_kept(tmp_path: Path) -> None:
    tables = broken_tables()
    bench = bench_with(tmp_path, tables)
    metrics = bench.run(validate, ValidateParams(max_quarantine_share=0.2))
    quarantine = bench.artifacts["quarantine"].read_table()
    of_item_5 = (tables["interactions"]["item_id"].to_numpy() == 5).sum()
    lines = {
        (table, rule): quarantine.filter(
            (pa.compute.field("table") == table) & (pa.compute.field("rule") == rule)
        )["row"].to_pylist()
        for table, rule in zip(
            quarantine["table"].to_pylist(), quarantine["rule"].to_pylist(), strict=True
        )
    }
    assert lines["items", "duration_s_not_positive"] == [5]
    assert lines["interactions", "watch_time_s_negative"] == [3, 9]
    assert lines["interactions", "user_id_missing"] == [17]
    assert lines["interactions", "exact_duplicate"] == [ROWS, ROWS + 1]
    assert len(lines["interactions", "item_unknown"]) == of_item_5 > 0
    assert json.loads(quarantine["record"][0].as_py())["duration_s"] == -2

    for name, contract in CONTRACTS.items():
        kept = bench.artifacts[name].read_table()
        bad = set(quarantine.filter(pa.compute.field("table") == name)["row"].to_pylist())
        rows = [row for row in range(tables[name].num_rows) if row not in bad]
        assert kept.to_pylist() == tables[name].take(rows).to_pylist()
        assert [f.name for f in kept.schema if not f.nullable] == list(contract.required)
    assert bench.artifacts["users"].read_table()["city"].to_pylist()[:3] == ["x", None, "y"]

    everything = sum(table.num_rows for table in tables.values())
    assert metrics["rows_in"] == everything
    assert metrics["rows_quarantined"] == quarantine.num_rows
    assert metrics["rows_passed"] == everything - quarantine.num_rows
    assert metrics["rules_failed"] == 5

    health = bench.artifacts["data_health"].read_json()
    assert health["tables"]["items"]["rows_quarantined"] == 1
    assert health["great_expectations"]
    index = Path(bench.artifacts["data_docs"].path("index.html")).read_text()
    assert "duration_s_not_positive" in index
    pages = [name for name in bench.artifacts["data_docs"].files if name != "index.html"]
    assert len(pages) == 6
    assert all(f"href='{page}'" in index for page in pages)


def test_masks_alone_part_the_rows_the_same_way_and_bitwise_again(tmp_path: Path) -> None:
    bench = bench_with(tmp_path, broken_tables())
    tables = ("interactions", "items", "users", "quarantine")
    artifacts = (*tables, "data_docs", "data_health")
    bench.run(validate, ValidateParams(max_quarantine_share=0.2))
    judged = bench.digests(*artifacts)
    bench.run(validate, ValidateParams(max_quarantine_share=0.2))
    assert bench.digests(*artifacts) == judged
    bench.run(validate, MASKS_ONLY.model_copy(update={"max_quarantine_share": 0.2}))
    assert bench.digests(*tables) == judged[: len(tables)]
    assert bench.artifacts["data_docs"].files == ["index.html"]
    assert bench.artifacts["data_health"].read_json()["great_expectations"] is None


def test_what_is_future_is_told_by_the_source_and_not_by_the_clock(tmp_path: Path) -> None:
    tables = raw_tables()
    days = {moment.date() for moment in tables["interactions"]["timestamp"].to_pylist()}
    assert days == {datetime.date(2020, 9, 13)}
    for day in ("2020-09-13", "2020-09-12"):
        bench = bench_with(tmp_path / day, tables, day)
        assert bench.run(validate, MASKS_ONLY)["rows_quarantined"] == 0
        assert bench.artifacts["data_health"].read_json()["day"] == day
    with pytest.raises(DataContractError, match="'timestamp_out_of_range' 400 times"):
        bench_with(tmp_path / "early", tables, "2020-09-11").run(validate, MASKS_ONLY)


def test_too_many_broken_rows_stop_with_the_place_and_keep_the_evidence(tmp_path: Path) -> None:
    tables = raw_tables()
    late = dict.fromkeys(range(100, 140), -5.0)
    tables["interactions"] = replaced(tables["interactions"], "watch_time_s", late)
    bench = bench_with(tmp_path, tables)
    with pytest.raises(DataContractError) as caught:
        bench.run(validate, MASKS_ONLY)
    text = str(caught.value)
    assert "table 'interactions'" in text
    assert "quarantined_share is 0.1, allowed is at most 0.05" in text
    assert "broken by rows: 'watch_time_s_negative' 40 times" in text
    assert "row 100: " in text
    assert "--set validate.max_quarantine_share=SHARE" in text
    rejected = tmp_path / "scratch" / "validate" / "rejected"
    assert str(rejected / "quarantine") in text
    assert pa.parquet.read_table(rejected / "quarantine").num_rows == 40
    assert "interactions" not in bench.artifacts


def test_nothing_after_a_stopped_table_is_validated(tmp_path: Path) -> None:
    tables = raw_tables()
    tables["items"] = tables["items"].slice(0, 0)
    bench = bench_with(tmp_path, tables)
    with pytest.raises(DataContractError, match="table 'items': rule 'table_empty' is broken"):
        bench.run(validate, MASKS_ONLY)


def test_wrong_type_names_table_and_column(tmp_path: Path) -> None:
    tables = raw_tables()
    at = INTERACTIONS.schema.get_field_index("rating")
    text = pa.nulls(ROWS, pa.string())
    tables["interactions"] = tables["interactions"].set_column(at, "rating", text)
    bench = bench_with(tmp_path, tables)
    with pytest.raises(DataContractError, match=r"column 'rating': .*of type string"):
        bench.run(validate, MASKS_ONLY)


def test_every_fault_of_the_simulator_is_found_under_its_name(tmp_path: Path) -> None:
    config = SimulatorConfig(
        users=300, items=400, interactions=20_000, dirty_rate=0, render_videos=False
    )
    source = corrupt(simulate(config, seed=1), kinds=tuple(KINDS), rate=0.01, seed=1)
    tables = {name: pa.Table.from_batches(list(make())) for name, make in source.tables.items()}
    bench = bench_with(tmp_path, tables)
    metrics = bench.run(validate, MASKS_ONLY)
    health = bench.artifacts["data_health"].read_json()
    found = {
        rule["rule"]: rule["broken"]
        for table in health["tables"].values()
        for rule in table["rules"]
        if rule["broken"]
    }
    dirty = source.ground_truth["dirty"]
    assert found == {kind: count for kind, count in dirty.items() if count}
    assert metrics["rows_quarantined"] == sum(dirty.values()) > 100


def test_benchmark_runs_the_real_stages_on_clean_tables(tmp_path: Path) -> None:
    write_tables(tmp_path / "data", 5_000)
    figures = measure_in_child("masks", tmp_path, "data")
    assert figures["seconds"] > 0
    assert 0.05 < figures["peak_gib"] < 2
    bench, _ = from_folder(tmp_path / "data", tmp_path)
    assert bench.run(validate, MASKS_ONLY)["rows_quarantined"] == 0


def from_folder(folder: Path, tmp_path: Path) -> tuple[Bench, dict[str, pa.Table]]:
    source = open_source(str(folder))
    tables = {name: pa.Table.from_batches(list(make())) for name, make in source.tables.items()}
    return bench_with(tmp_path, tables), tables


def test_kuairand_repeats_are_quarantined_and_only_them_and_impossible_times(
    shared_data: Path, tmp_path: Path
) -> None:
    bench, tables = from_folder(shared_data / "kuairand_pure", tmp_path)
    bench.run(validate, ValidateParams())
    quarantine = bench.artifacts["quarantine"].read_table().to_pandas()
    frame = tables["interactions"].to_pandas()
    repeats = np.flatnonzero(frame.duplicated())
    timeless = np.flatnonzero(frame["duration_s"] <= 0)
    endless = np.flatnonzero(
        (frame["duration_s"] > 0) & (frame["watch_time_s"] > 60 * frame["duration_s"])
    )
    bad = np.union1d(np.union1d(repeats, timeless), endless)
    assert quarantine.query("table == 'interactions'")["row"].tolist() == bad.tolist()
    named = quarantine[quarantine["reason"].str.contains("every column equals")]["row"]
    assert named.tolist() == repeats.tolist()
    # The source has 5,460 rows that repeat another in all its columns; more repeat another in
    # the columns that the contract keeps.
    assert len(repeats) >= 5_460
    assert set(quarantine["table"]) == {"interactions"}


def test_amazon_reviews_are_clean(shared_data: Path, tmp_path: Path) -> None:
    bench, _ = from_folder(shared_data / "amazon_scientific", tmp_path)
    metrics = bench.run(validate, MASKS_ONLY)
    assert metrics["rows_quarantined"] == 0
    assert bench.artifacts["interactions"].rows == 58_492
    assert bench.artifacts["items"].rows == 4_344
