"""An S3 server in a process of its own that fails on demand, can be killed, and comes back.

moto speaks the protocol; this adds what goes wrong with real servers: refusals, stalls, bodies that
break off, connections that are reset, outages. Faults strike at random, by a seed. Every change is
in a journal on the disk before it is answered, so that a server killed at any instant comes back
with all it ever confirmed; uploads in parts that were not ended are forgotten. Changes take turns,
which makes conditional puts atomic.

Use it from a test as ``FaultyS3``, or alone:

    python tests/faulty_s3.py --port 9000 --journal /tmp/s3.journal
    curl -d '{"refuse": 0.3}' localhost:9000/_faults

The server of ``real_services.py`` lives in the test's own process and fails request by request as
the test says; take that one to test a single operation, and this one for whole runs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

CONTROL = "/_faults"
CHANGES = ("PUT", "POST", "DELETE")
READY_WITHIN_S = 60


@dataclass
class Faults:
    """What goes wrong. The first five are shares of the requests, from 0 to 1.

    Attributes:
        refuse: answered 503 SlowDown.
        stall: answered ``stall_s`` seconds late.
        truncate: the body ends at a half of its length.
        reset: the connection is reset before an answer; the request may have been carried out.
        reset_within: the connection is reset in the middle of the body.
        stall_s: how long a stall is.
        outage_s: every request is reset from now on for so many seconds.
        seed: of the choice.
    """

    refuse: float = 0.0
    stall: float = 0.0
    truncate: float = 0.0
    reset: float = 0.0
    reset_within: float = 0.0
    stall_s: float = 2.0
    outage_s: float = 0.0
    seed: int = 0


class Server:
    """The WSGI application.

    Args:
        journal: file of all changes; replayed at the start.
    """

    def __init__(self, journal: Path) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._changes = threading.Lock()
        self._dice = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._set(Faults())
        self._journal = self._replay(journal)

    def _set(self, faults: Faults) -> None:
        with self._dice:
            self._faults, self._random = faults, random.Random(faults.seed)
            self._down_until = time.monotonic() + faults.outage_s

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == CONTROL:
            return self._control(environ, start)
        fault = self._draw()
        connection = environ["werkzeug.socket"]
        if fault == "outage":
            _reset(connection)
        if fault == "refuse":
            _body(environ)
            text = b"<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"
            start("503 Slow Down", [("Content-Length", str(len(text)))])
            return [text]
        if fault == "stall":
            time.sleep(self._faults.stall_s)
        if fault == "reset" and self._random.random() < 0.5:
            _reset(connection)
        status, headers, body = self._answer(environ)
        if fault == "reset":
            _reset(connection)
        write = start(status, headers)
        if environ["REQUEST_METHOD"] == "HEAD" or not body:
            return [body]
        if fault == "truncate":
            return [body[: len(body) // 2]]
        if fault == "reset_within":
            write(body[: len(body) // 2])
            # What was written must have left before the reset throws it away.
            time.sleep(0.02)
            _reset(connection)
        return [body]

    def _draw(self) -> str | None:
        """Which fault strikes this request."""
        with self._dice:
            self._counts["requests"] += 1
            if time.monotonic() < self._down_until:
                self._counts["outage"] += 1
                return "outage"
            share = self._random.random()
            for kind in ("refuse", "stall", "truncate", "reset", "reset_within"):
                share -= getattr(self._faults, kind)
                if share < 0:
                    self._counts[kind] += 1
                    return kind
        return None

    def _answer(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        if environ["REQUEST_METHOD"] not in CHANGES:
            return self._ask(environ)
        sent = _body(environ)
        with self._changes:
            answer = self._ask(environ)
            if answer[0].startswith("2"):
                self._note(environ, sent)
        return answer

    def _ask(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        said: list[Any] = []
        parts = self._app(environ, lambda status, headers, *_: said.extend((status, headers)))
        body = b"".join(parts)
        # moto answers some requests in chunks; here every answer says how long it is.
        headers = [(k, v) for k, v in said[1] if k.lower() != "transfer-encoding"]
        if environ["REQUEST_METHOD"] != "HEAD":
            headers = [(k, v) for k, v in headers if k.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        return said[0], headers, body

    def _note(self, environ: dict[str, Any], sent: bytes) -> None:
        """Append a change to the journal, on the disk when this returns."""
        query = environ.get("QUERY_STRING", "")
        path = environ["RAW_URI"].partition("?")[0]
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith("HTTP_") or name == "CONTENT_TYPE"
        }
        method = environ["REQUEST_METHOD"]
        if "uploadId=" in query or query.startswith("uploads"):
            if method != "POST" or "uploadId=" not in query:
                return
            # Parts are not in the journal; what became of them is.
            method, query, headers = "PUT", "", {}
            sent = self._ask(_environ("GET", path, "", {"host": environ["HTTP_HOST"]}, b""))[2]
        # A condition held when it was met.
        headers.pop("if-none-match", None)
        entry = [method, path, query, headers, base64.b64encode(sent).decode()]
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _replay(self, journal: Path) -> BinaryIO:
        journal.touch()
        file = journal.open("r+b")
        whole = 0
        for line in file:
            if not line.endswith(b"\n"):
                # The process died while it wrote; nobody was told of this change.
                break
            whole += len(line)
            method, path, query, headers, body = json.loads(line)
            self._ask(_environ(method, path, query, headers, base64.b64decode(body)))
        file.truncate(whole)
        file.seek(whole)
        return file

    def _control(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            self._set(Faults(**json.loads(_body(environ))))
        with self._dice:
            text = json.dumps({"faults": asdict(self._faults), "counts": self._counts}).encode()
        start("200 OK", [("Content-Length", str(len(text)))])
        return [text]


def _body(environ: dict[str, Any]) -> bytes:
    """The body of a request, which stays readable for the next reader."""
    data = bytes(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
    environ["wsgi.input"] = BytesIO(data)
    return data


def _environ(
    method: str, path: str, query: str, headers: dict[str, str], body: bytes
) -> dict[str, Any]:
    from werkzeug.test import EnvironBuilder

    headers = {k: v for k, v in headers.items() if k not in ("content-length", "expect")}
    url = f"http://{headers.get('host', 'localhost')}{path}"
    builder = EnvironBuilder(
        path=url, method=method, query_string=query, headers=headers, data=body or None
    )
    return builder.get_environ()


def _reset(connection: socket.socket) -> None:
    """End the connection with RST, not FIN, and give the request up."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # Files made from the socket would keep it open.
    os.close(connection.detach())
    raise ConnectionResetError


class FaultyS3:
    """The server as a test sees it; use as a context manager.

    Args:
        folder: for its journal and its log.

    Attributes:
        endpoint: its address, the same after a restart.
    """

    def __init__(self, folder: Path) -> None:
        self._journal, self._log = folder / "s3.journal", folder / "s3.log"
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def environment(self) -> dict[str, str]:
        """What leads a program to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def client(self) -> Any:
        """boto3 for this server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def make_bucket(self, name: str) -> str:
        """The URI of a new bucket."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def fail(self, **faults: float) -> None:
        """From now on these faults and no others; see ``Faults``."""
        request = urllib.request.Request(self.endpoint + CONTROL, json.dumps(faults).encode())
        urllib.request.urlopen(request, timeout=READY_WITHIN_S).close()

    def counts(self) -> dict[str, int]:
        """Requests, and those that each fault struck, since the server started."""
        with urllib.request.urlopen(self.endpoint + CONTROL, timeout=READY_WITHIN_S) as answer:
            return dict(json.load(answer)["counts"])

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self, *, empty: bool = False) -> None:
        """Start it, anew if it runs: with all it confirmed, or without anything."""
        self.kill()
        if empty:
            self._journal.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--port", str(self._port), "--owner", str(os.getpid())]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--journal", str(self._journal)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                self.counts()
                return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, "the S3 server does not start"
                time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description="An S3 server that fails on demand.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--owner", type=int, help="a parent whose end is this server's end")
    for field in fields(Faults):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    given = vars(parser.parse_args())
    port, journal, owner = (given.pop(name) for name in ("port", "journal", "owner"))

    import logging

    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        def handle(self) -> None:
            # Of a connection that was reset there is nothing left to read.
            with contextlib.suppress(OSError):
                super().handle()

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server(journal)
    server._set(Faults(**given))
    if owner is not None:
        threading.Thread(target=end_with, args=(owner,), daemon=True).start()
    make_server("127.0.0.1", port, server, threaded=True, request_handler=Handler).serve_forever()


def end_with(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    main()
