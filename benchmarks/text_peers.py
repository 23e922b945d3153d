"""cornac's sequential recommenders beside ours, each in a Python of its own.

``REELFLOW_PEER_PYTHON`` is a Python with `CORNAC`, which is otherwise installed into a temporary
environment; ``REELFLOW_PEER_MINUTES`` is the training time of one run of TIGER.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from benchmarks.flow_runs import ROOT
from components.evaluation.ranking.metrics import target_ranks

if TYPE_CHECKING:
    from components.pipeline.artifacts import Input

CORNAC = ("cornac==3.0.1", "torch==2.13.0", "transformers==5.24.0", "safetensors", "pyarrow")
VERSIONS = (
    "from importlib.metadata import version;"
    "print(*(f'{name} {version(name)}' for name in ('cornac', 'torch', 'transformers')), sep=', ')"
)
SCRIPT = ROOT / "benchmarks" / "peers" / "cornac_models.py"
#: Training time of one run on one core: for TIGER about our number of steps, each of which takes it
#: many times as long. The others need less.
TIGER_MINUTES, ITEM_MODEL_MINUTES = 25.0, 5.0
RECIPES = {
    "cornac_tiger": ("tiger_rkmeans", "tiger_rqvae"),
    "cornac_sasrec_bce": ("sasrec_bce_dropout_0.2", "sasrec_bce_dropout_0.5"),
    "cornac_gru4rec": ("gru4rec_dropout_0.0", "gru4rec_dropout_0.2"),
}
INPUTS = ("train_sequences", "valid_examples", "test_examples", "item_embedding")
FACTS = ("seconds", "epochs", "parameters", "valid_ndcg_at_10")


def train_peers(
    home: Path,
    of_seeds: Mapping[int, Mapping[str, Input]],
    recipes_of: Mapping[str, tuple[str, ...]],
) -> tuple[dict[str, list[npt.NDArray[np.integer]]], dict[str, dict[str, list[float]]]]:
    """Peers on the splits and the item embeddings of runs, as far as not done before.

    A model's recipes are trained with the first seed, the one that validation prefers with the
    others, a process of one thread a core.

    Args:
        of_seeds: artifacts of a run by its seed.
        recipes_of: names of the recipes by peer, of `RECIPES`.

    Returns:
        By peer the 1-based ranks of the test users' targets, 0 beyond the lists, by user id, one
        array a seed; by recipe what training took and how validation judges it.
    """
    from components.pipeline.machine import cores

    if not recipes_of:
        return {}, {}
    environment = Environment.prepare(home)
    first, *others = of_seeds
    with ThreadPoolExecutor(cores()) as pool:

        def start(recipe: str, seed: int) -> Future[Lists]:
            return pool.submit(environment.trained, recipe, seed, of_seeds[seed])

        trained = {
            recipe: [start(recipe, first)] for recipes in recipes_of.values() for recipe in recipes
        }
        better = {
            name: max(recipes, key=lambda r: trained[r][0].result().facts["valid_ndcg_at_10"])
            for name, recipes in recipes_of.items()
        }
        for recipe in better.values():
            trained[recipe] += [start(recipe, seed) for seed in others]
    done = {recipe: [run.result() for run in runs] for recipe, runs in trained.items()}
    ranks = {name: [run.rank_U for run in done[recipe]] for name, recipe in better.items()}
    facts = {
        f"cornac_{recipe}": {fact: [run.facts[fact] for run in runs] for fact in FACTS}
        for recipe, runs in done.items()
    }
    return ranks, facts


@dataclass(frozen=True)
class Lists:
    """What a trained peer gave: ranks of the targets by user id, and facts of its training."""

    rank_U: npt.NDArray[np.integer]
    facts: dict[str, float]


@dataclass(frozen=True)
class Environment:
    """A Python with cornac, the folder of what it made, and the minutes of a run of TIGER."""

    python: Path
    versions: str
    folder: Path
    tiger_minutes: float

    @classmethod
    def prepare(cls, home: Path) -> Environment:
        """The environment that is named, or a new one."""
        named = os.environ.get("REELFLOW_PEER_PYTHON")
        python = Path(named) if named else _installed(home / "peer_environment")
        words = [str(python), "-P", "-c", VERSIONS]
        versions = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        print(f"peers: {versions}", flush=True)
        minutes = float(os.environ.get("REELFLOW_PEER_MINUTES", str(TIGER_MINUTES)))
        return cls(python, versions, home / "peer", minutes)

    def trained(self, recipe: str, seed: int, artifacts: Mapping[str, Input]) -> Lists:
        """What a recipe gives with a seed, trained unless that was done before."""
        minutes = self.tiger_minutes if recipe.startswith("tiger") else ITEM_MODEL_MINUTES
        given = [artifacts[name].digest for name in INPUTS]
        made_of = json.dumps([given, self.versions, minutes, SCRIPT.read_text()])
        key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        output = self.folder / f"{recipe}_{seed}_{key}.npz"
        output.parent.mkdir(parents=True, exist_ok=True)
        if not output.exists():
            print(f"cornac {recipe}, seed {seed}", flush=True)
            split = Path(artifacts["test_examples"].path()).parent
            embedding = artifacts["item_embedding"].path("model.safetensors")
            words = [str(self.python), "-P", str(SCRIPT), str(split), embedding, str(output)]
            words += ["--recipe", recipe, "--seed", str(seed), "--minutes", str(minutes)]
            quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
            subprocess.run(words, env=os.environ | quiet, check=True)
        with np.load(output) as kept:
            lists_UN, facts = kept["lists"], {name: float(kept[name]) for name in FACTS}
        examples = artifacts["test_examples"].read_table(["user_id", "target"]).to_pandas()
        rank_U = target_ranks(lists_UN, examples["target"].to_numpy())
        by_user = np.argsort(examples["user_id"].to_numpy(), kind="stable")
        return Lists(rank_U[by_user], facts)


def _installed(place: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    install = [str(place / "bin" / "pip"), "install", "--quiet", *CORNAC]
    subprocess.run(install, check=True)
    return place / "bin" / "python"
