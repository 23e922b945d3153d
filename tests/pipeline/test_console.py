"""What a person sees while something takes its time: on a real terminal, and in a log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from components.pipeline import console
from components.pipeline.console import working

WORK = """
import time
from pathlib import Path
from components.pipeline import console, run
console.SHOW_AFTER_S = 0.1
stage = run.StageRun("train", 0, Path())
with console.working("flow"):
    time.sleep(0.5)
    with console.working("train"):
        time.sleep(1.5)
        stage.note("all is well")
        with stage.progress(4, "search") as bar:
            bar.advance(1)
            time.sleep(0.3)
            bar.advance(2)
            time.sleep(0.3)
            bar.advance(9)
            time.sleep(0.3)
        print("the result", flush=True)
    time.sleep(0.3)
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str, str]:
    """Distinct lines that a terminal was told to draw, all it was sent, and standard output."""
    result = tmp_path_factory.mktemp("console") / "result"
    ours, theirs = os.openpty()
    with result.open("wb") as file:
        work = subprocess.Popen(
            [sys.executable, "-c", WORK],
            stdin=theirs,
            stdout=file,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        sent = b""
        while True:
            try:
                sent += os.read(ours, 65536)
            except OSError:
                # Nobody holds the other end any more.
                break
        os.close(ours)
        assert work.wait(60) == 0, sent.decode()
    text = sent.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [
        re.sub(r"^[\u2800-\u28ff] ", "", line).rstrip() for line in re.split(r"[\r\n]+", plain)
    ]
    return lines, text, result.read_text()


def test_a_terminal_shows_the_innermost_work_with_its_seconds(
    seen: tuple[list[str], str, str],
) -> None:
    lines = seen[0]
    shown = [line for line in lines if re.match(r"(flow|train) +0:00:0\d$", line)]
    assert {line.split()[0] for line in shown} == {"flow", "train"}
    assert shown[0].startswith("flow")
    assert shown[-1].startswith("flow")
    # Counted from the start of the work, though shown later.
    assert any(re.match(r"train +0:00:01$", line) for line in shown)


def test_a_bar_takes_the_place_of_its_stage_and_never_passes_its_end(
    seen: tuple[list[str], str, str],
) -> None:
    lines = seen[0]
    shares = [int(m[1]) for line in lines if (m := re.search(r"train: search.* (\d+) %", line))]
    assert set(shares) >= {75, 100}
    assert max(shares) == 100
    first = next(n for n, line in enumerate(lines) if "75 %" in line)
    last = max(n for n, line in enumerate(lines) if "100 %" in line)
    assert not [line for line in lines[first:last] if re.match(r"train +0:", line)]


def test_notes_and_results_are_not_drawn_over(seen: tuple[list[str], str, str]) -> None:
    lines, sent, result = seen
    assert "  train: all is well" in lines
    assert result == "the result\n"
    assert "the result" not in sent
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h") > 0


def test_a_log_gets_one_line_for_what_takes_long_and_none_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SHOW_AFTER_S", 0.2)
    with working("quick"):
        pass
    with working("slow"):
        time.sleep(0.6)
    assert capsys.readouterr().err == "  slow ...\n"


def test_work_that_fails_leaves_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SHOW_AFTER_S", 0.1)
    with pytest.raises(ZeroDivisionError), working("hopeless"):
        raise ZeroDivisionError
    time.sleep(0.3)
    assert capsys.readouterr().err == ""
