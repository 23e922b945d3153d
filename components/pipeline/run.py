"""The one face through which a stage tells what happens: metrics, progress, figures, notes.

Behind it stand sinks: the console, MLflow, the page of the run in Prefect, or the process that
started this one. A stage knows none of them.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.pipeline.checkpoints import LocalCheckpoints
from components.pipeline.console import Console

if TYPE_CHECKING:
    from components.pipeline.stage import Checkpoints

#: A bar may advance millions of times; nobody sees more than this.
TOLD_EVERY_S = 0.2


class Sink(Protocol):
    """Somebody who is told what a stage does."""

    def log(self, metrics: Mapping[str, float], step: int | None) -> None: ...

    def figure(self, name: str, png: bytes) -> None: ...

    def note(self, text: str) -> None: ...

    def progress(self, label: str, done: float | None, total: float) -> None:
        """``done`` of ``total`` (0: nobody knows); None once it is over."""


class StageRun:
    """The ``run`` argument of a stage function.

    Args:
        stage: name shown beside notes.
        seed: seed of the stage.
        scratch: folder that survives a kill.
        sinks: who is told; the console alone unless given.
        checkpoints: where checkpoints survive; in the scratch folder if not given.
    """

    def __init__(
        self,
        stage: str,
        seed: int,
        scratch: Path,
        sinks: tuple[Sink, ...] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.stage, self.seed, self.scratch = stage, seed, scratch
        self.checkpoints = checkpoints or LocalCheckpoints(scratch)
        self._sinks: tuple[Sink, ...] = (Console(stage),) if sinks is None else sinks

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for sink in self._sinks:
            sink.log(metrics, step)

    def figure(self, name: str, figure: Any) -> None:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        for sink in self._sinks:
            sink.figure(name, drawn.getvalue())

    def note(self, text: str) -> None:
        for sink in self._sinks:
            sink.note(text)

    @contextmanager
    def progress(self, total: float, label: str) -> Iterator[ProgressBar]:
        bar = ProgressBar(label, total, self._sinks)
        try:
            yield bar
        finally:
            for sink in self._sinks:
                sink.progress(label, None, total)


class ProgressBar:
    """Counts, and tells the sinks a few times a second."""

    def __init__(self, label: str, total: float, sinks: tuple[Sink, ...]) -> None:
        self._label, self._total, self._sinks = label, total, sinks
        self._done, self._told = 0.0, float("-inf")

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        if self._total:
            # Totals are what was expected; there is no more than all of it.
            self._done = min(self._done, self._total)
        now = time.monotonic()
        if now - self._told < TOLD_EVERY_S:
            return
        self._told = now
        for sink in self._sinks:
            sink.progress(self._label, self._done, self._total)
