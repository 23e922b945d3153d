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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from command_line import (
    REELFLOW,
    ROOT,
    environment,
    manifests,
    settings,
    wait_until_nothing_runs_in,
)
from smallest_run import SMALL

from components.pipeline.automations import AGAIN, MARK
from components.pipeline.flow import load_flows
from flows import deployments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TINY = [*SMALL, *settings(validate__great_expectations="false")]
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def request(method: str, url: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of an answer; a busy database makes the server decline for a moment."""
    data = None if body is None else json.dumps(body).encode()
    for _ in range(20):
        call = urllib.request.Request(
            url, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(call, timeout=20) as answer:
                said = answer.read()
                return answer.status, json.loads(said) if said else None
        except urllib.error.HTTPError as error:
            if error.code != 503:
                return error.code, json.loads(error.read())
        time.sleep(1)
    raise AssertionError(f"{url} declines")


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.3)
    return found


@dataclass
class Operated:
    """A running `reelflow ui`."""

    home: Path
    process: subprocess.Popen[str]
    addresses: dict[str, str]

    @property
    def api(self) -> str:
        return self.addresses["Prefect"] + "/api"

    def get(self, path: str) -> Any:
        status, found = request("GET", self.api + path)
        assert status == 200, found
        return found

    def post(self, path: str, body: Any) -> Any:
        status, found = request("POST", self.api + path, body)
        assert status in (200, 201), found
        return found

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/deployments/name/recommend/{name}")
        return found

    def start(self, name: str, parameters: dict[str, Any]) -> str:
        """A run, made as the form makes it: what it shows and what was changed there."""
        deployment = self.deployment(name)
        given = merged(deployment["parameters"], parameters)
        path = f"/deployments/{deployment['id']}/create_flow_run"
        return str(self.post(path, {"parameters": given})["id"])

    def run(self, flow_run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/flow_runs/{flow_run}")
        return found

    def ended(self, flow_run: str, seconds: float = 150) -> dict[str, Any]:
        def final() -> dict[str, Any] | None:
            run = self.run(flow_run)
            return run if run["state"]["type"] in FINAL else None

        ended: dict[str, Any] = wait_for(final, seconds, f"{self.run(flow_run)['state']}")
        return ended

    def page(self, flow_run: str) -> dict[str, dict[str, Any]]:
        """Artifacts of the run by key."""
        found = self.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}})
        return {artifact["key"]: artifact for artifact in found}

    def flow_process(self, flow_run: str) -> psutil.Process:
        """The process that executes the run."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.environ().get("PREFECT__FLOW_RUN_ID", "").replace(
                    "-", ""
                ) == flow_run.replace("-", "") and "stage_process" not in " ".join(
                    process.cmdline()
                ):
                    return process
            except psutil.Error:
                continue
        raise AssertionError("no process executes it")


def merged(before: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = dict(before)
    for key, value in change.items():
        old = result.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    home = tmp_path_factory.mktemp("operation") / "home"
    process = subprocess.Popen(
        [*REELFLOW, "ui", "--limit", "2", *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # The scheduler looks once a minute by default; a test cannot wait that long.
        env=environment(home, PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="2"),
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "Ctrl-C" in line:
            break
    else:
        assert process.stderr is not None
        pytest.fail(process.stderr.read())
    yield Operated(home, process, dict(re.findall(r"(\w+)\s+(http\S+)", said)))
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)


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
        ({"params": {"train_recommender": {"training": {"batch_size": "many"}}}}, "batch_size"),
        ({"params": {"splitt": {}}}, "splitt"),
        ({"until": "nowhere"}, "until"),
        ({"stage_timeout_minutes": -1}, "stage_timeout_minutes"),
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
        "ingest", "validate", "split", "item_features", "semantic_ids", "train_recommender",
    }  # fmt: skip
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
    change = {"until": "train_recommender", "params": {"split": {"max_history": 37}}}
    flow_run = operated.start("on-demand", change)
    scratch = operated.home / "scratch" / "train_recommender"
    wait_for(
        lambda: list(scratch.glob("*/work/**/checkpoint_manager_snapshot.json")),
        250,
        "no checkpoint",
    )
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
    page = operated.page(flow_run)
    assert json.loads(page["recommend-metrics"]["data"])


def prefect(operated: Operated, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "prefect", *words],
        env=environment(
            operated.home, PREFECT_API_URL=operated.api, PREFECT_HOME=str(operated.home / "client")
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_file_for_a_work_pool_is_the_one_that_the_flows_give() -> None:
    text = deployments.POOL_FILE.read_text()
    assert text == deployments.pool_file(), "remedy: make deployments"
    entries = yaml.safe_load(text)["deployments"]
    assert len(entries) == 2 * len(load_flows())


def test_a_worker_on_another_machine_runs_what_the_work_pool_is_given(
    operated: Operated, tmp_path: Path
) -> None:
    made = prefect(operated, "work-pool", "create", deployments.POOL, "--type", "process")
    assert made.returncode == 0, made.stderr
    file = str(deployments.POOL_FILE.relative_to(ROOT))
    deployed = prefect(operated, "--no-prompt", "deploy", "--all", "--prefect-file", file)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    # Of another machine: another home and another folder; only addresses in common.
    elsewhere = tmp_path / "machine"
    elsewhere.mkdir()
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "prefect", "worker", "start", "--pool", deployments.POOL,
         "--type", "process", "--limit", "1"],
        env=environment(
            elsewhere / "home",
            PREFECT_API_URL=operated.api,
            MLFLOW_TRACKING_URI=operated.addresses["MLflow"],
            PREFECT_HOME=str(elsewhere / "prefect"),
            PREFECT_WORKER_QUERY_SECONDS="1",
            # Installed on that machine; here it lies where the tests run.
            PYTHONPATH=str(ROOT),
        ),
        cwd=elsewhere,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        pooled = operated.deployment("on-demand")
        assert pooled["work_pool_name"] == deployments.POOL
        params = {"ingest": {"simulator": {"users": 120, "items": 128, "interactions": 6000,
                                            "video_items": 2, "video_size": 32}},
                  "validate": {"great_expectations": False}}  # fmt: skip
        flow_run = operated.start("on-demand", {"until": "split", "params": params})
        ended = operated.ended(flow_run, 200)
        assert ended["state"]["type"] == "COMPLETED", ended["state"]
        assert {name.split("/")[0] for name in manifests(elsewhere / "home")} == {
            "ingest", "validate", "split",
        }  # fmt: skip
    finally:
        os.killpg(worker.pid, signal.SIGTERM)
        worker.wait(60)
        shutil.rmtree(elsewhere, ignore_errors=True)


def test_it_ends_without_an_error_in_its_logs_and_without_a_process(operated: Operated) -> None:
    operated.process.send_signal(signal.SIGINT)
    operated.process.communicate(timeout=90)
    assert operated.process.returncode == 0
    wait_until_nothing_runs_in(operated.home)
    for log in (operated.home / "logs").iterdir():
        lines = [line for line in log.read_text().splitlines() if re.search(r"\bERROR\b", line)]
        assert lines == [], log.name
