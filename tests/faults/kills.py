"""Runs the recommend flow and kills parts of it, at random instants of chosen stages."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from command_line import REELFLOW, ROOT, environment
from finished_run import RUN
from smallest_run import EVALUATE_EVERY, STAGES

from components.pipeline.runner import open_store
from components.pipeline.settings import Settings

#: What a start and the rest of a run may take on a busy machine; nothing may hang.
ENDS_WITHIN_S = 400.0
#: Stages whose artifacts tell of the registry, which numbers what it is given.
NUMBERED = ("register", "report")

FLOW_PROCESS = "the flow's process"
GROUP = "the flow's process group"
RAY_WORKER = "a Ray worker"
RAY_DRIVER = "the stage's process (Ray's driver)"
NURSERY = "the process that forks for stages"
PREFECT_SERVER = "the Prefect server"
OBJECT_STORE = "the object store"
#: What ends the run; it survives the others, which are tried again within it.
FATAL = (FLOW_PROCESS, GROUP)


@dataclass
class Run:
    """One call of the command line."""

    home: Path
    variables: dict[str, str]
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.home.parent / f"{self.home.name}-{time.time_ns()}.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*REELFLOW, *RUN],
                env=environment(self.home, **self.variables),
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self) -> int:
        try:
            return self.process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill(GROUP)
            raise AssertionError(f"it hangs:\n{self.log.read_text()}") from None

    def stage(self) -> str | None:
        """The stage that executes now, by the lock it holds."""
        for lock in (self.home / "locks").glob("*-*"):
            stage = lock.name.rpartition("-")[0]
            with suppress(FileNotFoundError), lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    if stage in STAGES:
                        return stage
        return None

    def kill(self, target: str, chance: random.Random | None = None) -> bool:
        """SIGKILL; whether there was such a process."""
        if target == GROUP:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            return True
        found = [p for p in self._tree() if target == _what(p, self.process.pid)]
        if not found:
            return False
        with suppress(psutil.NoSuchProcess):
            (chance or random).choice(found).kill()
        return True

    def _tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []


def _what(process: psutil.Process, flow: int) -> str:
    try:
        line = " ".join(process.cmdline())
        if process.pid == flow:
            return FLOW_PROCESS
        if "prefect_app" in line:
            return PREFECT_SERVER
        if line.startswith("ray::") and ("Worker" in line or "execute" in line):
            return RAY_WORKER
        if "stage_process" in line:
            forked = "stage_process" in " ".join(process.parent().cmdline())
            return RAY_DRIVER if forked else NURSERY
    except (psutil.Error, AttributeError):
        pass
    return "another"


@dataclass(frozen=True)
class Undisturbed:
    """What a run gives that nobody kills.

    Attributes:
        seconds: by stage.
        outputs: digests by stage and artifact, of the stages that do not number.
        metrics: of all stages, with the seconds that some of them hold left out.
    """

    seconds: dict[str, float]
    outputs: dict[str, dict[str, str]]
    metrics: dict[str, dict[str, float]]


def published(store: str, home: Path, variables: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Bodies of the manifests by stage; each stage must be there once at most."""
    with _environ(variables):
        found = open_store(Settings(home, store, "", None, None)).manifests()
    count = Counter(manifest.stage for manifest in found)
    assert max(count.values(), default=0) <= 1, f"published twice: {count}"
    return {manifest.stage: manifest.body for manifest in found}


@contextmanager
def _environ(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def outcome(bodies: dict[str, dict[str, Any]]) -> Undisturbed:
    """What is compared of the manifests of a whole run."""
    assert set(bodies) == set(STAGES)
    return Undisturbed(
        {name: body["seconds"] for name, body in bodies.items()},
        {
            name: {key: value["digest"] for key, value in body["outputs"].items()}
            for name, body in bodies.items()
            if name not in NUMBERED
        },
        {
            name: {key: v for key, v in body["metrics"].items() if "seconds" not in key}
            for name, body in bodies.items()
            # Its only figure is the size of a page that says how long things took.
            if name != "report"
        },
    )


@dataclass
class Chain:
    """A run that is killed again and again until it is through: resumes of resumes.

    Attributes:
        kills: targets that were killed, with the stage that executed then.
        codes: how the calls of the command ended.
        lost: training steps that were done twice, for each resume of the training.
    """

    home: Path
    store: str
    variables: dict[str, str]
    chance: random.Random
    seconds: dict[str, float]
    kill_store: Callable[[], None] | None = None
    kills: list[tuple[str, str]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def go(self, plan: list[tuple[str, str]]) -> None:
        """Follow ``plan``, (stage, target) after (stage, target), and then run to the end."""
        run = Run(self.home, self.variables)
        seen: dict[str, tuple[str, str]] = {}
        for stage, target in plan:
            run = self._until(run, stage, seen)
            span = self.seconds[stage] + 0.5
            until = time.monotonic() + self.chance.uniform(0, span)
            if target == RAY_WORKER:
                # Ray takes seconds to start its workers.
                until = time.monotonic() + 60
                while not run.kill(target, self.chance):
                    if run.ended() or run.stage() != stage or time.monotonic() > until:
                        break
                    time.sleep(self.chance.uniform(0.05, 0.5))
                else:
                    self.kills.append((stage, target))
                continue
            while time.monotonic() < until and not run.ended():
                time.sleep(0.02)
            now = run.stage() or "between stages"
            if target == OBJECT_STORE:
                assert self.kill_store is not None
                self.kill_store()
            elif not run.kill(target, self.chance):
                continue
            self.kills.append((now, target))
            if target in FATAL:
                self.codes.append(run.wait())
        while not (run.ended() and run.wait() == 0):
            if run.ended():
                run = Run(self.home, self.variables)
            self.codes.append(run.wait())
            assert len(self.codes) < len(plan) + 5, run.log.read_text()
            self._unchanged(seen)
        self._unchanged(seen)

    def _until(self, run: Run, stage: str, seen: dict[str, tuple[str, str]]) -> Run:
        """Go on, in a new call where the last one ended, until ``stage`` executes or is over."""
        deadline = time.monotonic() + ENDS_WITHIN_S
        while True:
            assert time.monotonic() < deadline, f"no {stage}:\n{run.log.read_text()}"
            if run.ended():
                self.codes.append(run.wait())
                self._unchanged(seen)
                if self.codes[-1] == 0:
                    return run
                run = Run(self.home, self.variables)
            now = run.stage()
            if now is not None and STAGES.index(now) >= STAGES.index(stage):
                return run
            time.sleep(0.02)

    def _unchanged(self, seen: dict[str, tuple[str, str]]) -> None:
        """No published stage is ever published again, nor its files written anew."""
        for name, body in published(self.store, self.home, self.variables).items():
            facts = (body["created_at"], json.dumps(body["outputs"], sort_keys=True))
            assert seen.setdefault(name, facts) == facts, f"{name} ran again"


def steps_lost(home: Path) -> list[int]:
    """Training steps that were done twice, by each resume, as MLflow was told of them."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("recommend")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    lost, reached = [], 0
    for run in runs:
        if run.info.run_name != "train_recommender":
            continue
        steps = sorted({p.step for p in client.get_metric_history(run.info.run_id, "loss")})
        if not steps:
            continue
        # A run of MLflow may hold several tries of the stage: each goes on from a checkpoint.
        if reached:
            lost.append(max(0, reached - steps[0] + EVALUATE_EVERY))
        reached = max(reached, steps[-1])
    return lost
