"""The results of NAS-Bench-201 (arXiv 2001.00326) as an architecture table.

Its file is gigabytes and not at hand here. Who has it reads it with the package ``nats_bench``,
whose version 1.8 this was written against:

    rows = from_nats_bench(nats_bench.create(file, "tss"), "cifar10-valid")
    ArchitectureTable.of(rows).write(Path("nas_bench_201.parquet"))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import pyarrow as pa

from components.curation.asp.nas_table import SCHEMA, TEST, TRAIN, VALID
from components.pipeline.errors import UsageError

#: Names of validation and test data in the package, by data set. Its ``cifar10`` was trained on
#: what would be validation and is thus of no use here.
NATS_SETS = {
    "cifar10-valid": ("x-valid", "ori-test"),
    "cifar100": ("x-valid", "x-test"),
    "ImageNet16-120": ("x-valid", "x-test"),
}


class NatsResults(Protocol):
    """``ArchResults`` of ``nats_bench`` 1.8, as far as it is needed."""

    def get_dataset_seeds(self, dataset: str) -> list[int]: ...
    def get_total_epoch(self, dataset: str) -> int: ...
    def get_metrics(
        self, dataset: str, setname: str, iepoch: int | None = None, is_random: int = 0
    ) -> Mapping[str, Any]: ...
    def get_compute_costs(self, dataset: str) -> Mapping[str, Any]: ...


class NatsTopology(Protocol):
    """``NATStopology`` of ``nats_bench`` 1.8: what ``create(file, "tss")`` gives."""

    def __len__(self) -> int: ...
    def arch(self, index: int) -> str: ...
    def query_meta_info_by_index(self, arch_index: int, hp: str) -> NatsResults: ...


def from_nats_bench(api: NatsTopology, dataset: str, hp: str = "200") -> pa.Table:
    """Rows of NAS-Bench-201 by the package's own reader, for `ArchitectureTable.of`.

    Seconds are those of training as it measured or estimated them.

    Args:
        hp: its name for a training: ``"12"`` or ``"200"`` epochs.

    Raises:
        UsageError: there is no such data set.
    """
    if dataset not in NATS_SETS:
        raise UsageError(
            f"NAS-Bench-201 has no validation accuracies of '{dataset}'",
            remedy=f"choose one of {', '.join(NATS_SETS)}",
        )
    valid, test = NATS_SETS[dataset]
    rows = []
    for index in range(len(api)):
        results = api.query_meta_info_by_index(index, hp)
        cost = results.get_compute_costs(dataset)
        for seed in results.get_dataset_seeds(dataset):
            trained = results.get_metrics(dataset, "train", is_random=seed)
            rows.append(
                {
                    "architecture": api.arch(index),
                    "dataset": dataset,
                    "seed": seed,
                    "epochs": results.get_total_epoch(dataset),
                    TRAIN: trained["accuracy"],
                    VALID: results.get_metrics(dataset, valid, is_random=seed)["accuracy"],
                    TEST: results.get_metrics(dataset, test, is_random=seed)["accuracy"],
                    "train_seconds": trained["all_time"],
                    # It counts both in millions.
                    "parameters": round(cost["params"] * 1e6),
                    "flops": round(cost["flops"] * 1e6),
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)
