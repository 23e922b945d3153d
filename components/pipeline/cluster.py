"""Ray: sessions and data-parallel training (``actor_map`` and ``actor_pool`` build on it).

A local Ray is started when it is first needed and stopped when the session ends; with
``RAY_ADDRESS`` set an existing cluster is used and left running.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from components.pipeline import ray_sessions, sigterm
from components.pipeline.errors import HardwareError, ReelflowError, StageError

if TYPE_CHECKING:
    from components.pipeline.stage import Checkpoints

OBJECT_STORE_BYTES = 100 * 1024**2
POLL_S = 0.5
ANSWER_WITHIN_S = 30

#: Before Ray is imported: no usage reports, one thread a worker, quick delivery of reports.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

Loop = Callable[[dict[str, Any], "WorkerContext"], None]


@contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[Any]:
    """A connection to Ray: the cluster of ``RAY_ADDRESS``, the one already joined, or a local one.

    Yields:
        The ``ray`` module.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # A loopback cluster of one machine needs no token; a shared one keeps its own setting.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Ray's name for "at 127.0.0.1": nobody else reaches it, and no name server is asked.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {
            "num_cpus": num_cpus or max(os.cpu_count() or 1, 2),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    # Ray's own handler of SIGTERM aborts a process that takes more than three seconds to end.
    if not address:
        ray_sessions.require_short_folder()
    with sigterm.lent(), _without_usage_reporter():
        # Without an address Ray would join whatever cluster was started here last, by anybody.
        started = ray.init(address=address or "local", **options)
    if not address:
        ray_sessions.mark(started.address_info["session_dir"])
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _without_usage_reporter() -> Iterator[None]:
    """Without its dashboard Ray still starts that process, for reports on usage alone.

    Even where they are off it asks the metadata services of three clouds where it runs.
    """
    from ray._private import services

    before = services.start_api_server
    services.start_api_server = lambda *ignored, **options: (None, None)
    try:
        yield
    finally:
        services.start_api_server = before


@dataclass
class WorkerContext:
    """What a training loop knows of its place and how it tells what happened.

    Attributes:
        rank, world_size: place of this worker.
        device: ``cpu`` or ``cuda:<n>``.
        restored: folder of the checkpoint to resume from, or None.
    """

    rank: int
    world_size: int
    device: str
    restored: Path | None
    _sink: Any = None
    _sent: Any = None

    def prepare(self, model: Any, **options: Any) -> Any:
        """Move a model to the device and wrap it for data-parallel training.

        Args:
            options: of ``DistributedDataParallel``.
        """
        from ray.train.torch import prepare_model

        return prepare_model(model, parallel_strategy_kwargs=options)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics to the driver (rank 0; a no-op elsewhere)."""
        if self.rank == 0 and self._sink is not None:
            self._sent = self._sink.put.remote((dict(metrics), step))

    def checkpoint(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None) -> None:
        """Report a checkpoint; every rank must call this the same number of times.

        Args:
            save: writes the state into the folder it is given (called on rank 0 only).
        """
        from ray import train

        if self.rank != 0 or save is None:
            train.report(dict(metrics))
            return
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            checkpoint = train.Checkpoint.from_directory(folder)
            train.report(dict(metrics), checkpoint=checkpoint)


def train_on_ray(
    loop: Loop,
    config: dict[str, Any],
    *,
    num_workers: int,
    storage: Checkpoints,
    name: str,
    log: Callable[[Mapping[str, float], int | None], None],
    use_gpu: bool = False,
    cpus_per_worker: float = 1,
    max_failures: int = 2,
) -> Path:
    """Run ``loop`` on ``num_workers`` data-parallel workers (DDP: gloo on CPU, NCCL on GPU).

    The same ``(storage, name)`` resumes: after a worker dies, and after the driver itself was
    killed. ``(storage, name)`` must therefore identify the work; a stage's ``run.checkpoints`` do.
    A worker that dies is replaced; an exception of the loop itself would come again and ends the
    training at once.

    Args:
        loop: an importable module-level function ``(config, worker context)``.
        config: JSON-like values handed to each worker.
        storage: where checkpoints go, reached by all workers.
        log: receives metrics with their step, in the driver.

    Returns:
        Local folder of the last checkpoint.

    Raises:
        HardwareError: the cluster has fewer CPUs or GPUs than the workers ask for.
        ReelflowError: as the loop raised it, or as the storage of checkpoints did.
        StageError: the loop raised any other exception, whose message it bears, or workers died
            more than ``max_failures`` times.
    """
    with (
        ray_session(num_cpus=max(num_workers, os.cpu_count() or 1)) as ray,
        tempfile.TemporaryDirectory(prefix="reelflow-") as meeting,
    ):
        gpus = num_workers if use_gpu else 0
        require_resources(ray, f"{num_workers} workers", num_workers * cpus_per_worker, gpus)
        from ray import train
        from ray.train.torch import TorchTrainer

        sink = mailbox(ray)
        filesystem, place = storage.arrow()
        # Asked here, for of a controller that cannot start Ray keeps no more than the traceback.
        filesystem.get_file_info(place)
        trainer = TorchTrainer(
            _worker,
            torch_config=_rendezvous(meeting),
            train_loop_config={
                "loop": loop,
                "config": config,
                "sink": sink,
                "threads": max(1, int(cpus_per_worker)),
            },
            scaling_config=train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=train.RunConfig(
                name=name,
                storage_path=place,
                storage_filesystem=filesystem,
                checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            ),
        )
        with _draining(ray, sink, log):
            result = _fit(trainer, max_failures)
    if result.checkpoint is None:
        raise StageError("training ended without a checkpoint", where=name)
    return storage.fetch(str(PurePosixPath(result.checkpoint.path).relative_to(place)))


def _rendezvous(folder: str) -> Any:
    """How workers meet: on a cluster as Ray has it, on this machine by a file in ``folder``."""
    if os.environ.get("RAY_ADDRESS"):
        return None
    from components.pipeline.local_rendezvous import FileRendezvous

    return FileRendezvous(folder=folder)


def _fit(trainer: Any, max_failures: int) -> Any:
    from ray.train import WorkerGroupError

    for deaths in itertools.count(1):
        try:
            return trainer.fit()
        except WorkerGroupError as error:
            own = _own_failure(error.worker_failures)
            if own is not None:
                raise own from error
            if deaths > max_failures:
                raise StageError(
                    f"training workers died {deaths} times: {_death(error.worker_failures)}",
                    remedy="if memory ran out, choose a smaller batch or fewer workers; "
                    "checkpoints are kept: the same command resumes",
                ) from error
            print(
                f"  a training worker died ({_death(error.worker_failures)}); "
                "going on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        except Exception as error:
            own = carried(error)
            if own is not None:
                raise own from error
            raise StageError(f"Ray could not train: {error}") from error


def carried(error: Any) -> ReelflowError | None:
    """The error of ours within one of Ray's; None if there is none."""
    while error is not None:
        if isinstance(error, ReelflowError):
            return error
        # As the controller, a remote call and Python hand it on.
        inner = (getattr(error, name, None) for name in ("controller_failure", "cause"))
        error = next((e for e in inner if isinstance(e, BaseException)), error.__cause__)
    return None


def _own_failure(failures: Mapping[int, Exception]) -> ReelflowError | None:
    """The error of the loop itself; None if workers only died or lost each other."""
    own = {rank: error for rank, error in failures.items() if not _is_death(error)}
    for error in own.values():
        if isinstance(error, ReelflowError):
            return error
    for rank, error in own.items():
        return StageError(
            f"training worker {rank} failed: {type(error).__name__}: {error}",
            remedy="the worker's traceback is above; checkpoints are kept: the same command "
            "resumes once the cause is mended",
        )
    return None


def _is_death(error: Exception) -> bool:
    """Whether a worker's process ended, or it lost the connection to one whose process did."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError
    from torch.distributed import DistError

    if isinstance(error, RayError | RayTrainError | DistError):
        return True
    lost = ("closed by peer", "reset by peer", "remote worker", "Connection refused", "NCCL")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in lost)


def _death(failures: Mapping[int, Exception]) -> str:
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    dead = [rank for rank, e in sorted(failures.items()) if isinstance(e, RayError | RayTrainError)]
    return f"rank {', '.join(map(str, dead))}" if dead else "connection lost"


def _worker(settings: dict[str, Any]) -> None:
    import ray
    import torch
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    device = get_device()
    # As many as the CPUs it was given, whatever OMP_NUM_THREADS says: the order of sums, and so the
    # weights, depend on it.
    torch.set_num_threads(settings["threads"])
    worker = WorkerContext(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=str(device),
        restored=None,
        _sink=settings["sink"],
    )
    checkpoint = train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        worker.restored = Path(folder) if folder else None
        settings["loop"](settings["config"], worker)
    if worker._sent is not None:
        # Calls to an actor arrive in order: after the last one none is lost when this process ends.
        ray.get(worker._sent, timeout=ANSWER_WITHIN_S)


def require_resources(ray: Any, who: str, cpus: float, gpus: int) -> None:
    """Raise HardwareError if the cluster has fewer CPUs or GPUs than ``who`` needs."""
    have = ray.cluster_resources()
    for kind, needed in (("GPU", gpus), ("CPU", cpus)):
        if have.get(kind, 0) < needed:
            raise HardwareError(
                f"{who} need {needed:g} {kind}s, this Ray cluster has {have.get(kind, 0):g}",
                remedy="choose a smaller profile (--profile laptop), fewer workers, or set "
                "RAY_ADDRESS to a larger cluster",
            )


def mailbox(ray: Any) -> Any:
    """An actor that holds what workers say until the driver fetches it; costs no CPU slot."""

    class Mailbox:
        def __init__(self) -> None:
            self._waiting: list[Any] = []

        def put(self, item: Any) -> None:
            self._waiting.append(item)

        def take(self) -> list[Any]:
            taken, self._waiting = self._waiting, []
            return taken

    return ray.remote(num_cpus=0)(Mailbox).remote()


@contextmanager
def _draining(
    ray: Any,
    sink: Any,
    log: Callable[[Mapping[str, float], int | None], None],
) -> Iterator[None]:
    """Pass metrics from the workers on while the block runs, and what is left at its end."""
    stop = threading.Event()
    seen: set[tuple[int, tuple[str, ...]]] = set()

    def drain() -> None:
        for metrics, step in ray.get(sink.take.remote(), timeout=ANSWER_WITHIN_S):
            what = (step, tuple(metrics))
            if what in seen:
                continue
            seen.add(what)
            log(metrics, step)

    def loop() -> None:
        while not stop.wait(POLL_S):
            with suppress(ray.exceptions.RayError):
                drain()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        # A cluster that is gone has nothing to say, and must not hide why the block ended.
        with suppress(ray.exceptions.RayError):
            drain()
