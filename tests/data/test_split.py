"""The split against a plain re-statement of its rules, one user and one event at a time."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_harness import Bench

from components.data.contracts import FEEDBACK, INTERACTIONS
from components.data.split_stage import SplitParams, split
from components.pipeline.errors import DataContractError, ParamsError

DAY_MS = 86_400_000
FIRST_DAY = 19_000
#: A dislike makes no event positive.
ENGAGEMENT = FEEDBACK[1:-1]
OUTPUTS = ("catalogue", "train_sequences", "valid_examples", "test_examples")


def make_events(seed: int, rows: int = 3000, signals: bool = True) -> list[dict[str, Any]]:
    """Random interactions of 60 users over 20 days, with ties, nulls and late-night dates."""
    rng = np.random.default_rng(seed)
    events = []
    for _ in range(rows):
        minute = int(rng.integers(0, 20 * 24 * 60))
        day = FIRST_DAY + minute // 1440
        # Near midnight the log may file an event under the next day; some rows have no day.
        date = day + int(minute % 1440 > 1425)
        event: dict[str, Any] = dict.fromkeys(INTERACTIONS.schema.names)
        event |= {
            "user_id": int(rng.integers(-5, 55)),
            "item_id": int(rng.integers(0, 40)) * 7,
            "timestamp": FIRST_DAY * DAY_MS + minute * 60_000,
            "date": None if rng.random() < 0.3 else date,
        }
        if signals:
            for name in FEEDBACK:
                event[name] = None if rng.random() < 0.4 else bool(rng.random() < 0.1)
            event["watch_time_s"] = None if rng.random() < 0.2 else float(rng.integers(0, 25))
            event["duration_s"] = None if rng.random() < 0.2 else float(rng.integers(0, 40))
            event["rating"] = None if rng.random() < 0.9 else float(rng.integers(1, 6))
        events.append(event)
    return events


def table_of(events: list[dict[str, Any]]) -> pa.Table:
    columns = {name: [e[name] for e in events] for name in INTERACTIONS.schema.names}
    arrays = []
    for field in INTERACTIONS.schema:
        values = columns[field.name]
        if field.name == "timestamp":
            arrays.append(pa.array(values, pa.int64()).cast(field.type))
        elif field.name == "date":
            arrays.append(pa.array(values, pa.int32()).cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.table(arrays, schema=INTERACTIONS.schema)


def run_split(
    folder: Path,
    interactions: pa.Table,
    protocol: str = "temporal",
    days: tuple[int | None, int | None] = (FIRST_DAY + 14, FIRST_DAY + 16),
    items: tuple[int, ...] = (1, 7, 14),
    seed: int = 0,
    **params: Any,
) -> tuple[Bench, dict[str, float]]:
    dates = [None if d is None else str(np.datetime64(d, "D")) for d in days]
    bench = Bench(folder)
    bench.give("interactions", lambda o: o.write_table(interactions))
    bench.give("items", lambda o: o.write_table(pa.table({"item_id": pa.array(items, pa.int64())})))
    source = {"split": {"protocol": protocol, "valid_from": dates[0], "test_from": dates[1]}}
    bench.give("source", lambda o: o.write_json(source))
    return bench, bench.run(split, SplitParams(**params), seed=seed)


def day_of(event: dict[str, Any]) -> int:
    return event["timestamp"] // DAY_MS if event["date"] is None else event["date"]


def is_positive(event: dict[str, Any]) -> bool:
    if any(event[name] for name in ENGAGEMENT):
        return True
    watch, duration = event["watch_time_s"], event["duration_s"]
    if event["long_view"] is None and watch is not None:
        if watch >= 18:
            return True
        if duration and watch >= 0.7 * duration:
            return True
    return event["rating"] is not None and event["rating"] >= 4


def as_event(row: dict[str, Any], position: int) -> tuple[Any, ...]:
    seconds = tuple(
        None if math.isnan(row[name][position]) else row[name][position]
        for name in ("watch_time_s", "duration_s")
    )
    plain = ("item_index", "timestamp_ms", "feedback", "positive")
    return tuple(row[name][position] for name in plain) + seconds


def expected_event(event: dict[str, Any], index: dict[int, int]) -> tuple[Any, ...]:
    bits = sum(1 << bit for bit, name in enumerate(FEEDBACK) if event[name])
    return (
        index[event["item_id"]],
        event["timestamp"],
        bits,
        is_positive(event),
        event["watch_time_s"],
        event["duration_s"],
    )


def history(row: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [as_event(row, position) for position in range(len(row["item_index"]))]


def multiset(events: list[tuple[Any, ...]]) -> Counter[tuple[Any, ...]]:
    return Counter(events)


def test_temporal_split_is_what_the_rules_say(tmp_path: Path) -> None:
    events = make_events(1)
    valid_from, test_from = FIRST_DAY + 14, FIRST_DAY + 16
    bench, metrics = run_split(tmp_path, table_of(events), max_history=1000)
    catalogue = bench.artifacts["catalogue"].read_table()
    ids = sorted({e["item_id"] for e in events} | {1, 7, 14})
    assert catalogue["item_id"].to_pylist() == ids
    assert catalogue["item_index"].to_pylist() == list(range(len(ids)))
    index = {item: i for i, item in enumerate(ids)}

    train = [e for e in events if day_of(e) < valid_from]
    counts = Counter(index[e["item_id"]] for e in train)
    liked = Counter(index[e["item_id"]] for e in train if is_positive(e))
    assert catalogue["train_count"].to_pylist() == [counts[i] for i in range(len(ids))]
    assert catalogue["train_positive_count"].to_pylist() == [liked[i] for i in range(len(ids))]

    rows = bench.artifacts["train_sequences"].read_table().to_pylist()
    assert [r["user_id"] for r in rows] == sorted({e["user_id"] for e in train})
    for row in rows:
        mine = [expected_event(e, index) for e in train if e["user_id"] == row["user_id"]]
        assert multiset(history(row)) == multiset(mine)
        assert row["timestamp_ms"] == sorted(row["timestamp_ms"])

    for name, low, high in (
        ("valid_examples", valid_from, test_from),
        ("test_examples", test_from, 10**9),
    ):
        rows = {r["user_id"]: r for r in bench.artifacts[name].read_table().to_pylist()}
        users = set()
        for user in {e["user_id"] for e in events}:
            mine = [e for e in events if e["user_id"] == user]
            before = [expected_event(e, index) for e in mine if day_of(e) < low]
            candidates = [e for e in mine if low <= day_of(e) < high and is_positive(e)]
            if not before or not candidates:
                continue
            users.add(user)
            first = min(e["timestamp"] for e in candidates)
            assert rows[user]["target_timestamp_ms"] == first
            tied = {index[e["item_id"]] for e in candidates if e["timestamp"] == first}
            assert rows[user]["target"] in tied
            assert multiset(history(rows[user])) == multiset(before)
        assert users == set(rows)
    assert metrics["train_events"] == len(train)
    assert metrics["users"] == len({e["user_id"] for e in events})


def test_leave_one_out_takes_the_last_two_events(tmp_path: Path) -> None:
    events = make_events(2, rows=400)
    for position, event in enumerate(events):  # no ties: the order is then certain
        event["timestamp"] += position
    bench, metrics = run_split(tmp_path, table_of(events), protocol="leave_one_out")
    index = {
        item: i
        for i, item in enumerate(bench.artifacts["catalogue"].read_table()["item_id"].to_pylist())
    }
    tables = {
        name: {r["user_id"]: r for r in bench.artifacts[name].read_table().to_pylist()}
        for name in OUTPUTS[1:]
    }
    for user in {e["user_id"] for e in events}:
        mine = sorted((e for e in events if e["user_id"] == user), key=lambda e: e["timestamp"])
        items = [index[e["item_id"]] for e in mine]
        if len(items) >= 2:
            assert tables["test_examples"][user]["target"] == items[-1]
            assert tables["test_examples"][user]["item_index"] == items[:-1]
        if len(items) >= 3:
            assert tables["valid_examples"][user]["target"] == items[-2]
            assert tables["valid_examples"][user]["item_index"] == items[:-2]
            assert tables["train_sequences"][user]["item_index"] == items[:-2]
        else:
            assert user not in tables["valid_examples"]
            assert user not in tables["train_sequences"]
    lengths = Counter(e["user_id"] for e in events).values()
    assert metrics["dropped_test_users"] == sum(n == 1 for n in lengths)
    assert metrics["dropped_valid_users"] == sum(n == 2 for n in lengths)


def test_no_train_or_history_event_lies_after_its_target(tmp_path: Path) -> None:
    bench, _ = run_split(tmp_path, table_of(make_events(3)))
    for name, boundary in (("valid_examples", FIRST_DAY + 14), ("test_examples", FIRST_DAY + 16)):
        for row in bench.artifacts[name].read_table().to_pylist():
            assert max(row["timestamp_ms"]) < boundary * DAY_MS
            assert max(row["timestamp_ms"]) <= row["target_timestamp_ms"]


def test_events_after_valid_from_change_nothing_that_training_sees(tmp_path: Path) -> None:
    events = make_events(4)
    altered = [dict(e) for e in events]
    for event in altered:
        if day_of(event) >= FIRST_DAY + 14:
            event["item_id"], event["like"] = 7 * ((event["item_id"] // 7 + 11) % 40), True
    before, _ = run_split(tmp_path / "a", table_of(events))
    after, _ = run_split(tmp_path / "b", table_of(altered))
    assert before.digests("catalogue", "train_sequences") == after.digests(
        "catalogue", "train_sequences"
    )
    assert before.digests("test_examples") != after.digests("test_examples")


def test_row_order_and_bucket_size_of_the_source_change_nothing(tmp_path: Path) -> None:
    table = table_of(make_events(5))
    order = np.random.default_rng(0).permutation(table.num_rows)
    one, _ = run_split(tmp_path / "a", table)
    other, _ = run_split(tmp_path / "b", table.take(pa.array(order)), rows_per_bucket=97)
    for name in OUTPUTS:  # as text: NaN stands for an unknown number and equals itself there
        rows = [str(b.artifacts[name].read_table().to_pylist()) for b in (one, other)]
        assert rows[0] == rows[1]


def test_tied_timestamps_are_shuffled_by_the_seed_alone(tmp_path: Path) -> None:
    events = make_events(6, rows=400)
    for event in events:
        event["timestamp"], event["date"] = FIRST_DAY * DAY_MS, None
    table = table_of(events)
    targets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        bench, _ = run_split(tmp_path / name, table, protocol="leave_one_out", seed=seed)
        targets.append(bench.artifacts["test_examples"].read_table()["target"].to_pylist())
    assert targets[0] == targets[1] != targets[2]


def test_source_without_feedback_makes_every_event_positive(tmp_path: Path) -> None:
    bench, metrics = run_split(tmp_path, table_of(make_events(7, signals=False)))
    assert metrics["train_positives"] == metrics["train_events"]
    positive = bench.artifacts["test_examples"].read_table()["positive"]
    assert all(flag for row in positive.to_pylist() for flag in row)


def test_source_with_clicks_alone_takes_clicks_as_positive(tmp_path: Path) -> None:
    events = make_events(8, signals=False)
    for position, event in enumerate(events):
        event["click"] = position % 3 == 0
    _, metrics = run_split(tmp_path, table_of(events))
    clicked = sum(bool(e["click"]) for e in events if day_of(e) < FIRST_DAY + 14)
    assert metrics["train_positives"] == clicked


@pytest.mark.parametrize("clicks", [False, True])
def test_what_was_disliked_is_no_preference_of_a_source_that_tells_no_other(
    tmp_path: Path, clicks: bool
) -> None:
    events = make_events(8, signals=False)
    for position, event in enumerate(events):
        event["click"] = position % 3 == 0 if clicks else None
        event["dislike"] = position % 4 == 0
    bench, metrics = run_split(tmp_path, table_of(events))
    train = [e for e in events if day_of(e) < FIRST_DAY + 14]
    liked = [e for e in train if not e["dislike"] and (e["click"] or not clicks)]
    assert metrics["train_positives"] == len(liked) < len(train)
    for row in bench.artifacts["train_sequences"].read_table().to_pylist():
        for bits, positive in zip(row["feedback"], row["positive"], strict=True):
            assert not (positive and bits >> FEEDBACK.index("dislike") & 1)


def test_history_keeps_the_newest_events_and_short_ones_are_counted(tmp_path: Path) -> None:
    events = make_events(9)
    full, _ = run_split(tmp_path / "full", table_of(events), max_history=1000)
    capped, metrics = run_split(
        tmp_path / "capped", table_of(events), max_history=4, min_history=40
    )
    whole = {r["user_id"]: r for r in full.artifacts["test_examples"].read_table().to_pylist()}
    rows = capped.artifacts["test_examples"].read_table().to_pylist()
    assert rows
    for row in rows:
        assert row["item_index"] == whole[row["user_id"]]["item_index"][-4:]
    short = [r for r in whole.values() if len(r["item_index"]) < 40]
    assert metrics["dropped_test_users"] == len(short) > 0


def test_source_without_dates_is_cut_by_its_time_span(tmp_path: Path) -> None:
    bench, _ = run_split(tmp_path, table_of(make_events(10)), days=(None, None))
    last_day = FIRST_DAY + 20  # the last minutes of day 19 are filed under the day after
    test_rows = bench.artifacts["test_examples"].read_table().to_pylist()
    span = last_day - FIRST_DAY + 1
    boundary = (last_day + 1 - round(0.1 * span)) * DAY_MS
    assert min(r["target_timestamp_ms"] for r in test_rows) >= boundary - 15 * 60_000
    assert max(max(r["timestamp_ms"]) for r in test_rows) < boundary


def test_parameters_overrule_the_days_of_the_source(tmp_path: Path) -> None:
    day = datetime.date(1970, 1, 1) + datetime.timedelta(days=FIRST_DAY + 5)
    bench, _ = run_split(tmp_path, table_of(make_events(11)), valid_from=day)
    newest = max(
        max(row)
        for row in bench.artifacts["train_sequences"].read_table()["timestamp_ms"].to_pylist()
    )
    assert newest < (FIRST_DAY + 5) * DAY_MS


def test_days_outside_the_data_are_refused_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"split\.valid_from"):
        run_split(tmp_path, table_of(make_events(12)), days=(FIRST_DAY + 90, FIRST_DAY + 95))


def test_split_without_any_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match="leaves no valid user"):
        run_split(tmp_path, table_of(make_events(13)), min_history=100_000)


def test_empty_interactions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match="no interaction is left"):
        run_split(tmp_path, table_of([]))


def test_published_leave_one_out_of_real_sequences(shared_data: Path, tmp_path: Path) -> None:
    """The stored order of the real sequences gives back their own last two items."""
    sequences = pq.read_table(shared_data / "amazon_scientific" / "sequences.parquet").slice(0, 500)
    lists = sequences["item_ids"].combine_chunks()
    users = np.repeat(sequences["user_id"].to_numpy(), lists.value_lengths().to_numpy())
    stamps = np.arange(len(users), dtype=np.int64)
    table = pa.table({"user_id": users, "item_id": lists.flatten(), "timestamp": stamps})
    full = pa.table(
        [
            table[f.name].cast(f.type)
            if f.name in table.schema.names
            else pa.nulls(len(users), f.type)
            for f in INTERACTIONS.schema
        ],
        schema=INTERACTIONS.schema,
    )
    bench, _ = run_split(tmp_path, full, protocol="leave_one_out", items=())
    ids = bench.artifacts["catalogue"].read_table()["item_id"].to_numpy()
    for name, back in (("test_examples", -1), ("valid_examples", -2)):
        target = ids[bench.artifacts[name].read_table()["target"].to_numpy()]
        assert target.tolist() == [row[back] for row in lists.to_pylist()]
