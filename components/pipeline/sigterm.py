"""SIGTERM ends a command as Ctrl-C does: tidily, ready to resume.

Several libraries put handlers of their own in the place of ours and report the end in their own
ways; so what counts is whether the signal came, not how the command ended.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130

_heeded = threading.Event()
_came = threading.Event()


@contextmanager
def as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block, and the block then ends in KeyboardInterrupt."""
    before = signal.signal(signal.SIGTERM, _end)
    _heeded.set()
    try:
        yield
    except BaseException as error:
        if _came.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        _heeded.clear()
        signal.signal(signal.SIGTERM, before)


@contextmanager
def lent() -> Iterator[None]:
    """A library takes the signal in the block and answers it by exiting; then it is ours again."""
    try:
        yield
    except SystemExit:
        _came.set()
        raise
    if _heeded.is_set() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    _came.set()
    # Ray and Prefect pass this on as it is; they have ways of their own with KeyboardInterrupt.
    sys.exit(INTERRUPTED)
