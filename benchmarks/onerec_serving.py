"""`reelflow serve` under load: latency and throughput of the whole service, client included.

A model of the `scientific` preset (2 + 2 layers, width 128, 4,344 items, untrained: the work does
not depend on the weights) is registered in a new registry, served by `reelflow serve`, and asked
through HTTP by a client in a process of its own. Arrivals are Poisson and the client waits for no
answer; latency counts from the moment a request was due.

Figures: p50 and p99 at 20 requests a second for several widths of the beam; the highest rate of a
ladder at which every load is answered within the limit; what becomes of requests at twice the first
rate that is not; what a route without any work takes; memory of the replica. The reference of p99
is the figure to reach: 100 ms at 32 beams and 20 requests a second on two cores.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.http_load import Outcome, Plan, load
from benchmarks.result import Result

SUMMARY = "the recommender service under load by a real HTTP client: p50, p99, throughput"

P99_MS, RATE, BEAMS = 100.0, 20.0, 32
WIDTHS = (8, 32, 128, 512)
LADDER = (20.0, 40.0, 80.0, 120.0, 160.0, 240.0, 320.0, 480.0)
NAME = "recommender-benchmark"


@dataclass(frozen=True)
class Load:
    """How much is asked: of each measurement the seconds, and how often it is taken."""

    seconds: float
    repeats: int
    widths: tuple[int, ...]
    ladder: tuple[float, ...]


FULL = Load(30.0, 3, WIDTHS, LADDER)
QUICK = Load(1.0, 1, (BEAMS,), (RATE, 2 * RATE))


def run(quick: bool = False) -> list[Result]:
    """All figures; ``quick`` is a tiny model and a second of load for each figure."""
    with tempfile.TemporaryDirectory(prefix="reelflow-bench-") as folder:
        item_ids = register(Path(folder), quick)
        with _service(Path(folder) / "home") as (address, process):
            return [*measure(address, item_ids, QUICK if quick else FULL), *_memory(process)]


def measure(address: str, item_ids: list[int], load_of: Load) -> list[Result]:
    """The figures of a running service.

    Args:
        item_ids: of its catalogue; histories are made of them.
    """
    results = []
    floor = _repeated(Plan(f"{address}/healthz", [], RATE, load_of.seconds, 0), load_of.repeats)
    results.append(_latency("healthz_p50", [o.percentile(0.5) for o in floor], None))
    for beams in load_of.widths:
        outcomes = _repeated(
            _plan(address, item_ids, beams, RATE, load_of.seconds), load_of.repeats
        )
        name = f"{RATE:.0f}_per_second_{beams}_beams"
        target = P99_MS if beams == BEAMS else None
        results.append(_latency(f"p50_{name}", [o.percentile(0.5) for o in outcomes], None))
        results.append(_latency(f"p99_{name}", [o.percentile(0.99) for o in outcomes], target))
        results.append(_share(f"answered_{name}", [o.answered for o in outcomes], 1.0))
    return results + _ladder(address, item_ids, load_of)


def _ladder(address: str, item_ids: list[int], load_of: Load) -> list[Result]:
    """The highest rate of the ladder within the limit, and what twice the next one meets.

    Of a ladder that holds to its end, twice the last one.
    """
    held, rate = 0.0, load_of.ladder[0]
    for rate in load_of.ladder:
        plan = _plan(address, item_ids, BEAMS, rate, load_of.seconds)
        outcomes = _repeated(plan, load_of.repeats)
        if any(o.answered < 0.999 or o.percentile(0.99) > P99_MS for o in outcomes):
            break
        held = rate
    over = _repeated(_plan(address, item_ids, BEAMS, 2 * rate, load_of.seconds), load_of.repeats)
    rates = [o.throughput for o in over]
    refused = [o.share(429) for o in over]
    lost = [1 - o.answered - o.share(429) for o in over]
    n = load_of.repeats
    return [
        Result("highest_rate_with_p99_below_100ms", held, RATE, "requests/s", held, held, n, True),
        Result("overload", 2 * rate, None, "requests/s", 2 * rate, 2 * rate, n, True),
        Result(
            "answers_per_second_under_overload",
            statistics.median(rates),
            None,
            "requests/s",
            min(rates),
            max(rates),
            n,
            True,
        ),
        _share("refused_with_429_under_overload", refused, None),
        _share("neither_answered_nor_refused_under_overload", lost, 0.0, higher_is_better=False),
        _latency("p99_of_answers_under_overload", [o.percentile(0.99) for o in over], None),
    ]


def _plan(address: str, item_ids: list[int], beams: int, rate: float, seconds: float) -> Plan:
    """Requests with histories of full length."""
    rng = random.Random(beams)
    bodies = []
    for _ in range(64):
        history = [
            {
                "item_id": rng.choice(item_ids),
                "timestamp_ms": 1_700_000_000_000 + n * 60_000,
                "watch_time_s": round(rng.uniform(1, 60), 1),
                "duration_s": 60.0,
                "like": rng.random() < 0.3,
            }
            for n in range(40)
        ]
        bodies.append(json.dumps({"history": history, "top_n": 20, "beams": beams}))
    return Plan(f"{address}/v1/recommend", bodies, rate, seconds, 0)


def _repeated(plan: Plan, repeats: int) -> list[Outcome]:
    return [
        load(Plan(plan.url, plan.bodies, plan.rate, plan.seconds, seed)) for seed in range(repeats)
    ]


def _latency(name: str, values_ms: list[float], target: float | None) -> Result:
    median, n = statistics.median(values_ms), len(values_ms)
    return Result(name, median, target, "ms", min(values_ms), max(values_ms), n, False)


def _share(
    name: str, shares: list[float], target: float | None, *, higher_is_better: bool = True
) -> Result:
    median, n = statistics.median(shares), len(shares)
    return Result(name, median, target, "share", min(shares), max(shares), n, higher_is_better)


def _memory(process: subprocess.Popen[str]) -> list[Result]:
    import psutil

    sizes = [
        child.memory_info().rss / 2**20
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ServeReplica" in " ".join(child.cmdline())
    ]
    return [Result("replica_memory", sum(sizes), None, "MiB", min(sizes), max(sizes), 1, False)]


def register(folder: Path, quick: bool) -> list[int]:
    """A model in the registry of the home in ``folder``, as its champion; the ids of its items."""
    import yaml

    from benchmarks.synthetic_onerec import SCIENTIFIC, SMALLEST, catalogue
    from benchmarks.synthetic_version import write_version
    from components.evaluation.registration import registry
    from components.pipeline.settings import Settings
    from components.pipeline.tracking import connect
    from components.training.onerec.config import OneRecConfig

    config = OneRecConfig(**(SMALLEST if quick else SCIENTIFIC))
    codes_NQ = catalogue(config.num_items, config.codebook_size, config.num_levels)
    item_ids = write_version(folder / "model" / "artifacts", config, codes_NQ)
    for place in (folder / "model" / "code", folder / "home"):
        place.mkdir()
    signature = {"signature": registry.signature(BEAMS).to_dict()}
    (folder / "model" / "MLmodel").write_text(yaml.safe_dump(signature))

    home = folder / "home"
    mlflow = connect(Settings(home, "", f"sqlite:///{home / 'mlflow.db'}", None, None))
    client = mlflow.MlflowClient()
    client.create_registered_model(NAME)
    version = client.create_model_version(NAME, (folder / "model").as_uri())
    registry.set_alias(mlflow, NAME, registry.CHAMPION, str(version.version))
    return item_ids


@contextmanager
def _service(home: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`reelflow serve` on a home of its own: its address and its process."""
    outside = ("MLFLOW_TRACKING_URI", "ARTIFACT_ROOT", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    process = subprocess.Popen(
        [sys.executable, "-m", "components.pipeline.cli", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        env=environment | {"REELFLOW_HOME": str(home)},
        text=True,
    )
    try:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            found = found or re.search(r"http://[^/]+", line)
            if "Ctrl-C" in line:
                break
        if found is None:
            raise RuntimeError("the service does not start: see above")
        yield found[0], process
    finally:
        process.terminate()
        process.wait(60)
