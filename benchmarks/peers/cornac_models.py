"""Sequential recommenders of cornac, on our split and our item embeddings. Needs no Reelflow.

Runs in an environment of its own, reads the artifacts of a run and writes the
lists of all test users, so that one evaluator judges everybody:

    python cornac_models.py SPLIT_FOLDER EMBEDDING.safetensors OUTPUT.npz --recipe tiger_rkmeans \\
        --seed 0 --minutes 25

``OUTPUT.npz`` holds ``lists`` int32 [U, 20] item indices in the order of the test examples, -1
padded, ``valid_ndcg_at_10`` of the kept epoch over `VALID_USERS` users, ``seconds`` of training
with its validations but without TIGER's tokenizer, ``parameters`` and ``epochs``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from cornac.data import FeatureModality
from cornac.eval_methods import NextItemEvaluation
from cornac.models import TIGER, GRU4Rec, NextItemRecommender, SASRec
from safetensors.numpy import load_file

TOP_N = 20
VALID_USERS = 1_000
VALIDATIONS = 8
#: TIGER by GRID's recipe and by that of Paischer et al., reduced to what a core trains in minutes:
#: the width and the layers of our own arms (cornac has 128 wide, 1,024 in feed-forwards, 4 + 4 or
#: 6 + 6 layers, of which a step of batch 256 takes seconds), a higher rate that falls by a cosine
#: (5e-4 constant; 3e-4 after 10,000 steps of warm-up), and for RQ-VAE 1,000 epochs at a latent
#: width of 64 (8,000 at 128).
TIGERS: dict[str, dict[str, Any]] = {
    "tiger_rkmeans": {
        "tokenizer": "rkmeans",
        "learning_rate": 1e-3,
        "weight_decay": 1e-6,
        "dropout": 0.1,
    },
    "tiger_rqvae": {
        "tokenizer": "rqvae",
        "learning_rate": 1e-3,
        "weight_decay": 0.035,
        "dropout": 0.2,
        "feature_standardize": True,
        "rqvae_hidden_dims": (256, 128),
        "rqvae_latent_dim": 64,
        "rqvae_n_epochs": 1000,
        "rqvae_weight_decay": 0.1,
    },
}
#: Models of whole items, at the width of our own arms; what is not named is cornac's default.
ITEM_MODELS: dict[str, tuple[type[NextItemRecommender], dict[str, Any]]] = {
    f"sasrec_bce_dropout_{dropout}": (
        SASRec,
        {"loss": "bce", "embedding_dim": 64, "dropout": dropout},
    )
    for dropout in (0.2, 0.5)
} | {
    f"gru4rec_dropout_{dropout}": (GRU4Rec, {"layers": [64], "dropout_p_hidden": dropout})
    for dropout in (0.0, 0.2)
}


class Timed(TIGER):
    """Says what the kept epoch scored and how long training took, the tokenizer's left out."""

    best = -1.0
    seconds = 0.0

    def _fit_seq2seq(self, *args: Any) -> None:
        start = time.perf_counter()
        super()._fit_seq2seq(*args)
        self.seconds = time.perf_counter() - start

    def _validate(self, sessions: Any, metric: Any) -> float:
        score = super()._validate(sessions, metric)
        self.best = max(self.best, score)
        return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("split", type=Path)
    parser.add_argument("embedding", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", choices=(*TIGERS, *ITEM_MODELS), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of training, about")
    given = parser.parse_args()
    torch.set_num_threads(1)
    feature_ND = load_file(given.embedding)["embedding"]
    tables = {
        name: pq.read_table(given.split / name / "table.parquet").to_pylist()
        for name in ("train_sequences", "valid_examples", "test_examples")
    }
    evaluation = NextItemEvaluation.from_splits(
        train_data=triples(tables["train_sequences"]),
        val_data=triples(tables["valid_examples"]),
        test_data=triples(tables["test_examples"]),
        fmt="SIT",
        mode="last",
        exclude_unknowns=False,
        seed=given.seed,
        item_feature=FeatureModality(features=feature_ND, ids=list(range(len(feature_ND)))),
    )
    epochs = epochs_within(60 * given.minutes, evaluation, given)
    model = make(given, epochs)
    start = time.perf_counter()
    model.fit(evaluation.train_set, evaluation.val_set)
    if isinstance(model, Timed):
        seconds, score = model.seconds, model.best
    else:
        seconds = time.perf_counter() - start
        score = ndcg_at_10(model, sample(tables["valid_examples"]))
    unfinished = given.output.with_suffix(".unfinished.npz")
    np.savez(
        unfinished,
        lists=lists(model, tables["test_examples"]),
        valid_ndcg_at_10=score,
        seconds=seconds,
        parameters=sum(p.numel() for p in model.model.parameters()),
        epochs=epochs,
    )
    unfinished.replace(given.output)


def triples(rows: list[dict]) -> list[tuple[int, int, int]]:
    """(session, item, time) of histories with their target, where they have one."""
    found = []
    for row in rows:
        items = [*row["item_index"], *([row["target"]] if "target" in row else [])]
        found += [(row["user_id"], item, place) for place, item in enumerate(items)]
    return found


def make(given: argparse.Namespace, epochs: int) -> NextItemRecommender:
    """A model that trains for so many epochs and keeps the best of some of them."""
    common = {
        "n_epochs": epochs,
        "model_selection": "best",
        "val_metric": "ndcg",
        "val_k": 10,
        "val_eval_every": max(1, epochs // VALIDATIONS),
        "seed": given.seed,
        "device": "cpu",
    }
    if given.recipe in ITEM_MODELS:
        kind, settings = ITEM_MODELS[given.recipe]
        return kind(**common, **settings)
    return Timed(
        rqvae_codebook_size=256,
        d_model=64,
        d_ff=256,
        num_heads=4,
        d_kv=16,
        num_enc_layers=2,
        num_dec_layers=2,
        max_len=20,
        batch_size=256,
        lr_schedule="cosine",
        warmup_steps=300,
        n_beams=50,
        val_sample=VALID_USERS,
        **common,
        **TIGERS[given.recipe],
    )


def epochs_within(seconds: float, evaluation: NextItemEvaluation, given: argparse.Namespace) -> int:
    """Epochs of training that take about so long, by one that is timed."""
    probe = make(given, 1)
    probe.model_selection = "last"
    probe.rqvae_n_epochs = 1
    start = time.perf_counter()
    probe.fit(evaluation.train_set, None)
    took = probe.seconds if isinstance(probe, Timed) else time.perf_counter() - start
    return max(1, round(seconds / took))


def sample(examples: list[dict]) -> list[dict]:
    """At most `VALID_USERS` of them, spread evenly."""
    places = np.linspace(0, len(examples) - 1, min(len(examples), VALID_USERS)).astype(int)
    return [examples[place] for place in places]


def ndcg_at_10(model: NextItemRecommender, examples: list[dict]) -> float:
    target_U1 = np.array([[example["target"]] for example in examples])
    hit_U10 = lists(model, examples)[:, :10] == target_U1
    return float((hit_U10 / np.log2(np.arange(2, 12))).sum(1).mean())


def lists(model: NextItemRecommender, examples: list[dict]) -> np.ndarray:
    """The first items of every user: int32 [U, TOP_N]."""
    item_of = {place: item for item, place in model.iid_map.items()}
    found = np.full((len(examples), TOP_N), -1, np.int32)
    for row, example in enumerate(examples):
        history = [model.iid_map[item] for item in example["item_index"]]
        score_N = model.score(None, history)
        top = np.argsort(-score_N)[:TOP_N]
        # Items that no beam reached have cornac's floor.
        known = [item_of[int(place)] for place in top if score_N[place] > -1e9]
        found[row, : len(known)] = known
    return found


if __name__ == "__main__":
    main()
