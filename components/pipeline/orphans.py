"""Processes that outlive a killed execution of a stage, for seconds: Ray's workers above all.

They go on writing checkpoints, and removing old ones, where the next execution reads. Whatever a
stage starts inherits a mark in its environment; who executes the same work next, alone by its
lock, ends what still bears the mark.
"""

from __future__ import annotations

import os
from contextlib import suppress

MARK = "REELFLOW_EXECUTION"
GONE_WITHIN_S = 10.0


def end_orphans(execution: str) -> None:
    """End the processes that an earlier ``execution`` left, and mark those to come.

    Args:
        execution: name of the work on this machine; the caller holds its lock.
    """
    import psutil

    me = psutil.Process()
    # A process that was started by a marked one for other work is marked as well.
    family = {me.pid, *(parent.pid for parent in me.parents())}
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid not in family and process.environ().get(MARK) == execution:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, GONE_WITHIN_S)
    os.environ[MARK] = execution
