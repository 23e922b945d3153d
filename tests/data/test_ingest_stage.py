"""The `ingest` stage: raw tables of outside data and of the simulator, whole or not at all."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from stage_harness import Bench

from components.data.contracts import CONTRACTS, TIMESTAMP
from components.data.readers.files import INTERACTION_ROWS
from components.data.simulator.config import SimulatorConfig
from components.data.source import open_source
from components.data.stage import IngestParams, ingest
from components.pipeline.errors import DataContractError
from components.pipeline.stage import REGISTRY

SMALL = SimulatorConfig(users=40, items=80, interactions=600, days=10, video_items=2)
RAW = ("raw_interactions", "raw_items", "raw_users")


def write_tables(folder: Path, rows: int) -> Path:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "user_id": random.integers(0, 99, rows),
            "item_id": random.integers(0, 99, rows),
            "timestamp": pa.array(np.arange(rows)).cast(TIMESTAMP),
        }
    )
    pq.write_table(table, folder / "interactions.parquet", row_group_size=10_000)
    return folder


def test_tables_are_written_whole_with_counts_and_description(tmp_path: Path) -> None:
    folder = write_tables(tmp_path / "in", 300_000)
    bench = Bench(tmp_path)
    metrics = bench.run(ingest, IngestParams(source=str(folder)))
    assert metrics == {"interactions": 300_000, "items": 99, "users": 99}
    source = open_source(str(folder))
    for name in CONTRACTS:
        got = bench.artifacts[f"raw_{name}"].read_table()
        assert got.equals(pa.Table.from_batches(list(source.tables[name]())))
    about = bench.artifacts["source"].read_json()
    assert (about["format"], about["split"]["protocol"]) == ("tables", "leave_one_out")
    assert bench.artifacts["videos"].files == []
    assert bench.last_run is not None
    assert any("ids are taken from the interactions" in note for note in bench.last_run.notes)


def test_row_groups_are_large_however_small_the_pieces_read(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run(ingest, IngestParams(source=str(write_tables(tmp_path / "in", 300_000))))
    path = bench.artifacts["raw_interactions"].path(bench.artifacts["raw_interactions"].files[0])
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sum(sizes) == 300_000
    assert min(sizes[:-1]) >= INTERACTION_ROWS // 2


def test_simulated_platform_is_written_with_videos_and_ground_truth(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    metrics = bench.run(ingest, IngestParams(simulator=SMALL), seed=3)
    assert (metrics["items"], metrics["users"]) == (80, 40)
    items = bench.artifacts["raw_items"].read_table()
    named = items["video"].drop_null().to_pylist()
    assert sorted(bench.artifacts["videos"].files) == sorted(named)
    assert len(named) == 2
    about = bench.artifacts["source"].read_json()
    assert about["format"] == "simulator"
    assert about["split"]["protocol"] == "temporal"
    assert about["ground_truth"]


def test_same_seed_and_data_give_equal_bytes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    params = IngestParams(simulator=SMALL.model_copy(update={"render_videos": False}))
    bench.run(ingest, params, seed=1)
    first = bench.digests(*RAW, "source")
    bench.run(ingest, params, seed=1)
    assert bench.digests(*RAW, "source") == first
    bench.run(ingest, params, seed=2)
    assert bench.digests("raw_interactions") != first[:1]


def newest_day(
    bench: Bench, folder: Path, read_on: str, monkeypatch: pytest.MonkeyPatch
) -> datetime.date:
    """The day that ingest tells validation, when the clock says ``read_on``."""
    today = datetime.date.fromisoformat(read_on)
    monkeypatch.setattr("components.data.stage._today", lambda: today)
    bench.run(ingest, IngestParams(source=str(folder)))
    return datetime.date.fromisoformat(bench.artifacts["source"].read_json()["newest_day"])


def write_moments(
    folder: Path, moments: list[str | None], days: list[str | None] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    n = len(moments)
    columns = {
        "user_id": np.arange(n),
        "item_id": np.arange(n),
        "timestamp": pa.array(moments).cast(pa.timestamp("ms")).cast(TIMESTAMP),
        "date": pa.array(days or [None] * n, pa.string()).cast(pa.date32()),
    }
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return folder


def test_same_data_read_on_another_day_gives_equal_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that ran wrong far into the future has no say in what day it is.
    moments = ["2024-03-01T23:59:59", None, "2039-01-01T00:00:00", "2024-01-01T00:00:00"]
    folder = write_moments(tmp_path / "in", moments)
    bench = Bench(tmp_path)
    days, digests = set(), set()
    for read_on in ("2024-03-01", "2024-03-02", "2026-11-27"):
        days.add(newest_day(bench, folder, read_on, monkeypatch))
        digests.add(tuple(bench.digests(*RAW, "source")))
    assert days == {datetime.date(2024, 3, 1)}
    assert len(digests) == 1


def test_newest_day_is_that_of_times_and_dates_but_never_after_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    folder = write_moments(
        tmp_path / "in", ["2024-03-01T12:00:00", "1969-01-01T00:00:00"], ["2024-03-02", None]
    )
    assert newest_day(bench, folder, "2024-05-01", monkeypatch) == datetime.date(2024, 3, 2)
    # Clocks may run ahead by a day, and the day after the reading is one of them.
    assert newest_day(bench, folder, "2024-03-01", monkeypatch) == datetime.date(2024, 3, 1)
    folder = write_moments(tmp_path / "in", ["1960-01-01T00:00:00", "9000-01-01T00:00:00"])
    assert newest_day(bench, folder, "2024-03-01", monkeypatch) == datetime.date(1970, 1, 1)


def test_broken_data_stops_the_stage_and_publishes_nothing(tmp_path: Path) -> None:
    folder = write_tables(tmp_path / "in", 1000)
    data = (folder / "interactions.parquet").read_bytes()
    (folder / "interactions.parquet").write_bytes(data[: len(data) // 2])
    bench = Bench(tmp_path)
    with pytest.raises(
        DataContractError, match=r"interactions\.parquet byte \d+: the file is cut off"
    ):
        bench.run(ingest, IngestParams(source=str(folder)))
    assert bench.artifacts == {}


def test_format_can_be_named(tmp_path: Path) -> None:
    folder = write_tables(tmp_path / "in", 1000)
    (folder / "ratings.dat").write_text("1::2::3::4\n")
    with pytest.raises(DataContractError, match=r"--set ingest\.format=tables"):
        Bench(tmp_path).run(ingest, IngestParams(source=str(folder)))
    metrics = Bench(tmp_path).run(ingest, IngestParams(source=str(folder), format="tables"))
    assert metrics["interactions"] == 1000


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValidationError):
        IngestParams.model_validate({"sources": "x"})
    with pytest.raises(ValidationError):
        IngestParams.model_validate({"format": "csv"})


def test_stage_declares_what_it_reads_from_outside(tmp_path: Path) -> None:
    stage = REGISTRY["ingest"]
    assert stage.inputs == ()
    assert stage.external is not None
    folder = write_tables(tmp_path / "in", 10)
    before = stage.external(IngestParams(source=str(folder)))
    pq.write_table(pa.table({"item_id": [1]}), folder / "items.parquet")
    assert stage.external(IngestParams(source=str(folder))) != before


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("kuairand_pure", {"interactions": 1_045_516, "items": 7_583, "users": 27_285}),
        ("amazon_scientific", {"interactions": 58_492, "items": 4_344, "users": 8_317}),
    ],
)
def test_real_data_is_ingested(
    shared_data: Path, tmp_path: Path, name: str, rows: dict[str, int]
) -> None:
    bench = Bench(tmp_path)
    assert bench.run(ingest, IngestParams(source=str(shared_data / name))) == rows
