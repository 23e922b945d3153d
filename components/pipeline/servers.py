"""Servers that a program starts for itself: child processes that end with it, however it ends."""

from __future__ import annotations

import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from components.pipeline.errors import StorageError

HOST = "127.0.0.1"
ENDS_WITHIN_S = 15.0
POLL_S = 0.1
LOG_LINES_SHOWN = 15
LOG_BYTES_SHOWN = 16 * 1024
#: Where in a server's code an error came up; the error itself stands on a line of its own.
FRAME = (
    r"    |\s*File \"|.*Traceback \(most recent call last\)|The above exception|During handling of"
)

# From linux/prctl.h.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Server:
    """A process that was started here, in a session of its own, and what it says.

    Attributes:
        log: file that receives its output.
        place: what an error names as the place.
        remedy: what an error advises.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    place: str
    remedy: str = "reelflow doctor looks for the usual causes"

    def check(self) -> None:
        """Raise if it ended by itself.

        Raises:
            StorageError: with the end of its log.
        """
        code = self.process.poll()
        if code is not None:
            raise self.failed(f"{self.name} ended with code {code}")

    def failed(self, what: str) -> StorageError:
        """The error that it does not work, with its last words."""
        said = "".join(f"\n    {line}" for line in self.last_lines())
        return StorageError(
            what + (f":{said}" if said else ""), where=self.place, remedy=self.remedy
        )

    def last_lines(self) -> list[str]:
        """The end of what it said so far, without the frames of tracebacks."""
        # Without moving the position: the process writes at the same one.
        size = os.fstat(self.log.fileno()).st_size
        end = os.pread(self.log.fileno(), LOG_BYTES_SHOWN, max(0, size - LOG_BYTES_SHOWN))
        lines = [line for line in end.decode(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if not re.match(FRAME, line)]
        return (said or lines)[-LOG_LINES_SHOWN:]

    def end(self) -> None:
        """Tell it to end; kill it if it does not in time."""
        self.process.terminate()
        try:
            self.process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def start_server(
    name: str,
    command: list[str],
    environment: Mapping[str, str],
    log: Path | None = None,
) -> Server:
    """Start ``command``; call from the main thread, whose end would end the server.

    Args:
        environment: on top of this process's own.
        log: file for its output; None for one that nobody sees and that goes with the server.
    """
    file = tempfile.TemporaryFile() if log is None else log.open("w+b")  # noqa: SIM115
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        # Ctrl-C must reach this process alone, which then ends the others in order.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    return Server(name, process, file, str(log or HOST))


def wait_for_answers(
    urls: Mapping[str, str],
    check: Callable[[], None],
    failed: Callable[[str], Exception],
    within_s: float,
    expected: bytes = b"",
) -> None:
    """Until every address answers with ``expected`` in its answer.

    Args:
        urls: address by name.
        check: raises if a server ended.
        failed: makes the error of one that does not answer in time.
    """
    deadline = time.monotonic() + within_s
    missing = dict(urls)
    while missing:
        check()
        for name, url in list(missing.items()):
            answer = _get(url)
            if answer is not None and expected in answer:
                del missing[name]
        if missing and time.monotonic() > deadline:
            raise failed(f"{', '.join(missing)} did not answer within {within_s:.0f} s")
        if missing:
            time.sleep(POLL_S)


def _get(url: str) -> bytes | None:
    try:
        with open_directly(urllib.request.Request(url)) as answer:
            return bytes(answer.read())
    except OSError:
        return None


def open_directly(request: urllib.request.Request, timeout_s: float = 5) -> Any:
    """The answer of a server of ours: no proxy of the environment may stand in between.

    Raises:
        OSError: it does not answer, or not as a server of the web does.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(request, timeout=timeout_s)
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def free_port(wanted: int = 0) -> int:
    """``wanted`` if nobody listens there, else any free port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((HOST, port))
                return int(probe.getsockname()[1])
    raise StorageError("there is no free port", where=HOST)


def claim_port(wanted: int) -> int:
    """A free port, ``wanted`` if it can be, that nobody else claims while this process lives.

    A server takes seconds from its start until it listens.
    """
    port = free_port(wanted)
    while sys.platform == "linux":
        # A name that is gone with the process, however it ends.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0reelflow port {port}")
        except OSError:
            claim.close()
            port = free_port()
        else:
            _CLAIMS.append(claim)
            break
    return port


def adopt_orphans() -> None:
    """Orphans of our children become our children, so that none is lost."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """In a child: receive this signal when the parent ends, even in a way it cannot handle."""
    _prctl(PR_SET_PDEATHSIG, number)


def end_soon_after(parent: int, within_s: float = ENDS_WITHIN_S) -> None:
    """In a child that may wait for a server that died with its parent: end it and all below it.

    Args:
        parent: number of the process after whose end this one has ``within_s`` left.
    """

    def watch() -> None:
        import psutil

        while os.getppid() == parent:
            time.sleep(POLL_S)
        time.sleep(within_s)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _LIBC.prctl(option, value, 0, 0, 0)


_LIBC = ctypes.CDLL(None)
_CLAIMS: list[socket.socket] = []
