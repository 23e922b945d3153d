"""The `split` stage: interactions in, sequences and evaluation examples out."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from components.pipeline.params_base import Params, Seed
from components.pipeline.stage import Inputs, Outputs, Run, stage

if TYPE_CHECKING:
    from components.data.buckets import Facts
    from components.data.split import Cut


class SplitParams(Params):
    """How interactions become train sequences, validation examples and test examples."""

    seed: Seed = Field(0, description="shuffles events of one user with equal timestamps")
    protocol: Literal["auto", "leave_one_out", "temporal"] = Field(
        "auto", description="auto: the protocol that the source names"
    )
    valid_from: datetime.date | None = Field(
        None, description="first day of validation; null: the source's, else 5 % of the time span"
    )
    test_from: datetime.date | None = Field(
        None, description="first day of test; null: the source's, else the last 10 % of the span"
    )
    min_history: int = Field(1, ge=1, description="examples with a shorter history are dropped")
    max_history: int = Field(256, ge=1, description="newest events kept as an example's history")
    positive_watch_ratio: float = Field(
        0.7, gt=0, le=10, description="watched share that makes a view positive without long_view"
    )
    rows_per_bucket: int = Field(
        400_000, ge=1, description="interactions sorted in memory at a time"
    )


@stage(
    inputs=("interactions", "items", "source"),
    outputs=("catalogue", "train_sequences", "valid_examples", "test_examples"),
    params=SplitParams,
)
def split(params: SplitParams, inputs: Inputs, outputs: Outputs, run: Run) -> dict[str, float]:
    """Cuts interactions into train sequences and unseen validation and test targets.

    The catalogue is as of the end of the log: it has every item of `items` and of any interaction,
    later ones too. What it counts of them is of the training split.
    """
    import numpy as np
    import pyarrow as pa

    from components.data import buckets
    from components.data import split as method
    from components.pipeline.errors import DataContractError

    interactions = inputs["interactions"]
    present = set(interactions.schema.names)
    scan_columns = [name for name in buckets.SCAN_COLUMNS if name in present]
    scatter_columns = [name for name in buckets.SCATTER_COLUMNS if name in present]
    facts = buckets.scan(interactions.batches(columns=scan_columns, batch_size=262_144))
    listed = inputs["items"].read_table(columns=["item_id"])["item_id"].to_numpy()
    item_ids = np.union1d(facts.item_ids, listed)

    cut = _cut(params, inputs["source"].read_json()["split"], facts, run.seed)
    paths, signals = buckets.scatter(
        interactions.batches(columns=scatter_columns, batch_size=262_144),
        item_ids,
        buckets.bucket_bounds(facts, params.rows_per_bucket),
        run.scratch / "buckets",
        params.positive_watch_ratio,
    )
    train_count = np.zeros(len(item_ids), np.int64)
    positive_count = np.zeros(len(item_ids), np.int64)
    users = dict.fromkeys(("train", "valid", "test"), 0)
    dropped_valid = dropped_test = 0
    with (
        outputs["train_sequences"].writer(method.SEQUENCE_SCHEMA) as train_writer,
        outputs["valid_examples"].writer(method.EXAMPLE_SCHEMA) as valid_writer,
        outputs["test_examples"].writer(method.EXAMPLE_SCHEMA) as test_writer,
        run.progress(len(paths), "cutting sequences") as bar,
    ):
        for bucket in buckets.read_buckets(paths):
            part = method.split_bucket(bucket, cut, signals, item_ids)
            for name, table, writer in (
                ("train", part.train, train_writer),
                ("valid", part.valid, valid_writer),
                ("test", part.test, test_writer),
            ):
                writer.write_table(table)
                users[name] += table.num_rows
            train_count += np.bincount(part.train_items, minlength=len(item_ids))
            positive_count += np.bincount(
                part.train_items[part.train_positive], minlength=len(item_ids)
            )
            dropped_valid += part.dropped_valid
            dropped_test += part.dropped_test
            bar.advance(1)
    for name, count in users.items():
        if count == 0:
            raise DataContractError(
                f"the {cut.protocol} split leaves no {name} user among {len(facts.user_ids)}",
                where="interactions",
                remedy="choose other split.valid_from and split.test_from, a smaller "
                "split.min_history, or the other split.protocol",
            )
    outputs["catalogue"].write_table(
        pa.table(
            {
                "item_index": np.arange(len(item_ids), dtype=np.int32),
                "item_id": item_ids,
                "train_count": train_count,
                "train_positive_count": positive_count,
            },
            schema=method.CATALOGUE_SCHEMA,
        )
    )
    return {
        "interactions": float(facts.rows),
        "users": float(len(facts.user_ids)),
        "items": float(len(item_ids)),
        "items_without_train_event": float((train_count == 0).sum()),
        "train_users": float(users["train"]),
        "train_events": float(train_count.sum()),
        "train_positives": float(positive_count.sum()),
        "valid_users": float(users["valid"]),
        "test_users": float(users["test"]),
        "dropped_valid_users": float(dropped_valid),
        "dropped_test_users": float(dropped_test),
    }


def _cut(params: SplitParams, source: dict[str, Any], facts: Facts, seed: int) -> Cut:
    """The cut that the parameters ask for, filled up by what the source says of itself."""
    from components.data.split import Cut, temporal_days

    protocol = source["protocol"] if params.protocol == "auto" else params.protocol
    days = (0, 0)
    if protocol == "temporal":
        days = temporal_days(
            facts,
            _day(params.valid_from or source.get("valid_from")),
            _day(params.test_from or source.get("test_from")),
        )
    return Cut(
        protocol=protocol,
        valid_from=days[0],
        test_from=days[1],
        min_history=params.min_history,
        max_history=params.max_history,
        seed=seed,
    )


def _day(date: datetime.date | str | None) -> int | None:
    if isinstance(date, str):
        date = datetime.date.fromisoformat(date)
    return None if date is None else (date - datetime.date(1970, 1, 1)).days
