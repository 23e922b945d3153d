"""Architecture search on subsets: all 125 cells of a small space, trained once, then looked up.

The cells of NAS-Bench-201 (arXiv 2001.00326) with three nodes instead of four are each trained on
all data with three seeds: 8,000 images of CIFAR-10 made 16 × 16 pixels, 10 epochs. The table of
these trainings (`components.curation.asp.nas_table`) is the truth that proxies are held against;
that of NAS-Bench-201 itself is not at hand. 3,000 other images are the validation data of both, and
row group 9 is the test data, seen once by every network of the table when it is finished.

A proxy trains all cells again with other seeds, on a share of the data: by ASP-R, by an even
subset drawn anew each epoch, or on all data for as many epochs as cost the same. The contract of
ASP (arXiv 2310.11478) is published; the rule ASP-R is our own, and the paper's tables could not be
read, so none of its figures stands beside ours.

Figures of a proxy are means over its seeds, low and high the lowest and the highest seed: Kendall's
tau-b and Spearman's rho of its validation accuracies with the table's means, of all cells and of
the quarter that the table has for best; regret, in points: how far the first one, or the best of
the first three, is below the best of the table, by validation and by test accuracy; and seconds of
processor time of all cells, selection and validation in them. The references are the same figures
of one training on all data, held against the table's other seeds: no proxy can be expected to rank
better than that. Of ``…_minus_…``, differences of tau, low and high are the 95 % interval of a
bootstrap over topologies. Cells of one topology are mostly the same network, and with equal seeds
tied: tau-b leaves such pairs out.

``REELFLOW_BENCH_HOME`` keeps the trainings and the table, ``architectures.parquet``: a second call
goes on where one was cut.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from benchmarks.flow_runs import shared_data
from benchmarks.nas_runs import (
    ASP_R,
    EVEN,
    FULL,
    SHORT,
    Figures,
    Job,
    Place,
    Size,
    architectures,
    jobs_of,
    place_in,
    train_all,
)
from benchmarks.result import Result, print_lines

if TYPE_CHECKING:
    from components.curation.asp.nas_table import ArchitectureTable

SUMMARY = "Architecture search on subsets: ranks and regret beside a table of 125 trained cells"

DATA = "cifar10"
CIFAR = Size(
    dataset="cifar10-16x16",
    train=8_000,
    valid=3_000,
    test=5_000,
    edge=16,
    channels=16,
    epochs=10,
    every=1,
    table_seeds=(0, 1, 2),
    proxy_seeds=(100, 101, 102),
    ratios=(0.1, 0.3),
    mirrored=True,
)
#: Every 31st cell has one operation on all of its edges.
DIGITS = Size(
    dataset="digits",
    train=600,
    valid=300,
    test=300,
    edge=8,
    channels=4,
    epochs=2,
    every=31,
    table_seeds=(0, 1),
    proxy_seeds=(100,),
    ratios=(0.5,),
    mirrored=False,
)
TABLE = "architectures.parquet"
RESAMPLES = 1000
TOP = 3
UNITS = {
    "kendall": "tau-b",
    "spearman": "rho",
    "kendall_best_quarter": "tau-b",
    "regret_top_1": "points",
    "regret_top_3": "points",
    "test_regret_top_1": "points",
    "test_regret_top_3": "points",
    "seconds": "s",
}

Float = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
#: A rule and a ratio.
Arm = tuple[str, float]


def run(quick: bool = False) -> list[Result]:
    """All figures; ``quick`` has five cells and the digits of scikit-learn."""
    from components.pipeline.errors import UsageError

    data = None if quick else shared_data(DATA)
    if data is None and not quick:
        raise UsageError(
            f"the data '{DATA}' is not at hand",
            remedy="name the folder of the public data sets by REELFLOW_SHARED_DATA, or give "
            "--quick",
        )
    with tempfile.TemporaryDirectory(prefix="bench_nas_") as temporary:
        home = Path(os.environ.get("REELFLOW_BENCH_HOME") or temporary).resolve()
        place = place_in(home, data, DIGITS if quick else CIFAR)
        known = train_all(place, jobs_of(place.size))
        table = table_of(place, known)
    return figures(table, place.size, known)


def table_of(place: Place, known: Mapping[str, Figures]) -> ArchitectureTable:
    """Of all trainings on all data; it is written, too."""
    import pyarrow as pa

    from components.curation.asp.nas_table import SCHEMA, ArchitectureTable

    rows = [known[job.key] for job in jobs_of(place.size) if job.rule == FULL]
    columns = [{name: row[name] for name in SCHEMA.names} for row in rows]
    table = ArchitectureTable.of(
        pa.Table.from_pylist(columns, schema=SCHEMA), complete=place.size.every == 1
    )
    table.write(place.folder / TABLE)
    return table


def figures(table: ArchitectureTable, size: Size, known: Mapping[str, Figures]) -> list[Result]:
    """Of the table itself, of every proxy, and of ASP-R beside the others."""
    ceiling = [
        judged(
            table.of_seeds([other for other in size.table_seeds if other != seed]),
            *of_arm(known, size, (FULL, 1.0), seed),
        )
        for seed in size.table_seeds
    ]
    rows = table_figures(table)
    rows += [of_seeds(f"full_{name}", [c[name] for c in ceiling], None, name) for name in UNITS]
    for ratio in size.ratios:
        scores: dict[str, list[Float]] = {}
        for rule in (ASP_R, EVEN, SHORT):
            found = [of_arm(known, size, (rule, ratio), seed) for seed in size.proxy_seeds]
            scores[rule] = [score_A for score_A, _ in found]
            seen = [judged(table, *one) for one in found]
            for name in UNITS:
                reference = float(np.mean([c[name] for c in ceiling]))
                values = [one[name] for one in seen]
                rows.append(of_seeds(f"{rule}_{ratio:g}_{name}", values, reference, name))
        for other in (EVEN, SHORT):
            gap = tau_difference(scores[ASP_R], scores[other], table.mean(), topologies(table))
            name = f"{ASP_R}_{ratio:g}_minus_{other}_kendall"
            rows.append(Result(name, *gap[:1], None, "tau-b", *gap[1:], len(scores[other]), True))
    return rows


def of_arm(known: Mapping[str, Figures], size: Size, arm: Arm, seed: int) -> tuple[Float, float]:
    """Validation accuracies of a seed's cells, float64 [A], and the seconds of all of them."""
    ours = [known[Job(*arm, seed, str(a)).key] for a in architectures(size)]
    score_A = np.array([one["valid_accuracy"] for one in ours])
    return score_A, sum(one["seconds"] for one in ours)


def judged(table: ArchitectureTable, score_A: Float, seconds: float) -> dict[str, float]:
    """The figures of one search: scores of the table's architectures, and what they cost."""
    from components.curation.asp.nas_table import TEST

    every = table.architectures
    by_score = [every[a] for a in np.argsort(-score_A, kind="stable")]
    best_quarter = np.argsort(-table.mean(), kind="stable")[: max(2, -(-len(every) // 4))]
    whole = table.rank_correlation(dict(zip(every, score_A.tolist(), strict=True)))
    return {
        "kendall": whole.kendall,
        "spearman": whole.spearman,
        "kendall_best_quarter": table.rank_correlation(
            {every[a]: float(score_A[a]) for a in best_quarter}
        ).kendall,
        "regret_top_1": table.regret(by_score[0]),
        "regret_top_3": table.regret(by_score[:TOP]),
        "test_regret_top_1": table.regret(by_score[0], TEST),
        "test_regret_top_3": table.regret(by_score[:TOP], TEST),
        "seconds": seconds,
    }


def table_figures(table: ArchitectureTable) -> list[Result]:
    """The best cell, and how far apart cells and seeds are."""
    from components.curation.asp.nas_table import TEST, VALID

    n = len(table.architectures)
    different = int(topologies(table).max()) + 1
    rows = [
        Result("architectures", n, None, "cells", n, n, len(table.seeds), True),
        Result("topologies", different, None, "cells", different, different, 1, True),
    ]
    for name, column in (("valid", VALID), ("test", TEST)):
        mean_A = table.mean(column)
        best = float(mean_A[table.architectures.index(table.best())])
        low, high = float(mean_A.min()), float(mean_A.max())
        rows.append(
            Result(
                f"{name}_accuracy_of_best", best, float(np.median(mean_A)), "%", low, high, n, True
            )
        )
    return rows


def topologies(table: ArchitectureTable) -> Int64:
    """A number for each architecture, equal for those of one topology: int64 [A]."""
    expressions = [architecture.expression for architecture in table.architectures]
    return np.unique(expressions, return_inverse=True)[1].astype(np.int64)


def tau_difference(
    ours: list[Float], theirs: list[Float], truth_A: Float, topology_A: Int64
) -> tuple[float, float, float]:
    """Mean over seeds of tau-b with the truth, ours less theirs; 95 % interval over topologies.

    A resample is how often each architecture is in it, so tau is a ratio of quadratic forms.
    """
    count = int(topology_A.max()) + 1
    drawn_RT = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weight_RA = np.concatenate([np.ones((1, len(truth_A))), drawn_RT[:, topology_A]])
    taus = [np.mean([tau(s, truth_A, weight_RA) for s in scores], 0) for scores in (ours, theirs)]
    gap_R = taus[0] - taus[1]
    low, high = np.nanquantile(gap_R[1:], (0.025, 0.975))
    return float(gap_R[0]), float(low), float(high)


def tau(score_A: Float, truth_A: Float, weight_RA: Float) -> Float:
    """Kendall's tau-b with architectures counted so often: float64 [R]; NaN where all are equal."""
    ours_AA = np.sign(score_A[:, None] - score_A)
    truth_AA = np.sign(truth_A[:, None] - truth_A)

    def pairs(x_AA: Float) -> Float:
        return ((weight_RA @ x_AA) * weight_RA).sum(1)

    of_both = np.sqrt(pairs(ours_AA**2) * pairs(truth_AA**2))
    agree_R = pairs(ours_AA * truth_AA)
    return np.divide(agree_R, of_both, out=np.full(len(of_both), np.nan), where=of_both > 0)


def of_seeds(name: str, values: list[float], reference: float | None, figure: str) -> Result:
    """The mean over seeds, with the lowest and the highest."""
    higher_is_better = "regret" not in figure and figure != "seconds"
    mean, low, high = float(np.mean(values)), min(values), max(values)
    unit = UNITS[figure]
    return Result(name, mean, reference, unit, low, high, len(values), higher_is_better)


if __name__ == "__main__":
    print_lines(run(quick="--quick" in sys.argv))
