"""Tiny untrained recommenders in real artifacts, and an exhaustive oracle of what they list."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from stage_harness import Bench

from components.data.item_encoder import ItemEncoder
from components.data.split import CATALOGUE_SCHEMA, EXAMPLE_SCHEMA
from components.evaluation.registration.serving import ENCODER_FILES, MODEL_FILES, OPTIONAL
from components.training.onerec.config import (
    AlignmentConfig,
    FeatureConfig,
    LifelongConfig,
    OneRecConfig,
    TokenizerConfig,
)
from components.training.onerec.data import assemble, read_sequences
from components.training.onerec.decode import score_catalogue
from components.training.onerec.features import Features
from components.training.onerec.recommender import Recommender, trained_on
from components.training.onerec.tokenizer.item_aligner import ItemAligner

ITEMS, USERS = 60, 60
NAME = "recommender-simulator"
#: As wide as there are ids: the beam finds what exhaustive scoring finds.
BEAMS = 64
CONFIG = OneRecConfig(
    codebook_size=8,
    d_model=16,
    heads=2,
    ffn=24,
    feature_width=4,
    short_term=5,
    positive_feedback=4,
    lifelong=LifelongConfig(entries=6, queries=2),
    features=FeatureConfig(user_buckets=50, min_count=1),
)


@dataclass(frozen=True)
class Model:
    """What a run trained.

    Attributes:
        item_ids: the catalogue, ascending.
        seed: of the weights.
    """

    item_ids: np.ndarray
    seed: int

    def fill(self, bench: Bench) -> None:
        """Put the artifacts of the model into the bench."""
        from components.training.onerec.model import OneRec

        torch.manual_seed(self.seed)
        features = features_of(self.item_ids)
        sizes = {"num_items": len(self.item_ids), **features.sizes(FeatureConfig())}
        config = CONFIG.model_copy(update=sizes)
        weights = OneRec(config)
        for parameter in weights.parameters():
            if parameter.dim() > 1:
                # Probabilities differ by orders of magnitude, as after training.
                torch.nn.init.normal_(parameter, std=0.4)
        item = np.arange(len(self.item_ids))
        codes = np.stack([item % 6, item // 6 % 4, item // 24 % 2], 1).astype(np.int32)
        version = {"version": f"{self.seed:016d}", "num_levels": 3, "codebook_size": 8}
        tokenizer = TokenizerConfig(method="plain", codebook_size=8, collisions="keep")
        version |= {"dimension": 8, "tokenizer": tokenizer.model_dump(mode="json")}
        aligner = ItemAligner.unaligned(AlignmentConfig())
        version |= {"item_encoder_digest": encoder().digest, "item_aligner_digest": aligner.digest}
        counts = np.random.default_rng(self.seed).permutation(len(item)) + 1

        random = np.random.default_rng(self.seed)
        shape = (len(item), config.memory.successors)
        weight_NR = -np.sort(-random.random(shape), axis=1).astype(np.float32)
        memory = {
            "item_NR": random.integers(0, len(item), shape).astype(np.int32),
            "weight_NR": weight_NR,
            "total_N": weight_NR.sum(1),
        }

        def recommender(output: Any) -> None:
            output.save_state_dict(memory, name="memory.safetensors")
            output.save_state_dict({k: v.clone() for k, v in weights.state_dict().items()})
            model = {"model": config.model_dump(), **trained_on(version, codes)}
            model["targets"] = "positive"
            output.write_json(model, "config.json")
            features.save(Path(output.path()))

        def semantic_ids(output: Any) -> None:
            output.save_state_dict({"codes": codes, "codebooks": codebooks()})
            output.write_json(version)

        def catalogue(output: Any) -> None:
            columns = [item.astype(np.int32), self.item_ids, counts, counts]
            output.write_table(pa.table(columns, schema=CATALOGUE_SCHEMA))

        def item_encoder(output: Any) -> None:
            output.save_state_dict(encoder().arrays)
            output.write_json(encoder().facts)

        def item_aligner(output: Any) -> None:
            output.save_state_dict(aligner.state())
            output.write_json(aligner.facts())

        fills = (recommender, semantic_ids, catalogue, item_encoder, item_aligner)
        for name, fill in zip(MODEL_FILES + ENCODER_FILES, fills, strict=True):
            bench.give(name, fill)


@functools.cache
def encoder() -> ItemEncoder:
    """Fitted to titles, tags and authors of items, in as many dimensions as codebooks have."""
    from components.curation.item_features.config import ItemFeaturesParams
    from components.curation.item_features.embedding import fit

    item = np.arange(ITEMS)
    titles = [f"{('red', 'blue', 'green', 'grey')[i % 4]} {('star', 'ring')[i % 2]}" for i in item]
    items = pa.table(
        {
            "item_id": first_catalogue(),
            "title": titles,
            "tags": [[f"t{i % 5}", "all"][: i % 3] for i in item],
            "author_id": item // 7,
        }
    )
    params = ItemFeaturesParams(dimension=8, block_dimension=8, token_dimension=8)
    return fit(items, [], params, 0)[0].for_new_items()


def features_of(item_ids: np.ndarray) -> Features:
    """Authors and tags of items by their id, age and town of every other user."""
    items = pa.table(
        {
            "author_id": item_ids // 7,
            "tags": [[f"t{item % 5}", "all"][: item % 3] for item in item_ids.tolist()],
        }
    )
    user_id = np.arange(0, USERS, 2) * 11 + 5
    columns = {"age": user_id % 3, "town": [f"town {u % 4}" for u in user_id.tolist()]}
    users = pa.table({"user_id": user_id, **columns})
    content_ND = np.random.default_rng(0).normal(size=(len(item_ids), 8)).astype(np.float32)
    known = pa.array(user_id)
    return Features.fit(items, users, known, CONFIG.features, content_ND)


def codebooks() -> np.ndarray:
    """float32 [3, 8, 8]: a level's codes are a tenth as far apart as those of the level above."""
    spread = 10.0 ** -np.arange(3)[:, None, None]
    return (np.random.default_rng(0).normal(size=(3, 8, 8)) * spread).astype(np.float32)


def first_catalogue() -> np.ndarray:
    return np.arange(ITEMS) * 3 + 1000


def later_catalogue() -> np.ndarray:
    """Twenty items of the first are gone and as many new ones lie between the others."""
    kept = np.delete(first_catalogue(), np.arange(0, ITEMS, 3))
    return np.sort(np.concatenate([kept, kept[::2] + 1]))


def histories(num_items: int, seed: int = 0) -> list[dict[str, Any]]:
    """Test examples of users in no order; one of them has seen nothing, signals have gaps."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in rng.permutation(USERS):
        n = 0 if user == 3 else int(rng.integers(1, 9))
        times = 1_650_000_000_000 + rng.integers(1, 10**8, n + 1).cumsum()
        duration = rng.uniform(3, 100, n)
        rows.append(
            {
                "user_id": int(user) * 11 + 5,
                "item_index": rng.integers(0, num_items, n).tolist(),
                "timestamp_ms": times[:-1].tolist(),
                "feedback": rng.integers(0, 256, n).tolist(),
                "positive": (rng.random(n) < 0.6).tolist(),
                "watch_time_s": np.where(rng.random(n) < 0.3, np.nan, duration / 2).tolist(),
                "duration_s": duration.tolist(),
                "target": int(rng.integers(0, num_items)),
                # Long after the history: a model that is not told the time reads other gaps.
                "target_timestamp_ms": int(times[-1]) + 10**9,
            }
        )
    return rows


def requests(item_ids: np.ndarray) -> list[dict[str, Any]]:
    """The histories of the world as requests."""
    return [
        {name: row[name] for name in OPTIONAL}
        | {
            "item_ids": item_ids[np.array(row["item_index"], int)].tolist(),
            "request_timestamp_ms": row["target_timestamp_ms"],
            "user_id": row["user_id"],
        }
        for row in histories(ITEMS)
    ]


def give_run(
    bench: Bench,
    model: Model,
    examples: list[dict[str, Any]],
    ranks: np.ndarray,
    uri: str = "",
    evaluated: slice = slice(None),
) -> None:
    """A whole run: the model, its test examples, and ranks that evaluation found for them."""
    model.fill(bench)
    table = pa.Table.from_pylist(examples, schema=EXAMPLE_SCHEMA)
    bench.give("test_examples", lambda output: output.write_table(table))
    users = table["user_id"].to_numpy()[evaluated]
    methods = {"popularity": np.ones(len(users)), "onerec": ranks[evaluated]}

    def evaluation(output: Any) -> None:
        names = pa.array(np.repeat(list(methods), len(users)).tolist())
        rank = pa.array(np.concatenate(list(methods.values())), pa.int32())
        columns = {
            "user_id": np.tile(users, len(methods)),
            "method": names.cast(pa.dictionary(pa.int8(), pa.string())),
            "rank": rank,
            "masked_rank": rank,
        }
        output.write_table(pa.table(columns))
        output.write_json({"beams": BEAMS})

    bench.give("evaluation", evaluation)
    bench.give("source", lambda output: output.write_json({"format": "simulator", "uri": uri}))


def exhaustive_lists(
    files: dict[str, Path], item_ids: np.ndarray, examples: list[dict[str, Any]]
) -> list[list[int]]:
    """Item ids for examples with column ``item_ids``, by scoring every semantic id, one by one.

    Knows nothing of beams, requests or batches.
    """
    import pyarrow.parquet as pq

    counts = pq.read_table(files["catalogue"] / "table.parquet")["train_positive_count"].to_numpy()
    model = Recommender.load(files["recommender"], files["semantic_ids"], counts)
    place = {int(item): index for index, item in enumerate(item_ids)}
    codes = [tuple(code) for code in model.codes_NQ.tolist()]
    leaves = sorted(set(codes))
    answers = []
    for example in examples:
        known = [i for i, item in enumerate(example["item_ids"]) if item in place]
        lists = EXAMPLE_SCHEMA.names[1:7]
        row = {name: [example[name][i] for i in known] for name in lists if name != "item_index"}
        row["item_index"] = [place[example["item_ids"][i]] for i in known]
        row |= {
            "user_id": example["user_id"],
            "target": 0,
            "target_timestamp_ms": example["target_timestamp_ms"],
        }
        (batch,) = pa.Table.from_pylist([row], schema=EXAMPLE_SCHEMA).to_batches()
        sequences = read_sequences([batch])
        event, config = sequences.example_targets(), model.model.config
        sequences = model.features.attach(sequences, event, config)
        request = assemble(sequences, event, model.codes_NQ, config)
        score = score_catalogue(model.model, model.trie, request)[0].tolist()
        best = sorted(range(len(leaves)), key=lambda leaf: -score[leaf])
        answers.append(
            [
                int(item_ids[item])
                for leaf in best
                for item in sorted(
                    (i for i, code in enumerate(codes) if code == leaves[leaf]),
                    key=lambda i: -counts[i],
                )
            ]
        )
    return answers


def model_files(bench: Bench) -> dict[str, Path]:
    """Folders of the artifacts that a version keeps."""
    return {name: Path(bench.artifacts[name].path()) for name in MODEL_FILES + ENCODER_FILES}


@contextmanager
def registry_at(home: Path, database: Path, setenv: Callable[[str, str], None]) -> Iterator[Any]:
    """MLflow on a copy of a migrated database, as the stage finds it through the environment."""
    import mlflow

    home.mkdir()
    shutil.copyfile(database, home / "mlflow.db")
    uri = f"sqlite:///{home / 'mlflow.db'}"
    setenv("REELFLOW_HOME", str(home))
    setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    try:
        yield mlflow
    finally:
        while mlflow.active_run():
            mlflow.end_run()


def aliases(mlflow: Any) -> dict[str, str]:
    """Version by alias."""
    found = mlflow.MlflowClient().get_registered_model(NAME).aliases
    return {alias: str(number) for alias, number in found.items()}


def versions(mlflow: Any) -> list[str]:
    found = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
    return sorted(str(version.version) for version in found)
