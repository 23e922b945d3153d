"""What a killed execution left running is ended before its work is taken up again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from components.pipeline.orphans import MARK, end_orphans


def sleeper(execution: str | None) -> subprocess.Popen[bytes]:
    marked = {} if execution is None else {MARK: execution}
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    started = subprocess.Popen(
        command, env={**os.environ, **marked}, stdout=subprocess.PIPE, start_new_session=True
    )
    assert started.stdout is not None
    started.stdout.readline()
    return started


def test_only_processes_of_the_same_execution_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "")
    same, other, unmarked = sleeper("/home:train-1"), sleeper("/home:train-2"), sleeper(None)
    try:
        end_orphans("/home:train-1")
        assert same.poll() is not None
        assert other.poll() is None
        assert unmarked.poll() is None
    finally:
        for process in (same, other, unmarked):
            process.kill()
            process.communicate()


def test_what_is_started_afterwards_bears_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "")
    end_orphans("/home:train-3")
    orphan = sleeper(os.environ[MARK])
    end_orphans("/home:train-3")
    assert orphan.poll() is not None
    orphan.communicate()
