"""Runs one tiny stage in several processes at the same time; a script of its own.

Usage: python concurrent_runs.py FOLDER PROCESSES. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pandas  # noqa: F401  loaded before the forks, as are the next ones
import psutil  # noqa: F401
import pyarrow.fs
import pyarrow.parquet  # noqa: F401
from tiny_stages import tiny_registry


def main(folder: Path, processes: int) -> None:
    log = folder / "executions"
    start = time.monotonic() + 0.3
    with tiny_registry() as tiny:

        def count(run: object) -> None:
            with log.open("a") as file:
                file.write("x")
            time.sleep(0.3)

        tiny.during = count
        pipes = []
        for _ in range(processes):
            reader, writer = os.pipe()
            if os.fork() == 0:
                time.sleep(max(0, start - time.monotonic()))
                manifest, cached = tiny.runner(folder).execute(tiny.stages[0])
                said = json.dumps([cached, manifest.output_digest("numbers")])
                os.write(writer, said.encode())
                os._exit(0)
            os.close(writer)
            pipes.append(reader)
        answers = [json.loads(os.read(pipe, 1000)) for pipe in pipes]
        for _ in pipes:
            os.wait()
    print(
        json.dumps(
            {
                "executions": len(log.read_text()),
                "cached": [cached for cached, _ in answers],
                "digests": [digest for _, digest in answers],
                "locks_left": [p.name for p in (folder / "home" / "locks").iterdir()],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
