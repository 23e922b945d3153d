"""A small world with real feedback: users like one group of items, and say so with some noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onerec_world
import pyarrow as pa
import torch
from onerec_world import GROUPS, ITEMS, examples
from stage_harness import Bench

from components.data.contracts import FEEDBACK
from components.data.split import CATALOGUE_SCHEMA, SEQUENCE_SCHEMA
from components.training.onerec.data import Targets, read_sequences
from components.training.onerec.decode import DeviceTrie
from components.training.onerec.features import Features
from components.training.onerec.memory import Successors
from components.training.onerec.model import OneRec
from components.training.onerec.recommender import Recommender, trained_on
from components.training.onerec.reward.align import Parts
from components.training.onerec.reward.align_stage import AlignRecommenderParams
from components.training.onerec.reward.config import AlignConfig, PScoreConfig, PScoreSize
from components.training.onerec.reward.exposures import Exposures, cut_by_time, usable
from components.training.onerec.reward.pscore_train import train_pscore
from components.training.onerec.reward.stage import TrainRewardModelParams
from components.training.onerec.train import TrainingData, successors_of, training_targets
from components.training.onerec.trie import Trie

SIZE = PScoreSize(
    d_model=16,
    history=8,
    tower_hidden=8,
    fusion_hidden=16,
    item_buckets=64,
    author_buckets=64,
    tag_buckets=64,
    user_buckets=64,
    dropout=0.0,
)
CONFIG = PScoreConfig(
    model=SIZE, epochs=8, batch_size=128, learning_rate=2e-2, min_labels=5, candidates=3
)


@dataclass(frozen=True)
class RewardWorld:
    """Tables of a source whose first half of every history knows long views and likes alone."""

    train: pa.Table
    valid: pa.Table
    interactions: pa.Table
    items: pa.Table
    users: pa.Table
    embedding_NC: torch.Tensor
    codes_NQ: np.ndarray
    popularity_N: np.ndarray

    def exposures(self, size: PScoreSize = SIZE) -> Exposures:
        return Exposures.of(
            read_sequences(self.train.to_batches()),
            self.train,
            self.interactions.to_batches(),
            np.arange(ITEMS),
            self.items,
            self.users,
            self.embedding_NC,
            size,
        )


def rows_of(users: int, seed: int) -> list[dict]:
    """Events of users whose favourite group is their id modulo the groups."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        length = int(rng.integers(12, 30))
        item = rng.integers(0, ITEMS, length)
        liked = item // (ITEMS // GROUPS) == user % GROUPS
        chance = np.where(liked[:, None], 0.9, 0.1)
        said = rng.random((length, len(FEEDBACK) - 1)) < chance
        said = np.column_stack([said, ~said.any(1)])  # a dislike: nothing else
        duration = rng.uniform(3, 60, length)
        start = 1_650_000_000_000
        half = length // 2
        old, new = (np.sort(rng.integers(0, 10**8, n)) for n in (half, length - half))
        rows.append(
            {
                "user_id": user,
                "item_index": item.tolist(),
                "timestamp_ms": (start + np.r_[old, 2 * 10**8 + new]).tolist(),
                "said": said,
                "known_all": np.arange(length) >= half,
                "watch_time_s": duration * np.where(said[:, 1], 0.9, 0.1),
                "duration_s": duration,
            }
        )
    return rows


def sequence_rows(rows: list[dict]) -> list[dict]:
    """As the split writes them: an unknown signal reads 0."""
    bits = 1 << np.arange(len(FEEDBACK))
    derived = np.array([name in ("long_view", "like") for name in FEEDBACK])
    made = []
    for row in rows:
        seen = row["said"] & (row["known_all"][:, None] | derived)
        made.append(
            {
                **{name: row[name] for name in ("user_id", "item_index", "timestamp_ms")},
                "feedback": (seen @ bits).tolist(),
                "positive": seen[:, 1:-1].any(1).tolist(),
                "watch_time_s": np.where(row["known_all"], row["watch_time_s"], np.nan).tolist(),
                "duration_s": row["duration_s"].tolist(),
            }
        )
    return made


def interactions_of(rows: list[dict]) -> pa.Table:
    """As the source has them: an unknown signal is null."""
    columns: dict[str, list] = {name: [] for name in ("user_id", "item_id", "timestamp", *FEEDBACK)}
    for row in rows:
        columns["user_id"] += [row["user_id"]] * len(row["item_index"])
        columns["item_id"] += row["item_index"]
        columns["timestamp"] += row["timestamp_ms"]
        for bit, name in enumerate(FEEDBACK):
            known = row["known_all"] | (name in ("long_view", "like"))
            columns[name] += [bool(s) if k else None for s, k in zip(row["said"][:, bit], known)]
    columns["timestamp"] = pa.array(columns["timestamp"]).cast(pa.timestamp("ms", tz="UTC"))
    table = pa.table(columns)
    # In another order than the sequences.
    return table.take(pa.array(np.random.default_rng(7).permutation(len(table))))


def make_reward_world(users: int = 160) -> RewardWorld:
    rows = rows_of(users, seed=0)
    sequences = sequence_rows(rows)
    item = np.arange(ITEMS)
    group, within = np.divmod(item, ITEMS // GROUPS)
    codes = np.stack([group, within // 4, np.minimum(within, 8) % 4], 1).astype(np.int32)
    counts = np.bincount(np.concatenate([r["item_index"] for r in sequences]), minlength=ITEMS)
    random = torch.Generator().manual_seed(0)
    embedding_NC = torch.randn(GROUPS, 8, generator=random)[torch.from_numpy(group)]
    return RewardWorld(
        pa.Table.from_pylist(sequences, schema=SEQUENCE_SCHEMA),
        examples(sequence_rows(rows_of(60, seed=1))),
        interactions_of(rows),
        pa.table(
            {
                "item_id": item,
                "tags": [[f"g{g}"] for g in group],
                "author_id": group,
                "duration_s": pa.array(np.full(ITEMS, 10.0), pa.float32()),
            }
        ),
        pa.table({"user_id": np.arange(users), "kind": [f"k{u % GROUPS}" for u in range(users)]}),
        embedding_NC + 0.1 * torch.randn(ITEMS, 8, generator=random),
        codes,
        counts,
    )


#: What the world's semantic ids say of themselves.
IDS = {"version": "v1", "codebook_size": 16}
MODEL = onerec_world.MODEL.model_copy(update={"short_term": 6})
ALIGN = AlignConfig(
    steps=6,
    users=8,
    group=12,
    format_group=12,
    format_k=4,
    sft_batch=32,
    max_staleness=2,
    ahead=1,
    checkpoint_every=3,
    learning_rate=3e-3,
)
#: Of the stages, quick.
REWARD_STAGE = TrainRewardModelParams(
    **{**CONFIG.model_dump(), "epochs": 8, "candidates": 2, "held_out_share": 0.0}
)
ALIGN_STAGE = AlignRecommenderParams(
    **{
        **ALIGN.model_dump(),
        "steps": 12,
        "checkpoint_every": 4,
        "preference_weight": 10.0,
        "viral_share": 0.05,
    },
    rollout_workers=0,
    max_ndcg_loss=0.99,
    viral_tags=["g0"],
)


def make_recommender(data: TrainingData, trie: Trie, targets: Targets = "positive") -> Recommender:
    """A model that still knows nothing: the alignment alone moves it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OneRec(MODEL)
    assert model.memory is not None
    counted = successors_of(data, training_targets(data, targets), MODEL)
    model.memory.fill(counted, data.codes_NQ)
    features = Features.none(ITEMS)
    return Recommender(model.eval(), DeviceTrie.on(trie), data.codes_NQ, features, targets)


def parts_of(
    world: RewardWorld, data: TrainingData, recommender: Recommender
) -> Callable[..., Parts]:
    """Makes the workers' arguments for some configuration; ten items are flagged."""
    exposures = world.exposures()
    cut = cut_by_time(exposures, 0.2)
    chosen = usable(exposures.labels, cut.train_S, 5)
    pscore = train_pscore(exposures, cut, chosen, CONFIG.model_copy(update={"candidates": 1}), 0)

    def make(config: AlignConfig = ALIGN, seed: int = 0) -> Parts:
        return Parts.of(
            recommender,
            data,
            pscore.model,
            config,
            seed,
            user_UF=exposures.user_UF,
            user_R=np.arange(data.train.num_users),
            flagged_N=torch.arange(ITEMS) < 10,
        )

    return make


def give_all(bench: Bench, world: RewardWorld, recommender: Recommender, signals: bool) -> None:
    counts = world.popularity_N
    catalogue = pa.table(
        {
            "item_index": np.arange(ITEMS, dtype=np.int32),
            "item_id": np.arange(ITEMS),
            "train_count": counts,
            "train_positive_count": counts,
        },
        schema=CATALOGUE_SCHEMA,
    )
    interactions = world.interactions
    if not signals:
        interactions = interactions.select(["user_id", "item_id", "timestamp"])
    train = world.train
    if not signals:
        nothing = pa.array([[np.nan] * len(x) for x in train["watch_time_s"].to_pylist()])
        place = train.schema.get_field_index("watch_time_s")
        field = train.schema.field("watch_time_s")
        train = train.set_column(place, field, nothing.cast(field.type))
    for name, table in {
        "catalogue": catalogue,
        "items": world.items,
        "users": world.users,
        "interactions": interactions,
        "train_sequences": train,
        "valid_examples": world.valid,
    }.items():
        bench.give(name, lambda out, table=table: out.write_table(table))
    bench.give("item_embedding", lambda out: out.save_state_dict({"embedding": world.embedding_NC}))

    def ids(out: Any) -> None:
        out.save_state_dict({"codes": torch.from_numpy(world.codes_NQ)})
        out.write_json(IDS)

    def trained(out: Any) -> None:
        memory = recommender.model.memory
        assert memory is not None
        counted = Successors(
            *(
                getattr(memory, f"served_{n}")[0].numpy()
                for n in ("item_FNR", "weight_FNR", "total_FN")
            )
        )
        out.save_state_dict({n: x.clone() for n, x in recommender.model.state_dict().items()})
        out.save_state_dict(vars(counted), name="memory.safetensors")
        recommender.features.save(Path(out.path()))
        config = {"model": MODEL.model_dump(), **trained_on(IDS, world.codes_NQ)}
        out.write_json(config | {"targets": recommender.targets}, "config.json")

    bench.give("semantic_ids", ids)
    bench.give("pretrained_recommender", trained)
