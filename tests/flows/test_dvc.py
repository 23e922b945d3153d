"""``dvc.yaml`` says what the stages say, and DVC makes what a flow makes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command_line import ROOT, environment, files, manifests
from s3_service import s3_service

from components.pipeline import dvc
from components.pipeline.stage import load_registry, producer_of
from flows.recommend import FLOW

pytestmark = pytest.mark.slow

#: The code beside dvc.yaml, not the installed one.
CLI = (sys.executable, "-m", "components.pipeline.cli")
UNTIL = ("--until", "split")
FIRST = ("ingest", "validate", "split")
PAGE = "html_template = plots.html"
IN_DVC = (".dvc/.gitignore", ".dvc/config", ".dvc/plots.html")
HOUR_MS = 3_600_000
FIRST_MS = 1_735_689_600_000  # 2025-01-01


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    return loaded


def test_the_committed_file_is_the_one_that_the_registry_gives() -> None:
    assert (ROOT / "dvc.yaml").read_text() == dvc.render(), "remedy: make dvc"


def test_it_has_the_stages_of_the_flow_in_its_order(document: dict[str, Any]) -> None:
    assert tuple(n for n in document["stages"] if not n.endswith("_outside")) == FLOW.stages
    for name in FLOW.stages:
        cmd = f"python -m components.pipeline.cli stage {name} --export out/{name}"
        assert document["stages"][name]["cmd"] == cmd


def test_a_stage_depends_on_the_artifacts_that_it_reads_and_on_its_code(
    document: dict[str, Any],
) -> None:
    registry = load_registry()
    written: dict[str, str] = {}
    for name in FLOW.stages:
        entry = document["stages"][name]
        read = [dep for dep in entry["deps"] if dep.startswith("out/")]
        outside = [f"out/{name}_outside.json"] if registry[name].external else []
        assert read == [*(written[artifact] for artifact in registry[name].inputs), *outside]
        code = set(entry["deps"]) - set(read)
        assert registry[name].module.replace(".", "/") + ".py" in code
        assert all((ROOT / file).stat().st_size for file in code)
        assert not [file for file in code if not file.startswith("components/")]
        told = ["manifest.json", *(["metrics.json"] if name in FLOW.headline else [])]
        assert entry["outs"] == [f"out/{name}/{out}" for out in (*registry[name].outputs, *told)]
        written |= {artifact: f"out/{name}/{artifact}" for artifact in registry[name].outputs}


def test_what_lies_outside_is_looked_at_every_time_after_the_stages_above(
    document: dict[str, Any],
) -> None:
    for name, stage in load_registry().items():
        entry = document["stages"].get(f"{name}_outside")
        assert (entry is not None) == (stage.external is not None)
        if entry is None:
            continue
        assert entry["always_changed"] is True
        assert entry["outs"] == [f"out/{name}_outside.json"]
        assert entry["cmd"].endswith(f" stage {name} --outside out/{name}_outside.json")
        read = [dep for dep in document["stages"][name]["deps"] if dep.startswith("out/")]
        assert entry.get("deps", []) == read[:-1]


def test_a_stage_depends_on_its_own_parameters_and_the_seed_it_takes(
    document: dict[str, Any],
) -> None:
    registry = load_registry()
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name in FLOW.stages:
        entry = document["stages"][name]
        seed = ["seed"] if "seed" in registry[name].params.model_fields else []
        assert entry["params"] == [name, *seed]
        assert set(entry["params"]) <= set(given)


def test_the_headline_of_the_flow_is_what_experiments_are_compared_by(
    document: dict[str, Any],
) -> None:
    assert document["metrics"] == [f"out/{stage}/metrics.json" for stage in FLOW.headline]
    # Evaluation first: DVC shows the columns in this order.
    assert next(iter(FLOW.headline)) == "evaluate_recommender"
    assert [title for plot in document["plots"] for title in plot] == [p.title for p in FLOW.plots]
    outs = {out for entry in document["stages"].values() for out in entry["outs"]}
    for plot in document["plots"]:
        ((file, _),) = next(iter(plot.values()))["y"].items()
        assert file.rpartition("/")[0] in outs


@dataclass(frozen=True)
class Clone:
    """The project in a git repository of its own, with outside data and small parameters."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / ".platform"

    def run(self, *command: str, home: Path | None = None, fails: bool = False) -> str:
        """What a command said; with ``fails`` it must not succeed."""
        done = self.call(*command, home=home)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr if fails else done.stdout

    def call(self, *command: str, home: Path | None) -> subprocess.CompletedProcess[str]:
        git = {"GIT_AUTHOR_NAME": "a", "GIT_COMMITTER_NAME": "a"}
        git |= {"GIT_AUTHOR_EMAIL": "a@b.c", "GIT_COMMITTER_EMAIL": "a@b.c"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        more = {"PYTHONPATH": str(self.folder), "PATH": path, "DVC_NO_ANALYTICS": "1", **git}
        given = environment(home or self.home, **more)
        if home is None:
            # The default: .platform of the project, also for a copy that DVC makes of it.
            del given["REELFLOW_HOME"], given["PYTHONPATH"]
        return subprocess.run(
            command, cwd=self.folder, env=given, capture_output=True, text=True, check=False
        )

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
    for name in ("params.yaml", ".gitignore", ".dvcignore", *IN_DVC):
        shutil.copy(ROOT / name, made.folder / name)
    # As the code here gives it: an edit that was not followed by `make dvc` is told elsewhere.
    (made.folder / "dvc.yaml").write_text(dvc.render())
    write_interactions(made.folder / "mine", users=60)
    write_interactions(made.folder / "more", users=90)
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
    clone.run(*CLI, "run", "recommend", *UNTIL, home=home)
    for stage in FIRST:
        assert digests(clone.outputs(stage)) == digests(clone.outputs(stage, home))
    # Each finds what the other made.
    said = clone.run("dvc", "repro", "--force", "split", home=home)
    assert re.findall(r"(?m)^  (\w+) +cached$", said) == list(FIRST)
    assert re.findall(r"(?m)^  (\w+) +(?:cached|[\d.]+ s)$", said) == list(FIRST)
    said = clone.run(*CLI, "run", "recommend", *UNTIL)
    assert said.split() == [word for stage in FIRST for word in (stage, "cached")]


def digests(outputs: dict[str, Any]) -> dict[str, str]:
    return {name: out["digest"] for name, out in outputs.items()}


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
    names = [*IN_DVC, ".dvcignore"]
    listed = subprocess.run(
        ["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == names
    config = (ROOT / ".dvc" / "config").read_text().split()
    assert config == ["[core]", "analytics", "=", "false", "[plots]", *PAGE.split()]


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
    for stage in FIRST:
        assert f"Stage '{stage}' didn't change, skipping" in said
    assert (files(store), {name: size for name, (size, _) in files(out).items()}) == before


def test_metrics_are_the_headline_of_the_stages(clone: Clone) -> None:
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json"))[""]["data"]
    for stage in ("validate", "split"):
        (text,) = [v for k, v in manifests(clone.home).items() if k.startswith(f"{stage}/")]
        metrics = json.loads(text)["body"]["metrics"]
        wanted = {name: metrics[name] for name in FLOW.headline[stage]}
        assert shown[f"out/{stage}/metrics.json"]["data"] == wanted


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


# From here on the state of the clone is committed.


@pytest.fixture(scope="module")
def committed(clone: Clone) -> Clone:
    clone.run("dvc", "repro", "split")
    clone.commit()
    return clone


def metrics_of(clone: Clone, stage: str) -> dict[str, dict[str, float]]:
    """By experiment name, the metrics that `dvc exp show` has of a stage."""
    found = {}
    for commit in json.loads(clone.run("dvc", "exp", "show", "--json")):
        rows = [commit, *(e["revs"][-1] for e in commit.get("experiments") or [])]
        for row in rows:
            shown = row["data"]["metrics"][f"out/{stage}/metrics.json"]
            found[row["name"] or row["rev"]] = shown["data"]
    return found


def test_experiments_are_listed_with_their_metrics_and_compared(committed: Clone) -> None:
    clone = committed
    branch = clone.run("git", "branch", "--show-current").strip()
    clone.run("dvc", "exp", "run", "-n", "more-data", "-S", "ingest.source=more", "split")
    clone.run("git", "checkout", "--quiet", "--", ".")
    # A copy of the project publishes where the project does.
    published = len(manifests(clone.home))
    clone.run("dvc", "exp", "run", "--temp", "-n", "short", "-S", "split.max_history=7", "split")
    assert len(manifests(clone.home)) == published + 1
    assert not list((clone.folder / ".dvc" / "tmp" / "exps").rglob(".platform"))

    shown = metrics_of(clone, "split")
    assert {branch, "more-data", "short"} <= shown.keys()
    events = {name: metrics["train_events"] for name, metrics in shown.items()}
    assert events["more-data"] > events[branch] == events["short"]
    lines = clone.run("dvc", "exp", "show", "--csv").splitlines()
    columns = lines[0].split(",")
    assert columns.index("train_events") < columns.index("seed")
    assert not [line for line in lines if "!" in line]

    changed = json.loads(clone.run("dvc", "metrics", "diff", branch, "more-data", "--json"))
    diff = changed["out/split/metrics.json"]["train_events"]
    assert (diff["old"], diff["new"]) == (events[branch], events["more-data"])
    changed = json.loads(clone.run("dvc", "params", "diff", branch, "short", "--json"))
    assert list(changed["params.yaml"]) == ["split.max_history"]


@pytest.fixture(scope="module")
def remote(committed: Clone) -> Iterator[Clone]:
    """The clone after `dvc push --run-cache` to an S3 service."""
    import boto3

    with s3_service() as address:
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="team")
        committed.run("dvc", "remote", "add", "--default", "team", "s3://team/dvc")
        committed.run("dvc", "remote", "modify", "team", "endpointurl", address)
        committed.commit()
        before = committed.set("split", max_history=7)
        for values in ({"max_history": 7}, before):
            committed.set("split", **values)
            committed.run("dvc", "repro", "split")
            # Of the run cache DVC pushes what ran; the files, those of the workspace alone.
            committed.run("dvc", "push", "--run-cache")
        assert committed.run("git", "status", "--porcelain") == ""
        yield committed


def test_a_fresh_clone_brings_everything_back_and_executes_nothing(
    remote: Clone, tmp_path: Path
) -> None:
    fresh = Clone(tmp_path / "fresh")
    remote.run("git", "clone", "--quiet", str(remote.folder), str(fresh.folder))
    fresh.run("dvc", "pull", "--run-cache", "--allow-missing")
    said = fresh.run("dvc", "repro", "split")
    for stage in FIRST:
        assert f"Stage '{stage}' didn't change, skipping" in said
    assert manifests(fresh.home) == {}

    # What somebody made elsewhere comes out of the run cache.
    fresh.set("split", max_history=7)
    said = fresh.run("dvc", "repro", "--pull", "split")
    assert "Stage 'split' is cached - skipping run, checking out outputs" in said
    assert manifests(fresh.home) == {}

    # A stage that nobody has run finds its inputs, though they were never published here.
    fresh.set("split", max_history=8)
    said = fresh.run("dvc", "repro", "split")
    assert re.findall(r"(?m)^  (\w+) +(?:cached|[\d.]+ s)$", said) == ["split"]
    for stage in ("ingest", "validate"):
        restored = json.loads((fresh.folder / "out" / stage / "manifest.json").read_text())
        assert digests(fresh.outputs(stage)) == digests(restored["body"]["outputs"])
    assert {name.split("/")[0] for name in manifests(fresh.home)} == set(FIRST)


def test_what_was_altered_after_it_was_restored_is_not_published(
    remote: Clone, tmp_path: Path
) -> None:
    fresh = Clone(tmp_path / "fresh")
    remote.run("git", "clone", "--quiet", str(remote.folder), str(fresh.folder))
    fresh.run("dvc", "pull", "--allow-missing")
    fresh.run("dvc", "repro", "split")
    (file,) = (fresh.folder / "out" / "ingest" / "raw_interactions").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    said = fresh.run(*CLI, "stage", "split", "--export", "out/split", fails=True)
    assert "stage 'ingest', which is not there" in said
    assert "Traceback" not in said
    assert manifests(fresh.home) == {}


def test_two_at_once_break_nothing(committed: Clone) -> None:
    committed.run("git", "checkout", "--quiet", "--", ".")
    committed.set("split", max_history=33)
    with ThreadPoolExecutor(3) as pool:
        calls = [("dvc", "repro", "split")] * 2 + [(*CLI, "run", "recommend", *UNTIL)]
        done = list(pool.map(lambda call: committed.call(*call, home=committed.home), calls))
    first, second, flow = done
    assert flow.returncode == 0, flow.stderr
    assert 0 in (first.returncode, second.returncode)
    for repro in (first, second):
        busy = "is busy" in repro.stderr or "Unable to acquire lock" in repro.stderr
        assert repro.returncode == 0 or busy, repro.stderr
    committed.run("dvc", "repro", "split")
    assert "Data and pipelines are up to date" in committed.run("dvc", "status", "split")
    exported = json.loads((committed.folder / "out" / "split" / "manifest.json").read_text())
    keys = [k for k in manifests(committed.home) if exported["body"]["key"] in k]
    assert len(keys) == 1
    assert exported["body"]["params"]["max_history"] == 33


def test_plots_have_the_data_and_load_nothing(committed: Clone, tmp_path: Path) -> None:
    for plot in FLOW.plots:
        # As the stages write it; that they do is told where the whole flow has run.
        file = (
            committed.folder / "out" / producer_of(plot.artifact).name / plot.artifact / plot.file
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [",".join([*names, plot.x]) for names in (plot.y, ["1"] * len(plot.y))]
        rows[1] = rows[1].replace(plot.x, "2")
        old = file.read_text().splitlines() if file.exists() else ["", ""]
        file.write_text("\n".join(",".join(filter(None, pair)) for pair in zip(old, rows)) + "\n")
    shown = json.loads(committed.run("dvc", "plots", "show", "--json"))["data"]
    assert list(shown) == [plot.title for plot in FLOW.plots]
    for plot in FLOW.plots:
        (drawn,) = shown[plot.title]
        values = drawn["content"]["data"]["values"]
        assert len(values) == len(plot.y)
        assert all(plot.x in row for row in values)
    committed.run("dvc", "plots", "show", "--out", str(tmp_path / "page"))
    page = (tmp_path / "page" / "index.html").read_text()
    assert "vegaEmbed(" in page
    assert not re.findall(r"<script[^>]+src|<link|url\(|@import", page)


def test_without_git_dvc_says_so_and_can_be_told_to_work(committed: Clone, tmp_path: Path) -> None:
    unpacked = Clone(tmp_path / "unpacked")
    ignored = shutil.ignore_patterns(".git", "tmp", "cache", ".platform", "__pycache__")
    shutil.copytree(committed.folder, unpacked.folder, ignore=ignored)
    said = unpacked.run("dvc", "repro", "ingest_outside", fails=True)
    assert "is not a git repository" in said
    assert "Traceback" not in said
    unpacked.run("dvc", "config", "--local", "core.no_scm", "true")
    unpacked.run("dvc", "repro", "ingest_outside")
    said = unpacked.run("dvc", "exp", "show", fails=True)
    assert "Only supported for Git repositories" in said
