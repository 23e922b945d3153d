"""Requests of many callers in batches of one thread, with a queue that has an end.

A batch is what waited while the last one was computed, so it grows with the load by itself; only
under load, when the last batch had several, does a batch wait some milliseconds for companions.
Requests of one beam width go together, and the oldest request decides which width is next. What is
full or too late is said at once: a caller that is told when to come back is worth more than a queue
that everybody leaves before their turn.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: Weight of the newest batch in the measured service rate.
NEWEST = 0.2
#: Latencies that percentiles are taken of.
REMEMBERED = 4096


class Overloaded(Exception):
    """The queue is full, or its end is further away than the request may wait.

    Attributes:
        retry_after_s: when the queue of now will be done, by the measured rate.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class Expired(Exception):
    """A request waited longer than it may; it was not computed."""


class Closed(Exception):
    """No request is taken any more."""


@dataclass(frozen=True)
class BatchLimits:
    """What a batch and the queue may hold.

    Attributes:
        requests, beams: of one batch together; one request may be alone with more beams.
        wait_s: how long a batch waits for companions under load.
        waiting: requests in the queue.
    """

    requests: int = 16
    beams: int = 1024
    wait_s: float = 0.002
    waiting: int = 256


@dataclass
class Counts:
    """What became of the requests so far, and how long the last ones took."""

    answered: int = 0
    refused: int = 0
    expired: int = 0
    cancelled: int = 0
    failed: int = 0
    batches: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))


@dataclass
class _Job(Generic[T, R]):
    request: T
    beams: int
    came: float
    until: float
    future: Future[R]


class Batcher(Generic[T, R]):
    """A queue and the thread that computes it.

    Args:
        compute: answers for requests of one beam width, in their order.
    """

    def __init__(self, compute: Callable[[list[T], int], Sequence[R]], limits: BatchLimits) -> None:
        self._compute, self._limits = compute, limits
        self._queue: deque[_Job[T, R]] = deque()
        self._changed = threading.Condition()
        self._closed, self._last = False, 1
        #: Requests a second of the computing thread; 0 until it has computed some.
        self.rate = 0.0
        self.counts = Counts()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, requests: Sequence[T], beams: int, wait_s: float) -> list[Future[R]]:
        """Queue all of the requests, or none.

        Args:
            wait_s: how long each may wait for its turn.

        Raises:
            Overloaded: the queue has no room, or its end is further away than ``wait_s``.
            Closed: nothing is taken any more.
        """
        now = time.monotonic()
        with self._changed:
            if self._closed:
                raise Closed
            ahead_s = len(self._queue) / self.rate if self.rate else 0.0
            full = len(self._queue) + len(requests) > self._limits.waiting
            if full or ahead_s > wait_s:
                self.counts.refused += len(requests)
                raise Overloaded(max(ahead_s, 1 / self.rate if self.rate else 0.0))
            jobs = [_Job[T, R](r, beams, now, now + wait_s, Future()) for r in requests]
            self._queue.extend(jobs)
            self._changed.notify()
        return [job.future for job in jobs]

    def close(self) -> None:
        """Take nothing more; what waits is still answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, within_s: float) -> bool:
        """Wait until all that waited is answered."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
                if self._last > 1:
                    enough = min(self._last, self._limits.requests)
                    self._changed.wait_for(
                        lambda n=enough: len(self._queue) >= n or self._closed,  # type: ignore[misc]
                        self._limits.wait_s,
                    )
                batch = self._take()
            if batch:
                self._run(batch)

    def _take(self) -> list[_Job[T, R]]:
        """The oldest request and those of its width behind it; what is too late goes."""
        batch: list[_Job[T, R]] = []
        left: deque[_Job[T, R]] = deque()
        now = time.monotonic()
        while self._queue:
            job = self._queue.popleft()
            beams = batch[0].beams if batch else job.beams
            room = min(self._limits.requests, max(1, self._limits.beams // beams))
            if job.beams != beams or len(batch) >= room:
                left.append(job)
            elif not job.future.set_running_or_notify_cancel():
                # Its caller went away; the others of the batch do not notice.
                self.counts.cancelled += 1
            elif now > job.until:
                self.counts.expired += 1
                job.future.set_exception(Expired(f"waited {now - job.came:.2f} s"))
            else:
                batch.append(job)
        self._queue = left
        return batch

    def _run(self, batch: list[_Job[T, R]]) -> None:
        start = time.monotonic()
        try:
            answers = self._compute([job.request for job in batch], batch[0].beams)
        except Exception as error:
            if len(batch) > 1:
                # One of them is to blame: each alone, so that the others get their answers.
                for job in batch:
                    self._run([job])
                return
            self.counts.failed += 1
            batch[0].future.set_exception(error)
            return
        done = time.monotonic()
        self._last = len(batch)
        rate = len(batch) / max(done - start, 1e-6)
        self.rate = rate if not self.rate else (1 - NEWEST) * self.rate + NEWEST * rate
        self.counts.batches += 1
        self.counts.answered += len(batch)
        for job, answer in zip(batch, answers, strict=True):
            self.counts.seconds.append(done - job.came)
            job.future.set_result(answer)


def percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile in milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)]
