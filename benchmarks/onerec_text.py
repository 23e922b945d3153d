"""Ranking on text data: OneRec, its ablations and controls, TIGER twice, and tuned SASRec.

Amazon Scientific (leave one out, full catalogue, item level, history not masked) where it is at
hand, the simulator elsewhere. Every arm is a run of the recommend flow with some parameters set, so
all share the split, the item embeddings, the validation rule and the evaluator; each is trained
with three seeds, chooses its checkpoint on validation and ranks the test users once. TIGER comes
twice: rebuilt from our parts (RQ-VAE or residual k-means with a digit more for collisions, an
encoder-decoder that reads semantic ids alone) and as cornac has it, at our width and in an
environment of its own; of cornac's two recipes the better one on validation is run with all seeds.
What else its recipes leave open is not searched. A shuffled arm gives each item the semantic id of
another one.

Figures are means over seeds and users; intervals are those of paired bootstrap over users (1,000
resamples) of the differences of seed means.

``REELFLOW_BENCH_HOME`` keeps the runs (a second call resumes); ``REELFLOW_PEER_PYTHON`` is a Python
with cornac, which is otherwise installed into a temporary environment;
``REELFLOW_PEER_MINUTES`` is the training time of one peer run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from benchmarks.flow_runs import ROOT, run_flow, shared_data
from benchmarks.result import Result
from components.evaluation.ranking.metrics import gains, hits, target_ranks

if TYPE_CHECKING:
    from components.pipeline.artifacts import Input

SUMMARY = "Ranking by text: OneRec beside TIGER (ours and cornac's), SASRec, ablations and controls"

DATA = "amazon_scientific"
SEEDS = (0, 1, 2)
CORNAC = ("cornac==3.0.1", "torch==2.13.0", "transformers==5.23.0", "safetensors", "pyarrow")
#: Training time of one peer run on two cores: about our number of epochs, each of which takes it
#: many times as long.
PEER_MINUTES = 25.0

_NO_COUNTS = "train_recommender.model.memory.successors=0"
_TIGER = (
    _NO_COUNTS,
    "train_recommender.model.item_input=sid",
    "train_recommender.model.positive_feedback=0",
    *(f"train_recommender.model.features.{name}" for name in ("content=false", "static=false")),
    *(f"train_recommender.model.features.{name}=0" for name in ("authors", "tags")),
    "align_items.method=none",
    "semantic_ids.collisions=extra_digit",
)
#: Parameters that each arm changes.
ARMS: Mapping[str, tuple[str, ...]] = {
    "onerec": (),
    "onerec_shuffled": ("semantic_ids.shuffled=true",),
    "without_memory": (_NO_COUNTS,),
    "without_memory_shuffled": (_NO_COUNTS, "semantic_ids.shuffled=true"),
    "without_alignment": ("align_items.method=none",),
    "without_balance": ("semantic_ids.method=plain",),
    "tiger_rq_vae": (*_TIGER, "semantic_ids.method=rq_vae"),
    "tiger_rq_kmeans": (*_TIGER, "semantic_ids.method=plain"),
}
OURS = "onerec"
#: A shuffled arm is judged by its own unshuffled one.
CONTROLS = {"onerec_shuffled": "onerec", "without_memory_shuffled": "without_memory"}
#: The least share of NDCG@10 that a control has to lose.
CONTROL_LOSS = 0.25


@dataclass(frozen=True)
class Ranks:
    """1-based rank of every test user's target by one method and seed, 0 beyond 20; by user id."""

    rank_U: npt.NDArray[np.integer]

    def values(self, metric: str) -> npt.NDArray[np.float64]:
        name, k = metric.split("_at_")
        return {"hr": hits, "ndcg": gains}[name](self.rank_U, int(k))


def run(quick: bool = False) -> list[Result]:
    """All arms and peers; ``quick`` is a tiny simulated catalogue, one seed and no peer."""
    kept = os.environ.get("REELFLOW_BENCH_HOME")
    data = None if quick else shared_data(DATA)
    seeds = SEEDS[:1] if quick else SEEDS
    ranks: dict[str, list[Ranks]] = {}
    collisions: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench_onerec_text_") as temporary:
        home = Path(kept or temporary)
        peer = None if data is None else Peer.prepare(home)
        for seed in seeds:
            for arm, changed in ARMS.items():
                print(f"arm {arm}, seed {seed}", flush=True)
                settings = (f"seed={seed}", *changed, *(() if data else SMALL))
                artifacts = run_flow(home, "evaluate_recommender", settings, data)
                found = read_ranks(artifacts["evaluation"])
                ranks.setdefault(arm, []).append(found["onerec"])
                collided = artifacts["evaluation"].read_json()["collision_rate"]
                collisions.setdefault(arm, []).append(collided)
                if arm == OURS:
                    for baseline in ("sasrec", "bigram", "popularity"):
                        ranks.setdefault(baseline, []).append(found[baseline])
                    if peer:
                        peer.train(artifacts, seed)
        if peer:
            ranks |= peer.ranks()
    return [*figures(ranks, collisions), *(peer.figures() if peer else ())]


def read_ranks(evaluation: Input) -> dict[str, Ranks]:
    """Ranks of the test users by method, in the order of their ids."""
    table = evaluation.read_table().to_pandas()
    by_method = table.sort_values("user_id", kind="stable").groupby("method", observed=True)
    return {str(name): Ranks(rows["rank"].to_numpy()) for name, rows in by_method}


def figures(
    ranks: Mapping[str, list[Ranks]], collisions: Mapping[str, list[float]]
) -> list[Result]:
    """Every method's figures beside ours, and the differences with their intervals."""
    from components.evaluation.ranking.metrics import intervals

    tigers = [name for name in ranks if "tiger" in name]
    found = []
    for metric in ("hr_at_10", "ndcg_at_10"):
        by_seed = {name: [r.values(metric) for r in runs] for name, runs in ranks.items()}
        mean = {name: float(np.mean(values)) for name, values in by_seed.items()}
        best_tiger = max(tigers, key=mean.__getitem__)
        for name, runs in by_seed.items():
            seeds = [float(values.mean()) for values in runs]
            reference = mean[OURS] if name != OURS else mean[best_tiger]
            label = f"{name}_{metric}"
            found.append(_result(label, mean[name], reference, min(seeds), max(seeds), len(seeds)))
        for name, runs in by_seed.items():
            if name != OURS:
                gap_U = np.mean(by_seed[OURS], 0) - np.mean(runs, 0)
                (gap,) = intervals(gap_U[:, None], seed=0)
                label = f"{OURS}_minus_{name}_{metric}"
                found.append(_result(label, gap.mean, None, gap.low, gap.high, len(runs)))
        for control, base in CONTROLS.items():
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
    found += [
        _of_seeds(f"{arm}_collision_rate", rates, "of items", higher_is_better=False)
        for arm, rates in collisions.items()
    ]
    return found


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


class Peer:
    """cornac's TIGER in a Python of its own: both recipes with the first seed, then the better."""

    SCRIPT = ROOT / "benchmarks" / "peers" / "cornac_tiger.py"
    RECIPES = ("rkmeans", "rqvae")
    INPUTS = ("train_sequences", "valid_examples", "test_examples", "item_embedding")
    FACTS = ("seconds", "epochs", "parameters")

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = python, folder
        self._runs: dict[str, list[tuple[float, Ranks]]] = {}
        self._facts: dict[str, list[dict[str, float]]] = {}

    @classmethod
    def prepare(cls, home: Path) -> Peer:
        """The peer's environment: the one that is named, or a new one."""
        named = os.environ.get("REELFLOW_PEER_PYTHON")
        if named:
            return cls(Path(named), home / "peer")
        place = home / "peer_environment"
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        install = [str(place / "bin" / "pip"), "install", "--quiet", *CORNAC]
        subprocess.run(install, check=True)
        return cls(place / "bin" / "python", home / "peer")

    def train(self, artifacts: Mapping[str, Input], seed: int) -> None:
        """Train on the split and the item embeddings of a run."""
        recipes = self.RECIPES if not self._runs else (self._better(),)
        for recipe in recipes:
            minutes = os.environ.get("REELFLOW_PEER_MINUTES", str(PEER_MINUTES))
            given = [artifacts[name].digest for name in self.INPUTS]
            made_of = json.dumps([given, minutes, self.SCRIPT.read_text()])
            key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
            output = self._folder / f"{recipe}_{seed}_{key}.npz"
            output.parent.mkdir(parents=True, exist_ok=True)
            if not output.exists():
                print(f"cornac {recipe}, seed {seed}", flush=True)
                split = Path(artifacts["test_examples"].path()).parent
                embedding = artifacts["item_embedding"].path("model.safetensors")
                words = [str(split), embedding, str(output), "--tokenizer", recipe]
                words += ["--seed", str(seed), "--minutes", minutes, "--threads", "2"]
                quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
                subprocess.run(
                    [str(self._python), "-P", str(self.SCRIPT), *words], env=quiet, check=True
                )
            with np.load(output) as kept:
                lists_UN, score = kept["lists"], float(kept["valid_ndcg_at_10"])
                facts = {name: float(kept[name]) for name in self.FACTS}
            self._facts.setdefault(recipe, []).append(facts | {"valid_ndcg_at_10": score})
            examples = artifacts["test_examples"].read_table(["user_id", "target"]).to_pandas()
            rank_U = target_ranks(lists_UN, examples["target"].to_numpy())
            by_user = rank_U[np.argsort(examples["user_id"].to_numpy(), kind="stable")]
            self._runs.setdefault(recipe, []).append((score, Ranks(by_user)))

    def _better(self) -> str:
        return max(self._runs, key=lambda recipe: self._runs[recipe][0][0])

    def ranks(self) -> dict[str, list[Ranks]]:
        """Of the recipe that was better on validation."""
        return {"cornac_tiger": [ranks for _, ranks in self._runs[self._better()]]}

    def figures(self) -> list[Result]:
        """What its training took, and how its recipes compare on validation."""
        return [
            _of_seeds(f"cornac_{recipe}_{name}", [run[name] for run in runs], unit)
            for recipe, runs in self._facts.items()
            for name, unit in (
                ("seconds", "s"),
                ("epochs", "epochs"),
                ("parameters", "parameters"),
                ("valid_ndcg_at_10", "mean over 500 users"),
            )
        ]


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
