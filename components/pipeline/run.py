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
        print(f"  {self.stage}: {text}", file=sys.stderr, flush=True)

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
        self._rich: Any = None
        self._task: Any = None

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._start < BAR_AFTER_S:
            return
        if sys.stderr.isatty():
            self._show()
        elif now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            share = f"{100 * self._done / self._total:.0f} %" if self._total else f"{self._done:g}"
            print(f"  {self._label}: {share}", file=sys.stderr, flush=True)

    def _show(self) -> None:
        if self._rich is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._rich.add_task(self._label, total=self._total or None)
            self._rich.start()
        self._rich.update(self._task, completed=self._done)

    def close(self) -> None:
        if self._rich is not None:
            self._rich.stop()
