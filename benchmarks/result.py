"""What a benchmark returns, and how a call is timed: medians with their spread, never a best-of."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one quantity: median, the lowest, the highest and how many."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Result:
    """One claim: our figure beside the alternative's, both taken in the same run.

    Attributes:
        name: what was measured, e.g. ``items_per_second_512_beams``.
        ours: median of our measurements, in ``unit``.
        reference: the alternative's median, or the figure to reach; None where there is none.
        low, high: spread of our measurements (lowest and highest).
        n: how many measurements.
        higher_is_better: direction of the quantity.
    """

    name: str
    ours: float
    reference: float | None
    unit: str
    low: float
    high: float
    n: int
    higher_is_better: bool

    @property
    def ratio(self) -> float | None:
        """How many times better ours is: above 1 wins, whatever the direction of the unit.

        Infinity where the worse one is nothing; None where both are, where one is below nothing, or
        where there is no reference.
        """
        if self.reference is None or min(self.ours, self.reference) < 0:
            return None
        better, worse = self.ours, self.reference
        if not self.higher_is_better:
            better, worse = worse, better
        if not worse:
            return math.inf if better else None
        return better / worse


def print_lines(results: Iterable[Result]) -> None:
    """Every figure as a line of JSON as soon as it is there, where there is no platform."""
    for result in results:
        print(json.dumps(asdict(result)), flush=True)


def measure(fn: Callable[[], object], repeats: int = 5, warmup: int = 1) -> Sample:
    """Seconds of ``fn()``, measured ``repeats`` times after ``warmup`` calls that do not count."""
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return Sample(statistics.median(seconds), min(seconds), max(seconds), repeats)
