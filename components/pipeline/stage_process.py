"""Each stage of a flow runs in a process of its own, which can be ended whatever it does.

Native code cannot be interrupted from within. In a process of its own a stage that hangs is ended
when its time is over, one that runs out of memory or crashes takes nothing with it, and either is
run again from its last checkpoint by a flow that is still there.

A *nursery* process imports what stages need, once, and forks for each stage. It ends with the
flow, however that ends, and a stage ends with the nursery. Started as a program, this module is
the nursery.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from components.pipeline import sigterm
from components.pipeline.errors import (
    ReelflowError,
    StageDied,
    StageError,
    StageTimeout,
)
from components.pipeline.manifest import Manifest
from components.pipeline.run import Sink
from components.pipeline.runner import Runner, code_in_force, open_store
from components.pipeline.servers import die_with_parent
from components.pipeline.settings import Settings
from components.pipeline.stage import REGISTRY, Stage

ROOT = Path(__file__).resolve().parent.parent.parent
#: What most stages import; while the first ones work, the nursery gets it ready for the next.
#: The first step of an optimiser imports ``torch._dynamo``, which takes seconds.
READY = ("pyarrow.parquet", "psutil", "pandas", "torch", "torch._dynamo")
ENDS_WITHIN_S = 20.0
STATUS = struct.Struct("i")


class StageTraceback(Exception):
    """The traceback of an exception that was raised in the process of a stage, as text."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclass(frozen=True)
class Request:
    """What a stage's process has to know; see ``Runner`` and ``Identity``.

    Attributes:
        params: by stage, as JSON values.
        done: bodies of the manifests above the stage.
        key: the key that the flow expects: this process must run the same code.
        environment: variables that are set for this stage.
    """

    settings: Settings
    params: dict[str, Any]
    done: dict[str, dict[str, Any]]
    stage: str
    key: str
    force: bool
    environment: dict[str, str]


class StageProcesses:
    """Runs the stages of one flow, one after the other; use as a context manager."""

    def __init__(self) -> None:
        self._nursery: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StageProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def get_ready(self) -> None:
        """Start the nursery, which imports meanwhile; it is started when needed in any case."""
        if self._nursery is not None:
            return
        self._control, theirs = socket.socketpair()
        # The nursery imports modules from where this process does, and this code above all.
        known = [str(ROOT), *(path or str(Path.cwd()) for path in sys.path)]
        paths = os.pathsep.join(dict.fromkeys(known))
        self._nursery = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), *_stage_modules()],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()

    def _stop(self) -> None:
        if self._nursery is None:
            return
        # Without a flow at the other end it ends by itself, with whatever runs below it; but it may
        # be importing what nobody will need.
        self._control.close()
        self._nursery.kill()
        self._nursery.wait()
        self._nursery = None

    def execute(
        self,
        runner: Runner,
        stage: Stage,
        *,
        force: bool,
        sinks: tuple[Sink, ...],
        limit_s: float,
        environment: Mapping[str, str],
    ) -> tuple[Manifest, bool]:
        """As ``Runner.execute``, in a process of its own.

        Args:
            limit_s: seconds it may take; then it is ended with all it started.
            environment: variables that are set for this stage.

        Raises:
            ReelflowError: as the stage raised it.
            StageTimeout: it took longer than ``limit_s``.
            StageDied: its process was ended from outside, or crashed.
        """
        request = Request(
            settings=runner.settings,
            params={n: p.model_dump(mode="json") for n, p in runner.params.items()},
            done={name: manifest.body for name, manifest in runner.done.items()},
            stage=stage.name,
            key=runner.identify(stage).key,
            force=force,
            environment=dict(environment),
        )
        self.get_ready()
        body, cached = self._converse(request, sinks, limit_s)
        manifest = Manifest(body)
        runner.done[stage.name] = manifest
        return manifest, cached

    def _converse(
        self, request: Request, sinks: tuple[Sink, ...], limit_s: float
    ) -> tuple[dict[str, Any], bool]:
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [b"."], [theirs.fileno()])
        except OSError:
            ours.close()
            raise self._lost(request.stage) from None
        finally:
            theirs.close()
        deadline = time.monotonic() + limit_s
        process: int | None = None
        result: tuple[str, Any] | None = None
        with Connection(ours.detach()) as connection:
            try:
                connection.send(request)
                while result is None:
                    # The clock first: one that never stops talking is ended as well.
                    left = deadline - time.monotonic()
                    if left <= 0 or not connection.poll(left):
                        raise StageTimeout(
                            f"took longer than {_duration(limit_s)} and was ended",
                            where=f"stage '{request.stage}'",
                            remedy="the same command goes on from its last checkpoint; give it "
                            "more time (--timeout MINUTES) or less to do",
                        )
                    what, value = connection.recv()
                    if what == "started":
                        process = value
                    elif what == "tell":
                        for sink in sinks:
                            getattr(sink, value[0])(*value[1:])
                    else:
                        result = (what, value)
            except (EOFError, ConnectionError, pickle.UnpicklingError):
                raise self._died(request.stage) from None
            except BaseException:
                self._end(process)
                raise
        if self._status(ENDS_WITHIN_S) is None:
            # It has said all it had to say and does not end.
            self._end(process)
        what, value = result
        if what == "failed":
            error, said = value
            if said:
                raise error from StageTraceback(said)
            raise error
        body, cached = value
        return body, cached

    def _end(self, process: int | None) -> None:
        """End the stage's process, tidily if it can, and all that it started."""
        import psutil

        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [psutil.Process(process)]
            tree += tree[0].children(recursive=True)
            tree[0].terminate()
            _, alive = psutil.wait_procs(tree[:1], ENDS_WITHIN_S)
            for one in (*alive, *tree[1:]):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self._status(ENDS_WITHIN_S)

    def _status(self, within_s: float) -> int | None:
        """The exit status of the stage's process, as ``waitpid`` gives it; None: not ended yet."""
        ready, _, _ = select.select([self._control], [], [], within_s)
        if not ready:
            return None
        try:
            said = self._control.recv(STATUS.size)
        except OSError:
            return None
        return int(STATUS.unpack(said)[0]) if len(said) == STATUS.size else None

    def _died(self, stage: str) -> StageDied:
        status = self._status(ENDS_WITHIN_S)
        if status is None:
            return self._lost(stage)
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return StageDied(
            f"its process {how}",
            where=f"stage '{stage}'",
            remedy="if memory ran out, choose a smaller size (--profile laptop); the same command "
            "goes on from the last checkpoint",
        )

    def _lost(self, stage: str) -> StageDied:
        # Another one serves the next attempt.
        self._stop()
        return StageDied(
            "its process was lost together with the one that starts the stages",
            where=f"stage '{stage}'",
            remedy="the same command goes on from the last checkpoint",
        )


def _stage_modules() -> list[str]:
    return sorted({stage.module for stage in REGISTRY.values()})


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


# In the nursery.


def main(descriptor: int, modules: list[str]) -> None:
    """Fork for every request that comes, until the flow is gone.

    Args:
        descriptor: of the socket to the flow.
        modules: where the stages are defined.
    """
    control = socket.socket(fileno=descriptor)
    # What a terminal or a scheduler sends to the whole group is for the flow to answer.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for module in modules:
        importlib.import_module(module)
        code_in_force(module)
    waiting = list(READY)
    while True:
        if waiting and not select.select([control], [], [], 0)[0]:
            importlib.import_module(waiting.pop(0))
            continue
        said, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not said:
            return
        child = os.fork()
        if child == 0:
            control.close()
            # Leave as a program does that was started for this alone.
            return _be_a_stage(Connection(descriptors[0]))
        os.close(descriptors[0])
        ended = os.pidfd_open(child)
        events = [control.fileno(), ended]
        while waiting and not select.select(events, [], [], 0)[0]:
            importlib.import_module(waiting.pop(0))
        if ended not in select.select(events, [], [])[0]:
            # Nothing is asked while a stage runs: the flow is gone.
            os.kill(child, signal.SIGKILL)
        os.close(ended)
        _, status = os.waitpid(child, 0)
        try:
            control.send(STATUS.pack(status))
        except OSError:
            return


class _Wire:
    """A sink that passes on to the flow; any thread may tell."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def send(self, what: str, value: Any) -> None:
        with self._lock:
            self._connection.send((what, value))

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        self.send("tell", ("log", dict(metrics), step))

    def figure(self, name: str, png: bytes) -> None:
        self.send("tell", ("figure", name, png))

    def note(self, text: str) -> None:
        self.send("tell", ("note", text))

    def progress(self, label: str, done: float | None, total: float) -> None:
        self.send("tell", ("progress", label, done, total))


def _be_a_stage(connection: Connection) -> None:
    # A terminal's Ctrl-C goes to the flow, which then ends this process by SIGTERM.
    os.setsid()
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wire = _Wire(connection)
    wire.send("started", os.getpid())
    try:
        with sigterm.as_interrupt():
            manifest, cached = _execute(connection.recv(), wire)
            wire.send("done", (manifest.body, cached))
    except KeyboardInterrupt:
        sys.exit(sigterm.INTERRUPTED)
    except Exception as error:
        wire.send("failed", _portable(error))


def _execute(request: Request, wire: _Wire) -> tuple[Manifest, bool]:
    os.environ.update(request.environment)
    params = {
        name: REGISTRY[name].params.model_validate(section)
        for name, section in request.params.items()
    }
    runner = Runner(request.settings, open_store(request.settings), params)
    runner.done.update({name: Manifest(body) for name, body in request.done.items()})
    stage = REGISTRY[request.stage]
    if runner.identify(stage).key != request.key:
        raise StageError(
            f"the code or the outside data of '{stage.name}' changed while the flow ran",
            remedy="give the same command again; what is published is not run again",
        )
    return runner.execute(stage, force=request.force, sinks=(wire,))


def _portable(error: Exception) -> tuple[Exception, str]:
    """The error as another process can raise it, and the traceback of what caused it."""
    cause = error.__cause__ if isinstance(error, ReelflowError) else error
    said = "".join(traceback.format_exception(cause)) if cause is not None else ""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = StageError(f"{type(error).__name__}: {error}")
    return error, said


if __name__ == "__main__":
    # By its own name, so that what is pickled here and in the flow is of one module.
    importlib.import_module("components.pipeline.stage_process").main(
        int(sys.argv[1]), sys.argv[2:]
    )
