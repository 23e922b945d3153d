"""Selection of a tenth of 50 million samples by ASP-R: seconds and memory.

A process of its own holds a rule in the middle of a training: nine of ten samples were seen, each
has a signal, and the next subset is drawn and its signals taken in. Memory is the process's peak,
state and all. Figures: seconds of `select` and of `observe`; bytes a sample of the state. The
references are the figures to reach.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.result import Result, measure

SUMMARY = "ASP-R: seconds and memory of selecting from 50 million samples"

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, RATIO, REPEATS = 50_000_000, 0.1, 3
SECONDS, GIBIBYTES = 10.0, 2.0


def run(quick: bool = False) -> list[Result]:
    """All figures; ``quick`` has two million samples."""
    size = 2_000_000 if quick else SAMPLES
    words = [sys.executable, "-m", "benchmarks.asp_select", str(size)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{size} samples: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    peak, state = found["peak_gib"], found["state_bytes"]
    return [
        Result("select", *_spread(found["select"], SECONDS), False),
        Result("observe", *_spread(found["observe"], None), False),
        Result("peak_memory", peak, GIBIBYTES, "GiB", peak, peak, 1, False),
        Result("state_of_a_sample", state, None, "bytes", state, state, 1, False),
    ]


def _spread(
    seconds: list[float], reference: float | None
) -> tuple[float, float | None, str, float, float, int]:
    low, median, high = seconds
    return median, reference, "s", low, high, REPEATS


def measure_here(size: int) -> dict[str, Any]:
    """Figures of this process."""
    import resource

    import numpy as np

    from components.curation.asp.asp_r import AspR
    from components.curation.asp.config import AspConfig, ScheduleConfig
    from components.curation.asp.schedule import Schedule
    from components.curation.asp.selector import Seen

    rule = AspR(Schedule.of(ScheduleConfig(ratio=RATIO), size, 100), 0, config=AspConfig())
    rng = np.random.default_rng(0)
    rule.epoch = 10
    for first in range(0, size, 1 << 20):
        rows = slice(first, min(first + (1 << 20), size))
        block = rows.stop - rows.start
        rule.score_MN[0, rows] = rng.gamma(1.0, 0.3, block)
        rule.variance_N[rows] = rng.gamma(1.0, 0.1, block)
        rule.last_N[rows] = np.where(rng.random(block) < 0.9, rng.integers(1, 11, block), 0)
    subset = rule.select(11)
    select = measure(lambda: rule.select(11), repeats=REPEATS)
    count = len(subset.index_S)
    seen = Seen(subset.index_S, {"el2n": rng.random(count, np.float32)}, rng.random(count) < 0.8)
    observe = measure(lambda: rule.observe(seen), repeats=REPEATS)
    return {
        "select": [select.low, select.median, select.high],
        "observe": [observe.low, observe.median, observe.high],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "state_bytes": sum(x.nbytes for x in rule.arrays().values()) / size,
    }


if __name__ == "__main__":
    print(json.dumps(measure_here(int(sys.argv[1]))))
