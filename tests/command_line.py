"""The ``reelflow`` command in a process of its own, with a home folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

REELFLOW = [sys.executable, "-m", "components.pipeline.cli"]
ROOT = Path(__file__).resolve().parent.parent
#: Addresses that would lead a test out of its folder; a test of the same process may have set them.
ADDRESSES = (
    "ARTIFACT_ROOT",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_URL",
    "PREFECT_HOME",
    "RAY_ADDRESS",
)


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ADDRESSES}
    # No GPU for anybody: the same on every machine.
    own = {"REELFLOW_HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**kept, **own, "PYTHONPATH": str(ROOT), **more}


def reelflow(home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a traceback is never what a user should see."""
    done = subprocess.run(
        [*REELFLOW, *words],
        capture_output=True,
        text=True,
        env=environment(home, **more),
        cwd=ROOT,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    # What takes more than two seconds is told, and that is up to the machine.
    done.stderr = re.sub(r"(?m)^  \w+ \.\.\.\n", "", done.stderr)
    return done


def settings(**values: Any) -> list[str]:
    """``stage__key=value`` as ``--set stage.key=value`` words."""
    words = [("--set", f"{name.replace('__', '.')}={value}") for name, value in values.items()]
    return [word for pair in words for word in pair]


def manifests(home: Path) -> dict[str, bytes]:
    """Every published manifest by its place, with its content."""
    folder = home / "store" / "manifests"
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.json"))}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below ``folder``."""
    return {
        str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns)
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def wait_until_nothing_runs_in(home: Path) -> None:
    """Ray's own processes end by themselves once their driver is gone."""
    deadline = time.monotonic() + 60
    while left := processes_of(home):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def processes_of(home: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("REELFLOW_HOME") == str(home):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found
