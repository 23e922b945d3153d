"""Claims about the queue: who shares a batch, who is told to come back, and who is not computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from components.serving.batching import (
    Batcher,
    BatchLimits,
    Closed,
    Expired,
    Overloaded,
    percentile_ms,
)


class Kitchen:
    """Computes ``-request``; batches wait at a gate, so that a test decides what meets."""

    def __init__(self, **limits: Any) -> None:
        self.gate = threading.Semaphore(0)
        self.batches: list[tuple[list[int], int]] = []
        self.batcher: Batcher[int, int] = Batcher(self.compute, BatchLimits(**limits))

    def compute(self, requests: list[int], beams: int) -> list[int]:
        assert self.gate.acquire(timeout=20)
        self.batches.append((requests, beams))
        if 13 in requests:
            raise ValueError("thirteen")
        return [-request for request in requests]

    def occupy(self) -> Future[int]:
        """One request that is being computed until the gate opens."""
        (future,) = self.batcher.submit([0], 8, 60)
        while self.batcher.waiting:
            time.sleep(0.001)
        return future

    def open(self) -> None:
        self.gate.release(1000)


@pytest.fixture
def kitchen() -> Iterator[Kitchen]:
    made = Kitchen(requests=4, beams=64, waiting=8)
    yield made
    made.open()
    made.batcher.close()
    assert made.batcher.join(20)


def test_what_waited_is_one_batch_of_one_width_oldest_first(kitchen: Kitchen) -> None:
    kitchen.occupy()
    futures = [
        future
        for request, beams in ((1, 8), (2, 16), (3, 8), (4, 16), (5, 8))
        for future in kitchen.batcher.submit([request], beams, 60)
    ]
    kitchen.open()
    assert [future.result(20) for future in futures] == [-1, -2, -3, -4, -5]
    assert kitchen.batches[1:] == [([1, 3, 5], 8), ([2, 4], 16)]


def test_a_batch_ends_at_its_limits_of_requests_and_beams(kitchen: Kitchen) -> None:
    kitchen.occupy()
    futures = kitchen.batcher.submit([1, 2, 3, 4, 5], 8, 60)
    futures += kitchen.batcher.submit([6, 7, 8], 100, 60)
    kitchen.open()
    assert [future.result(20) for future in futures] == [-n for n in range(1, 9)]
    assert [requests for requests, _ in kitchen.batches[1:]] == [[1, 2, 3, 4], [5], [6], [7], [8]]


def test_a_full_queue_takes_all_of_a_call_or_none_and_says_when_to_come_back(
    kitchen: Kitchen,
) -> None:
    kitchen.occupy()
    kitchen.batcher.rate = 2.0
    futures = kitchen.batcher.submit([1, 2, 3, 4, 5, 6], 8, 60)
    with pytest.raises(Overloaded) as refused:
        kitchen.batcher.submit([7, 8, 9], 8, 60)
    assert refused.value.retry_after_s == 3.0  # six wait, two a second
    assert kitchen.batcher.waiting == 6
    futures += kitchen.batcher.submit([7, 8], 8, 60)
    kitchen.open()
    assert [future.result(20) for future in futures] == [-n for n in range(1, 9)]
    assert (kitchen.batcher.counts.refused, kitchen.batcher.counts.answered) == (3, 9)


def test_who_could_not_wait_for_the_end_of_the_queue_is_told_at_once(kitchen: Kitchen) -> None:
    kitchen.occupy()
    kitchen.batcher.rate = 2.0
    kitchen.batcher.submit([1, 2, 3], 8, 60)
    with pytest.raises(Overloaded):
        kitchen.batcher.submit([4], 8, 1.0)
    kitchen.batcher.submit([4], 8, 2.0)


def test_who_waited_too_long_is_not_computed(kitchen: Kitchen) -> None:
    kitchen.occupy()
    (late,) = kitchen.batcher.submit([1], 8, 0.01)
    (patient,) = kitchen.batcher.submit([2], 8, 60)
    time.sleep(0.05)
    kitchen.open()
    with pytest.raises(Expired, match="waited"):
        late.result(20)
    assert patient.result(20) == -2
    assert [requests for requests, _ in kitchen.batches] == [[0], [2]]


def test_who_went_away_is_not_computed_and_disturbs_nobody(kitchen: Kitchen) -> None:
    kitchen.occupy()
    one, gone, two = kitchen.batcher.submit([1, 2, 3], 8, 60)
    assert gone.cancel()
    kitchen.open()
    assert (one.result(20), two.result(20)) == (-1, -3)
    assert kitchen.batches[1:] == [([1, 3], 8)]
    assert kitchen.batcher.counts.cancelled == 1


def test_one_request_that_breaks_does_not_break_the_others(kitchen: Kitchen) -> None:
    kitchen.occupy()
    one, broken, two = kitchen.batcher.submit([1, 13, 2], 8, 60)
    kitchen.open()
    assert (one.result(20), two.result(20)) == (-1, -2)
    with pytest.raises(ValueError, match="thirteen"):
        broken.result(20)
    assert kitchen.batcher.counts.failed == 1


def test_what_waits_at_the_end_is_answered_and_nothing_more_is_taken(kitchen: Kitchen) -> None:
    kitchen.occupy()
    (waiting,) = kitchen.batcher.submit([1], 8, 60)
    kitchen.batcher.close()
    with pytest.raises(Closed):
        kitchen.batcher.submit([2], 8, 60)
    kitchen.open()
    assert waiting.result(20) == -1
    assert kitchen.batcher.join(20)


def test_the_rate_is_that_of_the_computing(kitchen: Kitchen) -> None:
    kitchen.open()
    for _ in range(5):
        for future in kitchen.batcher.submit([1, 2], 8, 60):
            future.result(20)
    assert kitchen.batcher.rate > 100
    assert len(kitchen.batcher.counts.seconds) == 10


def test_percentiles_are_nearest_ranks() -> None:
    seconds = [n / 1000 for n in range(1, 201)]
    assert percentile_ms(seconds, 0.5) == 100
    assert percentile_ms(seconds, 0.99) == 198
    assert percentile_ms([], 0.5) is None
