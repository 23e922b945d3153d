"""Real services for tests of the pipeline: an S3 server that fails on demand, MLflow's database."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.pipeline.settings import Settings


class S3Server:
    """A real S3 protocol server (moto) that can be told to fail.

    Attributes:
        fail_every: every n-th request is answered 503 SlowDown; 0 for none.
        down: every request is answered 503.
        fail_once_after_put: the next conditional put is stored, but its answer is lost.
        conflicts: how many of the next conditional puts are told to try again.
        requests: method and path of every request.
        uri: a folder in a bucket of its own for each test.
    """

    uri: str

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.requests: list[str] = []
        self.reset()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.fail_every, self.down, self.fail_once_after_put = 0, False, False
        self.slow_down_s, self.conflicts = 0.0, 0
        self.requests.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        time.sleep(self.slow_down_s)
        number = len(self.requests)
        if self.down or (self.fail_every and number % self.fail_every == 0):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _slow_down(start)
        if not environ.get("HTTP_IF_NONE_MATCH"):
            return self._app(environ, start)
        # S3 promises that conditional puts take turns; the test server needs to be told.
        with self._lock:
            if self.conflicts:
                self.conflicts -= 1
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return _refuse(start, "409 Conflict", "ConditionalRequestConflict")
            if not self.fail_once_after_put:
                return list(self._app(environ, start))
            self.fail_once_after_put = False
            list(self._app(environ, lambda *ignored: None))
            return _slow_down(start)


def _slow_down(start: Any) -> list[bytes]:
    return _refuse(start, "503 Slow Down", "SlowDown")


def _refuse(start: Any, status: str, code: str) -> list[bytes]:
    body = f"<Error><Code>{code}</Code><Message>Try again later.</Message></Error>".encode()
    start(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
    return [body]


CONNECT = """
import sys
from pathlib import Path
from components.pipeline.settings import Settings
from components.pipeline.tracking import connect
connect(Settings(Path(sys.argv[1]), "", sys.argv[2], None, None), "tiny")
"""


@dataclass
class NewDatabase:
    """A database that met two processes at once when it was new, and what the other one said."""

    file: Path
    exit_code: int
    said: str


def migrated_database(home: Path) -> NewDatabase:
    """Let two processes connect to a new database in ``home`` at the same time."""
    uri = f"sqlite:///{home / 'mlflow.db'}"
    other = subprocess.Popen(
        [sys.executable, "-c", CONNECT, str(home), uri], stderr=subprocess.PIPE, text=True
    )
    from components.pipeline.tracking import connect

    connect(Settings(home, "", uri, None, None), "tiny")
    _, said = other.communicate(timeout=120)
    return NewDatabase(home / "mlflow.db", other.returncode, said)
