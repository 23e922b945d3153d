"""How many CPU threads the numerical libraries of this process use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cpu_threads(threads: int) -> Iterator[None]:
    """Let BLAS, OpenMP and torch use so many CPU threads meanwhile.

    Sums are added up in another order by another number of threads, so what is made of them has
    other last bits. Libraries count that are loaded already: import them before.
    """
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    try:
        with threadpool_limits(threads):
            if torch:
                torch.set_num_threads(threads)
            yield
    finally:
        if torch:
            torch.set_num_threads(before)
