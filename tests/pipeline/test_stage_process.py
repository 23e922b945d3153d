"""A stage in a process of its own: what it says arrives, and it can be ended whatever it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import process_stages
import psutil
import pytest
from process_stages import executions, only_these_stages

from components.pipeline.errors import DataContractError, StageDied, StageError, StageTimeout
from components.pipeline.runner import Runner
from components.pipeline.settings import Settings
from components.pipeline.stage import REGISTRY
from components.pipeline.stage_process import StageProcesses, StageTraceback


class Told:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []
        self.figures: dict[str, bytes] = {}
        self.notes: list[str] = []
        self.shares: list[float | None] = []

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        self.steps.append(step)

    def figure(self, name: str, png: bytes) -> None:
        self.figures[name] = png

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, label: str, done: float | None, total: float) -> None:
        self.shares.append(None if done is None else done / total)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with only_these_stages():
        yield


@pytest.fixture(scope="module")
def processes(registered: None) -> Iterator[StageProcesses]:
    with StageProcesses() as started:
        yield started


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    return tmp_path / "traces"


def make(tmp_path: Path, *overrides: str) -> Runner:
    settings = Settings(tmp_path / "home", str(tmp_path / "store"), "", None, None)
    return process_stages.runner(settings, tmp_path / "traces", *overrides)


def execute(
    processes: StageProcesses,
    runner: Runner,
    stage: str = "numbers",
    limit_s: float = 60,
    **more: Any,
) -> tuple[Any, bool]:
    options = {"force": False, "sinks": (), "environment": {}, **more}
    return processes.execute(runner, REGISTRY[stage], limit_s=limit_s, **options)


def test_results_notes_metrics_and_figures_arrive(
    processes: StageProcesses, tmp_path: Path, traces: Path
) -> None:
    runner, told = make(tmp_path, "numbers.rounds=8"), Told()
    manifest, cached = execute(processes, runner, sinks=(told,))
    assert (manifest.metrics["rows"], cached) == (5, False)
    assert told.notes == ["execution 1"]
    assert told.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert told.shares[-1] is None
    shares = [share for share in told.shares if share is not None]
    assert len(shares) >= 3
    assert shares == sorted(shares)
    execute(processes, runner, "doubled")
    manifest, _ = execute(processes, runner, "total", sinks=(told,))
    assert manifest.metrics == {"total": 20}
    assert told.figures["a line"].startswith(b"\x89PNG")
    assert execute(processes, runner, "total")[1]
    assert executions(traces) == ["numbers", "doubled", "total"]
    pids = {file.name.split("-")[1] for file in traces.iterdir()}
    assert len(pids) == 3
    assert str(os.getpid()) not in pids


def test_what_it_publishes_is_what_this_process_would_publish(
    processes: StageProcesses, tmp_path: Path
) -> None:
    apart, here = make(tmp_path / "a"), make(tmp_path / "b")
    # The traces are of different folders, which are parameters; compare the content alone.
    one, _ = execute(processes, apart)
    two, _ = here.execute(REGISTRY["numbers"])
    assert one.output_digest("numbers") == two.output_digest("numbers")
    assert one.body["code_digest"] == two.body["code_digest"]


def test_an_error_arrives_as_the_stage_raised_it(processes: StageProcesses, tmp_path: Path) -> None:
    with pytest.raises(DataContractError) as caught:
        execute(processes, make(tmp_path, "numbers.trouble=contract"))
    assert caught.value.where == "f.parquet"
    assert caught.value.exit_code == 3
    assert caught.value.__cause__ is None


def test_a_bug_arrives_with_its_traceback(processes: StageProcesses, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="ZeroDivisionError: division by zero") as caught:
        execute(processes, make(tmp_path, "numbers.trouble=bug"))
    assert isinstance(caught.value.__cause__, StageTraceback)
    assert "in _go_wrong" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("trouble", "how"), [("killed", "was killed by SIGKILL"), ("exits", "ended with 7")]
)
def test_a_process_that_dies_is_told_and_the_next_stage_runs(
    trouble: str, how: str, processes: StageProcesses, tmp_path: Path
) -> None:
    runner = make(tmp_path, f"numbers.trouble={trouble}")
    with pytest.raises(StageDied, match=how) as caught:
        execute(processes, runner)
    assert not isinstance(caught.value, StageTimeout)
    assert "stage 'numbers'" in str(caught.value)
    assert runner.store.manifests() == []
    assert execute(processes, make(tmp_path))[0].metrics["rows"] == 5


@pytest.mark.parametrize("trouble", ["hangs", "hangs in C"])
def test_a_limit_of_time_holds_for_native_code_too(
    trouble: str, processes: StageProcesses, tmp_path: Path, traces: Path
) -> None:
    runner = make(tmp_path, f"numbers.trouble={trouble}")
    start = time.monotonic()
    with pytest.raises(StageTimeout, match="took longer than 1 s") as caught:
        execute(processes, runner, limit_s=1)
    # The code in C hears no signal that Python handles; it is killed after a while.
    assert time.monotonic() - start < 60
    assert isinstance(caught.value, TimeoutError)
    (trace,) = traces.iterdir()
    assert not psutil.pid_exists(int(trace.name.split("-")[1]))


class Slow(Told):
    """Somebody who takes a while to listen."""

    def log(self, metrics: Any, step: int | None) -> None:
        time.sleep(0.05)


def test_a_limit_of_time_holds_for_one_that_talks_faster_than_anybody_listens(
    processes: StageProcesses, tmp_path: Path
) -> None:
    with pytest.raises(StageTimeout):
        execute(processes, make(tmp_path, "numbers.trouble=talks"), limit_s=1, sinks=(Slow(),))


def test_the_next_try_goes_on_from_the_checkpoint(
    processes: StageProcesses, tmp_path: Path
) -> None:
    runner = make(tmp_path, "numbers.rounds=30", "numbers.trouble=killed once")
    with pytest.raises(StageTimeout):
        execute(processes, runner, limit_s=1.5)
    manifest, _ = execute(processes, runner)
    assert manifest.metrics["started_at_round"] >= 5


def test_a_lost_nursery_is_replaced(tmp_path: Path) -> None:
    with StageProcesses() as processes:
        processes.get_ready()
        assert processes._nursery is not None
        processes._nursery.kill()
        processes._nursery.wait()
        with pytest.raises(StageDied, match="was lost"):
            execute(processes, make(tmp_path))
        assert execute(processes, make(tmp_path))[0].metrics["rows"] == 5


def test_an_edit_while_the_flow_runs_is_refused(processes: StageProcesses, tmp_path: Path) -> None:
    runner = make(tmp_path)
    identity = runner.identify(REGISTRY["numbers"])
    runner.identify = lambda stage: type(identity)(  # type: ignore[method-assign]
        **{**vars(identity), "code": {"components.edited": "0"}}
    )
    with pytest.raises(StageError, match="changed while the flow ran"):
        execute(processes, runner)


FLOW_THAT_IS_KILLED = """
import sys
from pathlib import Path
import process_stages
from components.pipeline.settings import Settings
from components.pipeline.stage import REGISTRY
from components.pipeline.stage_process import StageProcesses
process_stages.register()
folder = Path(sys.argv[1])
settings = Settings(folder / "home", str(folder / "store"), "", None, None)
runner = process_stages.runner(settings, folder / "traces", "numbers.trouble=" + sys.argv[2])
with StageProcesses() as processes:
    options = {"force": False, "sinks": (), "environment": {}, "limit_s": 600}
    processes.execute(runner, REGISTRY["numbers"], **options)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("trouble", ["hangs", "hangs in C"])
def test_a_stage_ends_with_its_flow(
    number: signal.Signals, trouble: str, tmp_path: Path, traces: Path
) -> None:
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW_THAT_IS_KILLED, str(tmp_path), trouble],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (traces.is_dir() and list(traces.iterdir())):
        assert flow.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    tree = psutil.Process(flow.pid).children(recursive=True)
    assert len(tree) == 2
    flow.send_signal(number)
    flow.wait(60)
    _, alive = psutil.wait_procs(tree, 10)
    assert alive == []


def test_threads_may_tell_at_once(tmp_path: Path) -> None:
    from multiprocessing import Pipe

    from components.pipeline.stage_process import _Wire

    ours, theirs = Pipe()
    wire = _Wire(theirs)
    threads = [
        threading.Thread(target=lambda n=n: [wire.note(f"{n}") for _ in range(200)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    heard = [ours.recv()[1][1] for _ in range(800)]
    for thread in threads:
        thread.join()
    assert sorted(heard) == sorted(f"{n}" for n in range(4) for _ in range(200))
