"""The product as it is operated: `reelflow ui` on, runs by schedule and by the form's own calls.

One server serves all tests of this file; what it said in its logs is looked at last.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT, environment, manifests, settings, wait_until_nothing_runs_in
from operated import Operated, deploy_to_pool, merged, operated_in, request, wait_for, worker
from smallest_run import SMALL

from components.pipeline.automations import AGAIN, MARK
from components.pipeline.flow import load_flows
from flows import deployments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    with operated_in(tmp_path_factory.mktemp("operation") / "home") as started:
        yield started


@pytest.fixture(scope="module")
def long_ago(operated: Operated) -> tuple[str, float]:
    """A run that nobody executes, as the server sees it: running; and since when."""
    deployment = operated.deployment("on-demand")
    body = {
        "state": {"type": "RUNNING"},
        "parameters": {**deployment["parameters"], "until": "ingest"},
    }
    made = operated.post(f"/deployments/{deployment['id']}/create_flow_run", body)
    return str(made["id"]), time.monotonic()


@pytest.mark.usefixtures("long_ago")
def test_the_form_is_made_of_the_models_and_begins_with_what_the_options_say(
    operated: Operated,
) -> None:
    deployment = operated.deployment("on-demand")
    schema = deployment["parameter_openapi_schema"]
    definitions = schema["definitions"]
    registry = load_flows()["recommend"].resolve()
    assert list(definitions["RecommendParams"]["properties"]) == [stage.name for stage in registry]
    for stage in registry:
        for name, field in definitions[stage.params.__name__]["properties"].items():
            assert field.get("title") or field.get("allOf") or field.get("$ref"), name
            assert field.get("description"), f"{stage.name}.{name}"
    history = definitions["SplitParams"]["properties"]["max_history"]
    assert history["minimum"] == 1
    assert set(definitions["SplitParams"]["properties"]["protocol"]["enum"]) >= {"auto"}
    assert deployment["parameters"]["params"]["ingest"]["simulator"]["users"] == 120
    assert deployment["enforce_parameter_schema"] is True


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"params": {"split": {"max_history": 0}}}, "params.split.max_history"),
        ({"params": {"train_recommender": {"batch_size": "many"}}}, "batch_size"),
        ({"params": {"splitt": {}}}, "splitt"),
        ({"until": "nowhere"}, "until"),
        ({"stage_timeout_minutes": -1}, "stage_timeout_minutes"),
        ({"retires": 0}, "retires"),
        ({"params": {"split": {"valid_from": "yesterday"}}}, "valid_from"),
        ({"params": {"split": {"test_from": "2025-02-31"}}}, "test_from"),
        ({"params": {"ingest": {"simulator": {"start_date": "1994-01-01"}}}}, "start_date"),
        ({"params": {"ingest": {"simulator": {"start_date": "2100-01-01"}}}}, "start_date"),
        ({"params": {"ingest": {"source": "\ud800"}}}, '"params", "ingest", "source"'),
        ({"params": {"ingest": {"source": "a\0b"}}}, '"params", "ingest", "source"'),
        ({"stage_timeout_minutes": float("nan")}, "stage_timeout_minutes"),
        ({"store": "ftp://x"}, "store"),
        ({"store": "s3://key:password@bucket/x"}, "store"),
        ({"params": {"train_sasrec": {"grid": {"dropout": [0.2, 7]}}}}, "dropout"),
        ({"params": {"train_recommender": {"max_steps": 10**10}}}, "max_steps"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_the_server_with_the_path_of_its_field(
    operated: Operated, change: dict[str, Any], path: str
) -> None:
    deployment = operated.deployment("on-demand")
    status, said = request(
        "POST",
        f"{operated.api}/deployments/{deployment['id']}/create_flow_run",
        {"parameters": merged(deployment["parameters"], change)},
    )
    assert 400 <= status < 500
    assert path in json.dumps(said)


def test_a_run_of_the_form_executes_with_its_values_and_shows_itself(operated: Operated) -> None:
    change = {"until": "train_recommender", "params": {"split": {"max_history": 31}}}
    flow_run = operated.start("on-demand", change)

    def progress() -> list[float]:
        page = operated.page(flow_run)
        return [a["data"] for a in page.values() if a["type"] == "progress"]

    # It moves while the run goes on.
    wait_for(lambda: any(0 < share < 100 for share in progress()), 200, "no live progress")
    assert operated.run(flow_run)["state"]["type"] == "RUNNING"
    ended = operated.ended(flow_run, 250)
    assert ended["state"]["type"] == "COMPLETED", ended["state"]

    (text,) = (t for n, t in manifests(operated.home).items() if n.startswith("split/"))
    assert json.loads(text)["body"]["params"]["max_history"] == 31
    page = operated.page(flow_run)
    table = json.loads(page["recommend-metrics"]["data"])
    assert {row["stage"] for row in table} == {
        "ingest", "validate", "split", "item_features", "align_items", "semantic_ids",
        "train_recommender",
    }  # fmt: skip
    logs = operated.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run]}}})
    assert [log for log in logs if "rows quarantined" in log["message"]]
    figure = page["recommend-train-recommender-training-curve"]
    assert figure["data"].startswith("data:image/png;base64,")
    (link,) = re.findall(r"\((http[^)]*)\)", page["recommend-mlflow"]["data"])
    mlflow, _, place = link.partition("/#/experiments/")
    assert mlflow == operated.addresses["MLflow"]
    run_id = place.partition("/runs/")[2]
    status, found = request("GET", f"{mlflow}/api/2.0/mlflow/runs/get?run_id={run_id}")
    assert status == 200
    assert found["run"]["info"]["run_name"] == "recommend"
    assert found["run"]["info"]["status"] == "FINISHED"


def test_a_run_with_nothing_to_do_takes_seconds(operated: Operated) -> None:
    change = {"until": "split", "params": {"split": {"max_history": 31}}}
    start = time.monotonic()
    ended = operated.ended(operated.start("on-demand", change))
    assert ended["state"]["type"] == "COMPLETED"
    # Alone about six: the worker looks every two, and Prefect is imported. Measured in
    # docs/results.md; tests share the machine.
    assert time.monotonic() - start < 40


def test_runs_of_a_deployment_that_takes_one_at_a_time_do_not_overlap(operated: Operated) -> None:
    changes = [
        {"until": "split", "force": True, "params": {"split": {"max_history": 40 + n}}}
        for n in range(3)
    ]
    started = [operated.start("nightly", change) for change in changes]
    runs = [operated.ended(flow_run, 200) for flow_run in started]
    assert [run["state"]["type"] for run in runs] == ["COMPLETED"] * 3
    spans = sorted((run["start_time"], run["end_time"]) for run in runs)
    for (_, before), (after, _) in itertools.pairwise(spans):
        assert before <= after


def test_a_schedule_makes_runs_that_complete(operated: Operated) -> None:
    nightly = operated.deployment("nightly")
    assert nightly["schedules"][0]["schedule"]["cron"] == deployments.EVERY_NIGHT
    every_minute = {
        "schedule": {"cron": "* * * * *", "timezone": "UTC"},
        "active": True,
        "parameters": {**nightly["parameters"], "until": "ingest"},
    }
    path = f"/deployments/{nightly['id']}/schedules"
    (schedule,) = operated.post(path, [every_minute])
    before = dt.datetime.now(dt.UTC)

    def completed() -> list[dict[str, Any]]:
        found = operated.post(
            "/flow_runs/filter",
            {
                "flow_runs": {
                    "deployment_id": {"any_": [nightly["id"]]},
                    "state": {"type": {"any_": ["COMPLETED"]}},
                }
            },
        )
        return [
            run
            for run in found
            if run["auto_scheduled"]
            and dt.datetime.fromisoformat(run["expected_start_time"]) >= before
        ]

    (run, *_) = wait_for(completed, 120, "the schedule made no run")
    assert run["parameters"]["until"] == "ingest"
    status, _ = request("DELETE", f"{operated.api}{path}/{schedule['id']}")
    assert status == 204


def test_a_run_whose_process_is_killed_goes_on_by_itself(operated: Operated) -> None:
    names = {automation["name"] for automation in operated.post("/automations/filter", {})}
    assert {MARK, AGAIN} <= names
    # Other data than that of the runs before: all stages execute.
    change = {"until": "split", "params": {"ingest": {"simulator": {"interactions": 5_990}}}}

    def ingested() -> set[str]:
        return {name for name in manifests(operated.home) if name.startswith("ingest/")}

    before = ingested()
    flow_run = operated.start("on-demand", change)
    published = wait_for(lambda: ingested() - before, 120, "nothing was published")
    operated.flow_process(flow_run).kill()
    crashed = wait_for(
        lambda: operated.run(flow_run)["run_count"] == 2 and operated.run(flow_run), 120,
        "it was not started again",
    )  # fmt: skip
    assert crashed["state"]["type"] in ("RUNNING", "COMPLETED")
    ended = operated.ended(flow_run, 250)
    assert ended["state"]["type"] == "COMPLETED"
    history = operated.get(f"/flow_run_states/?flow_run_id={flow_run}")
    names = [state["name"] for state in sorted(history, key=lambda s: s["timestamp"])]
    assert "Crashed" in names
    assert names.index("Crashed") < names.index("AwaitingRetry") < len(names) - 1
    table = json.loads(operated.page(flow_run)["recommend-metrics"]["data"])
    assert {row["stage"] for row in table} == {"ingest", "validate", "split"}
    # What was published is not made again.
    assert ingested() - before == published


def test_a_run_that_crashes_long_after_it_began_is_scheduled_again(
    operated: Operated, long_ago: tuple[str, float]
) -> None:
    def triggers() -> dict[str, str]:
        known = operated.post("/automations/filter", {})
        return {one["name"]: one["trigger"]["id"] for one in known}

    before = triggers()
    environment = {**os.environ, "PREFECT_API_URL": operated.api}
    command = [sys.executable, "-P", "-m", "components.pipeline.automations"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    # To the server an updated automation is new, and knows nothing of the runs that go on.
    assert triggers() == before

    flow_run, since = long_ago
    # Prefect forgets after a minute what it has no reason to keep.
    time.sleep(max(0.0, 90 - (time.monotonic() - since)))
    path = f"/flow_runs/{flow_run}/set_state"
    operated.post(path, {"state": {"type": "CRASHED"}, "force": True})
    assert operated.ended(flow_run, 120)["state"]["type"] in ("CRASHED", "COMPLETED")
    wait_for(lambda: operated.run(flow_run)["state"]["type"] == "COMPLETED", 120, "it stays so")
    states = operated.get(f"/flow_run_states/?flow_run_id={flow_run}")
    assert "AwaitingRetry" in {state["name"] for state in states}


def test_the_file_for_a_work_pool_is_the_one_that_the_flows_give() -> None:
    text = deployments.POOL_FILE.read_text()
    assert text == deployments.pool_file(), "remedy: make deployments"
    entries = yaml.safe_load(text)["deployments"]
    assert len(entries) == 2 * len(load_flows())


WITHOUT_GX = settings(validate__great_expectations="false")
SECOND_FLOW = """
from typing import Any

from components.pipeline.flow import Flow

FLOW = Flow(name="prepare", summary="Curate alone.", stages=("ingest", "validate", "split"))


def __getattr__(name: str) -> Any:
    if name != "prepare":
        raise AttributeError(name)
    from components.pipeline.prefect_flow import build

    return build(FLOW)
"""
LOOK = """
import json, yaml
from flows import deployments
served = deployments.deployments()
made = {f"{d.flow_name}/{d.name}": len(d.schedules) for d in served}
forms = {d.flow_name: list(d._parameter_openapi_schema.definitions) for d in served}
pool = yaml.safe_load(deployments.pool_file())["deployments"]
print(json.dumps([made, [f"{d['entrypoint']}/{d['name']}" for d in pool], forms["prepare"]]))
"""


def test_a_new_flow_is_deployed_and_can_be_run_by_its_file_alone(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for folder in ("components", "flows", "infra", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
    for file in ("params.yaml", "pyproject.toml"):
        shutil.copy(ROOT / file, project)
    (project / "flows" / "prepare.py").write_text(SECOND_FLOW)
    env = {**environment(tmp_path / "home"), "PYTHONPATH": str(project)}

    def python(*words: str) -> str:
        command = [sys.executable, "-P", *words]
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    made, pool, form = json.loads(python("-c", LOOK).splitlines()[-1])
    flows = ("recommend", "prepare")
    assert made == {
        f"{f}/{kind}": n for f in flows for kind, n in (("on-demand", 0), ("nightly", 1))
    }
    assert set(pool) == {
        f"flows.{f}.{f}/{kind}-pool" for f in flows for kind in ("on-demand", "nightly")
    }
    # Its form has the parameters of its stages alone.
    assert "IngestParams" in form
    assert not any("Sasrec" in name for name in form)
    assert "prepare" in python("-m", "components.pipeline.cli", "run", "--help")
    python("-m", "components.pipeline.cli", "run", "prepare", *SMALL, *WITHOUT_GX)
    assert {name.split("/")[0] for name in manifests(tmp_path / "home")} == {
        "ingest", "validate", "split",
    }  # fmt: skip


def test_a_worker_on_another_machine_runs_what_the_work_pool_is_given(
    operated: Operated, tmp_path: Path
) -> None:
    deploy_to_pool(operated)
    elsewhere = tmp_path / "machine"
    started = worker(operated, elsewhere)
    try:
        pooled = operated.deployment("on-demand-pool")
        assert pooled["work_pool_name"] == deployments.POOL
        params = {"ingest": {"simulator": {"users": 120, "items": 128, "interactions": 6000,
                                            "video_items": 2, "video_size": 32}},
                  "validate": {"great_expectations": False}}  # fmt: skip
        flow_run = operated.start("on-demand-pool", {"until": "split", "params": params})
        ended = operated.ended(flow_run, 200)
        assert ended["state"]["type"] == "COMPLETED", ended["state"]
        assert {name.split("/")[0] for name in manifests(elsewhere / "home")} == {
            "ingest", "validate", "split",
        }  # fmt: skip
    finally:
        # How a worker ends is Prefect's; this one has done its work.
        os.killpg(started.pid, signal.SIGKILL)
        started.wait(60)
        shutil.rmtree(elsewhere, ignore_errors=True)


def test_it_ends_without_an_error_in_its_logs_and_without_a_process(operated: Operated) -> None:
    operated.process.send_signal(signal.SIGINT)
    operated.process.communicate(timeout=90)
    assert operated.process.returncode == 0
    wait_until_nothing_runs_in(operated.home)
    for log in (operated.home / "logs").iterdir():
        said = [line for line in log.read_text().splitlines() if re.search(r"\bERROR\b", line)]
        # Prefect's runner may cut off a connection when it is told to end.
        assert [line for line in said if "asyncio" not in line] == [], log.name
