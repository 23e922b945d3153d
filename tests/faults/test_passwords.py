"""Servers behind a password

The address of a server may bear user and password: the platform logs in with them, and they are
found nowhere afterwards, whether the server answers or not.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from command_line import environment, reelflow, settings
from fault_suite import LONG, Record
from secrets_search import search
from smallest_run import SMALL

from components.pipeline import prefect_server
from components.pipeline.servers import free_port

SECRETS = {"MLflow": "albatross/5ecret+ofMLflow", "Prefect": "porcupine/5ecret+ofPrefect"}
FLOW = ["run", "recommend", *SMALL, *settings(validate__great_expectations="false")]
FLOW += ["--until", "validate" if LONG else "ingest"]


def address(program: str, port: int) -> str:
    end = "/api" if program == "Prefect" else ""
    return f"http://me:{quote(SECRETS[program], safe='')}@127.0.0.1:{port}{end}"


def addresses(ports: dict[str, int]) -> dict[str, str]:
    names = {"MLflow": "MLFLOW_TRACKING_URI", "Prefect": "PREFECT_API_URL"}
    return {names[program]: address(program, port) for program, port in ports.items()}


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, int]]:
    """Both servers; each answers only those who know its password."""
    ports = {program: free_port() for program in SECRETS}
    guarded = Path(__file__).parent / "mlflow_behind_password.py"
    mlflow = [sys.executable, str(guarded), str(ports["MLflow"]), str(folder / "mlflow.db")]
    commands = {"MLflow": mlflow, "Prefect": prefect_server.command(ports["Prefect"])}
    login = {f"{program}": f"me:{secret}" for program, secret in SECRETS.items()}
    env = environment(
        folder / "servers",
        LOGIN=login["MLflow"],
        PREFECT_SERVER_API_AUTH_STRING=login["Prefect"],
        PREFECT_HOME=str(folder / "prefect"),
    )
    folder.mkdir()
    started = []
    try:
        for program, command in commands.items():
            with (folder / f"{program}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
                )
        deadline = time.monotonic() + 120
        for program, port in ports.items():
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline, (folder / f"{program}.log").read_text()
                    time.sleep(0.1)
        yield ports
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


@pytest.mark.slow
def test_the_password_of_an_address_opens_the_server_and_is_written_nowhere(
    tmp_path: Path, record: Record
) -> None:
    home = tmp_path / "home"
    with servers(tmp_path / "servers") as ports:
        done = reelflow(home, *FLOW, **addresses(ports))
    assert done.returncode == 0, done.stderr
    (tmp_path / "said").write_text(done.stdout + done.stderr)
    assert "View run" not in done.stdout
    # What the servers keep was kept by this run: they were spoken to.
    assert (tmp_path / "servers" / "prefect" / "prefect.db").stat().st_size
    assert not (home / "mlflow.db").exists()
    assert search([tmp_path], SECRETS) == []
    record("a password in the address of a server that answers", "used, written nowhere", 2)


@pytest.mark.slow
@pytest.mark.parametrize("dead", ["MLflow", *(["Prefect"] if LONG else [])])
def test_a_server_that_does_not_answer_does_not_tell_the_password(
    dead: str, tmp_path: Path, record: Record
) -> None:
    home, refused = tmp_path / "home", {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = reelflow(home, *FLOW, **refused, **addresses({dead: 9}))
    assert done.returncode == 4
    assert f"{'MLFLOW_TRACKING_URI' if dead == 'MLflow' else 'PREFECT_API_URL'}: " in done.stderr
    (tmp_path / "said").write_text(done.stdout + done.stderr)
    assert search([tmp_path], SECRETS) == []
    # Prefect's own database was there to be written into.
    assert dead != "MLflow" or (home / "prefect" / "prefect.db").stat().st_size
    record("a password in the address of a server that does not answer", "written nowhere")
