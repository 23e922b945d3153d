"""What a stage published is put where DVC looks for it, whole and in place of what was there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from real_services import S3Server
from tiny_stages import Tiny

from components.pipeline import dvc
from components.pipeline.artifacts import Input
from components.pipeline.dvc import adopt, export
from components.pipeline.errors import CorruptArtifactError, UsageError
from components.pipeline.runner import Runner
from components.pipeline.stage import REGISTRY


def published(tiny: Tiny, folder: Path, *overrides: str, store: str | None = None) -> Runner:
    runner = tiny.runner(folder, *overrides, store=store)
    runner.execute(REGISTRY["numbers"])
    return runner


WHOLE = ["facts/data.json", "manifest.json", "numbers/table.parquet"]


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_outputs_manifest_and_headline_are_put_into_the_folder(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc, "headline_of", {"numbers": ("rows", "of another flow")}.get)
    runner = published(tiny, tmp_path)
    out = tmp_path / "out é" / "numbers"
    export(runner.store, runner.done["numbers"], out)
    everything = ["facts/data.json", "manifest.json", "metrics.json", "numbers/table.parquet"]
    assert names(out) == everything
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
    half = tmp_path / "out" / f".numbers.{os.getpid()}.new" / "numbers"
    half.mkdir(parents=True)
    (half / "half.parquet").write_text("half")
    runner = published(tiny, tmp_path, "numbers.count=7")
    export(runner.store, runner.done["numbers"], out)
    assert names(tmp_path / "out") == [
        "numbers/facts/data.json",
        "numbers/manifest.json",
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
    assert names(tmp_path / "out") == [f"numbers/{name}" for name in WHOLE]


def test_artifacts_of_an_object_store_are_fetched(tiny: Tiny, tmp_path: Path, s3: S3Server) -> None:
    runner = published(tiny, tmp_path, store=s3.uri)
    out = tmp_path / "out" / "numbers"
    export(runner.store, runner.done["numbers"], out)
    assert json.loads((out / "facts/data.json").read_text()) == {"count": 5}


@pytest.fixture
def restored(tiny: Tiny, tmp_path: Path) -> Path:
    """What DVC brings back: the exports of two stages, of a store that is not here."""
    elsewhere = tiny.runner(tmp_path / "elsewhere")
    for name in ("numbers", "doubled"):
        elsewhere.execute(REGISTRY[name])
        export(elsewhere.store, elsewhere.done[name], tmp_path / "out" / name)
    shutil.rmtree(tmp_path / "elsewhere")
    return tmp_path / "out"


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_what_was_restored_is_published_where_the_store_lacks_it(
    tiny: Tiny, restored: Path, tmp_path: Path, s3: S3Server, where: str
) -> None:
    runner = tiny.runner(tmp_path / "here", store=s3.uri if where == "s3" else None)
    tiny.calls.clear()
    adopt(runner, REGISTRY["total"], restored / "total")
    manifest, cached = runner.execute(REGISTRY["total"])
    assert not cached
    assert tiny.calls == ["total"]
    assert manifest.metrics == {"total": 20.0}
    for name in ("numbers", "doubled"):
        exported = json.loads((restored / name / "manifest.json").read_text())["body"]
        (body,) = [m.body for m in runner.store.manifests(name)]
        assert body | {"outputs": None} == exported | {"outputs": None}
        for artifact, record in exported["outputs"].items():
            assert body["outputs"][artifact]["digest"] == record["digest"]
            assert Path(Input(runner.store, artifact, runner.done[name]).path()).is_dir()
    # Nothing is left of the way there.
    assert not list((runner.settings.home / "scratch").glob("*/*"))


@pytest.mark.parametrize("harm", ["altered", "missing", "other params", "no manifest", "torn"])
def test_what_is_not_the_result_in_force_is_not_published(
    tiny: Tiny, restored: Path, tmp_path: Path, harm: str
) -> None:
    overrides = ["numbers.count=6"] if harm == "other params" else []
    runner = tiny.runner(tmp_path / "here", *overrides)
    table = restored / "numbers" / "numbers" / "table.parquet"
    manifest = restored / "numbers" / "manifest.json"
    table.chmod(0o644)
    if harm == "altered":
        table.write_bytes(table.read_bytes()[:-1] + b"?")
    elif harm == "missing":
        table.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "torn":
        manifest.write_bytes(manifest.read_bytes()[:100])
    adopt(runner, REGISTRY["total"], restored / "total")
    assert runner.store.manifests() == []
    with pytest.raises(UsageError, match="run it first: reelflow stage numbers"):
        runner.resolve_upstream(REGISTRY["total"])
