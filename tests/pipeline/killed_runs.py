"""Runs a tiny stage in child processes and kills them at given instants; a script of its own.

Usage: python killed_runs.py FOLDER STORE KILLS

Imports are done once and each run is a fork, so that dozens of kills take seconds. Prints one JSON
document: for each kill whether the manifest was there afterwards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3.s3.transfer  # noqa: F401  loaded before the forks, as are the next ones
import pandas  # noqa: F401
import psutil  # noqa: F401
import pyarrow.fs
import pyarrow.parquet  # noqa: F401
from tiny_stages import tiny_registry

from components.pipeline.artifacts import Input


def main(folder: Path, store: str, kills: int) -> None:
    with tiny_registry() as tiny:

        def slow_middle(run: object) -> None:
            (run.scratch / "checkpoint").write_text("half")  # type: ignore[attr-defined]
            time.sleep(0.01)

        tiny.during = slow_middle

        def execute(attempt: int) -> None:
            runner = tiny.runner(
                folder, f"numbers.attempt={attempt}", "numbers.count=1000", store=store
            )
            runner.execute(tiny.stages[0])

        def readable(attempt: int) -> None:
            """Exit code 0: published and whole; 1: not published; anything else: half-written."""
            runner = tiny.runner(
                folder, f"numbers.attempt={attempt}", "numbers.count=1000", store=store
            )
            manifest = runner.cached(tiny.stages[0])
            if manifest is None:
                assert not [
                    m for m in runner.store.manifests() if m.body["params"]["attempt"] == attempt
                ]
                os._exit(1)
            assert Input(runner.store, "numbers", manifest).read_table().num_rows == 1000
            assert Input(runner.store, "facts", manifest).read_json() == {"count": 1000}

        started = time.perf_counter()
        for warm in (10_001, 10_002):
            started = time.perf_counter()
            assert wait(fork(lambda attempt=warm: execute(attempt))) == 0
        whole = time.perf_counter() - started

        seen = []
        instants = random.Random(0)
        delays = [whole * 1.2 * (i + instants.random()) / kills for i in range(kills)]
        for attempt in range(2 * kills):
            if attempt == len(delays):
                if len(set(seen)) == 2:
                    break
                # A busy machine made all runs slower, or quicker, than the one that was timed.
                delays.append(delays[-1] * 2 if seen[-1] else delays[-1] / 2)
            child = fork(lambda attempt=attempt: execute(attempt))
            time.sleep(delays[attempt])
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            seen.append(wait(fork(lambda attempt=attempt: readable(attempt))))
            assert wait(fork(lambda attempt=attempt: execute(attempt))) == 0
            assert wait(fork(lambda attempt=attempt: readable(attempt))) == 0
    print(json.dumps(seen))


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(9)
    os._exit(0)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
