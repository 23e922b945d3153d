"""The simulated platform as a source: contracts, determinism, order, size and memory."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from components.data.contracts import CONTRACTS
from components.data.simulator.config import SimulatorConfig
from components.data.simulator.population import count_interactions, laws
from components.data.simulator.stream import interactions, items, simulate
from components.data.simulator.world import build_world

SMALL = SimulatorConfig(
    users=400, items=300, interactions=20_000, render_videos=False, dirty_rate=0.0
)


def table(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(list(batches))


def digest(batches: Iterable[pa.RecordBatch]) -> str:
    """Of the content, however it is cut: rows are written in batches of their own."""
    sink = pa.BufferOutputStream()
    whole = table(batches).combine_chunks()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def test_config_module_imports_no_numerical_library() -> None:
    code = (
        "import sys, components.data.simulator.config\n"
        "print(sorted({'numpy', 'pyarrow', 'av', 'torch', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_follow_the_contracts() -> None:
    source = simulate(SMALL, 3)
    for name, contract in CONTRACTS.items():
        read = table(source.tables[name]())
        assert read.num_rows == source.rows[name]
        for field in contract.schema:
            assert read.schema.field(field.name).type == field.type
            if not field.nullable:
                assert read[field.name].null_count == 0
        for key in contract.key:
            assert len(pc.unique(read[key])) == read.num_rows


def test_interactions_refer_to_listed_users_and_items() -> None:
    source = simulate(SMALL, 3)
    log = table(source.tables["interactions"]())
    for key, name in (("item_id", "items"), ("user_id", "users")):
        listed = table(source.tables[name]())[key]
        assert pc.all(pc.is_in(log[key], value_set=listed.combine_chunks())).as_py()


def test_interactions_come_by_user_then_time_without_ties() -> None:
    log = table(simulate(SMALL, 3).tables["interactions"]())
    user = log["user_id"].to_numpy()
    time = log["timestamp"].to_numpy().astype(np.int64)
    assert (np.diff(user) >= 0).all()
    same_user = np.diff(user) == 0
    assert (np.diff(time)[same_user] > 0).all()


def test_dates_are_the_days_of_the_timestamps_and_lie_within_the_log() -> None:
    log = table(simulate(SMALL, 3).tables["interactions"]())
    assert pc.all(pc.equal(log["date"], log["timestamp"].cast(pa.date32()))).as_py()
    assert pc.min(log["date"]).as_py() >= SMALL.start_date
    assert pc.max(log["date"]).as_py() < SMALL.start_date + datetime.timedelta(days=SMALL.days)


def test_sessions_keep_to_their_two_hours_and_videos_follow_one_another() -> None:
    log = table(simulate(SMALL, 3).tables["interactions"]())
    user, time = log["user_id"].to_numpy(), log["timestamp"].to_numpy().astype(np.int64)
    free = time + (1000 * log["watch_time_s"].to_numpy()).astype(np.int64)
    pause = (time[1:] - free[:-1])[np.diff(user) == 0]
    cell = time // 7_200_000
    same_cell = (np.diff(cell) == 0)[np.diff(user) == 0]
    # A pause within a cell is the gap between two videos: 0.4 to 3 seconds.
    assert (pause > 0).all()
    assert 400 <= pause[same_cell].min() < 410
    assert 2_990 < pause[same_cell].max() < 3_000
    first = np.concatenate([[True], (np.diff(user) != 0) | (np.diff(cell) != 0)])
    assert (time[first] % 7_200_000).max() < 2_400_000


def test_long_view_means_four_fifths_watched_and_feedback_needs_a_click() -> None:
    log = table(simulate(SMALL, 3).tables["interactions"]())
    watched, length = log["watch_time_s"].to_numpy(), log["duration_s"].to_numpy()
    long_view = log["long_view"].to_numpy()
    assert (long_view == (watched >= np.float32(0.8) * length)).all()
    assert (watched <= 3 * length).all()
    click = log["click"].to_numpy()
    for name in ("long_view", "like", "follow", "forward", "comment", "profile_enter"):
        given = log[name].to_numpy()
        assert given.any()
        assert not (given & ~click).any()


def test_streams_read_twice_are_equal_bit_by_bit_and_seeds_differ() -> None:
    source, other = simulate(SMALL, 3), simulate(SMALL, 4)
    build_world.cache_clear()
    laws.cache_clear()
    again = simulate(SMALL, 3)
    for name, stream in source.tables.items():
        assert digest(stream()) == digest(stream()) == digest(again.tables[name]())
        assert digest(stream()) != digest(other.tables[name]())


def test_content_does_not_depend_on_the_batch_size() -> None:
    world = build_world(SMALL, 3)
    assert digest(interactions(world, 1_000)) == digest(interactions(world, 77))
    assert digest(items(world, 20, 1_000)) == digest(items(world, 20, 7))
    assert max(batch.num_rows for batch in interactions(world, 77)) <= 77


def test_blocks_of_users_join_without_a_seam() -> None:
    config = SMALL.model_copy(update={"users": 5_000, "interactions": 300_000})
    assert laws(config, 0).num_blocks > 2
    users = table(simulate(config, 0).tables["users"]())["user_id"].to_numpy()
    assert (users == np.arange(1, 5_001)).all()
    log = table(interactions(build_world(config, 0)))
    assert (np.diff(log["user_id"].to_numpy()) >= 0).all()
    assert log.num_rows == count_interactions(config, 0)


@pytest.mark.parametrize(
    "size",
    [
        {"users": 1_000, "interactions": 5_000},
        {"users": 1_000, "interactions": 300_000},
        {"users": 300, "interactions": 300_000, "days": 90},
    ],
)
def test_number_of_interactions_is_the_one_asked_for(size: dict[str, int]) -> None:
    config = SMALL.model_copy(update=size)
    counts = [count_interactions(config, seed) for seed in range(5)]
    # A user's count has a coefficient of variation of up to 1.6 (log-normal activity, sigma 1.1);
    # 4.5 standard errors of the mean over five seeds.
    assert np.mean(counts) == pytest.approx(
        config.interactions, rel=4.5 * 1.6 / np.sqrt(5 * config.users)
    )


def test_few_items_and_few_users_make_most_of_the_traffic() -> None:
    config = SMALL.model_copy(update={"users": 2_000, "items": 2_000, "interactions": 100_000})
    log = table(simulate(config, 0).tables["interactions"]())
    for key, count, least in (("item_id", config.items, 0.55), ("user_id", config.users, 0.55)):
        rows = np.sort(np.bincount(log[key].to_numpy(), minlength=count + 1)[1:])[::-1]
        # Equal shares would give the first fifth 0.2 of the rows.
        assert rows[: count // 5].sum() / rows.sum() > least
        assert (rows > 0).sum() > 0.85 * count


def test_items_form_authors_that_keep_to_a_topic() -> None:
    world = build_world(SMALL.model_copy(update={"items": 5_000}), 0)
    shares = []
    for author in np.unique(world.author_id):
        topics = np.bincount(world.item_topic[world.author_id == author])
        if topics.sum() >= 10:
            shares.append(topics.max() / topics.sum())
    assert np.mean(shares) > 0.7


def test_split_days_cut_off_the_last_tenth_and_the_twentieth_before() -> None:
    assert simulate(SMALL, 0).split == {
        "protocol": "temporal",
        "valid_from": "2025-01-26",
        "test_from": "2025-01-28",
    }


def test_memory_does_not_grow_with_the_number_of_interactions() -> None:
    def peak(blocks: int) -> int:
        config = SMALL.model_copy(update={"users": 60_000, "interactions": 6_000_000})
        world = build_world(config, 0)
        rows = 0
        tracemalloc.start()
        for batch in interactions(world):
            rows += batch.num_rows
            if rows > blocks * 131_072:
                break
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few, many = peak(3), peak(9)
    # Blocks differ in their number of rows by a few per cent.
    assert many < 1.25 * few
    assert many < 100 * 2**20


def test_a_million_items_and_a_hundred_million_interactions_start_at_once() -> None:
    config = SimulatorConfig(
        users=1_000_000,
        items=1_000_000,
        interactions=100_000_000,
        themes=8,
        topics_per_theme=8,
        motifs_per_topic=64,
        render_videos=False,
    )
    world = build_world(config, 0)
    state = sum(v.nbytes for v in vars(world).values() if isinstance(v, np.ndarray))
    assert state < 100 * config.items
    batch = next(interactions(world))
    assert batch.num_rows == 65_536
    assert pc.max(batch["item_id"]).as_py() <= config.items
    first = next(iter(islice(items(world, 0), 1)))
    assert first.num_rows == 65_536


def test_world_locates_every_item_as_bisection_does() -> None:
    world = build_world(SMALL, 0)
    rng = np.random.default_rng(0)
    mass = np.concatenate([rng.random(10_000), world.cumulative[:-1], [1.0]])
    bisected = np.searchsorted(world.cumulative, mass[:-1], side="right") - 1
    assert (world.locate(mass)[:-1] == bisected).all()
    assert world.locate(mass)[-1] == SMALL.items - 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"users": 0}, "greater than or equal to 1"),
        ({"interactons": 5}, "Extra inputs"),
        ({"users": 10, "interactions": 1_000_000}, "raise users or days"),
        ({"min_duration_s": 9.0}, "exceeds max_duration_s"),
        ({"fps": 13}, "multiple of 2"),
    ],
)
def test_a_wrong_size_is_refused_with_the_reason(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SimulatorConfig(**wrong)


@pytest.mark.parametrize("items_", [64, 65, 200])
def test_small_catalogues_keep_their_tree_with_fewer_motifs(items_: int) -> None:
    config = SMALL.model_copy(update={"items": items_})
    world = build_world(config, 1)
    assert (np.diff(world.motif_start) >= 1).all()
    assert table(simulate(config, 1).tables["interactions"]()).num_rows > 10_000
