"""The one face through which a stage tells what happens: metrics, progress, figures, notes.

Behind it stand MLflow (through a tracker) and a Rich progress bar on standard error; a stage
knows neither.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from components.pipeline.console import DISPLAY, say

BAR_AFTER_S = 2.0
PLAIN_LINE_EVERY_S = 10.0


class Sink(Protocol):
    """Where metrics and figures of a stage are kept."""

    def log(self, metrics: Mapping[str, float], step: int | None) -> None: ...

    def figure(self, name: str, figure: Any) -> None: ...


class StageRun:
    """The ``run`` argument of a stage function.

    Args:
        stage: name shown beside progress.
        seed: seed of the stage.
        scratch: folder that survives a kill.
        sinks: trackers that receive metrics and figures.
    """

    def __init__(self, stage: str, seed: int, scratch: Path, sinks: tuple[Sink, ...] = ()) -> None:
        self.stage, self.seed, self.scratch = stage, seed, scratch
        self._sinks = sinks

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for sink in self._sinks:
            sink.log(metrics, step)

    def figure(self, name: str, figure: Any) -> None:
        for sink in self._sinks:
            sink.figure(name, figure)

    def note(self, text: str) -> None:
        say(f"{self.stage}: {text}")

    @contextmanager
    def progress(self, total: float, label: str) -> Iterator[ProgressBar]:
        bar = ProgressBar(f"{self.stage}: {label}", total)
        try:
            yield bar
        finally:
            bar.close()


class ProgressBar:
    """A bar that appears after two seconds; a line every ten seconds where there is no terminal."""

    def __init__(self, label: str, total: float) -> None:
        self._label, self._total, self._done = label, total, 0.0
        self._start = self._last_line = time.monotonic()
        self._row: int | None = None

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        if self._total:
            # Totals are what was expected; there is no more than all of it.
            self._done = min(self._done, self._total)
        now = time.monotonic()
        if now - self._start < BAR_AFTER_S:
            return
        if sys.stderr.isatty():
            if self._row is None:
                self._row = DISPLAY.add(self._label, self._total or None)
            DISPLAY.update(self._row, self._done)
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            share = f"{100 * self._done / self._total:.0f} %" if self._total else f"{self._done:g}"
            say(f"{self._label}: {share}")

    def close(self) -> None:
        if self._row is not None:
            DISPLAY.remove(self._row)
