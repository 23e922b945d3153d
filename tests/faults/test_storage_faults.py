"""Storage: an S3 server that fails in every way while stages run and a reader reads.

Whatever happens, a run completes, or stops soon after its last retry with object, operation and the
way to resume; the same command then ends with the bits of a run that nothing disturbed. All cases
run at once, each with a server of its own: most of their time they wait.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import (
    REELFLOW,
    ROOT,
    environment,
    manifests,
    reelflow,
    wait_until_nothing_runs_in,
)
from fault_suite import LONG, Record
from faulty_s3 import FaultyS3
from forked_runs import ForkedRun, ForkedRuns
from smallest_run import EVALUATE_EVERY, SMALL, STAGES

pytestmark = pytest.mark.slow

SEEDS = range(5) if LONG else range(1)
FIRST_STAGES = STAGES[: STAGES.index("split") + 1]
#: Requests of one attempt take this long at most when no connection is made.
LAST_ATTEMPT_S = 10.0
STOPS_WITHIN_S = 10.0
#: All cases at once on two cores are slow; the long version, whose pauses are real, is exact.
SLACK_S = 0.0 if LONG else 30.0
RUN_S = 280.0
#: No videos: x264 does not give the same bytes in every process, which is no matter of storage.
SIZE = [*SMALL, "--set", "ingest.simulator.render_videos=false"]
BUCKET, PREFIX = "artifacts", "a store"


@dataclass
class Case:
    """One run against a server of its own.

    Attributes:
        again: runs the stages with a given home folder and the same store.
        patience_s: of a run whose server does not come back in time.
    """

    s3: FaultyS3
    random: random.Random
    again: Callable[[str, float | None], ForkedRun]
    undisturbed: dict[str, str]
    outcome: str = "completed"

    def until_it_uploads(self, run: ForkedRun) -> None:
        """Wait for the first object of a stage, and a moment more."""
        deadline = time.monotonic() + RUN_S
        while not any("/data/" in key and not key.endswith("started") for key in self.objects()):
            assert run.exit_code is None, run.said
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(self.random.uniform(0, 0.3))

    def objects(self) -> list[str]:
        listed = self.s3.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return [entry["Key"] for entry in listed]

    def must_complete(self, run: ForkedRun) -> None:
        assert run.wait(RUN_S) == 0, run.said
        different = {k for k, v in run.result["digests"].items() if self.undisturbed[k] != v}
        assert not different

    def must_stop_well(self, run: ForkedRun) -> None:
        """A message for a person: the object, the operation, and how to go on."""
        assert run.exit_code == 4, run.said
        assert "Traceback" not in run.said, run.said
        (message,) = (line for line in run.said.splitlines() if line.startswith("error: "))
        assert message.startswith(f"error: s3://{BUCKET}/{PREFIX}/"), message
        assert ": cannot " in message or "altered" in message, message
        assert "same command again" in run.said or "with the same options" in run.said, run.said

    def resume(self) -> None:
        self.s3.fail()
        run = self.again("home", None)
        self.must_complete(run)


def at_random(**faults: float) -> Callable[[Case], None]:
    """Faults that strike requests at random; a run completes through them."""

    def disturb(case: Case) -> None:
        case.s3.fail(seed=case.random.randrange(1000), **faults)
        run = case.again("home", None)
        case.must_complete(run)
        counts = case.s3.counts()
        assert sum(counts.get(kind, 0) for kind in faults) >= 3, counts

    return disturb


def outage(seconds: float) -> Callable[[Case], None]:
    """All connections are reset for a while; that is survived."""

    def disturb(case: Case) -> None:
        run = case.again("home", None)
        case.until_it_uploads(run)
        case.s3.fail(outage_s=seconds)
        case.must_complete(run)
        assert case.s3.counts()["outage"] >= 3

    return disturb


def killed_and_restarted(case: Case) -> None:
    """SIGKILL of the server while files are uploaded; it comes back with all it confirmed."""
    run = case.again("home", None)
    for _ in range(2):
        case.until_it_uploads(run)
        case.s3.kill()
        time.sleep(case.random.uniform(0, 1))
        case.s3.restart()
    case.must_complete(run)


def restarted_empty(case: Case) -> None:
    """The server loses all its objects during a run, and somebody makes the bucket again."""
    run = case.again("home", None)
    case.until_it_uploads(run)
    case.s3.restart(empty=True)
    case.s3.make_bucket(BUCKET)
    if run.wait(RUN_S):
        case.must_stop_well(run)
        case.outcome = "stopped well; resumed, bitwise equal"
    case.resume()


def restarted_without_bucket(case: Case) -> None:
    """The server loses its objects and the bucket: no waiting, a clear error."""
    run = case.again("home", None)
    case.until_it_uploads(run)
    case.s3.restart(empty=True)
    assert run.wait(RUN_S) == 4, run.said
    case.must_stop_well(run)
    assert "NoSuchBucket" in run.said
    case.s3.make_bucket(BUCKET)
    case.resume()
    case.outcome = "stopped well; resumed, bitwise equal"


def never_back(patience_s: float | None) -> Callable[[Case], None]:
    """The server is gone; the run ends soon after its last retry."""

    def disturb(case: Case) -> None:
        from components.pipeline.s3 import PATIENCE_S

        run = case.again("home", patience_s)
        case.until_it_uploads(run)
        case.s3.kill()
        start = time.monotonic()
        run.wait(RUN_S)
        took = time.monotonic() - start
        case.must_stop_well(run)
        patience = PATIENCE_S if patience_s is None else patience_s
        assert took < patience + LAST_ATTEMPT_S + STOPS_WITHIN_S + SLACK_S
        case.s3.restart()
        case.resume()
        case.outcome = "stopped well; resumed, bitwise equal"

    return disturb


MIXED = {"refuse": 0.1, "truncate": 0.1, "reset": 0.1, "reset_within": 0.1, "stall": 0.1}
FAULTS: dict[str, Callable[[Case], None]] = {
    "1 in 3 requests 503": at_random(refuse=1 / 3),
    "stalls of 2 s": at_random(stall=1 / 3 if LONG else 1 / 6),
    "1 in 3 bodies truncated": at_random(truncate=1 / 3),
    "1 in 3 connections reset": at_random(reset=1 / 6, reset_within=1 / 6),
    "outage": outage(30 if LONG else 6),
    "server killed, back with its objects": killed_and_restarted,
    "server restarted empty": restarted_empty,
    **({"server restarted without the bucket": restarted_without_bucket} if LONG else {}),
    "server never comes back": never_back(None if LONG else 4.0),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with ForkedRuns(tmp_path_factory.mktemp("runs"), SIZE[1::2]) as forks:
        yield forks


@pytest.fixture(scope="module")
def undisturbed(runs: ForkedRuns, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of all outputs of a run in a folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = runs.run(folder / "home", str(folder / "store"), {}, FIRST_STAGES)
    assert run.wait(RUN_S) == 0, run.said
    assert run.result["executed"] == list(FIRST_STAGES)
    return dict(run.result["digests"])


@pytest.fixture(scope="module")
def cases(
    runs: ForkedRuns, undisturbed: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, int], Future[str]]]:
    """All cases, under way."""
    with ThreadPoolExecutor(len(FAULTS)) as pool:
        yield {
            (fault, seed): pool.submit(
                disturb_one, fault, seed, runs, undisturbed, tmp_path_factory.mktemp("case")
            )
            for seed in SEEDS
            for fault in FAULTS
        }


def disturb_one(
    fault: str, seed: int, runs: ForkedRuns, undisturbed: dict[str, str], folder: Path
) -> str:
    """Run under one fault beside a reader, and once more elsewhere; how it came out."""
    with FaultyS3(folder) as s3:
        uri = f"{s3.make_bucket(BUCKET)}/{PREFIX}"

        def again(home: str, patience_s: float | None) -> ForkedRun:
            return runs.run(folder / home, uri, s3.environment(), FIRST_STAGES, patience_s)

        case = Case(s3, random.Random(f"{fault} {seed}"), again, undisturbed)
        reader = runs.read(uri, s3.environment(), folder / "stop reading")
        try:
            FAULTS[fault](case)
            s3.fail()
            elsewhere = again("another home", None)
            case.must_complete(elsewhere)
            assert elsewhere.result["executed"] == []
            # Nothing of the run stays but what it published.
            left = [
                key
                for key in case.objects()
                if key.startswith(f"{PREFIX}/scratch/") and "/lease/" not in key
            ]
            assert left == []
        finally:
            (folder / "stop reading").touch()
        assert reader.wait(RUN_S) == 0, reader.said
        seen = reader.result
        assert seen["torn"] == []
        assert seen["manifests"] >= len(FIRST_STAGES)
        assert seen["files"] >= len(undisturbed)
        return case.outcome


@pytest.mark.timeout(3600 if LONG else 600)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_and_a_reader_through(
    fault: str, seed: int, cases: dict[tuple[str, int], Future[str]], record: Record
) -> None:
    outcome = cases[fault, seed].result()
    record(fault, outcome)
    record("reader beside it", "no torn data")


@pytest.mark.skipif(not LONG, reason="minutes: make faults")
@pytest.mark.timeout(1800)
def test_a_flow_killed_in_training_resumes_on_another_machine_through_all_faults(
    tmp_path: Path, record: Record
) -> None:
    words = ["run", "recommend", *SIZE, "--until", "evaluate_recommender"]
    alone = reelflow(tmp_path / "undisturbed", *words)
    assert alone.returncode == 0, alone.stderr
    wanted = outputs(manifests(tmp_path / "undisturbed"))

    with FaultyS3(tmp_path) as s3:
        uri = f"{s3.make_bucket(BUCKET)}/{PREFIX}"
        words += ["--store", uri]
        s3.fail(seed=1, **MIXED)
        with (tmp_path / "said").open("w") as said:
            process = subprocess.Popen(
                [*REELFLOW, *words],
                env=environment(tmp_path / "home", **s3.environment()),
                cwd=ROOT,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            wait_for_checkpoint(s3, process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            print((tmp_path / "said").read_text())
        wait_until_nothing_runs_in(tmp_path / "home")
        done = reelflow(tmp_path / "another home", *words, **s3.environment())
        assert done.returncode == 0, done.stderr
        s3.fail()
        listed = s3.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{PREFIX}/manifests/")
        found = {}
        for key in (entry["Key"] for entry in listed["Contents"]):
            found[key] = s3.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
        assert outputs(found) == wanted
    assert first_step_of_training(tmp_path / "another home") > EVALUATE_EVERY
    record("flow killed in training, all faults", "resumed on another machine, bitwise equal")


def outputs(published: dict[str, bytes]) -> dict[str, str]:
    """Digests of all outputs by name."""
    bodies = [json.loads(data)["body"] for data in published.values()]
    return {
        f"{body['stage']}/{name}": record["digest"]
        for body in bodies
        for name, record in body["outputs"].items()
    }


def wait_for_checkpoint(s3: FaultyS3, process: subprocess.Popen[bytes]) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + 400
    prefix, keys = f"{PREFIX}/scratch/train_recommender/", [""]
    while not any("checkpoint_manager_snapshot" in key for key in keys):
        assert process.poll() is None, "it ended before it wrote a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.1)
        # This request meets the faults as well.
        with suppress(BotoCoreError, ClientError):
            listed = s3.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
            keys = [entry["Key"] for entry in listed.get("Contents", [])]


def first_step_of_training(home: Path) -> int:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("recommend")
    runs = client.search_runs([experiment.experiment_id])
    (training,) = (run for run in runs if run.info.run_name == "train_recommender")
    return min(point.step for point in client.get_metric_history(training.info.run_id, "loss"))
