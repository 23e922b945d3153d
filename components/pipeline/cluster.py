"""The one face of Ray: distributed training and actor maps; nothing else starts distributed work.

A local Ray is started when it is first needed and stopped when the session ends; with
``RAY_ADDRESS`` set an existing cluster is used and left running.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.pipeline.errors import HardwareError, StageError

OBJECT_STORE_BYTES = 100 * 1024**2
POLL_S = 0.5

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
    import ray

    if ray.is_initialized():
        yield ray
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **options)
    else:
        ray.init(
            num_cpus=num_cpus or max(os.cpu_count() or 1, 2),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    try:
        yield ray
    finally:
        ray.shutdown()


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

    def prepare(self, model: Any) -> Any:
        """Move a model to the device and wrap it for data-parallel training."""
        from ray.train.torch import prepare_model

        return prepare_model(model)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics to the driver (rank 0; a no-op elsewhere)."""
        if self.rank == 0 and self._sink is not None:
            self._sink.put.remote(dict(metrics), step)

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
    storage: Path,
    name: str,
    log: Callable[[Mapping[str, float], int | None], None],
    use_gpu: bool = False,
    cpus_per_worker: float = 1,
    max_failures: int = 2,
) -> Path:
    """Run ``loop`` on ``num_workers`` data-parallel workers (DDP: gloo on CPU, NCCL on GPU).

    The same ``(storage, name)`` resumes: after a worker dies, and after the driver itself was
    killed. ``name`` must therefore identify the work; the cache key of the stage does.

    Args:
        loop: an importable module-level function ``(config, worker context)``.
        config: JSON-like values handed to each worker.
        storage: folder for checkpoints, shared by all workers.
        log: receives metrics with their step, in the driver.

    Returns:
        Folder of the last checkpoint.

    Raises:
        HardwareError: the cluster has fewer CPUs or GPUs than the workers ask for.
        StageError: the loop failed more than ``max_failures`` times; the message is the worker's.
    """
    with ray_session(num_cpus=max(num_workers, os.cpu_count() or 1)) as ray:
        _require_resources(ray, num_workers, cpus_per_worker, use_gpu)
        from ray import train
        from ray.train.torch import TorchTrainer

        sink = _metric_sink(ray)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"loop": loop, "config": config, "sink": sink},
            scaling_config=train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=train.RunConfig(
                name=name,
                storage_path=str(storage.absolute()),
                failure_config=train.FailureConfig(max_failures=max_failures),
                checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            ),
        )
        with _draining(ray, sink, log):
            try:
                result = trainer.fit()
            except Exception as error:
                raise _worker_error(error) from error
    if result.checkpoint is None:
        raise StageError("training ended without a checkpoint", where=name)
    return Path(result.checkpoint.path)


def _worker(settings: dict[str, Any]) -> None:
    import torch
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    device = get_device()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    worker = WorkerContext(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=str(device),
        restored=None,
        _sink=settings["sink"],
    )
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        settings["loop"](settings["config"], worker)
        return
    with checkpoint.as_directory() as folder:
        worker.restored = Path(folder)
        settings["loop"](settings["config"], worker)


def _require_resources(ray: Any, workers: int, cpus: float, use_gpu: bool) -> None:
    have = ray.cluster_resources()
    for kind, needed in (("GPU", workers if use_gpu else 0), ("CPU", workers * cpus)):
        if have.get(kind, 0) < needed:
            raise HardwareError(
                f"{workers} workers need {needed:g} {kind}s, this Ray cluster has "
                f"{have.get(kind, 0):g}",
                remedy="choose a smaller profile (--profile laptop), fewer workers, or set "
                "RAY_ADDRESS to a larger cluster",
            )


def _metric_sink(ray: Any) -> Any:
    """An actor that holds metrics until the driver fetches them; costs no CPU slot."""

    class MetricSink:
        def __init__(self) -> None:
            self._waiting: list[tuple[dict[str, float], int]] = []

        def put(self, metrics: dict[str, float], step: int) -> None:
            self._waiting.append((metrics, step))

        def take(self) -> list[tuple[dict[str, float], int]]:
            taken, self._waiting = self._waiting, []
            return taken

    return ray.remote(num_cpus=0)(MetricSink).remote()


@contextmanager
def _draining(
    ray: Any,
    sink: Any,
    log: Callable[[Mapping[str, float], int | None], None],
) -> Iterator[None]:
    """Pass metrics from the workers on while the block runs, and what is left at its end."""
    stop = threading.Event()

    def drain() -> None:
        for metrics, step in ray.get(sink.take.remote()):
            log(metrics, step)

    def loop() -> None:
        while not stop.wait(POLL_S):
            drain()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        drain()


def _worker_error(error: Exception) -> Exception:
    """The error of the worker's own code, without Ray's stack around it."""
    text = str(error)
    marker = "Error Snippet]"
    if marker in text:
        text = text.split(marker, 1)[1].strip()
    last = [line for line in text.splitlines() if line.strip()]
    return StageError(
        f"a training worker failed: {last[-1].strip() if last else error}",
        remedy="the worker's traceback is above; checkpoints are kept: the same command resumes",
    )


def map_on_ray(
    files: list[str],
    actor: type,
    *,
    output: Path,
    actor_args: Mapping[str, Any] | None = None,
    concurrency: int = 1,
    batch_size: int = 1024,
    columns: list[str] | None = None,
    use_gpu: bool = False,
) -> None:
    """Stream parquet files through a pool of actors that each hold a model (Ray Data).

    Args:
        files: local parquet files, one table.
        actor: importable class; ``__init__(**actor_args)`` loads the model, ``__call__(batch)``
            takes and returns a ``pyarrow.Table``.
        output: folder that receives the mapped table as parquet files.
        concurrency: actors in the pool.
        batch_size: rows a call.
    """
    with ray_session() as ray:
        _require_resources(ray, concurrency, 1, use_gpu)
        from ray import data as ray_data

        ray_data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        dataset = ray_data.read_parquet(files, columns=columns)
        mapped = dataset.map_batches(
            actor,
            fn_constructor_kwargs=dict(actor_args or {}),
            batch_format="pyarrow",
            batch_size=batch_size,
            compute=ray_data.ActorPoolStrategy(size=concurrency),
            num_gpus=1 if use_gpu else 0,
        )
        mapped.write_parquet(str(output))
