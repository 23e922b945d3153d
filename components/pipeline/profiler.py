"""What a stage costs: wall seconds and the peak memory of the process with all its children."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

SAMPLE_EVERY_S = 0.5
#: Time between two samples over the time that one takes: the kernel walks every page of every
#: process for it, a tenth of a second for Ray's processes on a small machine.
PAUSE_OVER_SAMPLE = 50


class Cost:
    """Context manager; afterwards ``seconds`` and ``peak_bytes`` hold what the block took.

    Memory is sampled twice a second (less often where that would take more than 2 % of a core) as
    the proportional set size of the process tree, so that pages shared by Ray's processes count
    once. Where the kernel does not tell it (not Linux), the resident set size is taken: an upper
    bound.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Cost:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, process_tree_bytes())

    def _sample(self) -> None:
        pause = SAMPLE_EVERY_S
        while not self._stop.wait(pause):
            began = time.thread_time()
            self.peak_bytes = max(self.peak_bytes, process_tree_bytes())
            pause = max(SAMPLE_EVERY_S, PAUSE_OVER_SAMPLE * (time.thread_time() - began))


def process_tree_bytes() -> int:
    """Bytes of memory of this process and its descendants, shared pages counted once."""
    import psutil

    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += _proportional_bytes(process.pid) or process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _proportional_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
