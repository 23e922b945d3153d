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
#: Training time of one run of TIGER on two cores: about our number of epochs, each of which takes
#: it many times as long. The others need less.
TIGER_MINUTES, ITEM_MODEL_MINUTES = 25.0, 5.0
RECIPES = {
    "cornac_tiger": ("tiger_rkmeans", "tiger_rqvae"),
    "cornac_sasrec_bce": ("sasrec_bce_dropout_0.2", "sasrec_bce_dropout_0.5"),
    "cornac_gru4rec": ("gru4rec_dropout_0.0", "gru4rec_dropout_0.2"),
}
INPUTS = ("train_sequences", "valid_examples", "test_examples", "item_embedding")
FACTS = ("seconds", "epochs", "parameters", "valid_ndcg_at_10")


def prepare_peers(home: Path) -> list[Peer]:
    """All peers, in the environment that is named or a new one."""
    named = os.environ.get("REELFLOW_PEER_PYTHON")
    python = Path(named) if named else _installed(home / "peer_environment")
    versions = subprocess.run(
        [str(python), "-P", "-c", VERSIONS], capture_output=True, text=True, check=True
    ).stdout
    print(f"peers: {versions}", flush=True)
    tiger_minutes = float(os.environ.get("REELFLOW_PEER_MINUTES", str(TIGER_MINUTES)))
    return [
        Peer(name, python, versions, home / "peer", minutes)
        for name, minutes in zip(RECIPES, (tiger_minutes, *[ITEM_MODEL_MINUTES] * 2), strict=True)
    ]


def _installed(place: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    install = [str(place / "bin" / "pip"), "install", "--quiet", *CORNAC]
    subprocess.run(install, check=True)
    return place / "bin" / "python"


class Peer:
    """One model: its recipes with the first seed, then the one that validation prefers."""

    def __init__(
        self, name: str, python: Path, versions: str, folder: Path, minutes: float
    ) -> None:
        self.name, self._python, self._versions = name, python, versions
        self._folder, self._minutes = folder, minutes
        self._ranks: dict[str, list[npt.NDArray[np.integer]]] = {}
        self._facts: dict[str, dict[str, list[float]]] = {}

    def train(self, artifacts: Mapping[str, Input], seed: int) -> None:
        """Train on the split and the item embeddings of a run, unless that was done before."""
        recipes = RECIPES[self.name] if not self._ranks else (self._better(),)
        for recipe in recipes:
            with np.load(self._trained(artifacts, seed, recipe)) as kept:
                lists_UN = kept["lists"]
                for name in FACTS:
                    facts = self._facts.setdefault(recipe, {})
                    facts.setdefault(name, []).append(float(kept[name]))
            examples = artifacts["test_examples"].read_table(["user_id", "target"]).to_pandas()
            rank_U = target_ranks(lists_UN, examples["target"].to_numpy())
            by_user = rank_U[np.argsort(examples["user_id"].to_numpy(), kind="stable")]
            self._ranks.setdefault(recipe, []).append(by_user)

    def _trained(self, artifacts: Mapping[str, Input], seed: int, recipe: str) -> Path:
        given = [artifacts[name].digest for name in INPUTS]
        made_of = json.dumps([given, self._versions, self._minutes, SCRIPT.read_text()])
        key = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        output = self._folder / f"{recipe}_{seed}_{key}.npz"
        output.parent.mkdir(parents=True, exist_ok=True)
        if not output.exists():
            print(f"cornac {recipe}, seed {seed}", flush=True)
            split = Path(artifacts["test_examples"].path()).parent
            embedding = artifacts["item_embedding"].path("model.safetensors")
            words = [str(split), embedding, str(output), "--recipe", recipe]
            words += ["--seed", str(seed), "--minutes", str(self._minutes), "--threads", "2"]
            quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
            subprocess.run([str(self._python), "-P", str(SCRIPT), *words], env=quiet, check=True)
        return output

    def _better(self) -> str:
        return max(self._facts, key=lambda recipe: self._facts[recipe]["valid_ndcg_at_10"][0])

    def ranks(self) -> list[npt.NDArray[np.integer]]:
        """1-based ranks of the test users' targets, 0 beyond the lists, by user id; one a seed."""
        return self._ranks[self._better()]

    def facts(self) -> dict[str, dict[str, list[float]]]:
        """By recipe: what training took, and how the recipes compare on validation."""
        return self._facts
