"""Claims about samples: what the encoder may read of a user, and in which order it comes."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from onerec_world import ITEMS, World

from components.data.contracts import FEEDBACK
from components.training.onerec.config import OneRecConfig
from components.training.onerec.data import (
    GAP_BUCKETS,
    POSITIVE_BIT,
    Batch,
    Sequences,
    assemble,
    duration_buckets,
    gap_buckets,
    read_sequences,
    watch_buckets,
)
from components.training.onerec.epochs import EpochOrder, context_lengths

CONFIG = OneRecConfig(
    codebook_size=16, d_model=16, short_term=5, positive_feedback=7, num_items=ITEMS
)


def read(table: pa.Table, rows: int = 40) -> Sequences:
    """As a stage reads it: in several batches."""
    return read_sequences(table.to_batches(max_chunksize=rows))


def test_batch_equals_a_loop_over_the_table(world: World) -> None:
    sequences = read(world.train)
    targets = sequences.train_targets("all")
    chosen = np.random.default_rng(0).permutation(targets)[:100]
    batch = assemble(sequences, chosen, world.codes_NQ, CONFIG)
    rows = world.train.to_pylist()
    for b, event in enumerate(chosen):
        user = int(np.searchsorted(sequences.start_U1, event, side="right")) - 1
        position = int(event - sequences.start_U1[user])
        row = rows[user]
        history = range(position)
        expected = {
            "short_term": list(history)[::-1][:5],
            "positive_feedback": [i for i in history if row["positive"][i]][::-1][:7],
        }
        target = world.codes_NQ[row["item_index"][position]]
        np.testing.assert_array_equal(batch.target_BQ[b], target)
        for name, places in expected.items():
            events = batch.pathways[name]
            count = int(events.mask_BL[b].sum())
            assert events.mask_BL[b].tolist() == [i < count for i in range(events.mask_BL.shape[1])]
            assert count == len(places)
            items = [row["item_index"][i] for i in places]
            np.testing.assert_array_equal(events.item_BL[b, :count], items)
            np.testing.assert_array_equal(events.sid_BLQ[b, :count], world.codes_NQ[items])
            bits = [row["feedback"][i] | row["positive"][i] << POSITIVE_BIT for i in places]
            assert events.feedback_BL[b, :count].tolist() == bits
            gaps = [(row["timestamp_ms"][position] - row["timestamp_ms"][i]) / 1000 for i in places]
            exact = [min(31, int(1 + np.log2(1 + gap))) for gap in gaps]
            assert events.gap_BL[b, :count].tolist() == exact


def same_inputs(a: Batch, b: Batch) -> bool:
    return all(
        all(
            np.array_equal(getattr(a.pathways[p], f), getattr(b.pathways[p], f))
            for f in (
                "item_BL",
                "sid_BLQ",
                "feedback_BL",
                "gap_BL",
                "watch_BL",
                "duration_BL",
                "mask_BL",
            )
        )
        for p in a.pathways
    )


def test_probe_what_comes_at_or_after_the_target_changes_no_input(world: World) -> None:
    """Overwrite the target and everything later of every column: the encoder sees no difference."""
    sequences = read(world.train)
    user = int(np.argmax(np.diff(sequences.start_U1)))
    event = np.array([sequences.start_U1[user] + 9])
    before = assemble(sequences, event, world.codes_NQ, CONFIG)
    rows = world.train.to_pylist()
    for name, lie in (
        ("item_index", 3),
        ("feedback", 127),
        ("positive", True),
        ("watch_time_s", 1e3),
        ("duration_s", 9.0),
    ):
        rows[user][name][9:] = [lie] * len(rows[user][name][9:])
    rows[user]["timestamp_ms"][10:] = [2**41] * len(rows[user]["timestamp_ms"][10:])
    after = assemble(
        read(pa.Table.from_pylist(rows, schema=world.train.schema)), event, world.codes_NQ, CONFIG
    )
    assert same_inputs(before, after)
    np.testing.assert_array_equal(after.target_BQ[0], world.codes_NQ[3])


def test_probe_other_users_change_no_input(world: World) -> None:
    sequences = read(world.train)
    alone = read(world.train.slice(20, 1))
    place = sequences.start_U1[20] + np.arange(1, 4)
    ours = assemble(sequences, place, world.codes_NQ, CONFIG)
    theirs = assemble(alone, np.arange(1, 4), world.codes_NQ, CONFIG)
    assert same_inputs(ours, theirs)


def test_examples_read_their_whole_history_and_target_their_target(world: World) -> None:
    sequences = read(world.valid)
    batch = assemble(sequences, sequences.example_targets(), world.codes_NQ, CONFIG)
    targets = world.valid["target"].to_numpy()
    np.testing.assert_array_equal(batch.target_BQ, world.codes_NQ[targets])
    newest = [row[-1] for row in world.valid["item_index"].to_pylist()]
    np.testing.assert_array_equal(
        batch.pathways["short_term"].sid_BLQ[:, 0], world.codes_NQ[newest]
    )
    gap = world.valid["target_timestamp_ms"].to_numpy() - np.array(
        [row[-1] for row in world.valid["timestamp_ms"].to_pylist()]
    )
    np.testing.assert_array_equal(batch.pathways["short_term"].gap_BL[:, 0], gap_buckets(gap))


def test_train_targets_are_later_events_and_optionally_positive_ones(world: World) -> None:
    sequences = read(world.train)
    positive = np.concatenate([row["positive"] for row in world.train.to_pylist()])
    first = set(sequences.start_U1[:-1].tolist())
    everything = set(range(len(positive))) - first
    assert set(sequences.train_targets("all").tolist()) == everything
    wanted = {e for e in everything if positive[e]}
    assert set(sequences.train_targets("positive").tolist()) == wanted


def test_context_length_counts_what_a_batch_holds(world: World) -> None:
    sequences = read(world.train)
    targets = sequences.train_targets("all")
    batch = assemble(sequences, targets, world.codes_NQ, CONFIG)
    held = sum(events.mask_BL.sum(1).numpy() for events in batch.pathways.values())
    np.testing.assert_array_equal(held, context_lengths(sequences, targets, CONFIG))


def test_without_positive_pathway_no_such_input_is_cut(world: World) -> None:
    sequences = read(world.train)
    config = CONFIG.model_copy(update={"positive_feedback": 0})
    batch = assemble(sequences, sequences.train_targets("all")[:3], world.codes_NQ, config)
    assert set(batch.pathways) == {"short_term"}


def test_a_table_without_any_positive_event_or_without_rows_can_be_read(world: World) -> None:
    rows = [
        {**row, "positive": [False] * len(row["positive"])} for row in world.train.to_pylist()[:4]
    ]
    sequences = read(pa.Table.from_pylist(rows, schema=world.train.schema))
    batch = assemble(sequences, sequences.train_targets("all"), world.codes_NQ, CONFIG)
    assert not batch.pathways["positive_feedback"].mask_BL.any()
    assert len(sequences.train_targets("positive")) == 0
    assert read_sequences([]).num_users == 0


def test_buckets_keep_order_and_mark_the_unknown() -> None:
    seconds = np.array([0, 1, 60, 3600, 86_400, 3e7, 1e12])
    gaps = gap_buckets((seconds * 1000).astype(np.int64))
    assert gaps[0] == 1
    assert (np.diff(gaps.astype(int)) > 0)[:-1].all()
    assert gaps.max() == GAP_BUCKETS - 1
    unknown = np.array([np.nan, 3.0, 3.0], np.float32)
    assert watch_buckets(unknown, np.array([10, np.nan, 0], np.float32)).tolist() == [0, 0, 0]
    shares = watch_buckets(np.array([0.0, 0.3, 0.95, 1.0, 99.0]), np.ones(5))
    assert (np.diff(shares.astype(int)) > 0).all()
    assert shares[0] > 0
    lengths = duration_buckets(np.array([np.nan, 0.0, 0.5, 5.0, 60.0, 1e6]))
    assert lengths[:2].tolist() == [0, 0]
    assert (np.diff(lengths[1:].astype(int)) > 0).all()


def test_every_feedback_signal_has_its_bit_beside_positive() -> None:
    assert len(FEEDBACK) == POSITIVE_BIT


def order(sequences: Sequences, world_size: int = 1, rank: int = 0, seed: int = 0) -> EpochOrder:
    targets = sequences.train_targets("all")
    lengths = context_lengths(sequences, targets, CONFIG)
    return EpochOrder(targets, lengths, 32, seed, rank, world_size, group_steps=4)


def test_an_epoch_takes_each_sample_at_most_once_and_leaves_less_than_a_step(world: World) -> None:
    sequences = read(world.train)
    seen = np.concatenate(list(order(sequences).epoch(3)))
    targets = sequences.train_targets("all")
    assert len(np.unique(seen)) == len(seen)
    assert set(seen) <= set(targets)
    assert len(targets) - len(seen) < 32


def test_workers_share_out_the_same_steps(world: World) -> None:
    sequences = read(world.train)
    whole = list(order(sequences).epoch(1))
    shares = [list(order(sequences, 2, rank).epoch(1)) for rank in range(2)]
    for step, first, second in zip(whole, *shares, strict=True):
        assert len(first) == len(second) == 16
        assert sorted(step) == sorted([*first, *second])


def test_order_is_a_function_of_seed_and_epoch_and_starts_anywhere(world: World) -> None:
    sequences = read(world.train)
    steps = list(order(sequences).epoch(2))
    for a, b in zip(steps[5:], order(sequences).epoch(2, first_step=5), strict=True):
        np.testing.assert_array_equal(a, b)

    def first(seed: int, epoch: int) -> npt.NDArray[np.int64]:
        return next(order(sequences, seed=seed).epoch(epoch))

    assert not np.array_equal(first(0, 2), first(0, 3))
    assert not np.array_equal(first(0, 2), first(1, 2))


def test_steps_hold_samples_of_similar_length(world: World) -> None:
    sequences = read(world.train)
    targets = sequences.train_targets("all")
    length_of = dict(zip(targets.tolist(), context_lengths(sequences, targets, CONFIG)))
    spread = [np.std([length_of[e] for e in step]) for step in order(sequences).epoch(0)]
    assert np.mean(spread) < 0.5 * np.std(list(length_of.values()))


def test_fewer_samples_than_a_step_still_give_every_worker_its_share() -> None:
    few = EpochOrder(np.arange(5), np.ones(5, np.int64), 8, 0, rank=1, world_size=2)
    (step,) = few.epoch(0)
    assert len(step) == 4
    with pytest.raises(ValueError, match="does not divide"):
        EpochOrder(np.arange(5), np.ones(5, np.int64), 7, 0, world_size=2)
    with pytest.raises(ValueError, match="no training target"):
        EpochOrder(np.zeros(0, np.int64), np.zeros(0, np.int64), 8, 0)


def test_assembly_keeps_far_ahead_of_training() -> None:
    rng = np.random.default_rng(0)
    users, length = 4_000, 60
    flat = rng.integers(0, 5_000, users * length).astype(np.int32)
    offsets = pa.array(np.arange(users + 1) * length, pa.int32())

    def column(values: npt.NDArray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind))

    table = pa.table(
        {
            "item_index": column(flat, pa.int32()),
            "timestamp_ms": column(np.arange(len(flat)), pa.int64()),
            "feedback": column(flat % 256, pa.uint8()),
            "positive": column(flat % 3 == 0, pa.bool_()),
            "watch_time_s": column(flat % 50, pa.float32()),
            "duration_s": column(flat % 70, pa.float32()),
        }
    )
    sequences = read_sequences(table.to_batches())
    codes = rng.integers(0, 64, (5_000, 3)).astype(np.int32)
    targets = sequences.train_targets("all")[:20_000]
    start = time.process_time()
    for first in range(0, len(targets), 500):
        assemble(sequences, targets[first : first + 500], codes, OneRecConfig())
    # 250,000 a second alone on a core; training takes some thousands.
    assert len(targets) / (time.process_time() - start) > 50_000
