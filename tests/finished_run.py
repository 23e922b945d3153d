"""One whole run of the smallest recommend flow, made by whichever test needs it first."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from command_line import reelflow
from smallest_run import SMALL

RUN = ("run", "recommend", *SMALL)


def finished_run(factory: pytest.TempPathFactory) -> Path:
    """A folder of all test processes of this session, in which the flow has run once.

    Below it ``home`` is that run's (tests of one file may go on with it), ``store`` a copy of what
    it published that nobody changes, and ``said.txt`` what the command printed.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "finished run"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = folder / "said.txt"
        if not said.exists():
            shutil.rmtree(folder / "home", ignore_errors=True)
            shutil.rmtree(folder / "store", ignore_errors=True)
            done = reelflow(folder / "home", *RUN)
            assert done.returncode == 0, done.stderr
            shutil.copytree(folder / "home" / "store", folder / "store")
            said.write_text(done.stdout)
    return folder
