"""Claims about tables of trained architectures: what is refused, and what searches gave."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.curation.asp.nas_bench_201 import from_nats_bench
from components.curation.asp.nas_cell import Architecture, all_architectures
from components.curation.asp.nas_table import SCHEMA, TEST, ArchitectureTable
from components.pipeline.errors import DataContractError, UsageError

CELLS = tuple(all_architectures(2))
Rows = list[dict[str, Any]]


def row(cell: Architecture, valid: float, test: float = 50.0, **other: Any) -> dict[str, Any]:
    return {
        "architecture": str(cell),
        "dataset": "digits",
        "seed": 0,
        "epochs": 10,
        "train_accuracy": 99.0,
        "valid_accuracy": valid,
        "test_accuracy": test,
        "train_seconds": 1.5,
        "parameters": 100,
        "flops": 2000,
        **other,
    }


def rows_of(*valid: float) -> Rows:
    return [row(cell, value) for cell, value in zip(CELLS, valid, strict=True)]


def table(rows: Rows, **choice: Any) -> ArchitectureTable:
    return ArchitectureTable.of(pa.Table.from_pylist(rows), **choice)


HAND_MADE = rows_of(10.0, 60.0, 70.0, 72.0, 65.0)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = table(HAND_MADE)
    made.write(tmp_path / "new" / "table.parquet")
    read = ArchitectureTable.read(tmp_path / "new" / "table.parquet")
    assert read.rows.equals(made.rows)
    assert read.rows.schema == SCHEMA
    assert read.architectures == CELLS
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["table.parquet"]


def test_rows_may_come_in_any_order_with_more_columns_and_narrower_types() -> None:
    rows = pa.Table.from_pylist([{**one, "note": "x"} for one in HAND_MADE[::-1]])
    place = rows.column_names.index("seed")
    rows = rows.set_column(place, "seed", rows["seed"].cast(pa.int8()))
    found = ArchitectureTable.of(rows)
    assert found.architectures == CELLS
    assert found.mean().tolist() == [10.0, 60.0, 70.0, 72.0, 65.0]


def with_row(number: int, **values: Any) -> Callable[[Rows], Rows]:
    return lambda rows: [{**one, **values} if r == number else one for r, one in enumerate(rows)]


@pytest.mark.parametrize(
    ("spoil", "where", "what"),
    [
        (lambda r: [{k: v for k, v in x.items() if k != "flops"} for x in r], "", "columns flops"),
        (with_row(2, valid_accuracy=100.5), " row 2 column 'valid_accuracy'", "is 100.5, not a"),
        (with_row(0, test_accuracy=-1.0), " row 0 column 'test_accuracy'", "is -1.0, not a"),
        (with_row(4, train_accuracy=math.nan), " row 4 column 'train_accuracy'", "is nan, not a"),
        (with_row(1, train_seconds=math.inf), " row 1 column 'train_seconds'", "not 0 or more"),
        (with_row(1, parameters=-5), " row 1 column 'parameters'", "is -5, not 0 or more"),
        (with_row(3, valid_accuracy=None), " row 3 column 'valid_accuracy'", "is empty"),
        (lambda r: [*r, r[1]], " row 5", "is a second row of architecture |skip_connect~0|"),
        (lambda r: r[:3], "", "2 of 5 architectures are missing, first '|nor_conv_3x3~0|'"),
        (
            with_row(1, architecture="|conv~0|"),
            " row 1 column 'architecture', architecture '|conv~0|' character 1",
            "there is no operation 'conv'",
        ),
        (
            with_row(2, architecture=str(next(all_architectures(3)))),
            " row 2 column 'architecture'",
            "has 3 nodes, row 0 has 2",
        ),
        (with_row(0, seed=0.5), " column 'seed'", "is double, not int64"),
        (
            lambda r: [{**x, "flops": "many"} for x in r],
            " column 'flops'",
            "is string, not int64",
        ),
    ],
)
def test_a_broken_table_is_told_with_its_place(
    spoil: Callable[[Rows], Rows], where: str, what: str
) -> None:
    with pytest.raises(DataContractError) as told:
        ArchitectureTable.of(pa.Table.from_pylist(spoil(HAND_MADE)), where="t.parquet")
    assert told.value.where == f"t.parquet{where}"
    assert what in told.value.what
    assert told.value.remedy


def test_a_table_without_rows_and_a_file_that_is_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match="has no rows"):
        ArchitectureTable.of(pa.Table.from_pylist([], schema=SCHEMA))
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    for name in ("broken.parquet", "missing.parquet"):
        with pytest.raises(DataContractError, match=f"{name}: cannot be read as parquet"):
            ArchitectureTable.read(tmp_path / name)


def test_a_part_of_a_space_may_be_allowed() -> None:
    found = table([HAND_MADE[3], HAND_MADE[1]], complete=False)
    assert found.architectures == (CELLS[1], CELLS[3])
    assert str(found.best()) == "|nor_conv_3x3~0|"


def test_one_data_set_and_one_training_are_chosen() -> None:
    rows = [*HAND_MADE, *({**one, "dataset": "other", "epochs": 20} for one in HAND_MADE)]
    rows += [{**one, "dataset": "other", "valid_accuracy": 1.0} for one in HAND_MADE]
    with pytest.raises(UsageError, match="column 'dataset': has 2 different ones") as told:
        table(rows)
    assert told.value.remedy == "choose dataset among digits, other"
    with pytest.raises(UsageError, match="column 'epochs': has 2 different ones"):
        table(rows, dataset="other")
    with pytest.raises(UsageError, match="column 'epochs': has no 30"):
        table(rows, dataset="other", epochs=30)
    assert table(rows, dataset="digits").mean()[1] == 60.0
    assert table(rows, dataset="other", epochs=10).mean()[1] == 1.0


def test_regret_is_how_far_a_choice_is_below_the_best() -> None:
    found = table(HAND_MADE)
    assert found.best() == CELLS[3]
    assert [found.regret(cell) for cell in CELLS] == [62.0, 12.0, 2.0, 0.0, 7.0]
    assert found.regret([CELLS[0], CELLS[4], CELLS[2]]) == 2.0
    tests = table([row(c, 50.0, test) for c, test in zip(CELLS, (1, 2, 3, 5, 4), strict=True)])
    assert tests.best() == CELLS[0]
    assert tests.best(TEST) == CELLS[3]
    assert tests.regret(tests.best(), TEST) == 4.0
    with pytest.raises(UsageError, match="has no architecture"):
        found.regret(next(all_architectures(3)))


def test_accuracies_are_means_over_the_seeds_that_are_there() -> None:
    rows = [*HAND_MADE, row(CELLS[1], 80.0, seed=7), row(CELLS[3], 70.0, seed=7)]
    found = table(rows)
    assert found.seeds == (0, 7)
    assert found.mean().tolist() == [10.0, 70.0, 70.0, 71.0, 65.0]
    second = found.of_seeds([7])
    assert second.architectures == (CELLS[1], CELLS[3])
    assert second.mean().tolist() == [80.0, 70.0]
    assert found.of_seeds([0]).mean().tolist() == table(HAND_MADE).mean().tolist()
    with pytest.raises(UsageError, match="no seed of 3") as told:
        found.of_seeds([3])
    assert told.value.remedy == "it has 0, 7"


def test_rank_correlations_are_those_counted_by_hand() -> None:
    found = table(HAND_MADE)
    same = found.rank_correlation(dict(zip(CELLS, (1, 2, 4, 5, 3), strict=True)))
    assert same == pytest.approx((1.0, 1.0, 5))
    # One of ten pairs is turned around; differences of ranks are 1 and 1.
    nearly = found.rank_correlation(dict(zip(CELLS, (1, 2, 5, 4, 3), strict=True)))
    assert nearly == pytest.approx((0.8, 1 - 6 * 2 / (5 * 24), 5))
    # Of six pairs one is tied and five agree: 5 / √(5 · 6).
    tied = found.rank_correlation(dict(zip(CELLS[:4], (1, 2, 3, 3), strict=True)))
    assert tied.kendall == pytest.approx(5 / math.sqrt(30))
    assert tied.n == 4
    assert math.isnan(found.rank_correlation(dict.fromkeys(CELLS, 1.0)).kendall)


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ({}, "0 scores have no ranking"),
        ({CELLS[0]: 1.0}, "1 scores have no ranking"),
        ({CELLS[0]: 1.0, CELLS[1]: math.nan}, r"the score of '\|skip_connect~0\|' is nan"),
        ({CELLS[0]: 1.0, next(all_architectures(3)): 1.0}, "has no architecture"),
    ],
)
def test_scores_that_rank_nothing_are_refused(scores: dict[Architecture, float], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        table(HAND_MADE).rank_correlation(scores)


class NatsResults:
    """A trained architecture as `ArchResults` of nats_bench 1.8 gives it."""

    def __init__(self, index: int) -> None:
        self.index = index

    def get_dataset_seeds(self, dataset: str) -> list[int]:
        return [777, 888][: 2 - self.index % 2]

    def get_total_epoch(self, dataset: str) -> int:
        return 200

    def get_metrics(
        self, dataset: str, setname: str, iepoch: int | None = None, is_random: int = 0
    ) -> dict[str, Any]:
        place = ["train", "x-valid", "ori-test", "x-test"].index(setname)
        accuracy = 10.0 * self.index + 5 * place + (is_random == 888)
        return {"loss": 1.0, "accuracy": accuracy, "all_time": 100.0 + is_random}

    def get_compute_costs(self, dataset: str) -> dict[str, Any]:
        return {"flops": 7.78305, "params": 0.073306, "latency": None}


class Nats:
    """A reader of five architectures."""

    def __len__(self) -> int:
        return len(CELLS)

    def arch(self, index: int) -> str:
        return str(CELLS[index])

    def query_meta_info_by_index(self, arch_index: int, hp: str) -> NatsResults:
        assert hp == "200"
        return NatsResults(arch_index)


@pytest.mark.parametrize(("dataset", "test"), [("cifar10-valid", 10.0), ("cifar100", 15.0)])
def test_results_of_nas_bench_201_become_a_table(dataset: str, test: float) -> None:
    found = ArchitectureTable.of(from_nats_bench(Nats(), dataset))
    assert found.architectures == CELLS
    assert found.seeds == (777, 888)
    assert found.mean().tolist() == [5.5, 15.0, 25.5, 35.0, 45.5]
    assert found.mean(TEST).tolist() == [test + 10 * i + 0.5 * (i % 2 == 0) for i in range(5)]
    first = found.rows.to_pylist()[0]
    assert (first["parameters"], first["flops"]) == (73_306, 7_783_050)
    assert (first["train_accuracy"], first["train_seconds"], first["epochs"]) == (0.0, 877.0, 200)


def test_what_nas_bench_201_has_no_validation_of_is_refused() -> None:
    with pytest.raises(UsageError, match="no validation accuracies of 'cifar10'"):
        from_nats_bench(Nats(), "cifar10")


def test_a_table_of_all_cells_of_four_nodes_is_read(tmp_path: Path) -> None:
    cells = list(all_architectures(4))
    rows = [row(cell, number / 200, seed=777) for number, cell in enumerate(cells)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = ArchitectureTable.read(tmp_path / "t.parquet")
    assert found.best() == cells[-1]
    some = {cell: float(number) for number, cell in enumerate(cells[::100])}
    assert found.rank_correlation(some) == pytest.approx((1.0, 1.0, 157))
