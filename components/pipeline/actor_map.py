"""Tables through a pool of actors that each hold a model, on Ray Data.

The work is cut by the rows alone, before anybody works, and a piece of it becomes the file of its
number: how many actors there are, and which is fastest, changes neither a file nor its place.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.cluster import ANSWER_WITHIN_S, mailbox, ray_session, require_resources
from components.pipeline.errors import ReelflowError, StageError
from components.pipeline.table_writer import ROW_GROUP, encoding

if TYPE_CHECKING:
    import pyarrow as pa

#: Pieces of a table, so that every actor gets some of a small one; more where one grows too big.
PIECES = 64
MAX_BATCHES_PER_PIECE = 64


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
            takes and returns a ``pyarrow.Table``. The same batch must give the same table.
        output: folder that receives the mapped table, in order, as files ``part-<number>.parquet``.
            Their bytes depend on ``files``, ``batch_size`` and the actor alone.
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

        ray_data.DataContext.get_current().enable_progress_bars = False
        for handler in logging.getLogger("ray.data").handlers:
            # What it has to say of a failure arrives as the error below.
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.CRITICAL)
        output.mkdir(parents=True, exist_ok=True)
        pieces = list(_pieces(files, batch_size))
        if not pieces:
            return
        failures = mailbox(ray)
        call = {"actor": actor, "args": dict(actor_args or {}), "failures": failures}
        how = {"output": str(output), "batch_size": batch_size, "columns": columns}
        written = ray_data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
            _PieceWriter,
            fn_constructor_kwargs=call | how,
            batch_format="numpy",
            batch_size=1,
            compute=ray_data.ActorPoolStrategy(size=concurrency),
            num_gpus=1 if use_gpu else 0,
        )
        try:
            written.materialize()
        except Exception as error:
            told: list[ReelflowError] = ray.get(failures.take.remote(), timeout=ANSWER_WITHIN_S)
            raise (told[0] if told else StageError(f"Ray could not map: {error}")) from error
        finally:
            # An actor that was killed leaves the file it was writing.
            for left in output.glob(".*.tmp"):
                left.unlink(missing_ok=True)


def _pieces(files: list[str], batch_size: int) -> Iterator[dict[str, Any]]:
    """Whole batches of one file each, in order."""
    import pyarrow.parquet as pq

    rows_of = {file: pq.read_metadata(file).num_rows for file in files}
    batches = math.ceil(sum(rows_of.values()) / batch_size / PIECES)
    size = batch_size * min(max(batches, 1), MAX_BATCHES_PER_PIECE)
    number = 0
    for file, rows in rows_of.items():
        for first in range(0, rows, size):
            yield {"number": number, "file": file, "first": first, "rows": min(size, rows - first)}
            number += 1


def _read(file: str, first: int, rows: int, columns: list[str] | None) -> pa.Table:
    """Rows ``first … first + rows - 1`` of a parquet file; only their row groups are read."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        groups: list[int] = []
        start = skipped = 0
        for group in range(table.num_row_groups):
            end = start + table.metadata.row_group(group).num_rows
            if start < first + rows and end > first:
                skipped = skipped if groups else start
                groups.append(group)
            start = end
        return table.read_row_groups(groups, columns=columns).slice(first - skipped, rows)


class _PieceWriter:
    """Maps pieces and writes the file of each; tells the driver why it failed: Ray Data would not.

    Args:
        failures: the mailbox of the driver.
    """

    def __init__(
        self,
        actor: Callable[..., Any],
        args: dict[str, Any],
        failures: Any,
        output: str,
        batch_size: int,
        columns: list[str] | None,
    ) -> None:
        self._name, self._failures = getattr(actor, "__name__", "actor"), failures
        self._output, self._batch_size, self._columns = Path(output), batch_size, columns
        self._actor = self._tell(lambda: actor(**args))

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        number, first, rows = (int(piece[name][0]) for name in ("number", "first", "rows"))
        self._tell(lambda: self._write(number, str(piece["file"][0]), first, rows))
        return {"number": piece["number"]}

    def _write(self, number: int, file: str, first: int, rows: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = _read(file, first, rows, self._columns)
        starts = range(0, rows, self._batch_size)
        mapped = pa.concat_tables(
            [self._actor(table.slice(start, self._batch_size)) for start in starts]
        )
        target = self._output / f"part-{number:05d}.parquet"
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        pq.write_table(mapped, partial, row_group_size=ROW_GROUP, **encoding(mapped.schema))
        partial.replace(target)

    def _tell(self, call: Callable[[], Any]) -> Any:
        import ray

        try:
            return call()
        except Exception as error:
            own = error
            if not isinstance(error, ReelflowError):
                text = f"{type(error).__name__}: {error}"
                own = StageError(f"actor {self._name} failed: {text}")
            ray.get(self._failures.put.remote(own), timeout=ANSWER_WITHIN_S)
            raise
