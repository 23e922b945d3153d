"""Ingest and validation of 10 million interactions: rows a second and peak memory.

A folder of contract tables is written first (8 parquet files of interactions, 100,000 items and
users). Each measurement is a fresh process that runs the real stages ``ingest`` and ``validate``
through the runner, so reading, casting, writing raw tables, judging, writing what passes,
digesting and publishing all count, and so does the import of Great Expectations where it judges.
Peak memory is the process's own high-water mark.

Beside it, in the same run: the same rules by Great Expectations on the whole table in pandas. It
judges only; our stage also parts the rows, writes and digests them, in memory that does not grow.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.result import Result

SUMMARY = "Ingest and validation of 10 million interactions: rows a second, peak memory"

ROOT = Path(__file__).resolve().parent.parent
FILES = 8
FILE_CHUNK_ROWS = 1 << 18
TARGET_MASKS = 1e6
TARGET_JUDGED = 2e5
TARGET_GIB = 2.0


def run(quick: bool = False) -> list[Result]:
    """Measure; ``quick`` takes 100,000 rows once, to see that it works."""
    rows = 100_000 if quick else 10_000_000
    repeats = 1 if quick else 3
    with tempfile.TemporaryDirectory(prefix="bench_ingest_") as name:
        folder = Path(name)
        write_tables(folder / "data", rows)
        masks = [measure_in_child("masks", folder, "data") for _ in range(repeats)]
        judged = [measure_in_child("judged", folder, "data") for _ in range(repeats)]
        whole = measure_in_child("pandas", folder, "data")
    return [
        _rate("masks_rate", masks, rows, TARGET_MASKS),
        _rate("gx_rate", judged, rows, TARGET_JUDGED),
        _memory("masks_peak", masks, TARGET_GIB),
        _memory("gx_peak", judged, TARGET_GIB),
        _rate(
            "validate_vs_pandas",
            judged,
            rows,
            rows / whole["validate_seconds"],
            key="validate_seconds",
        ),
        _memory("peak_vs_pandas", judged, whole["peak_gib"]),
    ]


def write_tables(folder: Path, rows: int) -> None:
    """Write clean contract tables: ``rows`` interactions of 100,000 users with 100,000 items."""
    random = np.random.default_rng(0)
    ids = min(100_000, max(10, rows // 20))
    (folder / "interactions").mkdir(parents=True)
    per_file = -(-rows // FILES)
    for number in range(FILES):
        count = min(per_file, rows - number * per_file)
        path = folder / "interactions" / f"part-{number}.parquet"
        with pq.ParquetWriter(path, _interactions(random, 0, ids).schema) as writer:
            while count > 0:
                taken = min(count, FILE_CHUNK_ROWS)
                writer.write_table(_interactions(random, taken, ids))
                count -= taken
    items = {"item_id": np.arange(ids), "title": [f"video {n}" for n in range(ids)]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    pq.write_table(pa.table({"user_id": np.arange(ids)}), folder / "users.parquet")


def _interactions(random: np.random.Generator, rows: int, ids: int) -> pa.Table:
    duration = random.gamma(2, 15, rows).astype(np.float32) + 1
    # Popular items and active users, as on a platform.
    item = (ids * random.random(rows) ** 3).astype(np.int64)
    moment = 1_700_000_000_000 + random.integers(0, 30 * 86_400_000, rows)
    flags = {
        name: random.random(rows, dtype=np.float32) < share
        for name, share in (("click", 0.4), ("long_view", 0.3), ("like", 0.02), ("follow", 0.002))
    }
    return pa.table(
        {
            "user_id": (ids * random.random(rows) ** 2).astype(np.int64),
            "item_id": item,
            "timestamp": pa.array(moment).cast(pa.timestamp("ms", tz="UTC")),
            "watch_time_s": duration * random.random(rows, dtype=np.float32),
            "duration_s": duration,
            **flags,
        }
    )


def _rate(
    name: str,
    runs: list[dict[str, float]],
    rows: int,
    reference: float,
    key: str = "seconds",
) -> Result:
    rates = [rows / run[key] for run in runs]
    middle = statistics.median(rates)
    return Result(name, middle, reference, "rows/s", min(rates), max(rates), len(rates), True)


def _memory(name: str, runs: list[dict[str, float]], reference: float) -> Result:
    peaks = [run["peak_gib"] for run in runs]
    middle = statistics.median(peaks)
    return Result(name, middle, reference, "GiB", min(peaks), max(peaks), len(peaks), False)


def measure_in_child(kind: str, folder: Path, data: str) -> dict[str, float]:
    """Figures of one measurement (a name of ``KINDS``) of ``folder / data`` in a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{kind}_") as home:
        command = [sys.executable, "-m", "benchmarks.ingest", kind, str(folder / data), home]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _stages(data: Path, home: Path, *, great_expectations: bool) -> dict[str, float]:
    from components.data.stage import IngestParams
    from components.data.validate_stage import ValidateParams
    from components.pipeline.artifacts import Store
    from components.pipeline.runner import Runner
    from components.pipeline.settings import Settings
    from components.pipeline.stage import find_stage

    settings = Settings(home, str(home / "store"), "", None, None)
    params = {
        "ingest": IngestParams.model_validate({"source": str(data)}),
        "validate": ValidateParams.model_validate({"great_expectations": great_expectations}),
    }
    runner = Runner(settings, Store(settings.store, settings.fetched), params)
    seconds = {}
    for name in params:
        stage = find_stage(name)
        start = time.perf_counter()
        runner.execute(stage)
        seconds[f"{name}_seconds"] = time.perf_counter() - start
    return {"seconds": sum(seconds.values()), **seconds}


def _whole_table_in_pandas(data: Path) -> dict[str, float]:
    """Great Expectations the plain way: one data frame, one suite."""
    import datetime

    import pandas as pd

    from components.data.expectations import INTERACTION_SUITE, latest_timestamp
    from components.pipeline.data_docs import expectation, great_expectations

    start = time.perf_counter()
    gx = great_expectations()
    frame = pd.read_parquet(data / "interactions")
    frame["watched_times"] = frame["watch_time_s"] / frame["duration_s"]
    frame["repeats_an_earlier_row"] = frame.duplicated()
    same_event = frame.duplicated(["user_id", "item_id", "timestamp"])
    frame["contradicts_an_earlier_row"] = same_event & ~frame["repeats_an_earlier_row"]
    for kind in ("item", "user"):
        known = pd.read_parquet(data / f"{kind}s.parquet", columns=[f"{kind}_id"])[f"{kind}_id"]
        frame[f"{kind}_is_known"] = frame[f"{kind}_id"].isin(known)
    frame["date_midnight"], frame["hours_after_date"] = frame["timestamp"], 0.0
    frame["rating"] = 1.0
    latest = latest_timestamp(datetime.datetime.now(datetime.UTC))
    suite = INTERACTION_SUITE.bind(max_quarantine_share=0.05, latest=latest)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    asset = context.data_sources.add_pandas("pandas").add_dataframe_asset("interactions")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch(
        batch_parameters={"dataframe": frame}
    )
    rules = [expectation(rule) for rule in suite.row_rules]
    outcome = batch.validate(gx.ExpectationSuite("interactions", expectations=rules))
    seconds = time.perf_counter() - start
    if not outcome.success:
        broken = [
            rule.name
            for rule, result in zip(suite.row_rules, outcome.results, strict=True)
            if not result.success
        ]
        raise RuntimeError(f"the synthetic interactions break rules: {', '.join(broken)}")
    return {"seconds": seconds, "validate_seconds": seconds}


def _peak_gib() -> float:
    """High-water mark of this process's memory; Linux counts it anew for each program."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("the kernel does not tell peak memory")


KINDS: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "masks": lambda data, home: _stages(data, home, great_expectations=False),
    "judged": lambda data, home: _stages(data, home, great_expectations=True),
    "pandas": lambda data, home: _whole_table_in_pandas(data),
}


def main(arguments: list[str]) -> None:
    """One measurement, as JSON on the last line of standard output."""
    kind, data, home = arguments
    figures: dict[str, Any] = KINDS[kind](Path(data), Path(home))
    print(json.dumps({**figures, "peak_gib": _peak_gib()}))


if __name__ == "__main__":
    main(sys.argv[1:])
