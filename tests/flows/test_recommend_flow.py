"""The main job as a user runs it: one command, every stage for real, at the smallest size.

One run serves all tests of this file.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from command_line import (
    ROOT,
    environment,
    files,
    manifests,
    reelflow,
    wait_until_nothing_runs_in,
)
from finished_run import RUN, finished_run
from pyarrow import csv
from scipy.stats import spearmanr
from smallest_run import EVALUATE_EVERY, SMALL, STAGES, STEPS

from components.evaluation.registration.serving import ENCODER_FILES
from components.pipeline.cli import cli
from components.pipeline.stage import Stage, load_registry, producer_of
from flows.recommend import FLOW

pytestmark = pytest.mark.slow

#: What a run that has nothing to do must not wait for.
HEAVY = {"prefect", "mlflow", "ray", "torch", "pandas", "sklearn", "great_expectations"}


@dataclass(frozen=True)
class Finished:
    """A home folder in which the flow has run once."""

    home: Path
    said: str

    def manifest(self, stage: str, home: Path | None = None) -> dict[str, Any]:
        """The only published execution of ``stage``."""
        (text,) = [
            text
            for name, text in manifests(home or self.home).items()
            if name.startswith(f"{stage}/")
        ]
        body: dict[str, Any] = json.loads(text)["body"]
        return body

    def artifact(self, stage: str, name: str) -> Path:
        (folder,) = (self.home / "store" / "data" / stage).glob(f"*/{name}")
        return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = finished_run(tmp_path_factory)
    return Finished(folder / "home", (folder / "said.txt").read_text())


def test_one_command_publishes_every_stage(finished: Finished) -> None:
    lines = finished.said.splitlines()
    ran = [m[1] for m in (re.match(r"  (\w+) +\d+\.\d s$", line) for line in lines) if m]
    assert tuple(ran) == STAGES
    registry = load_registry()
    for name in STAGES:
        body = finished.manifest(name)
        assert set(body["outputs"]) == set(registry[name].outputs)
    assert "  ndcg_at_10 = " in finished.said
    assert "  hr_at_10 = " in finished.said


def test_a_recommender_says_which_targets_it_learned(finished: Finished) -> None:
    for stage, name in (
        ("train_recommender", "pretrained_recommender"),
        ("align_recommender", "recommender"),
    ):
        config = json.loads((finished.artifact(stage, name) / "config.json").read_text())
        assert config["targets"] == "positive"


def test_a_finished_run_leaves_no_process_behind(finished: Finished) -> None:
    wait_until_nothing_runs_in(finished.home)


def test_the_same_command_again_starts_nothing_and_changes_nothing(finished: Finished) -> None:
    before = files(finished.home)
    start = time.perf_counter()
    done = reelflow(finished.home, *RUN, PYTHONPROFILEIMPORTTIME="1")
    seconds = time.perf_counter() - start
    assert done.returncode == 0
    cached = [line.split() for line in done.stdout.splitlines()[: len(STAGES)]]
    assert cached == [[name, "cached"] for name in STAGES]
    assert done.stdout.splitlines()[len(STAGES) :] == [
        line for line in finished.said.splitlines() if not re.match(r"  \w+ +\d+\.\d s$", line)
    ]
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")
    }
    assert "components" in imported
    assert not imported & HEAVY
    assert files(finished.home) == before
    # The promise; alone it takes about two seconds.
    assert seconds < 15


def test_the_report_needs_nothing_from_outside(finished: Finished) -> None:
    path = Path(reelflow(finished.home, "report").stdout.strip())
    assert f"  report: {path}" in finished.said
    page = path.read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.found
    outside = [link for link in links.found if not link.startswith(("#", "data:"))]
    assert outside == []
    for text in re.findall(r"url\(([^)]*)\)|@import([^;]*)", page):
        assert "".join(text).strip("'\" ").startswith(("#", "data:"))
    assert all(name in page for name in STAGES)


class Links(HTMLParser):
    """Every address that a browser would follow or fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fetched = {"src", "href", "xlink:href", "srcset", "action", "poster", "data", "background"}
        self.found += [value or "" for name, value in attrs if name in fetched]


@pytest.fixture
def mlflow(finished: Finished) -> Iterator[Any]:
    """MLflow, looking at the tracking database of the run."""
    import mlflow as module

    before, variables = module.get_tracking_uri(), dict(os.environ)
    module.set_tracking_uri(f"sqlite:///{finished.home / 'mlflow.db'}")
    yield module
    module.set_tracking_uri(before)
    # It tells its child processes too.
    os.environ.clear()
    os.environ.update(variables)


def nested_runs(mlflow: Any) -> dict[str, Any]:
    """The runs of the stages by name; there must be one run of the flow around them."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("recommend")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_name == "recommend"
    assert parent.info.status == "FINISHED"
    stages = {run.info.run_name: run for run in runs if run is not parent}
    assert len(stages) == len(runs) - 1
    assert {run.data.tags["mlflow.parentRunId"] for run in stages.values()} == {parent.info.run_id}
    return stages


def test_what_the_flow_declares_for_comparison_is_there(finished: Finished) -> None:
    for stage, metrics in FLOW.headline.items():
        assert set(metrics) <= finished.manifest(stage)["metrics"].keys()
    for plot in FLOW.plots:
        stage = producer_of(plot.artifact).name
        table = csv.read_csv(finished.artifact(stage, plot.artifact) / plot.file)
        assert {plot.x, *plot.y} <= set(table.column_names)


def test_mlflow_has_a_run_with_a_nested_run_for_each_stage(mlflow: Any) -> None:
    runs = nested_runs(mlflow)
    assert set(runs) == set(STAGES)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_mlflow_has_the_parameters_in_force(mlflow: Any) -> None:
    runs = nested_runs(mlflow)
    for setting in SMALL[1::2]:
        path, _, value = setting.partition("=")
        stage, _, key = path.partition(".")
        if not value.startswith("{"):
            assert float(runs[stage].data.params[key]) == float(value), path
    assert runs["split"].data.params["protocol"] == "auto"
    assert runs["train_recommender"].data.params["targets"] == "positive"


def test_mlflow_has_the_metrics_of_each_stage_and_the_curve_by_step(
    mlflow: Any, finished: Finished
) -> None:
    runs = nested_runs(mlflow)
    for name in STAGES:
        metrics = finished.manifest(name)["metrics"]
        logged = runs[name].data.metrics
        assert {key: logged[key] for key in metrics} == pytest.approx(metrics, rel=1e-6)
    run_id = runs["train_recommender"].info.run_id
    (figure,) = mlflow.MlflowClient().list_artifacts(run_id, "figures")
    assert figure.path == "figures/training curve.png"
    history = mlflow.MlflowClient().get_metric_history(run_id, "valid_ndcg_at_10")
    curve = pq.read_table(
        finished.artifact("train_recommender", "training_curve") / "table.parquet"
    )
    validations = {
        row["step"]: row["valid_ndcg_at_10"]
        for row in curve.to_pylist()
        if row["valid_ndcg_at_10"] is not None
    }
    assert sorted(validations) == list(range(EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY))
    # The figure of the stage comes last: MLflow shows the newest one.
    stage_metrics = finished.manifest("train_recommender")["metrics"]
    points = [*sorted(validations.items()), (STEPS, stage_metrics["valid_ndcg_at_10"])]
    assert [point.step for point in history] == [step for step, _ in points]
    assert [point.value for point in history] == pytest.approx([value for _, value in points])
    losses = mlflow.MlflowClient().get_metric_history(run_id, "loss")
    assert {point.step for point in losses} >= set(validations)


def test_mlflow_names_the_tables_that_a_stage_read_and_wrote_by_digest(
    mlflow: Any, finished: Finished
) -> None:
    split = nested_runs(mlflow)["split"]
    noted = {
        (given.dataset.name, given.tags[0].value): given.dataset.digest
        for given in split.inputs.dataset_inputs
    }
    validated, cut = finished.manifest("validate"), finished.manifest("split")
    wanted = {(name, "read"): validated["outputs"][name] for name in ("interactions", "items")}
    wanted |= {(name, "written"): entry for name, entry in cut["outputs"].items()}
    assert noted == {key: entry["digest"][: len(noted[key])] for key, entry in wanted.items()}
    assert min(map(len, noted.values())) >= 32


def test_the_champion_can_be_loaded_and_recommends_known_items(
    mlflow: Any, finished: Finished
) -> None:
    import pandas as pd

    (model,) = mlflow.MlflowClient().search_registered_models()
    assert {str(version) for version in model.aliases.values()} == {"1"}
    assert set(model.aliases) == {"champion"}
    champion = mlflow.pyfunc.load_model(f"models:/{model.name}@champion")
    catalogue = pq.read_table(finished.artifact("split", "catalogue") / "table.parquet")
    known = catalogue["item_id"].to_pylist()
    histories = [known[:3], known[40:47]]
    answer = champion.predict(pd.DataFrame({"item_ids": histories}))
    assert len(answer) == len(histories)
    for items, scores in zip(answer["item_ids"], answer["scores"], strict=True):
        assert 0 < len(items) <= 20
        assert len(set(items)) == len(items)
        assert set(items) <= set(known)
        assert list(scores) == sorted(scores, reverse=True)


COPY = 10**9


def test_copies_of_popular_items_are_recommended_to_those_who_are_recommended_the_originals(
    mlflow: Any, finished: Finished, tmp_path: Path
) -> None:
    """New items by content alone: the champion out of the registry, over HTTP, and restarted."""
    from fastapi.testclient import TestClient

    from components.serving.app import build_app
    from components.serving.champion_files import choose
    from components.serving.engine import Deployed
    from components.training.onerec.tokenizer.new_items import NewItemEncoder

    chosen = choose(mlflow, None, None, tmp_path)
    catalogue = pq.read_table(finished.artifact("split", "catalogue") / "table.parquet")
    popular = catalogue.sort_by([("train_positive_count", "descending")])["item_id"][:12]
    items = pq.read_table(finished.artifact("validate", "items") / "table.parquet")
    rows = items.filter(pc.is_in(items["item_id"], popular.combine_chunks()))
    content = rows.select(["title", "caption", "tags", "author_id", "duration_s"])
    originals = rows["item_id"].to_pylist()
    posted = [
        {"item_id": COPY + item} | told
        for item, told in zip(originals, content.to_pylist(), strict=True)
    ]
    examples = pq.read_table(finished.artifact("split", "test_examples") / "table.parquet")
    known = catalogue["item_id"].to_numpy()
    requests = [
        {
            "history": [
                {"item_id": int(known[item]), "timestamp_ms": time}
                for item, time in zip(row["item_index"], row["timestamp_ms"], strict=True)
            ],
            "user_id": row["user_id"],
        }
        for row in examples.to_pylist()
    ]

    def served() -> TestClient:
        parts = {"journal": str(tmp_path / "journal"), "end_mark": str(tmp_path / "end")}
        told = Deployed(chosen.name, chosen.number, str(chosen.files), beams=64, threads=1, **parts)
        client = TestClient(build_app(told, among_others=False))
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, client.get("/readyz").text
            time.sleep(0.05)
        return client

    def scores(client: TestClient) -> list[dict[int, float]]:
        body = {"requests": requests, "top_n": 200, "beams": 512, "deadline_ms": 600_000}
        answer = client.post("/v1/recommend", json=body)
        assert answer.status_code == 200, answer.text
        return [{i["item_id"]: i["score"] for i in a["items"]} for a in answer.json()["answers"]]

    first = served()
    answer = first.post("/v1/items", json={"items": posted})
    assert answer.status_code == 200, answer.text
    codes = {item["item_id"]: item["semantic_id"] for item in answer.json()["items"]}
    encoder = NewItemEncoder.load(
        *(chosen.files / name for name in (*ENCODER_FILES, "semantic_ids"))
    )
    new = content.add_column(0, "item_id", pa.array(list(codes), pa.int64()))
    assert list(codes.values()) == encoder.encode(new).tolist()

    lists = scores(first)
    assert all(len(one) == len(known) + len(posted) for one in lists)
    # A user's log-probability of a copy rises and falls with that of the item it resembles, more
    # than with those of other items; and some copies stand right behind their originals.
    user_item = np.array([[one[item] for item in (*known.tolist(), *codes)] for one in lists])
    alike = spearmanr(user_item).statistic
    places = np.searchsorted(known, originals)
    of_copy = alike[len(known) :, : len(known)]
    share_below = (of_copy < of_copy[np.arange(len(posted)), places][:, None]).mean(1)
    assert share_below.mean() > 0.75
    rank = {item: [list(one).index(item) for one in lists] for item in (*originals, *codes)}
    first_iu = np.array([[place < 10 for place in rank[item]] for item in originals])
    behind_iu = np.array([[place < 20 for place in rank[COPY + item]] for item in originals])
    assert behind_iu[first_iu].mean() > 2 * behind_iu[~first_iu].mean()
    assert scores(served()) == lists
    (tmp_path / "end").touch()


def descendants(changed: str, registry: dict[str, Stage]) -> set[str]:
    """Stages that read, directly or not, what ``changed`` writes."""
    found: set[str] = set()
    waiting = [changed]
    while waiting:
        outputs = set(registry[waiting.pop()].outputs)
        new = {n for n in STAGES if outputs & set(registry[n].inputs)} - found
        found |= new
        waiting += new
    return found


@pytest.fixture
def plan(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], dict[str, str]]]:
    """Stage → what `--plan` says would happen to it, with one parameter set otherwise."""

    def planned(setting: str) -> dict[str, str]:
        words = [*RUN, "--set", setting, "--plan"]
        cli.main(list(words), prog_name="reelflow", standalone_mode=False)
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {words[0]: words[1] if words[1] == "cached" else words[2] for words in lines}

    before, wanted = dict(os.environ), environment(finished.home)
    os.environ.clear()
    os.environ.update(wanted)
    monkeypatch.chdir(ROOT)
    yield planned
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    "setting",
    [
        "ingest.simulator.dirty_rate=0.002",
        "validate.max_quarantine_share=0.06",
        "split.max_history=100",
        "item_features.window=4",
        "align_items.steps=19",
        "semantic_ids.iterations=30",
        "train_recommender.clip=0.9",
        "train_sasrec.batch_size=100",
        "evaluate_recommender.beams=64",
        "register.gate_metric=hr_at_10",
        "report.history=4",
    ],
)
def test_one_parameter_runs_its_stage_and_those_that_depend_on_it(
    setting: str, plan: Callable[[str], dict[str, str]]
) -> None:
    changed = setting.partition(".")[0]
    after = descendants(changed, load_registry())
    planned = plan(setting)
    assert tuple(planned) == STAGES
    for name, fate in planned.items():
        wanted = "run" if name == changed else "follow" if name in after else "cached"
        assert fate == wanted, name


def test_the_flow_lists_every_stage_after_those_that_it_reads(finished: Finished) -> None:
    assert FLOW.stages == STAGES
    registry = load_registry()
    assert set(registry) >= set(STAGES)
    writers = {artifact: name for name in STAGES for artifact in registry[name].outputs}
    for name, above in FLOW.dependencies().items():
        assert set(above) == {writers[artifact] for artifact in registry[name].inputs}
        assert all(STAGES.index(one) < STAGES.index(name) for one in above)
    for name in STAGES:
        inputs = finished.manifest(name)["inputs"]
        outputs = {
            k: v["digest"] for n in STAGES for k, v in finished.manifest(n)["outputs"].items()
        }
        assert inputs == {artifact: outputs[artifact] for artifact in registry[name].inputs}
