"""What runs here now, and what killed runs left: processes nobody waits for any more."""

from __future__ import annotations

import os
import time
from pathlib import Path

from components.pipeline.finding import Finding
from components.pipeline.settings import Settings
from components.pipeline.storage import is_held

SHOWN = 5
#: Servers and daemons end by themselves within this once their parent is gone.
ENDS_WITHIN_S = 30.0


def running(settings: Settings) -> Finding:
    """Runs and stages of this home that go on."""
    locks = settings.home / "locks"
    runs = [lock.name.split(".")[0] for lock in (locks / "runs").glob("*") if is_held(lock)]
    stages = [lock.name.rpartition("-")[0] for lock in locks.glob("*-*") if is_held(lock)]
    what = ", ".join(sorted({*runs, *stages}))
    return Finding("running", what or "nothing")


def orphans(settings: Settings) -> Finding:
    """Processes of this home that outlived the command which started them."""
    found = [(pid, name) for pid, name in _orphans(settings.home)]
    if not found:
        return Finding("left over", "no process of a killed run")
    text = ", ".join(f"{name} ({pid})" for pid, name in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    pids = " ".join(str(pid) for pid, _ in found)
    return Finding("left over", f"processes of a killed run: {text}{more}", f"kill {pids}")


def _orphans(home: Path) -> list[tuple[int, str]]:
    """Process id and name of those whose parent is gone, and that are not new."""
    import psutil

    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    wanted = f"REELFLOW_HOME={home}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if wanted not in variables or process.pid in mine or process.ppid() > 1:
                continue
            # A command of a person or a scheduler may have lost its shell; it is no leftover.
            words = process.cmdline()
            if "components.pipeline.cli" in words or any(w.endswith("/reelflow") for w in words):
                continue
            if time.time() - process.create_time() > ENDS_WITHIN_S:
                found.append((process.pid, process.name()))
        except (psutil.Error, OSError):
            continue
    return found
