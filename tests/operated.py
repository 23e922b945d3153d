"""A running `reelflow ui`, and the calls that its pages make."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from command_line import REELFLOW, ROOT, environment, settings
from smallest_run import SMALL

from flows import deployments

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


@contextmanager
def operated_in(home: Path, **variables: str) -> Iterator[Operated]:
    """`reelflow ui` with a home of its own, until the block ends."""
    process = subprocess.Popen(
        [*REELFLOW, "ui", "--limit", "2", *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # By default the scheduler looks once a minute, and a run that waits for another one looks
        # every 30 s; a test cannot wait that long.
        env=environment(
            home,
            PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="2",
            PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS="3",
            **variables,
        ),
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "Ctrl-C" in line:
            break
    else:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())
    try:
        yield Operated(home, process, dict(re.findall(r"(\w+)\s+(http\S+)", said)))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)


def prefect(operated: Operated, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of Prefect's own, at that server."""
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


def deploy_to_pool(operated: Operated) -> None:
    """What docs/operations.md says to do once for a work pool."""
    made = prefect(operated, "work-pool", "create", deployments.POOL, "--type", "process")
    assert made.returncode == 0, made.stderr
    file = str(deployments.POOL_FILE.relative_to(ROOT))
    deployed = prefect(operated, "--no-prompt", "deploy", "--all", "--prefect-file", file)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr


def worker(operated: Operated, machine: Path) -> subprocess.Popen[bytes]:
    """A worker of the pool on another machine: another home, another folder, a group of its own."""
    machine.mkdir(exist_ok=True)
    return subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "prefect", "worker", "start"),
            *("--pool", deployments.POOL, "--type", "process", "--limit", "1"),
        ],
        env=environment(
            machine / "home",
            PREFECT_API_URL=operated.api,
            MLFLOW_TRACKING_URI=operated.addresses["MLflow"],
            PREFECT_HOME=str(machine / "prefect"),
            PREFECT_WORKER_QUERY_SECONDS="1",
        ),
        cwd=machine,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
