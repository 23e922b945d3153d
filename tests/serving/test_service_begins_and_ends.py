"""Claims about the marks by which a service knows who answers: its beginning, its end, its folder.

The replicas are real ones with a tiny model, a process or a thread each, without Ray and HTTP.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from service_world import version_files

from components.pipeline.errors import StorageError
from components.serving.engine import Deployed, Engine, answering, answers_mark
from components.serving.schema import Event, Request
from components.serving.service import POLL_S, _drain, _own_folder, _wait_until_ready


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return version_files(tmp_path_factory.mktemp("ends"))


def deployed(artifacts: Path, folder: Path) -> Deployed:
    end = folder / "running" / "ending"
    end.parent.mkdir(exist_ok=True)
    return Deployed("m", "1", str(artifacts), str(folder / "journal"), str(end), 8, 1)


@pytest.fixture
def ready(artifacts: Path, tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(deployed(artifacts, tmp_path))
    # Long before it has loaded.
    time.sleep(0.02)
    assert answering(Path(engine.deployed.end_mark)) == 0
    assert engine.settled.wait(60)
    assert (engine.state, engine.problem) == ("ready", "")
    yield engine
    Path(engine.deployed.end_mark).touch()


def fail(told: Deployed) -> None:
    engine = Engine(told)
    engine.settled.wait()
    assert engine.state == "failed"


def test_the_end_waits_for_who_answers_and_for_no_replica_that_failed_or_was_killed(
    ready: Engine, artifacts: Path, tmp_path: Path
) -> None:
    """Ray starts a replica that cannot load again and again, in a process of its own each time."""
    end = Path(ready.deployed.end_mark)
    broken = tmp_path / "broken"
    shutil.copytree(artifacts, broken)
    (broken / "semantic_ids" / "data.json").unlink()
    retry = multiprocessing.get_context("spawn").Process(
        target=fail, args=(deployed(broken, tmp_path),)
    )
    retry.start()
    retry.join(60)
    assert retry.exitcode == 0
    assert answering(end) == 1
    assert retry.pid is not None
    answers_mark(end, retry.pid).touch()
    assert answering(end) == 1
    many = [Request(history=[Event(item_id=1000, timestamp_ms=None)])] * 200
    waiting = ready.submit(many, 20, 64, 60.0)
    _drain(end)
    assert all(future.done() for future in waiting)
    assert {len(future.result()) for future in waiting} == {20}
    assert answering(end) == 0


class Watched(Engine):
    """Remembers its states."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state":
            self.__dict__.setdefault("states", []).append(value)
        super().__setattr__(name, value)


def test_a_replica_that_has_loaded_when_the_service_ends_takes_no_request(
    artifacts: Path, tmp_path: Path
) -> None:
    told = deployed(artifacts, tmp_path)
    Path(told.end_mark).touch()
    engine = Watched(told)
    assert engine.settled.wait(60)
    deadline = time.monotonic() + 20
    while engine.state == "loading":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.states == ["loading", "draining"]


class _AlwaysReady(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"status": "ready"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_service_has_begun_when_every_replica_answers_not_when_one_does(tmp_path: Path) -> None:
    end, ending = tmp_path / "ending", threading.Event()
    with HTTPServer(("127.0.0.1", 0), _AlwaysReady) as server, ThreadPoolExecutor(2) as pool:
        pool.submit(server.serve_forever, POLL_S)
        answers_mark(end, os.getpid()).touch()
        address = f"http://127.0.0.1:{server.server_port}"
        begun = pool.submit(_wait_until_ready, address, end, 2, ending, lambda: None)
        try:
            with pytest.raises(TimeoutError):
                begun.result(5 * POLL_S)
            answers_mark(end, os.getppid()).touch()
            begun.result(60)
        finally:
            ending.set()
            server.shutdown()


def test_a_replica_that_never_answers_is_told_from_a_service_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.serving.service.READY_WITHIN_S", 3 * POLL_S)
    end, ending = tmp_path / "ending", threading.Event()
    with HTTPServer(("127.0.0.1", 0), _AlwaysReady) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, POLL_S)
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            with pytest.raises(StorageError, match="ready: no answer"):
                _wait_until_ready(address, end, 2, ending, lambda: None)
            answers_mark(end, os.getpid()).touch()
            with pytest.raises(StorageError, match=r"1 of 2 replicas answer\n.*--replicas"):
                _wait_until_ready(address, end, 2, ending, lambda: None)
            # It answers, and who asks hears nothing of it: fewer replicas would not help.
            monkeypatch.setattr("components.serving.service._readiness", lambda address: (0, {}))
            with pytest.raises(StorageError, match=r"ready: no answer\n +remedy: reelflow doctor"):
                _wait_until_ready(address, end, 1, ending, lambda: None)
        finally:
            server.shutdown()


def own_folder_until_killed(parent: Path) -> None:
    with _own_folder(parent) as own:
        (own / "ending").touch()
        time.sleep(600)


def test_what_a_killed_service_left_goes_and_what_a_running_one_has_stays(tmp_path: Path) -> None:
    parent = tmp_path / "running"
    context = multiprocessing.get_context("spawn")
    running, killed = (
        context.Process(target=own_folder_until_killed, args=(parent,)) for _ in range(2)
    )
    marks = []
    for process in (running, killed):
        process.start()
        deadline = time.monotonic() + 60
        while not (new := {*parent.glob("*/ending")} - {*marks}):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        marks += new
    killed.kill()
    killed.join()
    try:
        with _own_folder(parent) as own:
            assert list(own.iterdir()) == []
            assert [mark.exists() for mark in marks] == [True, False]
        left = {marks[0].parent.name, f"{marks[0].parent.name}.lock"}
        assert {path.name for path in parent.iterdir()} == left
    finally:
        running.kill()
        running.join()
