"""Who uses a store: runs announce themselves for as long as they last, and gc asks before it frees.

A run reads results of earlier ones between its stages, while it waits for a retry and long after
it has looked them up; so that nothing is taken from under it, it says that it is there. It holds a
lock file below ``home``, which the kernel frees when its holder dies, and a *lease* in the store,
which other machines and other homes see: a small object that is refreshed and that counts for
nothing once it has not been refreshed for two minutes, as after a power cut.

Both sides first say that they are there and then look for the other: either gc sees the run, or
the run sees gc and waits until it is done. Ages of leases are differences of the store's own times,
so clocks of machines may differ.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from components.pipeline.console import say
from components.pipeline.errors import StorageError
from components.pipeline.manifest import Store
from components.pipeline.settings import Settings
from components.pipeline.storage import Folder, exclusive, is_held

REFRESH_S, EXPIRES_S, LOOK_EVERY_S = 15.0, 120.0, 0.5

#: Folder of leases in a store, and the two kinds: folders of lock files, and starts of names.
LEASES, RUNS, SWEEPS = "leases", "runs", "sweeps"


@dataclass(frozen=True)
class Use:
    """A run that is going on, or a gc.

    Attributes:
        what: the flow or the stage.
        host: machine it runs on.
        since: when it began (Unix time, by the clock of the files it writes).
    """

    what: str
    host: str
    since: float

    def __str__(self) -> str:
        return self.what if self.host == socket.gethostname() else f"{self.what} on {self.host}"


@contextmanager
def announced(settings: Settings, store: Store, what: str) -> Iterator[None]:
    """``what`` runs and reads results of ``store``: until the block ends gc leaves them alone.

    Within an announcement of this process another one is part of it.

    Raises:
        StorageError: the lock file or the lease cannot be written.
    """
    if not _announce(settings, store):
        yield
        return
    try:
        with _present(settings, store, RUNS, what) as lease:
            _wait_for_sweeps(settings, lease)
            yield
    finally:
        _withdraw(settings, store)


_held: set[tuple[Path, str]] = set()
_guard = threading.Lock()


def _announce(settings: Settings, store: Store) -> bool:
    with _guard:
        is_first = (settings.home, store.uri) not in _held
        _held.add((settings.home, store.uri))
        return is_first


def _withdraw(settings: Settings, store: Store) -> None:
    with _guard:
        _held.discard((settings.home, store.uri))


class Sweep:
    """What gc may rely on while it holds a store.

    Attributes:
        here: runs of this home.
        all: these and runs of other homes and machines on the same store.
    """

    def __init__(self, here: list[Use], elsewhere: list[Use], lease: Lease | None) -> None:
        self.here, self.all = here, [*here, *elsewhere]
        self._lease = lease

    def require_hold(self) -> None:
        """Raise unless a run that starts now still sees gc.

        Raises:
            StorageError: the store has not answered for a while, so that runs may have begun.
        """
        if self._lease is not None and not self._lease.is_fresh:
            raise StorageError(
                "the store did not answer for a while, and runs may have begun meanwhile",
                where="gc",
                remedy="give the same command again; nothing that was left is half removed",
            )


@contextmanager
def sweeping(settings: Settings, store: Store, *, hold: bool) -> Iterator[Sweep]:
    """Find out who uses ``store``; with ``hold`` runs that start wait until the block ends.

    Raises:
        StorageError: the lock file or the lease cannot be written.
    """
    # Where there is neither a home nor a store nobody runs; what is only looked at stays as it is.
    is_there = settings.home.is_dir() or not store.folder.is_local
    if not hold or not (is_there or Path(store.folder.root).is_dir()):
        yield Sweep(_local(settings, RUNS), _live(store.folder, RUNS, time.time()), None)
        return
    with _present(settings, store, SWEEPS, "gc") as lease:
        here, others = _local(settings, RUNS), lease.others(RUNS)
        known = {(use.what, use.host) for use in here}
        yield Sweep(here, [use for use in others if (use.what, use.host) not in known], lease)
        lease.remove_expired()


@contextmanager
def _present(settings: Settings, store: Store, kind: str, what: str) -> Iterator[Lease]:
    # A name of its own: a file that is there and free is of a holder that died.
    lock = settings.home / "locks" / kind / f"{what}.{os.getpid()}.{uuid.uuid4().hex[:12]}"
    with exclusive(lock), Lease(store.folder, kind, what, lock) as lease:
        yield lease


def _local(settings: Settings, kind: str) -> list[Use]:
    found = []
    for lock in sorted((settings.home / "locks" / kind).glob("*")):
        with suppress(FileNotFoundError):
            since = lock.stat().st_mtime
            if is_held(lock):
                found.append(Use(lock.name.split(".")[0], socket.gethostname(), since))
    return found


def _wait_for_sweeps(settings: Settings, lease: Lease) -> None:
    """Return when no gc is at work; those that begin later see this run."""
    told = False
    while sweeps := _local(settings, SWEEPS) or lease.others(SWEEPS):
        if not told:
            say(f"{sweeps[0]} frees disk; waiting for it")
            told = True
        time.sleep(LOOK_EVERY_S)


class Lease:
    """A refreshed object in a store, beside those of others; use as a context manager.

    Args:
        lock: lock file of the holder, by which its machine knows whether it lives.

    Raises:
        StorageError: the store cannot be written.
    """

    def __init__(self, folder: Folder, kind: str, what: str, lock: Path) -> None:
        self._folder, self._what, self._lock = folder, what, lock
        self._name = f"{LEASES}/{kind}-{uuid.uuid4().hex}.json"
        self._start, self._refreshed = time.monotonic(), 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Lease:
        self._refresh()
        self._thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._ended.set()
        self._thread.join()
        # It expires by itself; that must not hide why the block ended.
        with suppress(StorageError):
            self._folder.delete(self._name, once=True)

    @property
    def is_fresh(self) -> bool:
        """Whether others still see it, with time to spare."""
        return time.monotonic() - self._refreshed < EXPIRES_S / 2

    def others(self, kind: str) -> list[Use]:
        """Holders of live leases of ``kind``."""
        self._refresh()
        return _live(self._folder, kind, self._folder.times(LEASES).get(self._name, time.time()))

    def remove_expired(self) -> None:
        """Remove the leases of holders that ended without doing so."""
        times = self._folder.times(LEASES)
        for name, refreshed in times.items():
            if times.get(self._name, refreshed) - refreshed > EXPIRES_S:
                self._folder.delete(name)

    def _refresh(self, *, once: bool = False) -> None:
        now = time.monotonic()
        body = {
            "what": self._what,
            "host": socket.gethostname(),
            "lock": str(self._lock),
            "running_s": round(now - self._start, 1),
        }
        self._folder.put(self._name, json.dumps(body).encode(), replace=True, once=once)
        self._refreshed = now

    def _keep(self) -> None:
        while not self._ended.wait(REFRESH_S):
            # The next refresh comes in time if the store answers again; and who ends because it
            # is away waits for this one.
            with suppress(StorageError):
                self._refresh(once=True)


def _live(folder: Folder, kind: str, now: float) -> list[Use]:
    found = []
    for name, refreshed in folder.times(LEASES).items():
        if not name.startswith(f"{LEASES}/{kind}-") or now - refreshed > EXPIRES_S:
            continue
        data = folder.read(name)
        if data is None:
            continue
        try:
            body = json.loads(data)
            lock = Path(body["lock"])
            use = Use(str(body["what"]), str(body["host"]), refreshed - float(body["running_s"]))
        except (ValueError, KeyError, TypeError):
            # Of a program that writes another form: somebody is there all the same.
            found.append(Use("a run", "another machine", 0.0))
            continue
        # A lock file is removed by its holder alone: one that is there and free is of the dead.
        is_dead = use.host == socket.gethostname() and lock.exists() and not is_held(lock)
        if not is_dead:
            found.append(use)
    return found
