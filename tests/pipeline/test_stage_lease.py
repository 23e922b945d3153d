"""Machines that share an object store take turns, and nobody waits for the dead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from real_services import S3Server
from tiny_stages import Tiny

from components.pipeline import stage_lease as lease_module
from components.pipeline.stage_lease import lease
from components.pipeline.storage import Folder

PLACE = "scratch/train/key/lease"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "POLL_S", 0.02)


def held_by(s3: S3Server, **changes: object) -> Folder:
    """A store with a lease that somebody left, by what he said of himself."""
    store = Folder(s3.uri)
    holder = {"holder": "x", **lease_module._process(Path("/another/home")), **changes}
    store.put(f"{PLACE}/00000001", json.dumps(holder).encode(), replace=True)
    return store


def take(store: Folder, home: str = "/this/home") -> list[str]:
    """Take the lease and give it back; whether that needed a wait."""
    waited: list[str] = []
    with lease(store, PLACE, Path(home), lambda: waited.append("waited")):
        assert len(store.names(PLACE)) == 1
    assert store.names(PLACE) == []
    return waited


def test_only_one_holds_it_and_all_get_it(s3: S3Server) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work(number: int) -> None:
        nonlocal inside, most
        with lease(Folder(s3.uri), PLACE, Path(f"/home/{number}"), lambda: None):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == 1
    assert Folder(s3.uri).names(PLACE) == []


def test_the_lease_of_a_process_that_died_on_this_machine_is_taken_at_once(s3: S3Server) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert take(held_by(s3, pid=dead.pid)) == []
    # Another process has its number now.
    assert take(held_by(s3, started="0")) == []


def test_what_this_home_left_is_taken_at_once_for_its_lock_is_held(s3: S3Server) -> None:
    store = held_by(s3)
    assert take(store, "/another/home") == []


def test_another_machine_is_waited_for_until_it_renews_no_more(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "EXPIRES_S", 2.0)
    start = time.monotonic()
    assert take(held_by(s3, machine="another")) == ["waited"]
    assert time.monotonic() - start >= 1.0


def test_a_lease_that_is_renewed_is_kept(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "EXPIRES_S", 2.0)
    monkeypatch.setattr(lease_module, "RENEW_EVERY_S", 0.2)
    monkeypatch.setattr(lease_module, "_machine", lambda: "")
    store = Folder(s3.uri)
    with lease(store, PLACE, Path("/home/1"), lambda: None):
        time.sleep(4)
        (name,) = store.names(PLACE)
        assert lease_module._is_held(store, name, lease_module._process(Path("/home/2")))


def test_two_machines_run_a_stage_once(tiny: Tiny, tmp_path: Path, s3: S3Server) -> None:
    tiny.during = lambda run: time.sleep(0.3)
    outcomes: list[bool] = []

    def machine(name: str) -> None:
        runner = tiny.runner(tmp_path / name, store=s3.uri)
        outcomes.append(runner.execute(tiny.stages[0])[1])

    threads = [threading.Thread(target=machine, args=(n,)) for n in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == [False, True, True]
    assert tiny.calls == ["numbers"]
