"""A run triggered through Prefect's API: how much is added to the work itself.

`reelflow ui` is started in a home of its own. Then the same call that the form of the UI makes
creates one run after another of a flow whose stages are all in the store, so that every second
from the call to the state COMPLETED is overhead: waiting for the worker, starting Python, importing
Prefect, looking every stage up. Beside it, in the same session: Prefect's own choice of how often
its worker looks (every 10 s), and the same work by the command line.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.result import Result

SUMMARY = "A run triggered through the API: seconds of overhead until it is COMPLETED"

REELFLOW = [sys.executable, "-m", "components.pipeline.cli"]
SMALL = (
    "ingest.simulator.users=120",
    "ingest.simulator.items=128",
    "ingest.simulator.interactions=6000",
    "ingest.simulator.video_items=8",
    "ingest.simulator.video_size=32",
)
UNTIL = "split"
TARGET_S = 10.0
PREFECTS_OWN_POLL_S = "10"


def run(quick: bool = False) -> list[Result]:
    """Measure; ``quick`` takes one run of each kind, to see that it works."""
    repeats = 1 if quick else 9
    with tempfile.TemporaryDirectory(prefix="bench_run_") as folder:
        home = Path(folder) / "home"
        overrides = [word for value in SMALL for word in ("--set", value)]
        by_hand = [*REELFLOW, "run", "recommend", "--until", UNTIL, *overrides]
        subprocess.run(by_hand, env=_environment(home), check=True, stdout=sys.stderr)
        direct = [_timed(by_hand, home) for _ in range(repeats)]
        with _ui(home, overrides) as api:
            ours = [_triggered(api) for _ in range(repeats + 1)][1:]
        with _ui(home, overrides, PREFECT_RUNNER_POLL_FREQUENCY=PREFECTS_OWN_POLL_S) as api:
            theirs = [_triggered(api) for _ in range(repeats + 1)][1:]
    return [
        _seconds("overhead", ours, TARGET_S),
        _seconds("overhead_vs_own_poll", ours, statistics.median(theirs)),
        _seconds("command_line_all_cached", direct, None),
    ]


def _seconds(name: str, samples: list[float], reference: float | None) -> Result:
    return Result(
        name=name,
        ours=statistics.median(samples),
        reference=reference,
        unit="s",
        low=min(samples),
        high=max(samples),
        n=len(samples),
        higher_is_better=False,
    )


def _environment(home: Path, **more: str) -> dict[str, str]:
    moved = ("ARTIFACT_ROOT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in moved}
    return {**kept, "REELFLOW_HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def _timed(command: list[str], home: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=_environment(home), check=True, stdout=sys.stderr)
    return time.perf_counter() - start


@contextmanager
def _ui(home: Path, overrides: list[str], **variables: str) -> Iterator[str]:
    process = subprocess.Popen(
        [*REELFLOW, "ui", *overrides],
        env=_environment(home, **variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        (address,) = re.findall(r"Prefect\s+(http\S+)", said)
        yield f"{address}/api"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


def _triggered(api: str) -> float:
    """Seconds from the form's call to the state COMPLETED."""
    deployment = _call(f"{api}/deployments/name/recommend/on-demand")
    parameters = {**deployment["parameters"], "until": UNTIL}
    start = time.perf_counter()
    body = {"parameters": parameters}
    made = _call(f"{api}/deployments/{deployment['id']}/create_flow_run", body)
    while True:
        state = _call(f"{api}/flow_runs/{made['id']}")["state"]
        if state["type"] == "COMPLETED":
            return time.perf_counter() - start
        if state["type"] in ("FAILED", "CRASHED", "CANCELLED"):
            raise RuntimeError(f"the run ended as {state}")
        time.sleep(0.1)


def _call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
