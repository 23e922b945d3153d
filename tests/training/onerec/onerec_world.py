"""A small world for the recommender's tests: users walk through groups of items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from components.data.split import EXAMPLE_SCHEMA, SEQUENCE_SCHEMA

ITEMS, GROUPS = 60, 6


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
                "feedback": rng.integers(0, 128, length).tolist(),
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
