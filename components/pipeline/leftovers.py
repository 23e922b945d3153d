"""What runs here now, and what killed runs left: processes nobody waits for any more."""

from __future__ import annotations

import time
from pathlib import Path

from components.pipeline.finding import Finding
from components.pipeline.settings import Settings
from components.pipeline.storage import is_held

SHOWN = 5
#: What a command starts: servers, Ray's daemons and workers, processes of stages.
KINDS = ("prefect", "mlflow", "/ray/", "ray::", "components.", "flows.")
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
    found = _orphans(settings.home)
    if not found:
        return Finding("left over", "no process of a killed run")
    text = ", ".join(f"{name} ({pid})" for pid, name in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    pids = " ".join(str(pid) for pid, _ in found)
    return Finding("left over", f"processes of a killed run: {text}{more}", f"kill {pids}")


def _orphans(home: Path) -> list[tuple[int, str]]:
    """Process id and name of our servers and workers that no command of ours started any more."""
    import psutil

    wanted = f"REELFLOW_HOME={home}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            if wanted not in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                continue
            words = " ".join(process.cmdline())
            if not any(kind in words for kind in KINDS) or _is_command(words):
                continue
            if any(_is_command(" ".join(parent.cmdline())) for parent in process.parents()):
                continue
            if time.time() - process.create_time() > ENDS_WITHIN_S:
                found.append((process.pid, process.name()))
        except (psutil.Error, OSError):
            continue
    return found


def _is_command(words: str) -> bool:
    """Whether a person or a scheduler called it; one that lost its shell is no leftover."""
    program = words.split(" ")
    is_module = "components.pipeline.cli" in program or "flows.deployments" in program
    return is_module or any(word.endswith("/reelflow") for word in program[:3])
