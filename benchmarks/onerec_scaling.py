"""How OneRec's quality grows with its model, codebooks, beam and input features.

One factor at a time around a base size, each arm a run of the recommend flow with the same data and
steps: validation loss and NDCG@10 by model size, of three seeds, with a fitted law
``L(N) = L_inf + a / N^b`` over the parameters of encoder and decoder (without tables); HR@10 by
codebook size (losses of different codebooks are not comparable); HR and Pass@K by beam width, on
the base model; NDCG@10 by what the encoder reads. KuaiRand-Pure where it is at hand, the simulator
elsewhere; validation users only.

All arms but those of other codebooks have the same semantic ids; a seed is that of weights and of
the order of samples. Models of all sizes and what the encoder reads are trained with three seeds,
codebooks with one. Once the base has made what all share, as many arms are trained at once as there
are cores, each by one worker. The interval of the law is that of a bootstrap over the seeds of each
size. Where losses do not fall with the size, there is no law: a resample without one counts as
exponent 0, and none is reported where more than one in forty has none.

``REELFLOW_BENCH_HOME`` keeps the runs (a second call resumes). Curves are written as SVG: into
``REELFLOW_BENCH_FIGURES``, or the current folder.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.flow_runs import run_flow, shared_data
from benchmarks.result import Result

if TYPE_CHECKING:
    from components.pipeline.artifacts import Input

SUMMARY = "Scaling of OneRec: model, codebook, beam and feature sizes, with a fitted law"

DATA = "kuairand_pure"
WIDTHS = (16, 32, 64, 128)
CODEBOOKS = (32, 64, 128, 256)
BEAMS = (8, 32, 128, 512)
#: Ids of a request among which the target may be, best first.
PASS_AT = (8, 32, 128, 512)
#: Users on whom beams are compared, spread over the validation examples.
BEAM_USERS = 2_000
MODEL = "train_recommender.model"
#: What is taken from the encoder, one after the other, until the newest positive events are left
#: (and the newest event of any kind: there is no model without one), each known by its semantic id
#: and by what the user did with it. The lifelong pathway, off at the base size, comes on top.
OFF: Mapping[str, tuple[str, ...]] = {
    "content": (f"{MODEL}.features.content=false",),
    "authors_and_tags": (f"{MODEL}.features.authors=0", f"{MODEL}.features.tags=0"),
    "static": (f"{MODEL}.features.static=false",),
    "short_term": (f"{MODEL}.short_term=1",),
}
SEEDS = (0, 1, 2)
RESAMPLES = 1_000
#: Share of resamples that may have no law.
WITHOUT_LAW = 0.025


def arms_by_width(width: int, seed: int) -> tuple[str, ...]:
    """Parameters of a model size."""
    return f"{MODEL}.d_model={width}", f"{MODEL}.ffn={2 * width}", seed_of(seed)


def seed_of(seed: int) -> str:
    """A training's own seed: that of all stages would change the semantic ids, too."""
    return f"train_recommender.seed={seed}"


def arms_by_features() -> dict[str, tuple[str, ...]]:
    """Parameters of what the encoder reads, from the least to the most."""
    steps = [*OFF.values()]
    reads = ("positive_feedback", *reversed([*OFF]))
    found = {
        name: tuple(setting for step in steps[: len(steps) - place] for setting in step)
        for place, name in enumerate(reads)
    }
    return {**found, "lifelong": (f"{MODEL}.lifelong.entries=256",)}


@dataclass(frozen=True)
class Arm:
    """What one training gave."""

    parameters: int
    loss: float
    ndcg: float
    hr: float


def run(quick: bool = False) -> list[Result]:
    """All four studies; ``quick`` is a tiny simulated catalogue, two sizes of each, one seed."""
    from components.pipeline.machine import cores

    data = None if quick else shared_data(DATA)
    fixed = SMALL if quick else FIXED
    widths, codebooks, beams = (
        (both[:2] if quick else both) for both in (WIDTHS, CODEBOOKS, BEAMS)
    )
    seeds = SEEDS[:1] if quick else SEEDS
    with tempfile.TemporaryDirectory(prefix="bench_onerec_scaling_") as temporary:
        home = Path(os.environ.get("REELFLOW_BENCH_HOME") or temporary)

        def artifacts(*settings: str) -> dict[str, Input]:
            print("arm", *settings, flush=True)
            return run_flow(home, "train_recommender", (*fixed, *settings), data)

        base = artifacts()
        of_width = {d: [arms_by_width(d, seed) for seed in seeds] for d in widths}
        of_codebook = {k: (f"semantic_ids.codebook_size={k}",) for k in codebooks}
        of_features = {
            name: [(*settings, seed_of(seed)) for seed in seeds]
            for name, settings in arms_by_features().items()
        }
        wanted = {*chain(*of_width.values(), *of_features.values()), *of_codebook.values()}
        with ThreadPoolExecutor(1 if quick else cores()) as pool:
            jobs = {arm: pool.submit(artifacts, *arm) for arm in sorted(wanted)}
            try:
                found = {arm: read_arm(job.result()) for arm, job in jobs.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        by_width = {d: [found[arm] for arm in arms] for d, arms in of_width.items()}
        by_codebook = {k: found[arm] for k, arm in of_codebook.items()}
        by_features = {name: [found[arm] for arm in arms] for name, arms in of_features.items()}
        by_beam = search(base, beams)
    law, of_law = law_figures(by_width)
    draw(by_width, law, by_codebook, by_beam, by_features)
    return [
        *(result for d, arms in by_width.items() for result in _of_width(d, arms)),
        *of_law,
        *(
            _result(f"codebook_{k}_valid_hr_at_10", [a.hr], "users", True)
            for k, a in by_codebook.items()
        ),
        *(_result(name, [value], unit, unit != "ms") for name, value, unit in by_beam),
        *(
            _result(
                f"reads_up_to_{name}_valid_ndcg_at_10",
                [a.ndcg for a in arms],
                "mean over users",
                True,
            )
            for name, arms in by_features.items()
        ),
    ]


def _of_width(width: int, arms: Sequence[Arm]) -> list[Result]:
    return [
        _result(f"width_{width}_parameters", [a.parameters for a in arms], "parameters", True),
        _result(f"width_{width}_valid_loss", [a.loss for a in arms], "nats", False),
        _result(f"width_{width}_valid_ndcg_at_10", [a.ndcg for a in arms], "mean over users", True),
    ]


def read_arm(artifacts: Mapping[str, Input]) -> Arm:
    """The best validation of a training, and the size of what was trained."""
    curve = artifacts["training_curve"].read_table().to_pandas().dropna(subset=["valid_loss"])
    best = curve.loc[curve["valid_ndcg_at_10"].idxmax()]
    weights = artifacts["pretrained_recommender"].load_arrays()
    trunk = sum(w.size for name, w in weights.items() if name.startswith(("encoder", "decoder")))
    return Arm(
        parameters=trunk,
        loss=float(curve["valid_loss"].min()),
        ndcg=float(best["valid_ndcg_at_10"]),
        hr=float(best["valid_hr_at_10"]),
    )


@dataclass(frozen=True)
class Law:
    """``L(N) = floor + factor / N^exponent`` over N parameters, by least squares.

    Attributes:
        r2: share of the variance of the losses that it explains.
    """

    floor: float
    factor: float
    exponent: float
    r2: float

    def __call__(self, parameters: np.ndarray) -> np.ndarray:
        return self.floor + self.factor / parameters**self.exponent


def fit_law(points: Sequence[tuple[int, float]]) -> Law | None:
    """The law through (parameters, loss); None where losses do not fall.

    The floor is searched below the lowest loss, and for each floor the power law is a line in
    logarithms; with two sizes, which any floor would fit, it is 0.
    """
    size, loss = (np.array(column, float) for column in zip(*points, strict=True))
    few = len(np.unique(size)) < 3
    floor_F1 = np.zeros((1, 1)) if few else np.linspace(0, loss.min(), 400, endpoint=False)[:, None]
    x_P, y_FP = np.log(size), np.log(loss - floor_F1)
    off_P = x_P - x_P.mean()
    slope_F1 = (y_FP @ off_P / (off_P @ off_P))[:, None]
    offset_F1 = y_FP.mean(1, keepdims=True) - slope_F1 * x_P.mean()
    error_F = np.square(floor_F1 + np.exp(offset_F1 + slope_F1 * x_P) - loss).sum(1)
    best = int(error_F.argmin())
    error = float(error_F[best])
    law = Law(
        float(floor_F1[best, 0]), float(np.exp(offset_F1[best, 0])), -float(slope_F1[best, 0]), 0.0
    )
    total = float(np.square(loss - loss.mean()).sum())
    if law.exponent <= 0 or not total:
        return None
    return Law(law.floor, law.factor, law.exponent, 1 - error / total)


def law_figures(by_width: Mapping[int, Sequence[Arm]]) -> tuple[Law | None, list[Result]]:
    """The law, if any, and each part with the 95 % interval of laws through resampled seeds."""
    law = fit_law([(arm.parameters, arm.loss) for arms in by_width.values() for arm in arms])
    rng = np.random.default_rng(0)
    laws = []
    for _ in range(RESAMPLES):
        drawn = [
            arms[i] for arms in by_width.values() for i in rng.integers(0, len(arms), len(arms))
        ]
        found = fit_law([(arm.parameters, arm.loss) for arm in drawn])
        laws += [found] if found else []
    seeds = min(len(arms) for arms in by_width.values())
    without = 1 - len(laws) / RESAMPLES
    rows = [Result("law_missing", without, None, "of resamples", without, without, seeds, False)]
    if law is None or without > WITHOUT_LAW:
        return None, rows
    for name, unit in (("floor", "nats"), ("factor", "nats"), ("exponent", ""), ("r2", "share")):
        values = [getattr(found, name) for found in laws]
        if name == "exponent":
            values += [0.0] * (RESAMPLES - len(laws))
        low, high = (float(edge) for edge in np.quantile(values, (0.025, 0.975)))
        value = float(getattr(law, name))
        rows.append(Result(f"law_{name}", value, None, unit, low, high, seeds, True))
    return law, rows


def search(artifacts: Mapping[str, Input], widths: Sequence[int]) -> list[tuple[str, float, str]]:
    """HR@10, Pass@K and milliseconds a request of the base model by beam width, one thread."""
    import torch

    from components.evaluation.ranking.comparison import spread
    from components.training.onerec.data import read_sequences
    from components.training.onerec.recommender import Recommender, popularity

    catalogue = artifacts["catalogue"].read_table(["train_positive_count", "train_count"])
    recommender = Recommender.load(
        Path(artifacts["pretrained_recommender"].path()),
        Path(artifacts["semantic_ids"].path()),
        popularity(*(counts.to_numpy() for counts in catalogue.columns)),
    )
    examples = artifacts["valid_examples"].read_table()
    examples = examples.take(spread(len(examples), BEAM_USERS))
    valid = read_sequences(examples.to_batches())
    event_U = valid.example_targets()
    target_U = valid.item_E[event_U]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    try:
        for width in widths:
            start = time.perf_counter()
            ranked = list(recommender.rank(valid, event_U, beams=width, top_n=max(10, width)))
            took = time.perf_counter() - start
            lists_UN = np.concatenate([items for items, _ in ranked])
            for k in sorted({10, *(k for k in PASS_AT if k <= width)}):
                hit = float((lists_UN[:, :k] == target_U[:, None]).any(1).mean())
                name = f"beams_{width}_" + ("hr_at_10" if k == 10 else f"pass_at_{k}")
                found.append((name, hit, "users"))
            found.append((f"beams_{width}_ms_a_request", 1000 * took / len(event_U), "ms"))
    finally:
        torch.set_num_threads(threads)
    return found


def draw(
    by_width: Mapping[int, Sequence[Arm]],
    law: Law | None,
    by_codebook: Mapping[int, Arm],
    by_beam: Sequence[tuple[str, float, str]],
    by_features: Mapping[str, Sequence[Arm]],
) -> Path:
    """The four studies in one SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    model, codebook, beam, features = figure.subplots(2, 2).flatten()
    arms = [arm for of_width in by_width.values() for arm in of_width]
    sizes = np.array([arm.parameters for arm in arms], float)
    model.plot(sizes, [arm.loss for arm in arms], "o")
    model.set(xscale="log", xlabel="parameters N (no tables)", ylabel="validation loss, nats")
    if law:
        line = np.geomspace(sizes.min(), sizes.max(), 50)
        label = f"{law.floor:.2f} + {law.factor:.3g} / N^{law.exponent:.2f}"
        model.plot(line, law(line), "-", label=label)
        model.legend()
    codebook.plot(list(by_codebook), [arm.hr for arm in by_codebook.values()], "o-")
    codebook.set(xscale="log", xlabel="codes a level", ylabel="validation HR@10")
    widest = max(int(name.split("_")[1]) for name, _, _ in by_beam)
    passes = [
        (int(name.rsplit("_", 1)[1]), value)
        for name, value, _ in by_beam
        if name.startswith(f"beams_{widest}_pass")
    ]
    beam.plot(*zip(*passes, strict=True), "o-")
    beam.set(xscale="log", xlabel=f"K of {widest} beams", ylabel="validation Pass@K")
    names = [name.replace("_", " ") for name in by_features]
    features.barh(
        ["+ " * (place > 0) + name for place, name in enumerate(names)],
        [float(np.median([arm.ndcg for arm in arms])) for arms in by_features.values()],
    )
    features.invert_yaxis()
    features.set(xlabel="validation NDCG@10")
    for axis in (model, codebook, beam, features):
        axis.grid(alpha=0.3)
    folder = Path(os.environ.get("REELFLOW_BENCH_FIGURES", "."))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "onerec_scaling.svg"
    with rc_context({"svg.hashsalt": "reelflow"}):
        figure.savefig(path, metadata={"Date": None})
    print(f"curves: {path}", flush=True)
    return path


def _result(name: str, values: Sequence[float], unit: str, higher_is_better: bool) -> Result:
    """The median over seeds, with the lowest and the highest."""
    low, median, high = (float(v) for v in np.quantile(values, (0, 0.5, 1)))
    return Result(name, median, None, unit, low, high, len(values), higher_is_better)


#: The same samples for every arm: about the memory-free model, whose law is asked for.
FIXED = (
    f"{MODEL}.memory.successors=0",
    f"{MODEL}.item_input=sid",
    "train_recommender.max_steps=1500",
    "train_recommender.evaluate_every=250",
    "train_recommender.patience=100",
    "train_recommender.max_minutes=60",
    "train_recommender.workers=1",
)
SMALL = (
    *(f"ingest.simulator.{s}" for s in ("users=120", "items=128", "interactions=6000")),
    "ingest.simulator.render_videos=false",
    "validate.great_expectations=false",
    f"{MODEL}.memory.successors=0",
    f"{MODEL}.item_input=sid",
    "train_recommender.max_steps=20",
    "train_recommender.evaluate_every=10",
    "train_recommender.valid_beams=10",
    "train_recommender.workers=1",
)
