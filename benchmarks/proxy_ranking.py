"""Whether candidates trained on a part of the data rank as those trained on all of it.

CIFAR-10 at 16 × 16, 8,000 training and 3,000 validation images; scikit-learn's digits, and fewer of
them, where it is not at hand; 64 random candidates of a narrowed space (`proxy_trials`). The truth
is the mean validation accuracy of three trainings on all data; every method (`proxy_methods`:
ASP-R, its modes, all rules it is compared with) trains all candidates at several ratios with five
other seeds. The rule is our own: ASP (arXiv 2310.11478) is known to us by its abstract, so that
there is no figure of the paper beside ours.

Variants of the training images, on which importance must pay or must not hurt, are compared for a
few methods: each image five times with jitter, classes of very different sizes, a fifth of the
labels wrong, half of the images easy.

Figures, means over seeds with the lowest and the highest: Kendall's tau-b and Spearman's
correlation with the truth, tau within the true best quarter, regret of the best and of the best
three (accuracy that is lost if they are trained on all data and the best is taken), how many of the
best five are among the true best five, processor seconds (selection, what a method prepares and
validation in it) and how many times fewer they are than those of all data, R (samples trained on,
by those of all epochs on all data). ``…_minus_…`` are differences of tau with a 95 % interval of
paired bootstrap over candidates.

``REELFLOW_BENCH_HOME`` keeps what was trained (a second call goes on), ``REELFLOW_BENCH_ARMS``
names those methods that are wanted, with commas between them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.flow_runs import shared_data
from benchmarks.kept import kept, short_digest
from benchmarks.processes import one_thread_each
from benchmarks.result import Result

SUMMARY = "Proxy selection: do candidates trained on a part of the data rank as on all of it"

Float = npt.NDArray[np.float64]

RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5)
SEEDS = (0, 1, 2, 3, 4)
#: Of the trainings on all data that are the truth: those of no method.
TRUTH_SEEDS = (100, 101, 102)
FULL, OURS = "full", "asp_r"
OPPONENTS = ("short", "dynamic_random")
#: Methods that are compared on variants of the data, and the ratios there.
ON_VARIANTS = (OURS, "asp_r_stratified", "asp_r_noise_guard", *OPPONENTS, "static_random")
VARIANT_RATIOS = (0.1, 0.3)
#: Methods whose cost no ratio changes.
WITHOUT_RATIO = (FULL, "infobatch")
RESAMPLES = 1_000
RESULT = "trained.npz"


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        train, valid, held_out: images.
        candidates: points of the space.
    """

    train: int = 8_000
    valid: int = 3_000
    held_out: int = 160
    candidates: int = 64
    epochs: int = 24


#: Where there is no CIFAR-10.
DIGITS = Size(train=1_200, valid=500, held_out=60)
QUICK = Size(train=600, valid=400, held_out=40, candidates=6, epochs=4)
QUICK_METHODS = (OURS, *OPPONENTS, "grad_match", "forgetting", FULL)


@dataclass(frozen=True)
class Job:
    """All candidates trained by a method on a variant of the data."""

    variant: str
    method: str
    ratio: float
    seed: int


@dataclass(frozen=True)
class Trained:
    """What a job gave.

    Attributes:
        metric_K: validation accuracy of every candidate.
        seconds: of processor time, preparation and all.
        cost: R.
    """

    metric_K: Float
    seconds: float
    cost: float


def run(quick: bool = False) -> list[Result]:
    """All methods; ``quick`` has few images, candidates and methods, and one seed."""
    data = None if quick else shared_data("cifar10")
    size = QUICK if quick else DIGITS if data is None else Size()
    wanted = jobs(quick)
    with tempfile.TemporaryDirectory(prefix="bench_proxy_ranking_") as temporary:
        home = Path(os.environ.get("REELFLOW_BENCH_HOME") or temporary)
        found = train_all(home, size, wanted, data)
    return figures(found)


def jobs(quick: bool = False) -> list[Job]:
    """What is trained, the truth of every variant first."""
    from benchmarks.proxy_methods import METHODS
    from benchmarks.proxy_trials import VARIANTS

    named = os.environ.get("REELFLOW_BENCH_ARMS")
    methods = [m for m in METHODS if named is None or m in (OURS, FULL, *named.split(","))]
    variants = [*VARIANTS]
    ratios: Sequence[float] = RATIOS
    seeds: Sequence[int] = SEEDS
    truths: Sequence[int] = TRUTH_SEEDS
    if quick:
        methods, variants = [*QUICK_METHODS], ["plain", "half_easy"]
        ratios, seeds, truths = (0.3,), SEEDS[:1], TRUTH_SEEDS[:1]
    found = [Job(variant, FULL, 1.0, seed) for variant in variants for seed in truths]
    for variant in variants:
        plain = variant == variants[0]
        of_variant = methods if plain else [m for m in methods if m in ON_VARIANTS]
        of_ratios = ratios if plain or quick else VARIANT_RATIOS
        for method in of_variant:
            chosen = (1.0,) if method in WITHOUT_RATIO else of_ratios
            found += [Job(variant, method, ratio, seed) for ratio in chosen for seed in seeds]
    return found


def train_all(
    home: Path, size: Size, wanted: Sequence[Job], data: Path | None
) -> dict[Job, Trained]:
    """All jobs that are not kept yet, a process of one thread a core."""
    with one_thread_each() as pool:
        begun = {job: pool.submit(train_job, home, size, job, data) for job in wanted}
        return {job: trained.result() for job, trained in begun.items()}


def train_job(home: Path, size: Size, job: Job, data: Path | None) -> Trained:
    """A job's result, kept once it is there."""
    made_of = short_digest([asdict(size), asdict(job), data is None])

    def make(folder: Path) -> None:
        print(f"{job.variant}: {job.method} {job.ratio:g}, seed {job.seed}", flush=True)
        found = train(size, job, data)
        np.savez(folder / RESULT, metric_K=found.metric_K, facts=[found.seconds, found.cost])

    with np.load(kept(home / f"{job.method}_{made_of}", make) / RESULT) as stored:
        seconds, cost = stored["facts"]
        return Trained(stored["metric_K"], float(seconds), float(cost))


def train(size: Size, job: Job, data: Path | None) -> Trained:
    """All candidates by a method."""
    from benchmarks.proxy_methods import METHODS, Setting
    from benchmarks.proxy_trials import VARIANTS, Trial, candidates, load_task
    from components.curation.asp.evaluator import ProxyEvaluator

    whole = load_task(size.train, size.valid, size.held_out, data)
    # Variants are the same for all seeds and methods.
    task = VARIANTS[job.variant](whole, np.random.default_rng(0))
    start = time.process_time()
    rule = METHODS[job.method](Setting(task, job.ratio, size.epochs, job.seed))
    evaluator = ProxyEvaluator(Trial(task, job.seed), rule, 64)
    outcomes = [evaluator(c, job.seed) for c in candidates(size.candidates)]
    seconds = time.process_time() - start
    of_all = len(task.train) * size.epochs
    cost = float(np.mean([outcome.samples / of_all for outcome in outcomes]))
    return Trained(np.array([outcome.metric for outcome in outcomes]), seconds, cost)


def figures(found: Mapping[Job, Trained]) -> list[Result]:
    """Every method beside the truth, and ours minus its opponents."""
    rows = []
    for variant in dict.fromkeys(job.variant for job in found):
        of_variant = {job: trained for job, trained in found.items() if job.variant == variant}
        truths = [t for job, t in of_variant.items() if job.seed in TRUTH_SEEDS]
        truth_K = np.mean([t.metric_K for t in truths], 0)
        whole = float(np.mean([t.seconds for t in truths]))
        arms: dict[tuple[str, float], list[Trained]] = {}
        for job, trained in of_variant.items():
            if job.seed not in TRUTH_SEEDS:
                arms.setdefault((job.method, job.ratio), []).append(trained)
        for (method, ratio), runs in arms.items():
            rows += arm_figures(f"{variant}_{method}_{ratio:g}", runs, truth_K, whole)
        for (method, ratio), runs in arms.items():
            ours = arms.get((OURS, ratio))
            if method != OURS and ours and len(runs) == len(ours):
                name = f"{variant}_{OURS}_minus_{method}_{ratio:g}_tau"
                rows.append(difference(name, ours, runs, truth_K))
    return rows


def arm_figures(name: str, runs: Sequence[Trained], truth_K: Float, whole: float) -> list[Result]:
    """Of a method at a ratio; ``whole`` are the seconds of all candidates on all data."""
    by_seed = [agreement(run.metric_K, truth_K) for run in runs]
    rows = [
        _of_seeds(
            f"{name}_{key}", [seed[key] for seed in by_seed], unit, not key.endswith("regret")
        )
        for key, unit in UNITS.items()
    ]
    seconds = [run.seconds for run in runs]
    return [
        *rows,
        _of_seeds(f"{name}_seconds", seconds, "CPU s", False),
        _of_seeds(f"{name}_times_fewer_seconds", [whole / s for s in seconds], "times", True),
        _of_seeds(f"{name}_cost", [run.cost for run in runs], "of all samples", False),
    ]


UNITS = {
    "tau": "tau-b",
    "spearman": "rank correlation",
    "tau_of_best_quarter": "tau-b",
    "regret": "accuracy",
    "top_3_regret": "accuracy",
    "best_5_found": "of 5",
}


def agreement(metric_K: Float, truth_K: Float) -> dict[str, float]:
    """How candidates rank by a cheap metric beside the truth, by the names of `UNITS`."""
    from scipy.stats import kendalltau, spearmanr

    order_K = np.argsort(-metric_K, kind="stable")
    best_K = np.argsort(-truth_K, kind="stable")
    quarter = best_K[: max(2, len(truth_K) // 4)]
    highest = float(truth_K.max())
    return {
        "tau": float(kendalltau(metric_K, truth_K).statistic),
        "spearman": float(spearmanr(metric_K, truth_K).statistic),
        "tau_of_best_quarter": float(kendalltau(metric_K[quarter], truth_K[quarter]).statistic),
        "regret": highest - float(truth_K[order_K[0]]),
        "top_3_regret": highest - float(truth_K[order_K[:3]].max()),
        "best_5_found": float(len({*order_K[:5].tolist()} & {*best_K[:5].tolist()})),
    }


def difference(
    name: str, ours: Sequence[Trained], theirs: Sequence[Trained], truth_K: Float
) -> Result:
    """Mean over seeds of the difference of tau, candidates drawn anew for the interval."""
    size = len(truth_K)
    times_RK = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    weight_RK = np.concatenate([np.ones((1, size)), times_RK])
    mean_R, other_R = (
        np.mean([tau_b(run.metric_K, truth_K, weight_RK) for run in runs], 0)
        for runs in (ours, theirs)
    )
    gap_R = mean_R - other_R
    low, high = (float(edge) for edge in np.nanquantile(gap_R[1:], (0.025, 0.975)))
    return Result(name, float(gap_R[0]), None, "tau-b", low, high, len(ours), True)


def tau_b(x_K: Float, y_K: Float, weight_RK: Float) -> Float:
    """Kendall's tau-b of samples in which each candidate is so many times: float64 [R]."""
    x_KK, y_KK = (np.sign(v_K[:, None] - v_K) for v_K in (x_K, y_K))

    def pairs(value_KK: Float) -> Float:
        total: Float = ((weight_RK @ value_KK) * weight_RK).sum(1)
        return total

    return pairs(x_KK * y_KK) / np.sqrt(pairs(np.abs(x_KK)) * pairs(np.abs(y_KK)))


def _of_seeds(name: str, values: Sequence[float], unit: str, higher_is_better: bool) -> Result:
    """The mean over seeds, with the lowest and the highest."""
    mean, low, high = float(np.mean(values)), min(values), max(values)
    return Result(name, mean, None, unit, low, high, len(values), higher_is_better)
