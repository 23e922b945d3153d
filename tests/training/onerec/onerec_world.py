"""A small world for the recommender's tests: users walk through groups of items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from components.data.split import EXAMPLE_SCHEMA, SEQUENCE_SCHEMA
from components.training.onerec.config import OneRecConfig
from components.training.onerec.data import Events
from components.training.onerec.model import OneRec

ITEMS, GROUPS = 60, 6
#: A model that learns this world in seconds.
MODEL = OneRecConfig(
    codebook_size=16,
    d_model=32,
    heads=2,
    encoder_layers=1,
    decoder_layers=1,
    ffn=64,
    feature_width=4,
    short_term=5,
    positive_feedback=4,
    dropout=0.1,
    num_items=ITEMS,
)


@dataclass(frozen=True)
class World:
    """Sequence tables whose next item is in the group that follows the last item's group.

    Attributes:
        codes_NQ: level 1 = group, levels 2 and 3 number the items of a group; some collide.
        popularity_N: train events an item.
    """

    train: pa.Table
    valid: pa.Table
    codes_NQ: np.ndarray
    popularity_N: np.ndarray


def walk(users: int, seed: int, longest: int = 40) -> list[dict[str, list]]:
    """Events of each user, oldest first; signals drawn at random, some unknown."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        length = int(rng.integers(2, longest))
        group = (rng.integers(GROUPS) + np.arange(length)) % GROUPS
        within = rng.integers(0, ITEMS // GROUPS, length)
        duration = rng.uniform(3, 120, length)
        watch = np.where(rng.random(length) < 0.2, np.nan, duration * rng.uniform(0, 2, length))
        rows.append(
            {
                "user_id": user,
                "item_index": (group * (ITEMS // GROUPS) + within).tolist(),
                "timestamp_ms": (
                    1_650_000_000_000 + rng.integers(1, 10**7, length).cumsum()
                ).tolist(),
                "feedback": rng.integers(0, 256, length).tolist(),
                "positive": (rng.random(length) < 0.6).tolist(),
                "watch_time_s": watch.tolist(),
                "duration_s": duration.tolist(),
            }
        )
    return rows


def examples(rows: list[dict[str, list]]) -> pa.Table:
    """Every user's last event as the target of the events before it."""
    lists = SEQUENCE_SCHEMA.names[1:]
    return pa.Table.from_pylist(
        [
            {
                "user_id": row["user_id"],
                **{name: row[name][:-1] for name in lists},
                "target": row["item_index"][-1],
                "target_timestamp_ms": row["timestamp_ms"][-1],
            }
            for row in rows
        ],
        schema=EXAMPLE_SCHEMA,
    )


def items_table() -> pa.Table:
    """Seven authors; no tag, one or two; every fifth item has neither."""
    item = np.arange(ITEMS)
    tags = [[f"tag {i % 4}", "all"][: i % 3] if i % 5 else None for i in item.tolist()]
    author = [100 + i % 7 if i % 5 else None for i in item.tolist()]
    columns = {"item_id": item, "author_id": pa.array(author, pa.int64())}
    return pa.table({**columns, "tags": pa.array(tags, pa.list_(pa.string()))})


def users_table(users: int = 150) -> pa.Table:
    """Of every other user an age, and a town that some hide."""
    user = np.arange(0, users, 2)
    town = [None if u % 10 == 0 else f"town {u % 4}" for u in user.tolist()]
    return pa.table({"user_id": user, "age": user % 3, "town": pa.array(town, pa.string())})


def content() -> np.ndarray:
    """An embedding in which the items of a group lie together: float32 [60, 8]."""
    rng = np.random.default_rng(5)
    centre = rng.normal(size=(GROUPS, 8))
    noise = 0.2 * rng.normal(size=(ITEMS, 8))
    return (centre[np.arange(ITEMS) // (ITEMS // GROUPS)] + noise).astype(np.float32)


def pad(events: Events, more: int, junk: int) -> Events:
    """The same events behind which ``more`` masked positions hold junk."""

    def longer(x: torch.Tensor, value: int) -> torch.Tensor:
        tail = torch.full((x.shape[0], more, *x.shape[2:]), value, dtype=x.dtype)
        return torch.cat([x, tail], 1)

    real = {name: x for name, x in vars(events).items() if x is not None}
    masks = ("mask_BL", "count_BL")
    return Events(**{n: longer(x, 0 if n in masks else junk) for n, x in real.items()})


def trained_size(model: OneRec) -> OneRec:
    """Weights so large that an ignored input would show."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_world() -> World:
    rows = walk(150, seed=0)
    item = np.arange(ITEMS)
    within = item % (ITEMS // GROUPS)
    # Codes 0..15; items 8 and 9 of every group share their id.
    codes = np.stack([item // (ITEMS // GROUPS), within // 4, np.minimum(within, 8) % 4], 1)
    counts = np.bincount(np.concatenate([row["item_index"] for row in rows]), minlength=ITEMS)
    return World(
        pa.Table.from_pylist(rows, schema=SEQUENCE_SCHEMA),
        examples(walk(70, seed=1)),
        codes.astype(np.int32),
        counts,
    )
