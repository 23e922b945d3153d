"""Processes of one thread each, for many small trainings: these gain nothing from a second one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context

#: Memory of a process that trains.
WORKER_BYTES = 2 << 30


@contextmanager
def one_thread_each(most: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """As many processes as there are cores and memory, ``most`` at most.

    Whoever ends the block early does not wait for what is being trained.
    """
    from components.pipeline.machine import cores, memory_bytes

    workers = max(1, min(cores(), memory_bytes() // WORKER_BYTES, most or cores()))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException:
        for worker in active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """One thread, and what PyTorch loads with its first optimiser: no training is to pay for it."""
    import torch

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
