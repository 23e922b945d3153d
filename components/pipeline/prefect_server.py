"""The Prefect server of one ``reelflow run``, where no address of another is given.

Prefect would start one itself, but that one outlives a run that is killed, and a run whose server
cannot start waits for it for ever.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.pipeline.errors import StorageError
from components.pipeline.servers import HOST, Server, free_port, start_server, wait_for_answers
from components.pipeline.settings import Settings
from components.pipeline.storage import exclusive

READY_WITHIN_S = 120.0
RESTARTS = 3

#: As Prefect starts its own: no pages, no scheduler.
EPHEMERAL = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    # Nobody sees what it says unless it fails.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
}


@contextmanager
def prefect_server(settings: Settings) -> Iterator[None]:
    """Start a server for this process; it answers when the block has ended.

    The block is for what can be done meanwhile: importing Prefect takes as long. The server ends
    after everything else of this process, because Prefect tells it until then what happened.

    Raises:
        StorageError: its folder cannot be made, it ends by itself, or it does not answer in
            time; bears its last lines.
    """
    try:
        # Prefect makes its own folder when it is imported, but not the folders above it.
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the folder: {error.strerror}",
            where=str(settings.home),
            remedy="check the rights and the free space, or give REELFLOW_HOME another folder",
        ) from error
    if settings.prefect_api:
        yield
        return
    # Two servers that meet a new database would both create its tables.
    with exclusive(settings.home / "locks" / "prefect"):
        port = free_port()
        api = f"http://{HOST}:{port}/api"
        kept = _Kept(port, os.environ.get("PREFECT_HOME", str(settings.home / "prefect")))
        # First to be registered, last to be called.
        atexit.register(kept.end)
        os.environ["PREFECT_API_URL"] = api
        yield
        server = kept.server
        answers = {server.name: f"{api}/health"}
        wait_for_answers(answers, server.check, server.failed, READY_WITHIN_S)
        kept.watch()


class _Kept:
    """The server; one that dies later is started again, so that the run can tell it the rest."""

    def __init__(self, port: int, folder: str) -> None:
        self._port, self._folder = port, folder
        self._ending = threading.Event()
        self.server = self._start()

    def _start(self) -> Server:
        server = start_server("the Prefect server", command(self._port), EPHEMERAL)
        server.place = self._folder
        server.remedy = (
            "check the rights and the free space of that folder; a damaged prefect.db in it may be "
            "moved away (it holds the history of runs, no results); or give PREFECT_API_URL the "
            "address of another server"
        )
        return server

    def watch(self) -> None:
        threading.Thread(target=self._restart, daemon=True).start()

    def _restart(self) -> None:
        for _ in range(RESTARTS):
            self.server.process.wait()
            if self._ending.is_set():
                return
            self.server = self._start()

    def end(self) -> None:
        self._ending.set()
        self.server.end()


def command(port: int) -> list[str]:
    """What starts Prefect's server on that port of this machine."""
    # Only the packages are looked into for modules, not the folder it is started in.
    here = str(Path(__file__).resolve().parent.parent.parent)
    started = [sys.executable, "-P", "-m", "uvicorn", "--app-dir", here, "--factory"]
    started += ["components.pipeline.prefect_app:create_app", "--host", HOST, "--port", str(port)]
    return [*started, "--log-level", "error", "--lifespan", "on"]
