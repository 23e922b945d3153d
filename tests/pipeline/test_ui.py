"""`reelflow ui`, really started: servers healthy, deployments there, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import settings_in

from components.pipeline import ui
from components.pipeline.errors import StorageError
from components.pipeline.flow import load_flows
from components.pipeline.settings import Settings


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for _ in range(10):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            # Prefect on SQLite declines while another of its services writes.
            if error.code != 503:
                raise
            time.sleep(1)
    raise AssertionError(f"{url} declines")


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Ui:
    """`reelflow ui` in a process of its own."""

    def __init__(self, home: Path) -> None:
        environment = {
            **os.environ,
            "REELFLOW_HOME": str(home),
            # The scheduler looks once a minute by default; a test cannot wait that long.
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
        }
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "ARTIFACT_ROOT", "PREFECT_HOME"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "components.pipeline.cli", "ui"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.said = ""
        self.all: list[psutil.Process] = []

    def wait_until_ready(self) -> dict[str, str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if "Ctrl-C" in line:
                break
        else:
            assert self.process.stderr is not None
            pytest.fail(self.process.stderr.read())
        self.all = psutil.Process(self.process.pid).children(recursive=True)
        return dict(re.findall(r"(\w+)\s+(http\S+)", self.said))

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Ui]:
    run = Ui(tmp_path / "home")
    yield run
    if run.process.poll() is None:
        run.end(signal.SIGTERM)
    for stream in (run.process.stdout, run.process.stderr):
        assert stream is not None
        stream.close()


@pytest.mark.slow
def test_servers_answer_deployments_are_there_and_ctrl_c_leaves_nothing(
    started: Ui, tmp_path: Path
) -> None:
    addresses = started.wait_until_ready()
    api = addresses["Prefect"] + "/api"
    assert get(api + "/health") is True
    with urllib.request.urlopen(addresses["MLflow"] + "/health", timeout=10) as answer:
        assert answer.read() == b"OK"
    # The page in the browser must talk to this server, not to the default address.
    assert get(addresses["Prefect"] + "/ui-settings")["api_url"] == api

    deployments = post(api + "/deployments/filter", {})
    names = {deployment["name"] for deployment in deployments}
    assert names == {"on-demand", "nightly"}
    assert len(deployments) == 2 * len(load_flows())
    nightly = get(f"{api}/deployments/name/recommend/nightly")
    assert nightly["schedules"][0]["schedule"]["cron"] == "0 3 * * *"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    # The form of the flow is made of the stages' own models.
    assert "split" in json.dumps(nightly["parameter_openapi_schema"])

    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    wait_for(lambda: post(api + "/flow_runs/filter", scheduled), 30)

    # A run that died with an earlier server would be shown as running for ever; one that was
    # not started by a deployment may be alive elsewhere.
    running = {"state": {"type": "RUNNING"}}
    ours = post(f"{api}/deployments/{nightly['id']}/create_flow_run", running)
    other = post(f"{api}/flow_runs/", {"flow_id": nightly["flow_id"], **running})
    ui._take_up_dead_runs(api)
    states = [get(f"{api}/flow_runs/{run['id']}")["state"]["name"] for run in (ours, other)]
    assert states == ["AwaitingRetry", "Running"]
    # It is executed for real now, which is not what is looked at here.
    cancelled = {"state": {"type": "CANCELLED"}, "force": True}
    post(f"{api}/flow_runs/{ours['id']}/set_state", cancelled)

    # A run on these servers: the message is the stage's own, once, and without a traceback.
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"user_id": [1]}), data / "interactions.parquet")
    run = subprocess.run(
        [sys.executable, "-m", "components.pipeline.cli", "run", "recommend", "--data", str(data)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "REELFLOW_HOME": str(tmp_path / "home"),
            "PREFECT_API_URL": api,
            "MLFLOW_TRACKING_URI": addresses["MLflow"],
        },
        check=False,
    )
    assert run.returncode == 3, run.stderr
    assert run.stderr.count("interactions.parquet") == 1
    assert "Traceback" not in run.stderr

    second = Ui(tmp_path / "home")
    _, error = second.process.communicate(timeout=30)
    assert second.process.returncode == 2
    assert addresses["Prefect"] in error

    assert len(started.all) >= 3
    assert started.end(signal.SIGINT) == 0
    assert not [process for process in started.all if process.is_running()]
    logs = tmp_path / "home" / "logs"
    assert {log.stem for log in logs.iterdir()} == {"prefect", "mlflow", "deployments"}
    for log in logs.iterdir():
        # Prefect's runner may cut off a connection when it is told to end.
        said = [line for line in log.read_text().splitlines() if "ERROR" in line]
        assert [line for line in said if "asyncio" not in line] == []
    # Nothing of Prefect's lies elsewhere.
    assert (tmp_path / "home" / "prefect").is_dir()


def serving(settings: Settings, script: str) -> subprocess.Popen[str]:
    """`ui.serve` with servers given, so that only ``script`` is started as the deployments."""
    code = (
        "from components.pipeline import ui; "
        "from components.pipeline.settings import load_settings; "
        "ui.serve(load_settings(), 'made_up_deployments', {})"
    )
    folder = settings.home.parent / "modules"
    folder.mkdir(exist_ok=True)
    (folder / "made_up_deployments.py").write_text(script)
    environment = {
        **os.environ,
        "REELFLOW_HOME": str(settings.home),
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "PYTHONPATH": str(folder),
    }
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


ORPHANING = """
import subprocess, sys, time
# A grandchild in a session of its own, whose parent ends at once: nobody's child any more.
middle = '''
import subprocess, sys
nap = [sys.executable, "-c", "import time; time.sleep(600)"]
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
print(subprocess.Popen(nap, start_new_session=True, **quiet).pid)
'''
subprocess.run([sys.executable, "-c", middle], check=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_orphans_of_children_end_too_and_strangers_do_not(number: int, tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    run = serving(settings, ORPHANING)
    log = settings.home / "logs" / "deployments.log"
    wait_for(lambda: log.exists() and log.read_text().strip(), 30)
    orphan = psutil.Process(int(log.read_text()))
    run.send_signal(number)
    out, error = run.communicate(timeout=30)
    assert run.returncode == 0, error
    assert "Ctrl-C ends them" in out
    assert not orphan.is_running()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_children_end_when_the_program_itself_is_killed(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    run = serving(settings, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    log = settings.home / "logs" / "deployments.log"
    wait_for(lambda: log.exists() and log.read_text().strip(), 30)
    child = psutil.Process(int(log.read_text()))
    run.kill()
    run.communicate(timeout=30)
    psutil.wait_procs([child], 10)
    assert not child.is_running()


def test_a_child_that_ends_by_itself_ends_all_with_its_last_words(tmp_path: Path) -> None:
    run = serving(settings_in(tmp_path), "raise SystemExit('the port is taken')")
    _, error = run.communicate(timeout=30)
    assert run.returncode == 1
    assert "deployments ended with code 1" in error
    assert "the port is taken" in error


def test_a_store_that_no_run_could_write_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARTIFACT_ROOT", str(tmp_path / "file" / "store"))
    process = serving(settings_in(tmp_path), "import time; time.sleep(600)")
    assert process.stdout is not None
    assert any("Ctrl-C" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert f"{tmp_path / 'file' / 'store'} (ARTIFACT_ROOT): cannot write to" in error
    assert "remedy: name another folder" in error


def test_credentials_are_not_part_of_a_command(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, tracking="postgresql://me:secret@host/mlflow")
    command, environment = ui._mlflow(settings, 5000, {})
    assert "secret" not in " ".join(command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == settings.tracking


def test_a_server_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "TRIES", 1)
    with pytest.raises(StorageError, match="the server declines"):
        ui._post("http://127.0.0.1:9/api", {})
