"""Runs stages of the recommend flow in forks of one process that has everything imported.

A fork starts within milliseconds, so that many runs fit into seconds and can be killed like any
other process; each has an environment, a home folder and a store of its own. Used by a test as
``ForkedRuns``; as a script it reads one JSON request a line from standard input.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from command_line import environment

HERE = Path(__file__).resolve().parent
READY_WITHIN_S = 120


@dataclass
class ForkedRun:
    """A run of one or more stages, or a reader.

    Attributes:
        output: what it says on standard error; ``.out`` beside it is its result.
        pid: of the fork.
    """

    output: Path
    pid: int

    @property
    def exit_code(self) -> int | None:
        file = self.output.with_suffix(".exit")
        return int(file.read_text()) if file.is_file() else None

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.exit_code) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {timeout:g} s: {self.said}")
            time.sleep(0.02)
        return code

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def result(self) -> Any:
        return json.loads(self.output.with_suffix(".out").read_text())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class ForkedRuns:
    """The process that forks; use as a context manager.

    Args:
        folder: for what the runs say.
        overrides: parameters, as ``stage.key=value``.
    """

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self._folder, self._overrides = folder, overrides
        # Several threads ask; each must read the answer to its own request.
        self._asking = threading.Lock()

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        started = environment(self._folder / "unused")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *self._overrides],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**started, "PYTHONPATH": os.pathsep.join([started["PYTHONPATH"], path])},
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self,
        home: Path,
        store: str,
        environment: dict[str, str],
        stages: Iterable[str],
        patience_s: float | None = None,
    ) -> ForkedRun:
        """Run stages one after the other, as `reelflow stage` does.

        Args:
            patience_s: how long a storage operation is tried again; None for as long as for a user.
        """
        return self._fork(
            home=str(home),
            store=store,
            environment=environment,
            stages=list(stages),
            patience_s=patience_s,
        )

    def read(self, uri: str, environment: dict[str, str], stop: Path) -> ForkedRun:
        """Read all that is published, again and again, until there is a file ``stop``."""
        return self._fork(store=uri, environment=environment, stop=str(stop))

    def _fork(self, **request: Any) -> ForkedRun:
        output = self._folder / f"{uuid4().hex}.err"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(json.dumps({**request, "output": str(output)}) + "\n")
            self._process.stdin.flush()
            return ForkedRun(output, int(self._process.stdout.readline()))


def serve(overrides: list[str]) -> None:
    """The process that forks."""
    import boto3.s3.transfer
    import great_expectations
    import pandas
    import psutil
    import pyarrow.fs
    import pyarrow.parquet

    from components.pipeline.params import load_params
    from components.pipeline.stage import load_registry

    del boto3, great_expectations, pandas, psutil, pyarrow
    params = load_params(load_registry(), overrides=overrides)
    # Forks leave by themselves; nobody waits for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _in_fork(request, params)


def _in_fork(request: dict[str, Any], params: dict[str, Any]) -> None:
    output = Path(request["output"])
    said = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    code = 1
    try:
        os.environ.update(request["environment"])
        if "stop" in request:
            result = _read(request["store"], Path(request["stop"]))
        else:
            result = _run(request, params)
        output.with_suffix(".out").write_text(json.dumps(result))
        code = 0
    except BaseException as error:
        code = _explain(error)
    finally:
        sys.stderr.flush()
        unfinished = output.with_suffix(".exiting")
        unfinished.write_text(str(code))
        unfinished.replace(output.with_suffix(".exit"))
        os._exit(code)


def _explain(error: BaseException) -> int:
    """As the command line does it."""
    from components.pipeline.errors import ReelflowError

    if isinstance(error, ReelflowError):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sys.excepthook(type(error), error, error.__traceback__)
    return 1


def _run(request: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    from components.pipeline import s3
    from components.pipeline.runner import Runner, open_store
    from components.pipeline.settings import Settings
    from components.pipeline.stage import REGISTRY

    if request["patience_s"] is not None:
        s3.PATIENCE_S = request["patience_s"]
    home = Path(request["home"])
    settings = Settings(home, request["store"], f"sqlite:///{home / 'mlflow.db'}", None, None)
    runner = Runner(settings, open_store(settings), params)
    executed = []
    for name in request["stages"]:
        _, cached = runner.execute(REGISTRY[name])
        executed += [] if cached else [name]
    digests = {
        f"{name}/{output}": record["digest"]
        for name in request["stages"]
        for output, record in runner.done[name].body["outputs"].items()
    }
    return {"executed": executed, "digests": digests}


def _read(uri: str, stop: Path) -> dict[str, Any]:
    """Plain boto3, hashlib and json: the reader shares no code with what it checks.

    Torn is a manifest that is there and a file that is not what it says. A file that is gone with
    its manifest was lost, or removed.
    """
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client, parent = boto3.client("s3"), os.getppid()
    seen: dict[str, Any] = {"manifests": 0, "files": 0, "torn": []}

    def get(key: str) -> bytes | None:
        """None if there is no such object; asks until it is told."""
        while True:
            try:
                return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
            except ClientError as error:
                if error.response["Error"]["Code"] in ("NoSuchKey", "NoSuchBucket"):
                    return None
            except (BotoCoreError, Boto3Error, HTTPError):
                pass
            if stop.exists() or os.getppid() != parent:
                raise InterruptedError

    def check(key: str) -> None:
        manifest = get(key)
        if manifest is None:
            return
        body = json.loads(manifest)["body"]
        seen["manifests"] += 1
        for record in body["outputs"].values():
            for file in record["files"]:
                data = get(f"{prefix}/{record['path']}/{file['name']}")
                if data is not None and hashlib.sha256(data).hexdigest() == file["sha256"]:
                    seen["files"] += 1
                elif get(key) == manifest:
                    seen["torn"].append(f"{key}: {file['name']}")

    last = False
    while not last and os.getppid() == parent:
        # The pass that begins when all is over sees all.
        last = stop.exists()
        try:
            listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/manifests/")
            for entry in listed.get("Contents", []):
                check(entry["Key"])
        except (BotoCoreError, ClientError, HTTPError, InterruptedError):
            pass
        except ValueError as error:
            seen["torn"].append(str(error))
        time.sleep(1)
    return seen


if __name__ == "__main__":
    serve(sys.argv[1:])
