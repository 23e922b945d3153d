"""Tables through a pool of actors that each hold a model, on Ray Data."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.pipeline.cluster import ANSWER_WITHIN_S, mailbox, ray_session, require_resources
from components.pipeline.errors import ReelflowError, StageError

BLOCKS_PER_ACTOR = 4
MAX_BATCHES_PER_BLOCK = 64


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
        output: folder that receives the mapped table as parquet files; how the rows are cut
            into files may differ between two runs.
        concurrency: actors in the pool.
        batch_size: rows a call, at most.

    Raises:
        HardwareError: the cluster has fewer CPUs or GPUs than the actors ask for.
        ReelflowError: as the actor raised it.
        StageError: the actor raised any other exception, whose message it bears.
    """
    # The actors keep their cores; without one more nobody could read and write for them.
    cpus = concurrency + 1
    with ray_session(num_cpus=max(cpus, os.cpu_count() or 1)) as ray:
        require_resources(ray, f"{concurrency} actors", cpus, concurrency if use_gpu else 0)
        from ray import data as ray_data

        context = ray_data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        for handler in logging.getLogger("ray.data").handlers:
            # What it has to say of a failure arrives as the error below.
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.CRITICAL)
        failures = mailbox(ray)
        dataset = ray_data.read_parquet(files, columns=columns)
        rows = _rows_per_block(files, concurrency, batch_size)
        mapped = dataset.repartition(target_num_rows_per_block=rows).map_batches(
            _telling(actor, dict(actor_args or {}), failures),
            batch_format="pyarrow",
            batch_size=batch_size,
            compute=ray_data.ActorPoolStrategy(size=concurrency),
            num_gpus=1 if use_gpu else 0,
        )
        try:
            mapped.write_parquet(str(output))
        except Exception as error:
            told: list[ReelflowError] = ray.get(failures.take.remote(), timeout=ANSWER_WITHIN_S)
            raise (told[0] if told else StageError(f"Ray could not map: {error}")) from error
    # Ray names files at random.
    for number, file in enumerate(sorted(output.glob("*.parquet"))):
        file.rename(output / f"part-{number:05d}.parquet")


def _rows_per_block(files: list[str], concurrency: int, batch_size: int) -> int:
    """Whole batches; so few that every actor gets some of a small table, yet not a file a batch."""
    import pyarrow.parquet as pq

    rows = sum(pq.read_metadata(file).num_rows for file in files)
    batches = math.ceil(rows / batch_size / (BLOCKS_PER_ACTOR * concurrency))
    return batch_size * min(max(batches, 1), MAX_BATCHES_PER_BLOCK)


def _telling(actor: type, args: dict[str, Any], failures: Any) -> type:
    """``actor`` with its arguments, telling the driver why it failed: Ray Data would not."""

    class Telling:
        def __init__(self) -> None:
            self._actor = self._tell(lambda: actor(**args))

        def __call__(self, batch: Any) -> Any:
            return self._tell(lambda: self._actor(batch))

        def _tell(self, call: Callable[[], Any]) -> Any:
            import ray

            try:
                return call()
            except Exception as error:
                own = error
                if not isinstance(error, ReelflowError):
                    text = f"{type(error).__name__}: {error}"
                    own = StageError(f"actor {actor.__name__} failed: {text}")
                ray.get(failures.put.remote(own), timeout=ANSWER_WITHIN_S)
                raise

    Telling.__name__ = Telling.__qualname__ = actor.__name__
    return Telling
