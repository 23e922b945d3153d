"""The champion on today's test examples: yesterday's figures say nothing about today's users.

The champion answers in a process of its own, with the code that was registered beside its weights:
today's code may build another model, or read the same history another way, and the gate would then
compare with a champion that nobody serves.

Shapes: B requests, E items of all their lists.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.evaluation.registration import serving
from components.evaluation.registration.registry import WAY_OUT
from components.pipeline.errors import StageError

if TYPE_CHECKING:
    from components.pipeline.stage import Inputs, Run

REQUESTS = pa.schema(
    [
        ("item_ids", pa.list_(pa.int64())),
        *((name, pa.list_(kind)) for name, (kind, _) in serving.OPTIONAL.items()),
        ("request_timestamp_ms", pa.int64()),
        ("user_id", pa.int64()),
    ]
)


def rank_champion(
    model: Path, inputs: Inputs, user_ids: pa.Array, *, top_n: int, beams: int, run: Run
) -> npt.NDArray[np.int32]:
    """1-based ranks of this run's test targets in the champion's lists; 0 = not in the list.

    The champion has its own catalogue: items are matched by id. Those it does not know are left
    out of the histories and count as a miss when they are the target.

    Args:
        model: folder of the registered version, with ``artifacts`` and ``code``.
        inputs: ``catalogue`` and ``test_examples`` are read.
        user_ids: whom to rank for, ascending.
        top_n, beams: length of the lists and width of the beam.

    Returns:
        int32 [U], in the order of ``user_ids``.

    Raises:
        StageError: the champion's program failed, or an evaluated user has no test example.
    """
    requests, answers = run.scratch / "requests.parquet", run.scratch / "answers.parquet"
    user_B, target_B = _write_requests(inputs, user_ids, requests)
    order_B = np.argsort(user_B, kind="stable")
    if not np.array_equal(user_B[order_B], user_ids.to_numpy()):
        raise StageError(
            "the evaluated users are not among the test examples",
            where="artifacts 'evaluation' and 'test_examples'",
            remedy="make them again: reelflow stage evaluate_recommender --force",
        )
    options = ["--top-n", str(top_n), "--beams", str(beams)]
    command = [str(model / "artifacts"), str(requests), str(answers), *options]
    with run.progress(len(user_B), "champion") as bar:
        for done in run_program(model / "code", command, run.scratch / "champion.log"):
            bar.advance(done)
    lists = pq.read_table(answers, columns=["item_ids"])["item_ids"].combine_chunks()
    return ranks_in(lists, target_B)[order_B]


def ranks_in(lists: pa.ListArray, target_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """int32 [B]: 1-based place of each target id in its list, 0 where it is not there."""
    length_B = lists.value_lengths().to_numpy(zero_copy_only=False)
    row_E = np.repeat(np.arange(len(lists)), length_B)
    place_E = np.arange(len(row_E)) - (np.cumsum(length_B) - length_B)[row_E]
    hit_E = lists.flatten().to_numpy() == target_B[row_E]
    rank_B = np.zeros(len(lists), np.int32)
    rank_B[row_E[hit_E]] = place_E[hit_E] + 1
    return rank_B


def _write_requests(
    inputs: Inputs, user_ids: pa.Array, file: Path
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Write the histories of the users with item ids; users and target ids in that order."""
    item_id_N = inputs["catalogue"].read_table(["item_id"])["item_id"].to_numpy()
    users, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    with pq.ParquetWriter(file, REQUESTS) as writer:
        for batch in inputs["test_examples"].batches(batch_size=serving.CHUNK):
            batch = batch.filter(pc.is_in(batch.column("user_id"), user_ids))
            history = batch.column("item_index")
            item_ids = pa.ListArray.from_arrays(
                pa.array(np.append(0, np.cumsum(history.value_lengths())), pa.int32()),
                pa.array(item_id_N[history.flatten()]),
            )
            signals = [batch.column(name) for name in serving.OPTIONAL]
            columns = [item_ids, *signals, batch.column("target_timestamp_ms")]
            columns.append(batch.column("user_id"))
            writer.write_table(pa.table(columns, schema=REQUESTS))
            users.append(batch.column("user_id").to_numpy())
            targets.append(item_id_N[batch.column("target")])
    return np.concatenate(users), np.concatenate(targets)


def run_program(code: Path, arguments: list[str], log: Path) -> Iterator[int]:
    """Run the serving program of a version; yields requests answered, a batch at a time.

    Args:
        code: folder of the version's own modules.
        arguments: of ``python -m components.evaluation.registration.serving``.
        log: receives what it says.

    Raises:
        StageError: it failed.
    """
    # -P: nothing in the working folder may stand in for the version's own code.
    command = [sys.executable, "-P", "-m", serving.__name__, *arguments]
    environment = os.environ | {"PYTHONPATH": str(code)}
    with (
        log.open("w") as said,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip().isdigit():
                    yield int(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        lines = log.read_text().strip().splitlines() or [f"exit code {process.returncode}"]
        raise StageError(
            f"the champion could not be run: {lines[-1]}",
            where=str(log),
            remedy=f"mend what it says, or {WAY_OUT}",
        )
