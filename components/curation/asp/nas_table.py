"""Tables of trained architectures: a search is judged by what training gave long ago.

A table has a row for each architecture, data set, number of epochs and seed (`SCHEMA`). Those of
NAS-Bench-201 (arXiv 2001.00326) are gigabytes in a format of their own and not at hand here:
`nas_bench_201.py` makes such a table with the reader that their users have. Our own small one is
made by ``reelflow bench nas_table``.

Shapes: R rows, A architectures, in the order of `all_architectures`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.curation.asp.nas_cell import Architecture, all_architectures
from components.pipeline.errors import DataContractError, UsageError

Float64 = npt.NDArray[np.float64]

TRAIN, VALID, TEST = "train_accuracy", "valid_accuracy", "test_accuracy"
#: Accuracies are in percent. Seconds are of training, by whatever clock the table's maker says;
#: FLOPs are multiply-accumulates for one image.
SCHEMA = pa.schema(
    [
        ("architecture", pa.string()),
        ("dataset", pa.string()),
        ("seed", pa.int64()),
        ("epochs", pa.int64()),
        (TRAIN, pa.float64()),
        (VALID, pa.float64()),
        (TEST, pa.float64()),
        ("train_seconds", pa.float64()),
        ("parameters", pa.int64()),
        ("flops", pa.int64()),
    ]
)
KEY = ("architecture", "dataset", "seed", "epochs")


class RankCorrelation(NamedTuple):
    """How alike two rankings are, from -1 to 1; NaN where all values of one are equal.

    Attributes:
        kendall: tau-b.
        spearman: rho.
        n: architectures.
    """

    kendall: float
    spearman: float
    n: int


@dataclass(frozen=True)
class ArchitectureTable:
    """What training on one data set for one number of epochs gave.

    Attributes:
        rows: of `SCHEMA`.
        architectures: A, each once.
    """

    rows: pa.Table
    architectures: tuple[Architecture, ...]

    @classmethod
    def read(
        cls,
        file: Path,
        *,
        dataset: str | None = None,
        epochs: int | None = None,
        complete: bool = True,
    ) -> ArchitectureTable:
        """From a parquet file.

        Args:
            dataset, epochs: which rows; None: the file has one only.
            complete: whether it has to have every architecture of its space.

        Raises:
            DataContractError: a column or row is not as it should be; file, row and column are
                told.
            UsageError: the file has no such data set or epochs, or several to choose from.
        """
        try:
            rows = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise DataContractError(
                f"cannot be read as parquet: {error}", where=str(file), remedy="export it again"
            ) from error
        return cls.of(rows, dataset=dataset, epochs=epochs, complete=complete, where=str(file))

    @classmethod
    def of(
        cls,
        rows: pa.Table,
        *,
        dataset: str | None = None,
        epochs: int | None = None,
        complete: bool = True,
        where: str = "architecture table",
    ) -> ArchitectureTable:
        """From rows; as `read`, whose errors name ``where``."""
        rows = _in_schema(rows, where)
        _check_numbers(rows, where)
        _check_once(rows, where)
        known = _parsed(rows["architecture"].to_pylist(), where)
        rows = _chosen(_chosen(rows, "dataset", dataset, where), "epochs", epochs, where)
        there = {known[text] for text in rows["architecture"].unique().to_pylist()}
        whole = tuple(all_architectures(next(iter(there)).nodes))
        found = tuple(a for a in whole if a in there)
        if complete and len(found) < len(whole):
            first = next(a for a in whole if a not in there)
            raise DataContractError(
                f"{len(whole) - len(found)} of {len(whole)} architectures are missing, first "
                f"'{first}'",
                where=where,
                remedy="train them, or say that the table is a part (complete=False)",
            )
        return cls(rows, found)

    def write(self, file: Path) -> None:
        """As parquet, in one atomic step."""
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.unfinished")
        pq.write_table(self.rows, unfinished, compression="zstd")
        unfinished.replace(file)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Ascending; an architecture need not have all of them."""
        return tuple(sorted(self.rows["seed"].unique().to_pylist()))

    def of_seeds(self, seeds: Sequence[int]) -> ArchitectureTable:
        """The rows of some seeds, and the architectures that have one.

        Raises:
            UsageError: the table has none of them.
        """
        rows = self.rows.filter(pc.is_in(self.rows["seed"], pa.array(seeds, pa.int64())))
        if not len(rows):
            raise UsageError(
                f"the table has no seed of {', '.join(map(str, seeds))}",
                remedy=f"it has {', '.join(map(str, self.seeds))}",
            )
        there = set(rows["architecture"].to_pylist())
        return ArchitectureTable(rows, tuple(a for a in self.architectures if str(a) in there))

    def mean(self, column: str = VALID) -> Float64:
        """Mean over seeds: float64 [A]."""
        place = {str(architecture): a for a, architecture in enumerate(self.architectures)}
        row_R = np.array([place[text] for text in self.rows["architecture"].to_pylist()])
        value_R = self.rows[column].to_numpy().astype(np.float64)
        return np.bincount(row_R, value_R) / np.bincount(row_R)

    def best(self, column: str = VALID) -> Architecture:
        """The architecture of the highest mean, of equal ones the first."""
        return self.architectures[int(self.mean(column).argmax())]

    def regret(self, choice: Architecture | Sequence[Architecture], column: str = VALID) -> float:
        """How many points the choice is below the best; of several the best counts.

        Raises:
            UsageError: the table has no such architecture.
        """
        chosen = [choice] if isinstance(choice, Architecture) else choice
        mean_A = self.mean(column)
        return float(mean_A.max() - max(mean_A[self._place(a)] for a in chosen))

    def rank_correlation(
        self, scores: Mapping[Architecture, float], column: str = VALID
    ) -> RankCorrelation:
        """Of scores, of all architectures or a part of them, with the means of a column.

        Raises:
            UsageError: fewer than two scores, one that is not finite, or of an architecture that
                the table does not have.
        """
        from scipy.stats import kendalltau, spearmanr

        if len(scores) < 2:
            raise UsageError(f"{len(scores)} scores have no ranking: give two at least")
        for architecture, score in scores.items():
            if not math.isfinite(score):
                raise UsageError(f"the score of '{architecture}' is {score}")
        theirs = self.mean(column)[[self._place(architecture) for architecture in scores]]
        ours = np.array([*scores.values()], np.float64)
        if not np.ptp(ours) or not np.ptp(theirs):
            return RankCorrelation(math.nan, math.nan, len(ours))
        return RankCorrelation(
            float(kendalltau(ours, theirs).statistic),
            float(spearmanr(ours, theirs).statistic),
            len(ours),
        )

    @functools.cached_property
    def _places(self) -> Mapping[Architecture, int]:
        return {architecture: a for a, architecture in enumerate(self.architectures)}

    def _place(self, architecture: Architecture) -> int:
        if architecture not in self._places:
            raise UsageError(
                f"the table has no architecture '{architecture}' among its "
                f"{len(self.architectures)}"
            )
        return self._places[architecture]


def _in_schema(rows: pa.Table, where: str) -> pa.Table:
    """The columns of the schema alone, in its types."""
    missing = [name for name in SCHEMA.names if name not in rows.column_names]
    if missing:
        raise DataContractError(
            f"columns {', '.join(missing)} are missing",
            where=where,
            remedy=f"an architecture table has {', '.join(SCHEMA.names)}",
        )
    if not len(rows):
        raise DataContractError("has no rows", where=where, remedy="export it again")
    columns = []
    for field in SCHEMA:
        column = rows[field.name]
        place = f"{where} column '{field.name}'"
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowException as error:
            raise DataContractError(
                f"is {column.type}, not {field.type}: {error}",
                where=place,
                remedy=f"write it as {field.type}",
            ) from error
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise DataContractError(
                "is empty", where=f"{where} row {row} column '{field.name}'", remedy="fill it in"
            )
    return pa.table(columns, schema=SCHEMA)


def _check_numbers(rows: pa.Table, where: str) -> None:
    limits = {TRAIN: 100.0, VALID: 100.0, TEST: 100.0}
    limits |= dict.fromkeys(("train_seconds", "parameters", "flops"), math.inf)
    for name, highest in limits.items():
        value_R = rows[name].to_numpy()
        # NaN is in no range.
        wrong_R = ~((value_R >= 0) & (value_R <= highest) & np.isfinite(value_R))
        if wrong_R.any():
            row = int(wrong_R.argmax())
            wanted = "a percentage, 0 to 100" if highest == 100 else "0 or more"
            raise DataContractError(
                f"is {value_R[row]}, not {wanted}",
                where=f"{where} row {row} column '{name}'",
                remedy="correct the export",
            )


def _check_once(rows: pa.Table, where: str) -> None:
    first: dict[tuple[Any, ...], int] = {}
    for row, key in enumerate(zip(*(rows[name].to_pylist() for name in KEY), strict=True)):
        if key in first:
            told = ", ".join(f"{name} {value}" for name, value in zip(KEY, key, strict=True))
            raise DataContractError(
                f"is a second row of {told}; the first is row {first[key]}",
                where=f"{where} row {row}",
                remedy="keep one of them",
            )
        first[key] = row


def _parsed(texts: list[str], where: str) -> dict[str, Architecture]:
    """Architectures by their strings; all have equally many nodes."""
    known: dict[str, Architecture] = {}
    for row, text in enumerate(texts):
        if text in known:
            continue
        place = f"{where} row {row} column 'architecture'"
        try:
            known[text] = Architecture.parse(text)
        except DataContractError as error:
            raise DataContractError(
                error.what, where=f"{place}, {error.where}", remedy=error.remedy
            ) from error
        nodes, others = known[text].nodes, known[texts[0]].nodes
        if nodes != others:
            raise DataContractError(
                f"has {nodes} nodes, row 0 has {others}",
                where=place,
                remedy="make a table of each space",
            )
    return known


def _chosen(rows: pa.Table, column: str, value: str | int | None, where: str) -> pa.Table:
    """The rows of one data set or number of epochs."""
    there = sorted(rows[column].unique().to_pylist())
    if value is None and len(there) == 1:
        return rows
    if value not in there:
        raise UsageError(
            f"has no {value!r}" if value is not None else f"has {len(there)} different ones",
            where=f"{where} column '{column}'",
            remedy=f"choose {column} among {', '.join(map(str, there))}",
        )
    return rows.filter(pc.equal(rows[column], value))
