"""Ranking on text data: OneRec, its ablations and controls, TIGER twice, and tuned SASRec.

Amazon Scientific (leave one out, full catalogue, item level, history not masked) where it is at
hand, the simulator elsewhere. Every arm is a run of the recommend flow with some parameters set, so
all share the split, the item embeddings, the validation rule and the evaluator; each is trained
with three seeds (`ABLATIONS` with one), chooses its checkpoint on validation and ranks the test
users once. TIGER comes twice: rebuilt from our parts (RQ-VAE or residual k-means with a digit more
for collisions, an encoder-decoder that knows items by semantic ids alone; `TIGER_GRID`) and
cornac's, reduced to our width, which also gives SASRec with binary cross-entropy and GRU4Rec
(`text_peers`); of a TIGER's and a peer's recipes the best one on validation is run with all seeds.
A shuffled arm gives each item the semantic id of another one; the more a model knows of items
beside their ids, the less it loses by that, so that there are three: of the whole model, without
the successor memory, and of one that knows items by their ids alone. ``sasrec_with_counts`` is
SASRec that knows what our successor memory knows (`counted_sasrec`). This data has ratings alone,
so that no arm can be aligned with a reward, and every event is positive, so that there is no
pathway of positive feedback.

Figures are means over seeds and users; intervals are those of paired bootstrap over users (1,000
resamples) of the differences of seed means. ``masked`` strikes out what a user had before. Legality
without constraints is measured by `onerec_reward`, latency by `onerec_serving`.

``REELFLOW_BENCH_HOME`` keeps the runs (a second call resumes), ``REELFLOW_BENCH_ARMS`` names those
arms and peers that are wanted, with commas between them; for the peers' variables see `text_peers`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.counted_sasrec import CountedSasrec
from benchmarks.flow_runs import run_flow, shared_data
from benchmarks.result import Result
from benchmarks.text_peers import RECIPES, train_peers
from components.evaluation.ranking.metrics import gains, hits

if TYPE_CHECKING:
    from components.pipeline.artifacts import Input

T = TypeVar("T")

SUMMARY = "Ranking by text: OneRec beside TIGER (ours and cornac's), SASRec, ablations and controls"

DATA = "amazon_scientific"
SEEDS = (0, 1, 2)

_NO_COUNTS = "train_recommender.model.memory.successors=0"
_NO_FEATURES = tuple(
    f"train_recommender.model.features.{name}"
    for name in ("content=false", "static=false", "authors=0", "tags=0")
)
#: All that the model knows of an item is its semantic id.
_IDS_ALONE = (_NO_COUNTS, *_NO_FEATURES, "train_recommender.model.item_input=sid")
_TIGER = (
    *_IDS_ALONE,
    "train_recommender.model.positive_feedback=0",
    "align_items.method=none",
    "semantic_ids.collisions=extra_digit",
)
#: Parameters that each arm changes.
ARMS: Mapping[str, tuple[str, ...]] = {
    "onerec": (),
    "onerec_shuffled": ("semantic_ids.shuffled=true",),
    "ids_alone": _IDS_ALONE,
    "ids_alone_shuffled": (*_IDS_ALONE, "semantic_ids.shuffled=true"),
}
#: With the first seed alone, and judged beside the arms of the same seed.
ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "without_memory": (_NO_COUNTS,),
    "without_memory_shuffled": (_NO_COUNTS, "semantic_ids.shuffled=true"),
    "without_alignment": ("align_items.method=none",),
    "without_balance": ("semantic_ids.method=plain",),
    "without_features": _NO_FEATURES,
    "experts": ("train_recommender.model.experts=8", "train_recommender.model.active_experts=2"),
}
TIGERS: Mapping[str, tuple[str, ...]] = {
    "tiger_rq_vae": (*_TIGER, "semantic_ids.method=rq_vae", "semantic_ids.rq_vae.latent=128"),
    "tiger_rq_kmeans": (*_TIGER, "semantic_ids.method=plain"),
}
#: Of each TIGER the better rate by validation with the first seed.
TIGER_GRID = tuple((f"train_recommender.learning_rate={rate}",) for rate in (1e-3, 3e-3))
OURS = "onerec"
#: A shuffled arm is judged by its own unshuffled one.
CONTROLS = {
    "onerec_shuffled": "onerec",
    "without_memory_shuffled": "without_memory",
    "ids_alone_shuffled": "ids_alone",
}
#: The least share of NDCG@10 that a control has to lose.
CONTROL_LOSS = 0.25


UNITS = {
    "collision_rate": "of items",
    "coverage_at_10": "of items",
    "parameters": "parameters",
    "active_parameters": "parameters",
    "steps": "steps",
    "seconds": "s",
    "epochs": "epochs",
    "valid_ndcg_at_10": "mean over users",
}
#: Of those that are better if lower.
LESS = ("collision_rate", "parameters", "active_parameters", "steps", "seconds", "epochs")


@dataclass(frozen=True)
class Ranks:
    """1-based rank of every test user's target by one method and seed, 0 beyond 20; by user id.

    Attributes:
        masked_U: the same with what a user had before struck out; None where it is not known.
    """

    rank_U: npt.NDArray[np.integer]
    masked_U: npt.NDArray[np.integer] | None = None

    def values(self, metric: str) -> npt.NDArray[np.float64]:
        name, k = metric.split("_at_")
        return {"hr": hits, "ndcg": gains}[name](self.rank_U, int(k))


def run(quick: bool = False) -> list[Result]:
    """All arms and peers; ``quick`` is a tiny simulated catalogue, one seed and no peer."""
    require_known()
    kept = os.environ.get("REELFLOW_BENCH_HOME")
    data = None if quick else shared_data(DATA)
    seeds = SEEDS[:1] if quick else SEEDS
    ranks: dict[str, list[Ranks]] = {}
    of_arms: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench_onerec_text_") as temporary:
        home = Path(kept or temporary)
        small = () if data else SMALL

        def flow(seed: int, changed: tuple[str, ...], until: str) -> dict[str, Input]:
            print("arm", f"seed={seed}", *changed, flush=True)
            return run_flow(home, until, (f"seed={seed}", *changed, *small), data)

        arms = chosen(ARMS)
        for name, changed in chosen(TIGERS).items():
            grid = TIGER_GRID[:1] if quick else TIGER_GRID
            tried = {
                recipe: flow(seeds[0], (*changed, *recipe), "train_recommender") for recipe in grid
            }
            arms[name] = (
                *changed,
                *max(grid, key=lambda r: facts_of(tried[r])["valid_ndcg_at_10"]),
            )
        whole: dict[int, Mapping[str, Input]] = {}
        for seed in seeds:
            of_seed = arms | chosen(ABLATIONS) if seed == seeds[0] else arms
            for arm, changed in of_seed.items():
                artifacts = flow(seed, changed, "evaluate_recommender")
                found = read_ranks(artifacts["evaluation"])
                ranks.setdefault(arm, []).append(found["onerec"])
                for name, value in facts_of(artifacts).items():
                    of_arms.setdefault(arm, {}).setdefault(name, []).append(value)
                if arm == OURS:
                    for baseline in ("sasrec", "bigram", "popularity"):
                        ranks.setdefault(baseline, []).append(found[baseline])
                    counted = Ranks(CountedSasrec.of(artifacts).ranks(artifacts))
                    ranks.setdefault("sasrec_with_counts", []).append(counted)
                    whole[seed] = artifacts
        if data is not None:
            of_peers, peer_facts = train_peers(home, whole, chosen(RECIPES))
            ranks |= {name: [Ranks(rank_U) for rank_U in runs] for name, runs in of_peers.items()}
            of_arms |= peer_facts
    return [*figures(ranks), *facts(of_arms)]


def chosen(arms: Mapping[str, T]) -> dict[str, T]:
    """Those of some arms or peers that ``REELFLOW_BENCH_ARMS`` names, `OURS` always; else all."""
    named = os.environ.get("REELFLOW_BENCH_ARMS")
    wanted = {*arms} if named is None else {OURS, *(name.strip() for name in named.split(","))}
    return {name: arm for name, arm in arms.items() if name in wanted}


def require_known() -> None:
    """Refuse names of ``REELFLOW_BENCH_ARMS`` that are no arm's or peer's.

    Raises:
        UsageError: the message has the names that there are.
    """
    from components.pipeline.errors import UsageError

    known = [*ARMS, *ABLATIONS, *TIGERS, *RECIPES]
    for name in os.environ.get("REELFLOW_BENCH_ARMS", OURS).split(","):
        if name.strip() not in known:
            raise UsageError(
                f"there is no arm '{name.strip()}'",
                where="REELFLOW_BENCH_ARMS",
                remedy=f"arms: {', '.join(known)}",
            )


def read_ranks(evaluation: Input) -> dict[str, Ranks]:
    """Ranks of the test users by method, in the order of their ids."""
    table = evaluation.read_table().to_pandas()
    by_method = table.sort_values("user_id", kind="stable").groupby("method", observed=True)
    return {
        str(name): Ranks(rows["rank"].to_numpy(), rows["masked_rank"].to_numpy())
        for name, rows in by_method
    }


def facts_of(artifacts: Mapping[str, Input]) -> dict[str, float]:
    """Of one arm: its model, how it trained, and what its lists are like where it ranked."""
    weights = artifacts["pretrained_recommender"].load_arrays()
    curve = artifacts["training_curve"].read_table().to_pandas()
    total = sum(array.size for array in weights.values())
    found = {
        "parameters": total,
        "active_parameters": total - idle(artifacts["pretrained_recommender"], weights),
        "steps": curve["step"].max(),
        "valid_ndcg_at_10": curve["valid_ndcg_at_10"].max(),
    }
    if "evaluation" in artifacts:
        evaluation = artifacts["evaluation"].read_json()
        distinct = evaluation["methods"]["onerec"]["distinct_items"]["10"]
        found["collision_rate"] = evaluation["collision_rate"]
        found["coverage_at_10"] = distinct / evaluation["catalogue_size"]
    return {name: float(value) for name, value in found.items()}


def idle(recommender: Input, weights: Mapping[str, np.ndarray]) -> int:
    """Parameters of the experts that a position is not sent to."""
    config = json.loads(Path(recommender.path("config.json")).read_text())["model"]
    if not config["experts"]:
        return 0
    of_experts = sum(w.size for name, w in weights.items() if name.endswith((".gate_up", ".down")))
    return of_experts * (config["experts"] - config["active_experts"]) // config["experts"]


def figures(ranks: Mapping[str, list[Ranks]]) -> list[Result]:
    """Every method's figures beside ours, and the differences with their intervals."""
    from components.evaluation.ranking.metrics import intervals

    tigers = [name for name in ranks if "tiger" in name]
    found = []
    for metric in ("hr_at_10", "ndcg_at_10"):
        by_seed = {name: [r.values(metric) for r in runs] for name, runs in ranks.items()}
        mean = {name: float(np.mean(values)) for name, values in by_seed.items()}
        best_tiger = max((mean[name] for name in tigers), default=None)
        for name, runs in by_seed.items():
            seeds = [float(values.mean()) for values in runs]
            of_same = float(np.mean(by_seed[OURS][: len(runs)]))
            reference = of_same if name != OURS else best_tiger
            label = f"{name}_{metric}"
            found.append(_result(label, mean[name], reference, min(seeds), max(seeds), len(seeds)))
        for name, runs in by_seed.items():
            if name != OURS:
                gap_U = np.mean(by_seed[OURS][: len(runs)], 0) - np.mean(runs, 0)
                (gap,) = intervals(gap_U[:, None], seed=0)
                label = f"{OURS}_minus_{name}_{metric}"
                found.append(_result(label, gap.mean, None, gap.low, gap.high, len(runs)))
        for control, base in CONTROLS.items():
            if control not in mean or base not in mean:
                continue
            lost = 1 - mean[control] / mean[base]
            seeds = [
                1 - float(c.mean() / b.mean()) for c, b in zip(by_seed[control], by_seed[base])
            ]
            label = f"{control}_loses_of_{metric}"
            n = len(seeds)
            found.append(_result(label, lost, CONTROL_LOSS, min(seeds), max(seeds), n, "share"))
    for metric in ("hr_at_5", "ndcg_at_5", "hr_at_20", "ndcg_at_20"):
        found += [
            _of_seeds(f"{name}_{metric}", [float(r.values(metric).mean()) for r in runs])
            for name, runs in ranks.items()
        ]
    for name, of_seeds in ranks.items():
        masked = [Ranks(r.masked_U) for r in of_seeds if r.masked_U is not None]
        if masked:
            for metric in ("hr_at_10", "ndcg_at_10"):
                values = [float(r.values(metric).mean()) for r in masked]
                found.append(_of_seeds(f"{name}_masked_{metric}", values))
    return found


def facts(of_methods: Mapping[str, Mapping[str, list[float]]]) -> list[Result]:
    """What is known of arms and peers beside their ranks."""
    return [
        _of_seeds(f"{method}_{name}", values, UNITS[name], higher_is_better=name not in LESS)
        for method, found in of_methods.items()
        for name, values in found.items()
    ]


def _of_seeds(
    name: str, values: list[float], unit: str = "mean over users", *, higher_is_better: bool = True
) -> Result:
    """The mean over seeds, with the lowest and the highest."""
    mean, low, high = float(np.mean(values)), min(values), max(values)
    return Result(name, mean, None, unit, low, high, len(values), higher_is_better)


def _result(
    name: str,
    ours: float,
    reference: float | None,
    low: float,
    high: float,
    n: int,
    unit: str = "mean over users",
) -> Result:
    return Result(name, ours, reference, unit, low, high, n, True)


#: A run of a few seconds.
SMALL = (
    *(f"ingest.simulator.{s}" for s in ("users=120", "items=128", "interactions=6000")),
    "ingest.simulator.render_videos=false",
    "validate.great_expectations=false",
    "semantic_ids.codebook_size=8",
    "train_recommender.max_steps=20",
    "train_recommender.evaluate_every=10",
    "train_recommender.workers=1",
    "train_sasrec.grid={learning_rate: [0.001], dropout: [0.2], width: [16], tied: [true]}",
    "train_sasrec.max_epochs=1",
    "train_sasrec.workers=1",
)
