"""`reelflow bench`: the list, the table and the JSON that scripts read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ingest, runner
from benchmarks.result import Result
from components.pipeline.errors import StageError, UsageError

MADE_UP = """
from __future__ import annotations
import os
import subprocess
from benchmarks.result import Result

SUMMARY: str = "A made-up claim"
{top}

def run(quick: bool = False) -> list[Result]:
    print("noise of the benchmark")
    subprocess.run(["echo", "noise of its child"], check=True)
    return [
        Result("items_per_second", 200.0, 10.0, "items/s", 190.0, 210.0, 5, True),
        Result("seconds", 2.0, 10.0, "s", 1.9, 2.1, 3 if quick else 30, False),
        Result("alone", 7.0, None, "GiB", float("nan"), 7.5, 1, False),
        Result("none_at_all", 0.0, 195.0, "items", 0.0, 0.0, 3, False),
    ]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmarks package with one more folder in it."""
    import benchmarks

    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    (tmp_path / "made_up.py").write_text(MADE_UP.format(top=""))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("benchmarks.made_up")]:
        del sys.modules[name]


def test_every_benchmark_of_the_project_has_a_summary_and_a_run() -> None:
    found = runner.list_benchmarks()
    modules = {p.stem for p in runner.FOLDER.glob("*.py")} - {"__init__", "result", "runner"}
    assert set(found) <= modules
    for name, summary in found.items():
        assert summary
        assert "\n" not in summary, name
        assert "def run(" in (runner.FOLDER / f"{name}.py").read_text()


def test_listing_imports_no_benchmark(folder: Path) -> None:
    (folder / "made_up.py").write_text(MADE_UP.format(top="raise RuntimeError('imported')"))
    assert runner.list_benchmarks() == {"made_up": "A made-up claim"}


def test_json_is_the_only_thing_on_standard_output(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runner.run_benchmark("made_up", as_json=True)
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert list(document) == ["bench", "commit", "machine", "seconds", "results"]
    assert document["bench"] == "made_up"
    assert document["seconds"] > 0
    assert {"cpu", "cores", "memory_gib", "torch_threads"} <= document["machine"].keys()
    first, second, alone, none_at_all = document["results"]
    assert first == {
        "name": "items_per_second",
        "ours": 200.0,
        "reference": 10.0,
        "ratio": 20.0,
        "unit": "items/s",
        "low": 190.0,
        "high": 210.0,
        "n": 5,
    }
    assert second["ratio"] == 5.0
    assert second["n"] == 30
    assert (alone["reference"], alone["ratio"], alone["low"]) == (None, None, None)
    # Infinitely better: JSON has no word for it.
    assert (none_at_all["ours"], none_at_all["ratio"]) == (0.0, None)
    assert "noise of the benchmark" in err
    assert "noise of its child" in err


def test_the_table_shows_ratios_and_warns_of_quick_sizes(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runner.run_benchmark("made_up", quick=True)
    out, _ = capfd.readouterr()
    assert "A made-up claim" in out
    assert "20.00×" in out
    assert "5.00×" in out
    assert "∞" in out
    assert "not a figure" in out


@pytest.mark.parametrize(
    ("ours", "reference", "higher_is_better", "ratio"),
    [
        (3.0, 2.0, True, 1.5),
        (3.0, 2.0, False, 2 / 3),
        (0.0, 2.0, True, 0.0),
        (0.5, 0.0, True, math.inf),
        (0.0, 0.5, False, math.inf),
        (0.0, 0.0, True, None),
        (0.5, None, True, None),
        # Differences have no ratio where one is a loss.
        (-0.5, 0.0, True, None),
        (0.0, -0.5, False, None),
        (-0.5, 0.1, True, None),
        (-0.5, -0.1, True, None),
    ],
)
def test_a_ratio_is_of_two_figures_that_are_not_below_nothing(
    ours: float, reference: float | None, higher_is_better: bool, ratio: float | None
) -> None:
    result = Result("figure", ours, reference, "x", ours, ours, 1, higher_is_better)
    assert result.ratio == ratio


def test_an_unknown_name_suggests_the_nearest(folder: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'made_up'"):
        runner.run_benchmark("madeup")


def test_a_benchmark_that_breaks_is_a_failed_stage(folder: Path) -> None:
    (folder / "made_up.py").write_text(MADE_UP.format(top="raise RuntimeError('no luck')"))
    with pytest.raises(StageError, match="RuntimeError: no luck"):
        runner.run_benchmark("made_up")


def test_the_commit_is_the_one_git_tells_and_unknown_outside_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    assert runner.commit() == "unknown"

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    git("tag", "v1")
    assert runner.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert runner.commit() == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.slow
def test_the_reference_of_ingest_judges_by_every_rule_there_is(tmp_path: Path) -> None:
    ingest.write_tables(tmp_path, 5000)
    assert ingest._whole_table_in_pandas(tmp_path)["validate_seconds"] > 0
