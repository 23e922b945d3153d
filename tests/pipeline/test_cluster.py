"""Training on real Ray workers survives the death of a worker and of the driver, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_training
import torch
from faulty_s3 import FaultyS3
from safetensors.torch import load_file

from components.pipeline import cluster
from components.pipeline.actor_map import map_on_ray
from components.pipeline.actor_pool import actor_pool, in_turn
from components.pipeline.checkpoints import LocalCheckpoints, StoredCheckpoints
from components.pipeline.cluster import ray_session, train_on_ray
from components.pipeline.errors import (
    DataContractError,
    HardwareError,
    ReelflowError,
    StageError,
    StorageError,
)
from components.pipeline.stage import Checkpoints
from components.pipeline.storage import Folder

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
STEPS = 30
SETTINGS = {
    "PYTHONPATH": f"{HERE}:{HERE.parent.parent}",
    # Two workers on a busy machine of two cores; the driver gives its own answer sooner.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyS3]:
    with FaultyS3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def ray(s3: FaultyS3) -> Iterator[Any]:
    """One Ray for the whole file: it takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, **s3.environment()}.items():
            patch.setenv(name, value)
        with ray_session(num_cpus=4) as session:
            yield session


@dataclass
class Training:
    """One call of `train_on_ray` and what came of it."""

    folder: Path
    metrics: list[tuple[int | None, dict[str, float]]] = field(default_factory=list)
    last: Path | None = None
    checkpoints: Checkpoints | None = None

    def config(self, **more: Any) -> dict[str, Any]:
        return {
            "steps": STEPS,
            "log_to": str(self.folder / "steps done"),
            "marker": str(self.folder / "killed"),
            **more,
        }

    def run(self, **more: Any) -> Training:
        self.folder.mkdir(exist_ok=True)
        self.last = train_on_ray(
            tiny_training.loop,
            self.config(**more),
            num_workers=2,
            storage=self.checkpoints or LocalCheckpoints(self.folder / "check points é"),
            name="work",
            log=lambda metrics, step: self.metrics.append((step, dict(metrics))),
        )
        return self

    @property
    def steps_done(self) -> list[int]:
        return [int(line) for line in (self.folder / "steps done").read_text().split()]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        assert self.last is not None
        return load_file(self.last / "state.safetensors")


def assert_bitwise_equal(a: Training, b: Training) -> None:
    assert a.state.keys() == b.state.keys()
    for name, tensor in a.state.items():
        assert torch.equal(tensor, b.state[name]), name


@pytest.fixture(scope="module")
def whole(ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Training that nothing interrupted."""
    return Training(tmp_path_factory.mktemp("whole")).run()


def test_two_workers_train_as_one_process_does(whole: Training) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        for rank in (0, 1):
            random = torch.Generator().manual_seed(step * 2 + rank)
            x_BD = torch.randn(8, 4, generator=random)
            (torch.nn.functional.mse_loss(model(x_BD), x_BD[:, :2]) / 2).backward()
        optimiser.step()
    # Sums of gradients in another order: float32 rounding only.
    torch.testing.assert_close(whole.state["weight"], model.weight.data, rtol=1e-5, atol=1e-6)


def test_metrics_reach_the_driver_with_their_steps(whole: Training) -> None:
    assert [step for step, _ in whole.metrics] == list(range(1, STEPS + 1))
    assert [set(metrics) for _, metrics in whole.metrics] == [{"loss"}] * STEPS
    assert whole.metrics[-1][1]["loss"] < whole.metrics[0][1]["loss"]


def test_a_killed_worker_is_replaced_and_the_weights_end_bitwise_equal(
    whole: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = Training(tmp_path / "killed").run(kill_rank=1, kill_at=18)
    assert (tmp_path / "killed" / "killed").exists()
    assert_bitwise_equal(killed, whole)
    assert "a training worker died (rank 1); going on from the last" in capsys.readouterr().err
    again = killed.steps_done[killed.steps_done.index(17) + 1]
    # A checkpoint is reported before it is committed: at most two intervals are lost.
    assert 17 - again < 2 * tiny_training.CHECKPOINT_EVERY
    assert [step for step, _ in killed.metrics] == list(range(1, STEPS + 1))
    assert killed.metrics == whole.metrics


def test_after_the_driver_was_killed_the_same_call_resumes(
    ray: Any, whole: Training, tmp_path: Path
) -> None:
    training = Training(tmp_path / "driver")
    training.folder.mkdir()
    storage = training.folder / "check points é"
    driver = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "tiny_training.py"),
            str(storage),
            json.dumps(training.config(step_s=0.2)),
        ],
        env={**os.environ, **SETTINGS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = training.folder / "steps done"
    wait_until(lambda: log.exists() and len(training.steps_done) >= 12, 100)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    seen = -1
    while seen != (seen := len(training.steps_done)):
        time.sleep(2)
    assert seen < STEPS
    training.run()
    assert_bitwise_equal(training, whole)
    assert training.steps_done[seen] > 1, "it should not have begun anew"


def wait_until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_same_call_after_success_trains_nothing_again(whole: Training) -> None:
    again = Training(whole.folder).run()
    assert again.last == whole.last
    assert again.metrics == []
    assert len(again.steps_done) == STEPS


def test_an_error_of_the_loop_arrives_with_its_message_and_is_not_repeated(
    ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageError) as caught:
        Training(tmp_path / "bug").run(fail="bug")
    assert "worker 1 failed: ZeroDivisionError: the learning rate is zero" in str(caught.value)
    # The traceback of the worker is what the command line prints above the message.
    assert "tiny_training.py" in str(caught.value.__cause__)
    assert "going on" not in capsys.readouterr().err


def test_an_error_of_the_platform_keeps_its_type_through_the_workers() -> None:
    raised = DataContractError("column 'x' is missing", where="t.parquet", remedy="add it")
    lost = RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1")
    arrived = pickle.loads(pickle.dumps(raised))
    found = cluster._own_failure({0: lost, 1: arrived})
    assert isinstance(found, DataContractError)
    assert found.exit_code == 3
    assert str(found) == str(raised)


def test_lost_connections_and_dead_processes_are_not_errors_of_the_loop() -> None:
    from ray.exceptions import ActorDiedError
    from torch.distributed import DistBackendError

    lost = RuntimeError("Read error [127.0.0.1]:1: Connection reset by peer")
    assert cluster._own_failure({0: lost, 1: ActorDiedError()}) is None
    assert cluster._own_failure({0: DistBackendError("NCCL error")}) is None
    assert cluster._own_failure({0: lost, 1: RuntimeError("shapes differ")}) is not None


def test_checkpoints_in_an_object_store_serve_another_machine(
    whole: Training, s3: FaultyS3, tmp_path: Path
) -> None:
    store = Folder(f"{s3.make_bucket('checkpoints')}/a store é")

    def machine(name: str) -> Training:
        place = "scratch/train/key/checkpoints"
        return Training(
            tmp_path / name, checkpoints=StoredCheckpoints(store, place, tmp_path / name / "copies")
        )

    first = machine("one").run(steps=STEPS // 2)
    assert first.steps_done == list(range(1, STEPS // 2 + 1))
    # Bodies that break off on their way are fetched again.
    s3.fail(truncate=0.2)
    second = machine("another").run()
    s3.fail()
    assert second.steps_done == list(range(STEPS // 2 + 1, STEPS + 1))
    assert_bitwise_equal(whole, second)
    assert second.last is not None
    assert second.last.is_relative_to(tmp_path / "another")
    assert second.checkpoints is not None
    second.checkpoints.clear()
    assert store.files("") == []


def test_a_store_that_does_not_take_a_checkpoint_is_an_error_of_ours(
    ray: Any, s3: FaultyS3, tmp_path: Path
) -> None:
    # There is no such bucket: no amount of patience helps, and Ray must not hide what was said.
    place = StoredCheckpoints(Folder("s3://not-there/a store"), "scratch", tmp_path / "copies")
    with pytest.raises(StorageError, match=r"s3://not-there/a store/scratch.*cannot"):
        Training(tmp_path, checkpoints=place).run()


def test_hardware_that_is_not_there_is_named_with_the_remedy(ray: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(HardwareError) as caught:
        train_on_ray(
            tiny_training.loop,
            {},
            num_workers=2,
            storage=LocalCheckpoints(tmp_path),
            name="work",
            log=lambda metrics, step: None,
            use_gpu=True,
        )
    assert caught.value.exit_code == 2
    assert "2 workers need 2 GPUs, this Ray cluster has 0" in str(caught.value)
    assert "--profile laptop" in str(caught.value)
    with pytest.raises(HardwareError, match="8 actors need 9 CPUs, this Ray cluster has 4"):
        map_on_ray([], tiny_training.Doubler, output=tmp_path, concurrency=8)


def test_a_cluster_that_somebody_started_here_is_not_joined() -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        # Where `ray start` notes its address.
        noted = Path(folder) / "ray" / "ray_current_cluster"
        noted.parent.mkdir()
        noted.write_text("127.0.0.1:1")
        program = "from components.pipeline.cluster import ray_session\n"
        program += "with ray_session(num_cpus=3) as ray: print(ray.cluster_resources()['CPU'])"
        command = [sys.executable, "-c", program]
        environment = os.environ | SETTINGS | {"RAY_TMPDIR": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "3.0\n", done.stderr


SLOW_TO_END = """
import sys, time
from components.pipeline import cluster, sigterm
def nap():
    time.sleep(600)
try:
    with sigterm.as_interrupt(), cluster.ray_session(num_cpus=1) as ray:
        try:
            print("ready", flush=True)
            ray.get(ray.remote(nap).remote())
        finally:
            # Ray's own handler gives a process three seconds.
            time.sleep(4)
            print("tidy", flush=True)
except KeyboardInterrupt:
    sys.exit(sigterm.INTERRUPTED)
"""


def test_sigterm_beside_a_local_ray_lets_a_program_end_in_its_own_time() -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_END],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | SETTINGS,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGTERM)
    said, error = program.communicate(timeout=60)
    assert (program.returncode, said) == (130, "tidy\n"), error


@pytest.fixture
def numbered(tmp_path: Path) -> list[str]:
    """Three files of 1000 rows, in row groups that no batch fits."""
    files = []
    for part in range(3):
        numbers = list(range(part * 1000, (part + 1) * 1000))
        files.append(str(tmp_path / f"part {part}.parquet"))
        table = pa.table({"n": numbers, "unread": ["x"] * 1000})
        pq.write_table(table, files[-1], row_group_size=70)
    return files


def test_actors_map_every_row_of_a_table_once_and_in_order(
    ray: Any, numbered: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "mapped"
    map_on_ray(
        numbered,
        tiny_training.Doubler,
        output=output,
        actor_args={"factor": 3},
        concurrency=2,
        batch_size=300,
        columns=["n"],
    )
    written = sorted(output.iterdir())
    assert [f.name for f in written] == [f"part-{i:05d}.parquet" for i in range(len(written))]
    table = pa.concat_tables([pq.read_table(f) for f in written])
    assert table["n"].to_pylist() == list(range(3000))
    assert table["product"].to_pylist() == [3 * n for n in range(3000)]


def test_the_files_do_not_depend_on_how_many_actors_there_are_or_which_is_fastest(
    ray: Any, numbered: list[str], tmp_path: Path
) -> None:
    made = []
    for actors in (1, 3):
        output = tmp_path / f"by {actors}"
        map_on_ray(
            numbered,
            tiny_training.Hesitant,
            output=output,
            actor_args={"factor": 3},
            concurrency=actors,
            batch_size=64,
        )
        made.append({f.name: f.read_bytes() for f in sorted(output.iterdir())})
    assert len(made[0]) > 3
    assert made[0] == made[1]


def test_a_table_without_rows_gives_a_folder_without_files(ray: Any, tmp_path: Path) -> None:
    file, output = tmp_path / "t.parquet", tmp_path / "out"
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), file)
    map_on_ray([str(file)], tiny_training.Doubler, output=output, actor_args={"factor": 3})
    assert list(output.iterdir()) == []


def test_an_error_of_an_actor_arrives_with_its_message(ray: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3]}), file)
    with pytest.raises(ReelflowError, match="actor Broken failed: ValueError: the model expects"):
        map_on_ray([str(file)], tiny_training.Broken, output=tmp_path / "out")


def counted(ray: Any, marker: Path, fates: list[str]) -> dict[int, list[tuple[int, int]]]:
    """Items of jobs that count from where they are to 10 in steps of 1, on two actors."""
    seen: dict[int, list[tuple[int, int]]] = {number: [(0, 0)] for number in range(len(fates))}
    args = {"step": 1, "marker": str(marker)}
    with actor_pool(tiny_training.Counter, args, concurrency=2) as run:
        jobs = {
            number: lambda number=number, fate=fate: (seen[number][-1][0], 10, fate)
            for number, fate in enumerate(fates)
        }
        for number, item in run(jobs):
            seen[number].append(item)
    return seen


def test_jobs_of_a_pool_go_on_where_they_were_when_an_actor_dies(ray: Any, tmp_path: Path) -> None:
    seen = counted(ray, tmp_path / "died", ["", "", "dies once", ""])
    assert (tmp_path / "died").exists()
    here = in_turn(tiny_training.Counter(1, ""))
    expected = [count for _, (count, _) in here({0: lambda: (0, 10, "")})]
    for items in seen.values():
        assert [count for count, _ in items[1:]] == expected
    pids = {number: {pid for _, pid in items[1:]} for number, items in seen.items()}
    assert len(pids[2]) == 2
    assert len(set.union(*pids.values())) == 3
    assert os.getpid() not in set.union(*pids.values())


@pytest.mark.parametrize(
    ("fate", "error", "said"),
    [
        ("contract", DataContractError, "column 'x' is missing"),
        ("bug", StageError, "actor Counter failed: ZeroDivisionError: the step is zero"),
        ("dies always", StageError, "actor Counter died 3 times"),
    ],
)
def test_a_pool_says_why_it_failed(
    ray: Any, tmp_path: Path, fate: str, error: type[ReelflowError], said: str
) -> None:
    with pytest.raises(error) as caught:
        counted(ray, tmp_path / "died", ["", fate])
    assert said in str(caught.value)
    assert "Traceback" not in str(caught.value)
    if error is DataContractError:
        assert caught.value.where == "t.parquet"
