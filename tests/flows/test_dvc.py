"""``dvc.yaml`` says what the stages say, and DVC makes what a flow makes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command_line import ROOT, environment, files, manifests

from components.pipeline import dvc
from components.pipeline.stage import load_registry
from flows.recommend import FLOW

pytestmark = pytest.mark.slow

FIRST = ("ingest", "validate", "split")
HOUR_MS = 3_600_000
FIRST_MS = 1_735_689_600_000  # 2025-01-01


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    return loaded


def test_the_committed_file_is_the_one_that_the_registry_gives() -> None:
    assert (ROOT / "dvc.yaml").read_text() == dvc.render(), "remedy: make dvc"


def test_it_has_the_stages_of_the_flow_in_its_order(document: dict[str, Any]) -> None:
    assert tuple(document["stages"]) == FLOW.stages
    for name, entry in document["stages"].items():
        assert entry["cmd"] == f"reelflow stage {name} --export out/{name}"


def test_a_stage_depends_on_the_artifacts_that_it_reads_and_on_its_code(
    document: dict[str, Any],
) -> None:
    registry = load_registry()
    written: dict[str, str] = {}
    for name, entry in document["stages"].items():
        artifacts = [dep for dep in entry["deps"] if dep.startswith("out/")]
        assert artifacts == [written[artifact] for artifact in registry[name].inputs]
        code = set(entry["deps"]) - set(artifacts)
        assert registry[name].module.replace(".", "/") + ".py" in code
        assert all((ROOT / file).stat().st_size for file in code)
        assert not [file for file in code if not file.startswith("components/")]
        assert entry["outs"] == [f"out/{name}/{artifact}" for artifact in registry[name].outputs]
        written |= {artifact: f"out/{name}/{artifact}" for artifact in registry[name].outputs}


def test_a_stage_depends_on_its_own_parameters_and_the_seed_it_takes(
    document: dict[str, Any],
) -> None:
    registry = load_registry()
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, entry in document["stages"].items():
        seed = ["seed"] if "seed" in registry[name].params.model_fields else []
        assert entry["params"] == [name, *seed]
        assert set(entry["params"]) <= set(given)


def test_metrics_of_every_stage_and_the_loss_curve_are_declared(document: dict[str, Any]) -> None:
    for name, entry in document["stages"].items():
        assert entry["metrics"] == [f"out/{name}/metrics.json"]
    (plot,) = document["plots"]
    assert list(plot) == ["out/train_recommender/training_curve/curve.csv"]


@dataclass(frozen=True)
class Clone:
    """The project in a git repository of its own, with outside data and small parameters."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / ".platform"

    def run(self, *command: str, home: Path | None = None) -> str:
        git = {"GIT_AUTHOR_NAME": "a", "GIT_COMMITTER_NAME": "a"}
        git |= {"GIT_AUTHOR_EMAIL": "a@b.c", "GIT_COMMITTER_EMAIL": "a@b.c"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        more = {"PYTHONPATH": str(self.folder), "PATH": path, "DVC_NO_ANALYTICS": "1", **git}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment(home or self.home, **more),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "state")

    def set(self, stage: str, **values: Any) -> dict[str, Any]:
        """Edit params.yaml; the values before."""
        file = self.folder / "params.yaml"
        params = yaml.safe_load(file.read_text())
        before = {name: params[stage][name] for name in values}
        params[stage] |= values
        file.write_text(yaml.safe_dump(params, sort_keys=False))
        return before

    def outputs(self, stage: str, home: Path | None = None) -> dict[str, Any]:
        """Output entries of the newest execution of ``stage``."""
        found = manifests(home or self.home)
        bodies = [json.loads(v)["body"] for k, v in found.items() if k.startswith(f"{stage}/")]
        outputs: dict[str, Any] = max(bodies, key=lambda body: body["created_at"])["outputs"]
        return outputs


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """After one ``dvc repro split``."""
    made = Clone(tmp_path_factory.mktemp("dvc") / "clone")
    made.folder.mkdir()
    for name in ("components", "flows"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, made.folder / name, ignore=ignored)
    (made.folder / ".dvc").mkdir()
    for name in ("params.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy(ROOT / name, made.folder / name)
    # As the code here gives it: an edit that was not followed by `make dvc` is told elsewhere.
    (made.folder / "dvc.yaml").write_text(dvc.render())
    write_interactions(made.folder / "mine", users=60)
    made.set("ingest", source="mine")
    made.set("validate", great_expectations=False)
    made.run("git", "init", "--quiet")
    made.commit()
    made.run("dvc", "repro", "split")
    return made


def write_interactions(folder: Path, *, users: int) -> None:
    rng = np.random.default_rng(0)
    rows = users * 20
    times = pa.array(FIRST_MS + HOUR_MS * np.arange(rows), pa.timestamp("ms", "UTC"))
    table = {
        "user_id": rng.integers(0, users, rows),
        "item_id": rng.integers(0, 40, rows),
        "timestamp": times,
    }
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), folder / "interactions.parquet")


def test_dvc_makes_the_same_artifacts_as_the_flow(clone: Clone, tmp_path: Path) -> None:
    home = tmp_path / "home"
    clone.run("reelflow", "run", "recommend", "--until", "split", home=home)
    for stage in FIRST:
        by_dvc, by_flow = clone.outputs(stage), clone.outputs(stage, home)
        assert {name: out["digest"] for name, out in by_dvc.items()} == {
            name: out["digest"] for name, out in by_flow.items()
        }


def test_dvc_tracks_what_the_store_holds(clone: Clone) -> None:
    for stage in FIRST:
        for name, entry in clone.outputs(stage).items():
            folder = clone.folder / "out" / stage / name
            exported = {
                str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
                for file in folder.rglob("*")
                if file.is_file()
            }
            assert exported == {file["name"]: file["sha256"] for file in entry["files"]}
    # All of `out` is ignored by git; DVC keeps its digests in the one file that is to be committed.
    assert clone.run("git", "status", "--porcelain").split() == ["??", "dvc.lock"]


def test_what_makes_the_project_one_of_dvc_is_committed() -> None:
    """A fresh clone needs no `dvc init`, and nothing of DVC's own is reported to anybody."""
    names = [".dvc/.gitignore", ".dvc/config", ".dvcignore"]
    listed = subprocess.run(
        ["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == names
    assert (ROOT / ".dvc" / "config").read_text().split() == ["[core]", "analytics", "=", "false"]


def test_dvc_and_the_cache_look_at_the_same_code(clone: Clone) -> None:
    lock = yaml.safe_load((clone.folder / "dvc.lock").read_text())
    for stage in FIRST:
        (text,) = [v for k, v in manifests(clone.home).items() if k.startswith(f"{stage}/")]
        modules = json.loads(text)["body"]["code"]
        files_of = [clone.folder.joinpath(*module.split(".")) for module in modules]
        python = [f / "__init__.py" if f.is_dir() else f.with_suffix(".py") for f in files_of]
        wanted = {str(f.relative_to(clone.folder)) for f in python if f.stat().st_size}
        assert {
            dep["path"] for dep in lock["stages"][stage]["deps"] if dep["path"].endswith(".py")
        } == wanted


def test_repro_again_executes_nothing(clone: Clone) -> None:
    store, out = clone.home / "store", clone.folder / "out"
    before = files(store), {name: size for name, (size, _) in files(out).items()}
    said = clone.run("dvc", "repro", "split")
    assert "  ingest                 cached" in said
    assert "Stage 'validate' didn't change, skipping" in said
    assert "Stage 'split' didn't change, skipping" in said
    assert (files(store), {name: size for name, (size, _) in files(out).items()}) == before


def test_metrics_are_those_of_the_stages(clone: Clone) -> None:
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json"))[""]["data"]
    for stage in FIRST:
        (text,) = [v for k, v in manifests(clone.home).items() if k.startswith(f"{stage}/")]
        assert shown[f"out/{stage}/metrics.json"]["data"] == json.loads(text)["body"]["metrics"]


def test_params_diff_names_what_was_edited(clone: Clone) -> None:
    before = clone.set("split", max_history=99)
    try:
        changed = json.loads(clone.run("dvc", "params", "diff", "--json"))
    finally:
        clone.set("split", **before)
    (edited,) = changed["params.yaml"].items()
    assert edited[0] == "split.max_history"
    assert (edited[1]["old"], edited[1]["new"]) == (before["max_history"], 99)


def test_repro_sees_that_the_outside_data_changed(clone: Clone) -> None:
    before = clone.outputs("split")["train_sequences"]["rows"]
    write_interactions(clone.folder / "mine", users=70)
    clone.run("dvc", "repro", "split")
    after = clone.outputs("split")["train_sequences"]["rows"]
    assert after > before
    exported = pq.read_table(clone.folder / "out" / "split" / "train_sequences")
    assert exported.num_rows == after
