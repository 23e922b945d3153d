"""``reelflow ui``: the servers a person looks at, and the deployments they can start there.

Prefect and MLflow are started unless their addresses are given; then the deployments of all flows
are served. Everything runs in child processes that end with this one, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from components.pipeline import prefect_server
from components.pipeline.addresses import hide_password
from components.pipeline.addresses import store as look_at_store
from components.pipeline.automations import HEARTBEATS
from components.pipeline.errors import StorageError, UsageError
from components.pipeline.flow import load_flows
from components.pipeline.machine import cores
from components.pipeline.servers import (
    ENDS_WITHIN_S,
    HOST,
    Server,
    adopt_orphans,
    claim_port,
    open_directly,
    start_server,
    wait_for_answers,
)
from components.pipeline.settings import Settings, prepare_environment
from components.pipeline.storage import exclusive
from components.pipeline.tracking import artifact_location, make_database

PREFECT_PORT, MLFLOW_PORT = 4200, 5000
#: Names of the two deployments of each flow.
ON_DEMAND, NIGHTLY = "on-demand", "nightly"
#: In the environment of what serves the deployments: the number of this process.
UI_PROCESS = "REELFLOW_UI_PROCESS"
READY_WITHIN_S = 180.0
#: How often the worker looks whether there is something to run; Prefect's own ten are long.
LOOKS_EVERY_S = 2
POLL_S = 0.25
#: Who runs under a limit of concurrency is known to a restarted server too; else it ends them all.
LEASES = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    )
}
TRIES = 5


@dataclass
class Children:
    """The processes of this session; ending it ends them and whatever they started."""

    logs: Path
    members: list[Server] = field(default_factory=list)
    strangers: set[psutil.Process] = field(default_factory=lambda: _offspring())

    def start(self, name: str, command: list[str], environment: Mapping[str, str]) -> Server:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.members.append(start_server(name, command, environment, self.logs / f"{name}.log"))
        return self.members[-1]

    def check(self) -> None:
        for child in self.members:
            child.check()

    def end(self) -> None:
        """End all, the last started first, and wait until none is left."""
        # A child of a child keeps running when its parent dies; it is ours to end as well.
        before = _offspring()
        for child in reversed(self.members):
            child.end()
        left = (before | _offspring()) - self.strangers
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, ENDS_WITHIN_S)


def _offspring() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def serve(
    settings: Settings, deployments: str, params: Mapping[str, Any], limit: int | None = None
) -> None:
    """Start what is not running yet, print the addresses, stay until interrupted.

    Args:
        deployments: module that serves them when it is run, with ``params`` and ``limit`` as JSON.
        params: parameters by stage, where they are not the defaults of the models.
        limit: runs at once on this machine; a run for every two cores unless given.

    Raises:
        UsageError: it runs already for this ``REELFLOW_HOME``.
        StorageError: a server does not start, or ends by itself later.
    """
    prepare_environment(settings)
    with _only_one(settings) as tell, _ended_on_exit(Children(settings.home / "logs")) as children:
        shared = _environment(settings)
        addresses = {"Prefect": settings.prefect_api or "", "MLflow": settings.tracking}
        print("  starting; the first time takes half a minute", file=sys.stderr, flush=True)
        waiting: dict[str, str] = {}
        registered: dict[str, str] = {}
        if settings.prefect_api is None:
            port = claim_port(PREFECT_PORT)
            addresses["Prefect"] = f"http://{HOST}:{port}"
            api = f"http://{HOST}:{port}/api"
            shared["PREFECT_API_URL"] = api
            children.start("prefect", *_prefect(port, shared))
            waiting["Prefect"] = f"{api}/health"
            registered = {f: f"{api}/deployments/name/{f}/{NIGHTLY}" for f in load_flows()}
        if not settings.tracking.startswith(("http://", "https://")):
            if settings.tracking.startswith("sqlite:"):
                with exclusive(settings.home / "locks" / "mlflow"):
                    make_database(settings)
            port = claim_port(MLFLOW_PORT)
            addresses["MLflow"] = f"http://{HOST}:{port}"
            children.start("mlflow", *_mlflow(settings, port, shared))
            waiting["MLflow"] = f"{addresses['MLflow']}/health"
            # Through the server, so that the page of a run can lead to its page in MLflow.
            shared["MLFLOW_TRACKING_URI"] = addresses["MLflow"]
        _wait(waiting, children)
        if settings.prefect_api is None:
            _take_up_dead_runs(api)
        at_once = limit or max(1, cores() // 2)
        words = [json.dumps(params), json.dumps(at_once)]
        # What stages say is part of the page of a run, where nobody sees a console.
        noted = {**shared, "PREFECT_LOGGING_LEVEL": "INFO", UI_PROCESS: str(os.getpid())}
        children.start("deployments", [sys.executable, "-m", deployments, *words], noted)
        # Prefect pauses schedules when their runner ends; they are live once it registered again.
        _wait(registered, children, expected=b'"paused":false')
        for name, address in addresses.items():
            print(f"  {name:<10} {hide_password(address)}")
        print(f"  {'worker':<10} up to {at_once} at once on this machine")
        print(f"  {'logs':<10} {children.logs}")
        if (store := look_at_store(settings)).broken:
            # It may come; but every run would wait for it and fail.
            print(f"  {'store':<10} {store.text}\n  remedy: {store.remedy}", file=sys.stderr)
        print("  Ctrl-C ends them", flush=True)
        tell("\n".join(hide_password(address) for address in addresses.values()))
        while True:
            children.check()
            time.sleep(POLL_S)


def _environment(settings: Settings) -> dict[str, str]:
    """What the children must agree on, whatever folder they run in."""
    return {
        "REELFLOW_HOME": str(settings.home),
        "ARTIFACT_ROOT": settings.store,
        "MLFLOW_TRACKING_URI": settings.tracking,
        "PYTHONUNBUFFERED": "1",
        "PREFECT_RUNNER_POLL_FREQUENCY": os.environ.get(
            "PREFECT_RUNNER_POLL_FREQUENCY", str(LOOKS_EVERY_S)
        ),
        **HEARTBEATS,
    }


def _prefect(port: int, shared: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    # The page in the browser asks the server where its API is; these settings are the answer.
    address = {"PREFECT_SERVER_API_HOST": HOST, "PREFECT_SERVER_API_PORT": str(port)}
    return prefect_server.command(port), {**shared, **address, **LEASES}


def _mlflow(
    settings: Settings, port: int, shared: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    settings.home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", HOST, "--port", str(port)]
    # Runs write their artifacts to the place themselves; the server only reads them.
    root = artifact_location(settings) or (settings.home / "mlflow-artifacts").as_uri()
    command += ["--no-serve-artifacts", "--default-artifact-root", root]
    # By the environment: a database address may hold a password, and commands are for all to see.
    return command, {
        **shared,
        "MLFLOW_BACKEND_STORE_URI": settings.tracking,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _wait(urls: Mapping[str, str], children: Children, expected: bytes = b"") -> None:
    """Until every address answers with ``expected`` in its answer.

    Raises:
        StorageError: a server ended, or does not answer in time.
    """

    def failed(what: str) -> StorageError:
        remedy = "see the log; on a slow machine the same command may do better"
        return StorageError(what, where=str(children.logs), remedy=remedy)

    wait_for_answers(urls, children.check, failed, READY_WITHIN_S, expected)


def _take_up_dead_runs(api: str) -> None:
    """Schedule the runs again that ended with an earlier server; Prefect would show them for ever.

    Only runs of the deployments that are served here: they are executed below this command and by
    nobody else, while the workers of a pool go on without a server for a while. Not by way of
    `Crashed`, which would have the automation schedule them too.
    """
    alive = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    ours = {"deployment_id": {"is_null_": False}}
    again = {
        "type": "SCHEDULED",
        "name": "AwaitingRetry",
        "message": "its server ended; it goes on from its last checkpoint",
    }
    cancelled = {"type": "CANCELLED", "message": "its process ended with the server"}
    for run in _post(f"{api}/flow_runs/filter", {"flow_runs": {**alive, **ours}}):
        if run["work_pool_name"] is not None:
            continue
        state = cancelled if run["state"]["type"] == "CANCELLING" else again
        _post(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _post(url: str, body: dict[str, Any]) -> Any:
    """Send JSON and return the JSON of the answer.

    Raises:
        StorageError: no good answer after several tries (a busy SQLite makes the server decline).
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for left in reversed(range(TRIES)):
        try:
            with open_directly(request) as answer:
                return json.load(answer)
        except OSError as error:
            if not left:
                raise StorageError(f"the server declines: {error}", where=url) from error
            time.sleep(1)
    raise AssertionError


@contextmanager
def _only_one(settings: Settings) -> Iterator[Callable[[str], None]]:
    """One at a time for a home: two Prefect servers on one database would run things twice."""
    lock = settings.home / "locks" / "ui"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            addresses = ", ".join(file.read().split())
            raise UsageError(
                f"it runs already: {addresses or 'starting'}",
                where=str(settings.home),
                remedy="use it, end it, or give another REELFLOW_HOME",
            ) from None
        file.truncate(0)

        def tell(text: str) -> None:
            file.write(text)
            file.flush()

        yield tell


@contextmanager
def _ended_on_exit(children: Children) -> Iterator[Children]:
    """End the children whenever the block ends; Ctrl-C and SIGTERM are its normal end."""
    adopt_orphans()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield children
    except KeyboardInterrupt:
        print("\n  ending", file=sys.stderr, flush=True)
    finally:
        # A second Ctrl-C must not leave anything behind; ending takes seconds at most.
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        children.end()
        signal.signal(signal.SIGINT, interrupted)
        signal.signal(signal.SIGTERM, before)
