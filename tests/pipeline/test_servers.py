"""Servers that a program starts for itself: what is said when one does not work, and its end."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from components.pipeline.errors import StorageError
from components.pipeline.servers import HOST, Server, free_port, start_server, wait_for_answers

SILENT = "import time; print('I wait for the database', flush=True); time.sleep(600)"


@pytest.fixture
def silent() -> Iterator[Server]:
    """A server that lives and never answers."""
    server = start_server("the clock", [sys.executable, "-c", SILENT], {})
    yield server
    server.end()


def wait(server: Server, within_s: float) -> None:
    url = f"http://{HOST}:{free_port()}/"
    wait_for_answers({server.name: url}, server.check, server.failed, within_s)


def test_a_server_that_never_answers_is_given_up_with_its_last_words(silent: Server) -> None:
    silent.place, silent.remedy = "/some/folder", "wind it up"
    until_it_speaks(silent)
    start = time.monotonic()
    with pytest.raises(StorageError) as caught:
        wait(silent, within_s=0.3)
    assert time.monotonic() - start < 5
    said = str(caught.value)
    assert said.startswith("/some/folder: the clock did not answer within")
    assert "I wait for the database" in said
    assert "remedy: wind it up" in said


def until_it_speaks(server: Server) -> None:
    deadline = time.monotonic() + 30
    while not server.last_lines():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_ends_is_not_waited_for() -> None:
    command = [sys.executable, "-c", "raise SystemExit('the disk is full')"]
    server = start_server("the clock", command, {})
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"the clock ended with code 1:\n    the disk is full"):
        wait(server, within_s=60)
    assert time.monotonic() - start < 30
    server.end()


def test_a_server_ends_with_the_program_that_is_killed() -> None:
    program = (
        "import sys; from components.pipeline.servers import start_server\n"
        f"server = start_server('s', [sys.executable, '-c', {SILENT!r}], {{}})\n"
        "print(server.process.pid, flush=True); server.process.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate(timeout=30)
    psutil.wait_procs([server], 10)
    assert not server.is_running()


def test_a_taken_port_is_avoided_and_a_free_one_is_used() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_a_claimed_port_is_given_to_nobody_else_until_its_process_ends() -> None:
    port = free_port()
    code = f"from components.pipeline.servers import claim_port; print(claim_port({port}), end='')"
    say = f"{code}; import sys; sys.stdout.flush(); sys.stdin.read()"
    command = [sys.executable, "-c", say]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
    assert first.stdout.read(len(str(port))) == str(port)
    other, _ = subprocess.Popen(command, **pipes).communicate("")  # type: ignore[call-overload]
    assert int(other) != port
    first.communicate("")
    again, _ = subprocess.Popen(command, **pipes).communicate("")  # type: ignore[call-overload]
    assert int(again) == port


STUBBORN = """
import os, signal, subprocess, sys, time
from components.pipeline.servers import end_soon_after
signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_soon_after(os.getppid(), 0.5)
nap = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), nap.pid, flush=True)
time.sleep(600)
"""
PARENT = """
import sys, time
from pathlib import Path
from components.pipeline.servers import start_server
start_server("stubborn", [sys.executable, "-c", sys.argv[1]], {}, Path(sys.argv[2]))
time.sleep(600)
"""


def test_what_does_not_end_by_itself_ends_soon_after_a_parent_that_was_killed(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, STUBBORN, str(log)])
    deadline = time.monotonic() + 30
    while not (log.exists() and len(log.read_text().split()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    left = [psutil.Process(int(pid)) for pid in log.read_text().split()]
    time.sleep(1)
    assert all(process.is_running() for process in left)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(left, 20)
    assert alive == []
