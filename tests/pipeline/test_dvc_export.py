"""What a stage published is put where DVC looks for it, whole and in place of what was there."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from real_services import S3Server
from tiny_stages import Tiny

from components.pipeline.dvc import export
from components.pipeline.errors import CorruptArtifactError
from components.pipeline.runner import Runner
from components.pipeline.stage import REGISTRY


def published(tiny: Tiny, folder: Path, *overrides: str, store: str | None = None) -> Runner:
    runner = tiny.runner(folder, *overrides, store=store)
    runner.execute(REGISTRY["numbers"])
    return runner


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_outputs_and_metrics_are_put_into_the_folder(tiny: Tiny, tmp_path: Path) -> None:
    runner = published(tiny, tmp_path)
    out = tmp_path / "out é" / "numbers"
    export(runner.store, runner.done["numbers"], out)
    assert names(out) == ["facts/data.json", "metrics.json", "numbers/table.parquet"]
    assert json.loads((out / "metrics.json").read_text()) == {"rows": 5}
    assert pq.read_table(out / "numbers/table.parquet").num_rows == 5
    record = runner.done["numbers"].body["outputs"]["numbers"]
    stored = tmp_path / "store" / record["path"] / "table.parquet"
    assert (out / "numbers/table.parquet").samefile(stored)


def test_nothing_of_an_earlier_execution_stays(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out" / "numbers"
    (out / "gone").mkdir(parents=True)
    (out / "gone" / "old.parquet").write_text("old")
    # What a killed export left half-way.
    (tmp_path / "out" / ".numbers.new" / "numbers").mkdir(parents=True)
    (tmp_path / "out" / ".numbers.new" / "numbers" / "half.parquet").write_text("half")
    runner = published(tiny, tmp_path, "numbers.count=7")
    export(runner.store, runner.done["numbers"], out)
    assert names(tmp_path / "out") == [
        "numbers/facts/data.json",
        "numbers/metrics.json",
        "numbers/numbers/table.parquet",
    ]
    export(runner.store, runner.done["numbers"], out)
    assert pq.read_table(out / "numbers/table.parquet").num_rows == 7


def test_removing_what_was_exported_leaves_the_store_whole(tiny: Tiny, tmp_path: Path) -> None:
    runner = published(tiny, tmp_path)
    out = tmp_path / "out" / "numbers"
    export(runner.store, runner.done["numbers"], out)
    for file in [p for p in out.rglob("*") if p.is_file()]:
        file.unlink()
    assert tiny.run(tmp_path) == ["doubled", "total"]


def test_a_harmed_artifact_is_not_exported(tiny: Tiny, tmp_path: Path) -> None:
    runner = published(tiny, tmp_path)
    out = tmp_path / "out" / "numbers"
    export(runner.store, runner.done["numbers"], out)
    record = runner.done["numbers"].body["outputs"]["facts"]
    stored = tmp_path / "store" / record["path"] / "data.json"
    stored.unlink()
    with pytest.raises(CorruptArtifactError):
        export(runner.store, runner.done["numbers"], out)
    assert names(out) == ["facts/data.json", "metrics.json", "numbers/table.parquet"]


def test_artifacts_of_an_object_store_are_fetched(tiny: Tiny, tmp_path: Path, s3: S3Server) -> None:
    runner = published(tiny, tmp_path, store=s3.uri)
    out = tmp_path / "out" / "numbers"
    export(runner.store, runner.done["numbers"], out)
    assert json.loads((out / "facts/data.json").read_text()) == {"count": 5}
