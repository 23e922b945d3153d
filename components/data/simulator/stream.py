"""The simulated platform as a `Source`: its three tables as streams of Arrow batches.

Interactions come by user, a user's by time; a stream is made anew, block of users after block, each
time it is read, and is the same each time. Memory does not grow with the number of interactions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from components.data.contracts import INTERACTIONS, ITEMS, TIMESTAMP
from components.data.simulator.captions import texts
from components.data.simulator.config import SimulatorConfig
from components.data.simulator.corrupt import ROW_KINDS, corrupt
from components.data.simulator.ground_truth import facts
from components.data.simulator.population import ACTIVITY, DAY_MS, FEATURES, laws, make_block
from components.data.simulator.render import render_videos
from components.data.simulator.sampling import Log, simulate_block
from components.data.simulator.world import World, build_world
from components.data.source import SIMULATOR, Source

BATCH_ROWS = 65_536

# Faulty rows pass through a source, so no field can promise that it has no null.
_INTERACTIONS = pa.schema([field.with_nullable(True) for field in INTERACTIONS.schema])
_ITEMS = pa.schema([field.with_nullable(True) for field in ITEMS.schema])
_USER_FEATURES = {name: values for name, (values, _) in FEATURES.items()} | {
    "activity_degree": tuple(ACTIVITY)
}
_USERS = pa.schema([("user_id", pa.int64()), *((name, pa.string()) for name in _USER_FEATURES)])


def simulate(
    config: SimulatorConfig,
    seed: int,
    video_dir: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Source:
    """Make the platform of ``(config, seed)``.

    Videos are rendered before the call returns, if ``config.render_videos`` and there is a folder
    for them; ``items.video`` is the file name in it, null for items without.

    Args:
        video_dir: folder for ``<item_id>.mp4``; made if absent.
        progress: called with 1 after each video.

    Returns:
        A source whose ``ground_truth`` holds the facts of `ground_truth.facts` and whose streams
        can be read again and again, with equal content.
    """
    world = build_world(config, seed)
    videos = 0
    if config.render_videos and video_dir is not None:
        videos = render_videos(world, video_dir, progress)
    truth = facts(config, seed) | {"videos": videos}
    clean = int(truth["interactions_before_faults"])
    source = Source(
        format=SIMULATOR,
        uri=SIMULATOR,
        citation="Reelflow platform simulator: synthetic data with known ground truth",
        licence="synthetic; free of rights of others",
        split={
            "protocol": "temporal",
            "valid_from": config.valid_from.isoformat(),
            "test_from": config.test_from.isoformat(),
        },
        tables={
            "interactions": partial(interactions, world),
            "items": partial(items, world, videos),
            "users": partial(users, config, seed),
        },
        rows={"interactions": clean, "items": config.items, "users": config.users},
        ground_truth=truth,
    )
    if config.dirty_rate == 0:
        return source
    return corrupt(source, ROW_KINDS, config.dirty_rate, seed, rows={"interactions": clean})


def interactions(world: World, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """Interactions by user then time, in batches of at most ``batch_rows``."""
    start = np.datetime64(world.config.start_date, "ms").astype(np.int64)
    for number in range(laws(world.config, world.seed).num_blocks):
        batch = _interaction_batch(world, simulate_block(world, number), int(start))
        for first in range(0, batch.num_rows, batch_rows):
            yield batch.slice(first, batch_rows)


def _interaction_batch(world: World, log: Log, start_ms: int) -> pa.RecordBatch:
    timestamp_ms = start_ms + log.timestamp_ms
    columns = {
        "user_id": pa.array(log.user_id),
        "item_id": pa.array(world.item_id[log.item]),
        "timestamp": pa.array(timestamp_ms).view(TIMESTAMP),
        "date": pa.array((timestamp_ms // DAY_MS).astype(np.int32)).view(pa.date32()),
        "watch_time_s": pa.array(log.watch_time_s),
        "duration_s": pa.array(log.duration_s),
        **{name: pa.array(given) for name, given in log.feedback.items()},
        "rating": pa.nulls(len(log.item), pa.float32()),
        "dislike": pa.nulls(len(log.item), pa.bool_()),
    }
    return pa.RecordBatch.from_arrays(
        [columns[name] for name in _INTERACTIONS.names], schema=_INTERACTIONS
    )


def items(world: World, videos: int, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """The catalogue by item id; the first ``videos`` items have one."""
    for first in range(0, world.num_items, batch_rows):
        tree = world.by_id[first : first + batch_rows]
        item_id = world.item_id[tree]
        title, caption, tags = texts(world, tree)
        names = [world.video_name(i) for i in item_id[: max(0, videos - first)].tolist()]
        columns = {
            "item_id": pa.array(item_id),
            "title": title,
            "caption": caption,
            "tags": tags,
            "author_id": pa.array(world.author_id[tree].astype(np.int64)),
            "duration_s": pa.array(world.duration_s[tree]),
            "video": pa.concat_arrays(
                [pa.array(names, pa.string()), pa.nulls(len(tree) - len(names), pa.string())]
            ),
            "image": pa.nulls(len(tree), pa.string()),
        }
        yield pa.RecordBatch.from_arrays([columns[name] for name in _ITEMS.names], schema=_ITEMS)


def users(
    config: SimulatorConfig, seed: int, batch_rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The users by id, with their categorical features as strings."""
    for number in range(laws(config, seed).num_blocks):
        block = make_block(config, seed, number)
        columns = [pa.array(np.arange(len(block), dtype=np.int64) + block.first_user)]
        for name, values in _USER_FEATURES.items():
            index = pa.array(block.features[name])
            columns.append(pa.array(values, pa.string()).take(index))
        batch = pa.RecordBatch.from_arrays(columns, schema=_USERS)
        for first in range(0, batch.num_rows, batch_rows):
            yield batch.slice(first, batch_rows)
