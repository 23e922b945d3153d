"""One execution of a stage at a time, also across machines that share an object store.

A lock file serves the processes of one machine; checkpoints in an object store are shared by
machines that know nothing of each other, and two trainings must not write the same ones. A lease is
an object ``<place>/<number>`` that its holder writes anew as long as it lives. Who finds it held
waits; who finds that its holder died, at once if it died on the same machine and after
``EXPIRES_S`` otherwise, takes the next number by a conditional put, which exactly one can.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components.pipeline.errors import StorageError
from components.pipeline.storage import Folder

#: Longer than an operation may keep trying, for a holder that waits for the store lives.
EXPIRES_S = 150.0
RENEW_EVERY_S = 20.0
POLL_S = 2.0


@contextlib.contextmanager
def lease(store: Folder, place: str, home: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lease ``place`` of an object store while the block runs.

    Args:
        home: folder whose lock file for the same work the caller holds; so whoever left a lease
            from there is gone.
        on_wait: called once if somebody else holds it.

    Raises:
        StorageError: the store does not answer.
    """
    name, me = _acquire(store, place, home, on_wait)
    over = threading.Event()

    def renew() -> None:
        while not over.wait(RENEW_EVERY_S):
            with contextlib.suppress(StorageError):
                if not over.is_set():
                    # It comes again; and who ends because the store is away waits for this one.
                    store.put(name, me, replace=True, once=True)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(RENEW_EVERY_S)
        # What stays is seen to be dead by the next who comes.
        with contextlib.suppress(StorageError):
            store.delete(name, once=True)


def _acquire(
    store: Folder, place: str, home: Path, on_wait: Callable[[], None]
) -> tuple[str, bytes]:
    process = _process(home)
    me = json.dumps({"holder": uuid.uuid4().hex, **process}).encode()
    told = False
    while True:
        names = store.names(place)
        if any(_is_held(store, name, process) for name in names):
            if not told:
                told = True
                on_wait()
            time.sleep(POLL_S * random.uniform(0.5, 1))
            continue
        number = max((int(name.rpartition("/")[2]) for name in names), default=0) + 1
        mine = f"{place}/{number:08d}"
        if not store.put(mine, me, replace=False) and store.read(mine) != me:
            continue
        # Numbers begin anew when all are gone: of two that took different ones, neither keeps his
        # unless he is alone.
        others = [name for name in store.names(place) if name != mine]
        if any(_is_held(store, name, process) for name in others):
            store.delete(mine)
            continue
        for name in others:
            store.delete(name)
        return mine, me


def _is_held(store: Folder, name: str, me: dict[str, Any]) -> bool:
    """Whether the holder of a lease lives, as far as can be told."""
    age, content = store.age(name), store.read(name)
    if age is None or content is None or age > EXPIRES_S:
        return False
    try:
        holder = json.loads(content)
        machine, home = holder["machine"], holder["home"]
        pid, started = int(holder["pid"]), holder["started"]
    except (ValueError, KeyError, TypeError):
        return True
    if not machine or machine != me["machine"]:
        return True
    return bool(home != me["home"] and _started(pid) == started)


def _process(home: Path) -> dict[str, Any]:
    """This process, told from all others of its machine, now and later."""
    me = os.getpid()
    machine = {"machine": _machine(), "host": platform.node(), "home": str(home)}
    return {**machine, "pid": me, "started": _started(me)}


def _machine() -> str:
    """This boot of this machine and its names of processes; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the boot; None if it lives no more."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else fields[18]
