"""What a person sees on standard error while something takes its time.

On a terminal all that goes on has a row in one display, so that nothing draws over another; the
display is there only while a row is. A log gets plain lines instead.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SHOW_AFTER_S = 2.0
LINE_EVERY_S = 10.0


def say(text: str) -> None:
    """A line on standard error, at once."""
    print(f"  {text}", file=sys.stderr, flush=True)


@contextmanager
def working(label: str) -> Iterator[None]:
    """Say that ``label`` goes on once the block takes more than two seconds.

    A terminal shows it with the seconds until the block ends, a log gets a line.
    """
    row: int | None = None
    ended, start = False, time.monotonic()
    lock = threading.Lock()

    def show() -> None:
        nonlocal row
        with lock:
            if ended:
                return
            if sys.stderr.isatty():
                row = DISPLAY.add(label, since=start)
            else:
                say(f"{label} ...")

    # By a timer, for it is while nothing is heard of the work that a person wonders.
    timer = threading.Timer(SHOW_AFTER_S, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            ended = True
        timer.cancel()
        if row is not None:
            DISPLAY.remove(row)


class Console:
    """What a stage tells, for the person who waits: notes, and bars of what takes its time.

    A bar appears after two seconds; without a terminal a line tells of it every ten.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bars: dict[str, _Bar] = {}

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Metrics are for the trackers."""

    def figure(self, name: str, png: bytes) -> None:
        """Figures are for the trackers."""

    def note(self, text: str) -> None:
        say(f"{self._stage}: {text}")

    def progress(self, label: str, done: float | None, total: float) -> None:
        if done is None:
            bar = self._bars.pop(label, None)
            if bar is not None and bar.row is not None:
                DISPLAY.remove(bar.row)
            return
        now = time.monotonic()
        bar = self._bars.setdefault(label, _Bar(now, now))
        if now - bar.start < SHOW_AFTER_S:
            return
        if sys.stderr.isatty():
            if bar.row is None:
                bar.row = DISPLAY.add(f"{self._stage}: {label}", total or None)
            DISPLAY.update(bar.row, done)
        elif now - bar.line >= LINE_EVERY_S:
            bar.line = now
            share = f"{100 * done / total:.0f} %" if total else f"{done:g}"
            say(f"{self._stage}: {label}: {share}")


@dataclass
class _Bar:
    """When it started, when its last line was (monotonic seconds), and its row if it has one."""

    start: float
    line: float
    row: int | None = None


class Display:
    """Rows of what goes on: bars with a share, and the newest of those without one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._progress: Any = None
        self._bars: set[int] = set()
        self._plain: list[int] = []

    def add(self, label: str, total: float | None = None, since: float | None = None) -> int:
        """A new row: a bar, or without ``total`` the seconds since the monotonic time ``since``."""
        with self._lock:
            if self._progress is None:
                self._progress = _progress()
                self._progress.start()
            row = int(self._progress.add_task(label, total=total))
            (task,) = (task for task in self._progress.tasks if task.id == row)
            task.start_time = since or task.start_time
            if total is None:
                self._plain.append(row)
            else:
                self._bars.add(row)
            self._arrange()
            return row

    def update(self, row: int, done: float) -> None:
        with self._lock:
            self._progress.update(row, completed=done)

    def remove(self, row: int) -> None:
        with self._lock:
            self._progress.remove_task(row)
            self._bars.discard(row)
            if row in self._plain:
                self._plain.remove(row)
            if self._bars or self._plain:
                self._arrange()
            else:
                self._progress.stop()
                self._progress = None

    def _arrange(self) -> None:
        """A bar says more than the row of its stage, and a stage more than that of its flow."""
        for row in self._plain:
            shown = not self._bars and row == self._plain[-1]
            self._progress.update(row, visible=shown)


DISPLAY = Display()


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Only(ProgressColumn):
        """A column of bars alone, or of the other rows alone."""

        def __init__(self, column: ProgressColumn, *, bars: bool) -> None:
            super().__init__()
            self._column, self._of_bars = column, bars

        def render(self, task: Task) -> Any:
            return self._column(task) if (task.total is not None) == self._of_bars else Text("")

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        Only(TimeElapsedColumn(), bars=False),
        Only(BarColumn(), bars=True),
        Only(TextColumn("{task.percentage:>3.0f} %"), bars=True),
        Only(TimeRemainingColumn(), bars=True),
        console=Console(stderr=True),
        transient=True,
        # Results go where they are sent, be it a file beside a terminal.
        redirect_stdout=sys.stdout.isatty(),
    )
