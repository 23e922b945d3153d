"""Schedules

A hundred scheduled runs in a row, and a worker that is lost with the run it executes. Both take
minutes, so that only the long version has them; ``tests/flows/test_operation.py`` has the rest.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import wait_until_nothing_runs_in
from fault_suite import LONG
from operated import Operated, deploy_to_pool, operated_in, request, wait_for, worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not LONG, reason="minutes: make faults"),
]

RUNS, WARM, EVERY_S = 100, 10, 8
#: A long stage that is cheap; whole, since a deployment of a pool has no parameters of its own.
LONG_TRAINING = {
    "ingest": {
        "simulator": {
            "users": 120,
            "items": 128,
            "interactions": 6000,
            "video_items": 8,
            "video_size": 32,
        }
    },
    "validate": {"great_expectations": False},
    "item_features": {"dimension": 16, "block_dimension": 16, "token_dimension": 16},
    "align_items": {"steps": 20, "pairs": 64},
    "semantic_ids": {"codebook_size": 8},
    "train_recommender": {
        "model": {
            "d_model": 16,
            "heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "ffn": 32,
        },
        "max_steps": 4000,
        "evaluate_every": 50,
        "batch_size": 64,
        "patience": 1000,
    },
}


@pytest.fixture
def operated(tmp_path: Path) -> Iterator[Operated]:
    with operated_in(tmp_path / "home") as started:
        yield started
    wait_until_nothing_runs_in(tmp_path / "home")


def server(operated: Operated) -> psutil.Process:
    (found,) = (
        process
        for process in psutil.Process(operated.process.pid).children(recursive=True)
        if "prefect_app" in " ".join(process.cmdline())
    )
    return found


def errors(operated: Operated) -> list[str]:
    logs = (operated.home / "logs").iterdir()
    return [line for log in logs for line in log.read_text().splitlines() if "ERROR" in line]


def test_a_hundred_scheduled_runs_in_a_row(operated: Operated, record: Callable[..., None]) -> None:
    nightly = operated.deployment("nightly")
    path = f"/deployments/{nightly['id']}/schedules"
    often = {
        "schedule": {"interval": EVERY_S},
        "active": True,
        "parameters": {**nightly["parameters"], "until": "ingest"},
    }
    (schedule,) = operated.post(path, [often])
    ours = {"flow_runs": {"deployment_id": {"any_": [nightly["id"]]}}}

    def runs(*types: str) -> list[dict[str, Any]]:
        wanted = {**ours["flow_runs"], "state": {"type": {"any_": list(types)}}}
        found: list[dict[str, Any]] = operated.post("/flow_runs/filter", {"flow_runs": wanted})
        return found

    memory = server(operated)
    wait_for(lambda: len(runs("COMPLETED")) >= WARM, 600, "no runs")
    warm = memory.memory_info().rss
    wait_for(lambda: len(runs("COMPLETED")) >= RUNS, 2400, f"{len(runs('COMPLETED'))} runs")
    grown = memory.memory_info().rss / warm - 1
    status, _ = request("DELETE", f"{operated.api}{path}/{schedule['id']}")
    assert status == 204
    wait_for(lambda: not runs("RUNNING", "PENDING"), 120, "a run is stuck")
    assert runs("FAILED", "CRASHED", "CANCELLED") == []
    assert errors(operated) == []
    spans = sorted((run["start_time"], run["end_time"]) for run in runs("COMPLETED"))
    overlaps = [after for (_, before), (after, _) in itertools.pairwise(spans) if after < before]
    assert overlaps == []
    assert grown < 0.10
    record(
        "a hundred scheduled runs in a row",
        f"none stuck, no overlap, server's memory {100 * grown:+.1f} %",
        len(spans),
    )


def in_training(operated: Operated, home: Path, deployment: str, **parameters: Any) -> str:
    """A run that has written its first checkpoint of many."""
    flow_run = operated.start(
        deployment, {"until": "train_recommender", "params": LONG_TRAINING, **parameters}
    )
    scratch = home / "scratch" / "train_recommender"
    wait_for(
        lambda: list(scratch.glob("*/work/**/checkpoint_manager_snapshot.json")), 400, "no training"
    )
    return flow_run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_runs_go_on_when_the_ui_ends_and_comes_back(
    number: int, tmp_path: Path, record: Callable[..., None]
) -> None:
    home = tmp_path / "home"
    with operated_in(home) as before:
        flow_run = in_training(before, home, "nightly")
        before.process.send_signal(number)
        before.process.wait(90)
    wait_until_nothing_runs_in(home)
    with operated_in(home) as after:
        ended = after.ended(flow_run, 900)
        assert ended["state"]["type"] == "COMPLETED", ended["state"]
        assert ended["run_count"] == 2
        # The slot of the one that was interrupted is free again.
        another = after.start("nightly", {"until": "ingest"})
        assert after.ended(another, 120)["state"]["type"] == "COMPLETED"
    wait_until_nothing_runs_in(home)
    how = signal.Signals(number).name
    record(f"`reelflow ui` ended by {how}, started again", "its run completed")


def test_a_run_of_a_pool_lives_through_a_restart_of_the_server(
    tmp_path: Path, record: Callable[..., None]
) -> None:
    home, machine = tmp_path / "home", tmp_path / "machine"
    ports: dict[str, str] = {}
    with operated_in(home) as before:
        deploy_to_pool(before)
        alive = worker(before, machine)
        store = str(tmp_path / "shared")
        flow_run = in_training(before, machine / "home", "on-demand-pool", store=store)
        ports = before.addresses
        before.process.send_signal(signal.SIGINT)
        before.process.wait(90)
    try:
        with operated_in(home) as after:
            assert after.addresses == ports, "another took the port"
            ended = after.ended(flow_run, 900)
            assert ended["state"]["type"] == "COMPLETED", ended["state"]
            assert ended["run_count"] == 1
    finally:
        os.killpg(alive.pid, signal.SIGKILL)
        alive.wait()
    record("the server of a pool restarts", "its run completed, undisturbed")


def test_a_run_goes_on_elsewhere_when_its_worker_is_lost(
    operated: Operated, tmp_path: Path, record: Callable[..., None]
) -> None:
    deploy_to_pool(operated)
    first, second = tmp_path / "first", tmp_path / "second"
    lost = worker(operated, first)
    pool = operated.deployment("on-demand-pool")
    assert pool["work_pool_name"] is not None
    store = str(tmp_path / "shared")
    flow_run = in_training(operated, first / "home", "on-demand-pool", store=store)
    tree = psutil.Process(lost.pid).children(recursive=True)
    os.killpg(lost.pid, signal.SIGKILL)
    for process in tree:
        # The machine is gone with all that ran on it.
        if process.is_running():
            process.kill()
    lost.wait()
    start = time.monotonic()
    assert operated.run(flow_run)["state"]["type"] == "RUNNING"
    wait_for(
        lambda: operated.run(flow_run)["state"]["name"] == "AwaitingRetry", 400, "still running"
    )
    noticed = time.monotonic() - start
    found = worker(operated, second)
    try:
        ended = operated.ended(flow_run, 900)
        assert ended["state"]["type"] == "COMPLETED", ended["state"]
    finally:
        os.killpg(found.pid, signal.SIGTERM)
        found.wait(60)
    assert ended["run_count"] == 2
    states = operated.get(f"/flow_run_states/?flow_run_id={flow_run}")
    assert [s for s in states if re.search("no heartbeat", s["message"] or "")]
    record("a worker is lost with its run", f"noticed after {noticed:.0f} s, completed elsewhere")
