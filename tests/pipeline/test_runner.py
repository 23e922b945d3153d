"""Stages run once for one cache key; what interrupts them leaves nothing but their checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from tiny_stages import Tiny

from components.pipeline.artifacts import Input
from components.pipeline.errors import (
    DataContractError,
    HardwareError,
    ReelflowError,
    StageError,
    StorageError,
    UsageError,
)
from components.pipeline.flow import Flow
from components.pipeline.manifest import digest_json
from components.pipeline.runner import environment, scratch_path, slice_flow
from components.pipeline.stage import REGISTRY, stage
from components.pipeline.storage import exclusive


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# What runs again


def test_the_same_command_again_runs_nothing(tiny: Tiny, tmp_path: Path) -> None:
    assert tiny.run(tmp_path) == ["numbers", "doubled", "total"]
    before = files(tmp_path)
    assert tiny.run(tmp_path) == []
    assert tiny.calls == ["numbers", "doubled", "total"]
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("override", "executed"),
    [
        ("numbers.count=6", ["numbers", "doubled", "total"]),
        ("seed=1", ["numbers", "doubled", "total"]),
        ("doubled.factor=3", ["doubled", "total"]),
        ("doubled.rounding.digits=0", ["doubled"]),
        ("numbers.attempt=1", ["numbers"]),
        ("total.label=t", ["total"]),
    ],
)
def test_a_parameter_runs_again_what_reads_it_and_what_sees_a_difference(
    tiny: Tiny, tmp_path: Path, override: str, executed: list[str]
) -> None:
    tiny.run(tmp_path)
    assert tiny.run(tmp_path, override) == executed
    assert tiny.run(tmp_path, override) == []
    assert tiny.run(tmp_path) == []


def test_outside_data_that_changed_runs_again(tiny: Tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path)
    tiny.outside = "data of tomorrow"
    assert tiny.run(tmp_path) == ["numbers"]


def test_force_runs_again_and_what_it_publishes_is_read(tiny: Tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path)
    runner = tiny.runner(tmp_path)
    first, _ = runner.execute(REGISTRY["numbers"])
    forced, cached = runner.execute(REGISTRY["numbers"], force=True)
    assert cached is False
    assert forced.body["outputs"]["numbers"]["path"] != first.body["outputs"]["numbers"]["path"]
    assert forced.output_digest("numbers") == first.output_digest("numbers")
    assert tiny.runner(tmp_path).execute(REGISTRY["numbers"])[0].body == forced.body


def test_a_moved_store_is_still_whole(tiny: Tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "not here é")
    assert tiny.run(tmp_path / "not here é") == []
    runner = tiny.runner(tmp_path / "not here é")
    manifest, _ = runner.execute(REGISTRY["numbers"])
    assert Input(runner.store, "numbers", manifest).read_table().num_rows == 5


# Plans


def test_a_plan_says_what_would_happen_and_does_nothing(tiny: Tiny, tmp_path: Path) -> None:
    steps = tiny.runner(tmp_path).plan(tiny.stages)
    assert [(s.stage.name, s.status) for s in steps] == [
        ("numbers", "run"),
        ("doubled", "waits"),
        ("total", "waits"),
    ]
    assert steps[0].reason == "never ran in this store"
    assert steps[1].reason == "after numbers; cached if their outputs stay the same"
    assert files(tmp_path) == ["params.yaml"]
    tiny.run(tmp_path)
    steps = tiny.runner(tmp_path, "doubled.factor=4").plan(tiny.stages)
    assert [s.status for s in steps] == ["cached", "run", "waits"]
    assert steps[1].reason == "param factor: 2.0 → 4.0"
    forced = tiny.runner(tmp_path).plan(tiny.stages, frozenset(["doubled"]))
    assert [(s.status, s.reason) for s in forced][1] == ("run", "forced")


def test_a_stage_whose_upstream_is_not_there_says_what_to_run(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        tiny.runner(tmp_path).execute(REGISTRY["doubled"])
    assert "run it first: reelflow stage numbers" in str(caught.value)
    assert "never ran in this store" in str(caught.value)


def test_a_flow_is_cut_by_names_and_refuses_others(tiny: Tiny) -> None:
    flow = Flow("tiny", "Tiny.", ("numbers", "doubled", "total"))
    assert [s.name for s in slice_flow(flow, "doubled", None)] == ["doubled", "total"]
    assert [s.name for s in slice_flow(flow, None, "doubled")] == ["numbers", "doubled"]
    for start, until in (("nothing", None), (None, "nothing"), ("total", "numbers")):
        with pytest.raises(UsageError, match="--"):
            slice_flow(flow, start, until)
    assert flow.dependencies() == {"numbers": (), "doubled": ("numbers",), "total": ("doubled",)}
    with pytest.raises(UsageError, match="no earlier stage writes"):
        Flow("tiny", "", ("doubled", "numbers")).resolve()


# The manifest


def test_the_manifest_holds_what_a_later_reader_needs(tiny: Tiny, tmp_path: Path) -> None:
    runner = tiny.runner(tmp_path, "seed=4", "numbers.count=7")
    for each in tiny.stages[:2]:
        runner.execute(each)
    upstream, body = (runner.done[name].body for name in ("numbers", "doubled"))
    assert upstream["seed"] == 4
    assert upstream["external"] == digest_json("data of today")
    record = upstream["outputs"]["numbers"]
    assert record["rows"] == 7
    assert record["schema"] == "n: int64"
    (file,) = record["files"]
    content = (tmp_path / "store" / record["path"] / file["name"]).read_bytes()
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert file["size"] == len(content)
    assert "rows" not in upstream["outputs"]["facts"]
    assert body["inputs"] == {"numbers": record["digest"]}
    assert body["params"] == {"factor": 2.0, "rounding": {"digits": 2}}
    assert body["params_digest"] == digest_json(body["params"])
    assert body["metrics"] == {"largest": 20.0}
    assert body["seconds"] >= 0
    assert body["peak_rss_bytes"] > 2**20
    assert body["environment"]["torch"] == torch.__version__
    assert body["environment"] == environment()
    on_disk = tmp_path / "store/manifests/doubled" / f"{body['key']}.json"
    assert json.loads(on_disk.read_bytes())["body"] == body


def test_a_stage_sees_the_manifests_of_everything_above_it(tiny: Tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path)
    runner = tiny.runner(tmp_path)
    runner.resolve_upstream(REGISTRY["total"])
    lineage = runner.inputs_of(REGISTRY["total"]).lineage()
    assert [body["stage"] for body in lineage] == ["numbers", "doubled"]


# What interrupts a stage


def failing(error: BaseException) -> Any:
    def during(run: Any) -> None:
        (run.scratch / "checkpoint").write_text("half")
        raise error

    return during


def nothing_is_published(folder: Path) -> bool:
    return not files(folder / "store") and not (folder / "store/manifests").exists()


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (DataContractError("column 'a' is missing", where="f.parquet"), 3),
        (HardwareError("no GPU"), 2),
        (StageError("no"), 4),
    ],
)
def test_an_error_of_the_platform_keeps_its_type_and_leaves_no_output(
    tiny: Tiny, tmp_path: Path, error: ReelflowError, exit_code: int
) -> None:
    tiny.during = failing(error)
    with pytest.raises(ReelflowError) as caught:
        tiny.run(tmp_path)
    assert caught.value is error
    assert caught.value.exit_code == exit_code
    assert nothing_is_published(tmp_path)


def test_any_other_error_becomes_a_stage_error_with_its_cause(tiny: Tiny, tmp_path: Path) -> None:
    tiny.during = failing(ZeroDivisionError("division by zero"))
    with pytest.raises(StageError) as caught:
        tiny.run(tmp_path)
    assert "stage 'numbers' failed: ZeroDivisionError: division by zero" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert nothing_is_published(tmp_path)


def test_an_interrupt_leaves_no_output_and_keeps_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    tiny.during = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path)
    assert nothing_is_published(tmp_path)
    assert [p.split("/")[-1] for p in files(tmp_path / "home")] == ["checkpoint"]


def test_a_resume_finds_the_same_scratch_and_a_success_removes_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    tiny.during = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path)
    seen = []
    tiny.during = lambda run: seen.append((run.scratch / "checkpoint").read_text())
    runner = tiny.runner(tmp_path)
    scratch = scratch_path(runner.settings, runner.identify(tiny.stages[0]))
    assert (scratch / "checkpoint").is_file()
    runner.execute(tiny.stages[0])
    assert seen == ["half"]
    assert not scratch.parent.exists()


def test_other_parameters_start_with_an_empty_scratch(tiny: Tiny, tmp_path: Path) -> None:
    tiny.during = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path)
    seen: list[Any] = []
    tiny.during = lambda run: seen.extend(run.scratch.iterdir())
    tiny.runner(tmp_path, "numbers.attempt=1").execute(tiny.stages[0])
    assert seen == []


class Nothing(BaseModel):
    """No parameters."""


def returning(value: Any) -> Any:
    @stage(outputs=("made",), params=Nothing)
    def make(params: Nothing, inputs: Any, outputs: Any, run: Any) -> Any:
        return value

    return REGISTRY["make"]


def test_metrics_are_kept_as_numbers(tiny: Tiny, tmp_path: Path) -> None:
    made = returning({"a": np.float32(0.5), "b": torch.tensor(2), "c": True})
    manifest, _ = tiny.runner(tmp_path).execute(made)  # type: ignore[arg-type]
    assert manifest.metrics == {"a": 0.5, "b": 2.0, "c": 1.0}


@pytest.mark.parametrize("value", [None, {"a": "high"}, [1]])
def test_metrics_that_are_none_are_a_stage_error(tiny: Tiny, tmp_path: Path, value: Any) -> None:
    made = returning(value)
    with pytest.raises(StageError, match="stage 'make' failed"):
        tiny.runner(tmp_path).execute(made)
    assert nothing_is_published(tmp_path)


def test_outside_data_that_cannot_be_looked_at_is_a_stage_error(tiny: Tiny, tmp_path: Path) -> None:
    def unreadable(params: Any) -> str:
        raise FileNotFoundError("no such folder: /data")

    @stage(outputs=("made",), params=Nothing, external=unreadable)
    def make(params: Nothing, inputs: Any, outputs: Any, run: Any) -> dict[str, float]:
        return {}

    with pytest.raises(StageError, match=r"stage 'make' reads.*no such folder: /data"):
        tiny.runner(tmp_path).plan([REGISTRY["make"]])


def test_a_home_that_cannot_be_written_is_a_storage_error(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="REELFLOW_HOME"):
        tiny.run(tmp_path)
    (tmp_path / "home").unlink()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "scratch").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="REELFLOW_HOME"):
        tiny.run(tmp_path)


def test_a_store_that_cannot_be_written_is_told_from_a_home_that_cannot(
    tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data").write_text("a file where the folder should be")
    with pytest.raises(StorageError) as caught:
        tiny.run(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/store/data/numbers/")
    assert "--store or ARTIFACT_ROOT" in str(caught.value)
    assert "REELFLOW_HOME" not in str(caught.value)


def test_locks_do_not_pile_up(tiny: Tiny, tmp_path: Path) -> None:
    for attempt in range(3):
        tiny.run(tmp_path, f"numbers.attempt={attempt}")
    assert list((tmp_path / "home" / "locks").iterdir()) == []


def test_holders_of_a_lock_take_turns_though_each_removes_its_file(tmp_path: Path) -> None:
    counter, lock = tmp_path / "counter", tmp_path / "locks" / "counter"
    counter.write_text("0")

    def count() -> None:
        for _ in range(40):
            with exclusive(lock):
                value = int(counter.read_text())
                time.sleep(0.0005)
                counter.write_text(str(value + 1))

    threads = [threading.Thread(target=count) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "240"
    assert not lock.exists()


# What a stage tells while it runs


def test_progress_shows_after_a_while_and_notes_at_once(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(run: Any) -> None:
        run.note("reading")
        with run.progress(4, "quick") as bar:
            bar.advance(4)
        monkeypatch.setattr("components.pipeline.console.SHOW_AFTER_S", 0)
        monkeypatch.setattr("components.pipeline.console.LINE_EVERY_S", 0)
        monkeypatch.setattr("components.pipeline.run.TOLD_EVERY_S", 0)
        with run.progress(4, "slow") as bar:
            bar.advance()
            bar.advance(2)
        with run.progress(0, "of unknown length") as bar:
            bar.advance(7)

    tiny.during = work
    tiny.runner(tmp_path).execute(tiny.stages[0])
    assert capsys.readouterr().err.splitlines() == [
        "  numbers: reading",
        "  numbers: slow: 25 %",
        "  numbers: slow: 75 %",
        "  numbers: of unknown length: 7",
    ]


def test_the_cost_of_a_stage_counts_the_memory_of_its_children(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.pipeline.profiler.SAMPLE_EVERY_S", 0.02)
    monkeypatch.setattr("components.pipeline.profiler.PAUSE_OVER_SAMPLE", 1)
    script = "b = bytearray(300 * 2**20); b[::4096] = b'x' * len(b[::4096]); print(1); input()"

    def work(run: Any) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.3)
            child.communicate(b"end\n")

    without, _ = tiny.runner(tmp_path).execute(tiny.stages[0])
    tiny.during = work
    with_child, _ = tiny.runner(tmp_path, "numbers.attempt=1").execute(tiny.stages[0])
    extra = with_child.body["peak_rss_bytes"] - without.body["peak_rss_bytes"]
    assert 290 * 2**20 < extra < 600 * 2**20
    assert with_child.body["seconds"] >= 0.3


def test_memory_is_sampled_less_often_where_a_sample_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from components.pipeline import profiler

    samples: list[int] = []

    def costly() -> int:
        begun = time.thread_time()
        while time.thread_time() < begun + 0.02:
            pass
        samples.append(len(samples))
        return 7

    monkeypatch.setattr(profiler, "SAMPLE_EVERY_S", 0.01)
    monkeypatch.setattr(profiler, "process_tree_bytes", costly)
    with profiler.Cost() as cost:
        time.sleep(0.8)
    # One at once, the next a second later; the last one is that of the end.
    assert len(samples) == 2
    assert cost.peak_bytes == 7
