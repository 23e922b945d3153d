"""What tests of the pipeline share: tiny stages, an S3 server, a database for MLflow."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_stages import Tiny, tiny_registry

from components.pipeline.settings import Settings

LOCAL = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    """Three tiny stages and nothing else in the registry."""
    with tiny_registry() as stages:
        yield stages


class S3Server:
    """A real S3 protocol server (moto) that can be told to fail.

    Attributes:
        fail_every: every n-th request is answered 503 SlowDown; 0 for none.
        down: every request is answered 503.
        fail_once_after_put: the next conditional put is stored, but its answer is lost.
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
        self.slow_down_s = 0.0
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
            if not self.fail_once_after_put:
                return list(self._app(environ, start))
            self.fail_once_after_put = False
            list(self._app(environ, lambda *ignored: None))
            return _slow_down(start)


def _slow_down(start: Any) -> list[bytes]:
    body = (
        b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    )
    start("503 Slow Down", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
    return [body]


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The S3 server, addressed by the environment, with a new bucket at `s3.uri`."""
    import boto3

    _s3_server.reset()
    for name, value in {**LOCAL, "AWS_ENDPOINT_URL": _s3_server.endpoint}.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=_s3_server.endpoint).create_bucket(Bucket=bucket)
    _s3_server.uri = f"s3://{bucket}/a store"
    yield _s3_server
    _s3_server.reset()


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


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> NewDatabase:
    """Made once: the migrations of MLflow take seconds."""
    home = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{home / 'mlflow.db'}"
    other = subprocess.Popen(
        [sys.executable, "-c", CONNECT, str(home), uri], stderr=subprocess.PIPE, text=True
    )
    from components.pipeline.tracking import connect

    connect(Settings(home, "", uri, None, None), "tiny")
    _, said = other.communicate(timeout=120)
    return NewDatabase(home / "mlflow.db", other.returncode, said)
