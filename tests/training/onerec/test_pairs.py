"""Item pairs of the training split against loops, and what is never looked at."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from math import sqrt

import numpy as np
import pyarrow as pa
import pytest

from components.training.onerec.config import PairsConfig
from components.training.onerec.tokenizer import pairs

ITEMS = 25


def sequences(seed: int = 0, users: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, ITEMS, rng.integers(0, 14)).tolist() for _ in range(users)]


def events(rows: list[list[int]]) -> pairs.PositiveEvents:
    user = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return pairs.PositiveEvents(user, np.array([i for row in rows for i in row], np.int64))


def swing_by_loops(rows: list[list[int]]) -> dict[tuple[int, int], float]:
    """The formula, user pair by user pair."""
    of_user = [set(row) for row in rows]
    users = defaultdict(set)
    for user, items in enumerate(of_user):
        for item in items:
            users[item].add(user)
    scores: dict[tuple[int, int], float] = defaultdict(float)
    for i, j in combinations(range(ITEMS), 2):
        both = users[i] & users[j]
        for u in both:
            for v in both - {u}:
                overlap = len(of_user[u] & of_user[v])
                scores[i, j] += 1 / sqrt(len(of_user[u])) / sqrt(len(of_user[v])) / (1 + overlap)
    return {pair: score for pair, score in scores.items() if score}


@pytest.mark.parametrize("triples", [7, 10**6])
def test_swing_equals_the_formula_by_loops(triples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "TRIPLES", triples)
    rows = sequences()
    scores = pairs.swing(events(rows), ITEMS, PairsConfig(), seed=0)
    expected = swing_by_loops(rows)
    left, right = np.divmod(scores.key_P, ITEMS)
    ours = dict(zip(zip(left.tolist(), right.tolist(), strict=True), scores.score_P, strict=True))
    assert len(ours) == len(expected) > 100
    assert ours == pytest.approx(expected, rel=1e-9)


def test_partners_are_the_highest_scores_both_ways() -> None:
    rows = sequences()
    scores = pairs.swing(events(rows), ITEMS, PairsConfig(), seed=0)
    left, _, score = scores.nearest(3)
    expected = swing_by_loops(rows)
    for item in range(ITEMS):
        best = sorted((s for pair, s in expected.items() if item in pair), reverse=True)[:3]
        assert score[left == item] == pytest.approx(best, rel=1e-9)


def test_a_target_is_paired_with_the_most_similar_of_the_latest_clicks() -> None:
    rows = sequences()
    scores = pairs.swing(events(rows), ITEMS, PairsConfig(), seed=0)
    known = swing_by_loops(rows)
    expected: dict[tuple[int, int], int] = defaultdict(int)
    for row in rows:
        for place, target in enumerate(row):
            clicks = [c for c in row[max(0, place - 4) : place][::-1] if c != target]
            if clicks:
                # max() keeps the first of equals, and the latest click comes first.
                best = max(clicks, key=lambda c: known.get((min(c, target), max(c, target)), 0.0))
                expected[target, best] += 1
    target, click, count = pairs.user_item_pairs(events(rows), scores, latest=4)
    ours = dict(zip(zip(target.tolist(), click.tolist(), strict=True), count, strict=True))
    assert ours == expected


def test_caps_bound_what_is_counted_by_a_sample_of_the_seed() -> None:
    rows = sequences(users=200)
    config = PairsConfig(items_per_user=3, users_per_item=5)
    user, _ = pairs._counted(events(rows), config, seed=0)
    assert np.bincount(user).max() == 3
    one, again, other = (pairs.swing(events(rows), ITEMS, config, seed) for seed in (0, 0, 1))
    assert one.key_P.tolist() == again.key_P.tolist()
    assert one.score_P.tolist() == again.score_P.tolist()
    assert one.key_P.tolist() != other.key_P.tolist()
    # Five users of an item make ten pairs of users at most.
    everybody = pairs.swing(
        events([[0, 1]] * 50), ITEMS, PairsConfig(users_per_item=5), seed=0
    ).score_P
    assert everybody.sum() <= 10 * 2 / 2 / 3 + 1e-12


def test_only_positive_events_are_paired_unless_there_are_none() -> None:
    rows = [[1, 2, 3], [2, 3]]
    batch = {
        "item_index": pa.array(rows, pa.list_(pa.int32())),
        "positive": pa.array([[True, False, True], [True, True]], pa.list_(pa.bool_())),
    }
    found = pairs.positive_events(pa.table(batch).to_batches(max_chunksize=1))
    assert (found.user_E.tolist(), found.item_E.tolist()) == ([0, 0, 1, 1], [1, 3, 2, 3])
    assert not found.all_count
    batch["positive"] = pa.array([[False] * 3, [False] * 2], pa.list_(pa.bool_()))
    found = pairs.positive_events(pa.table(batch).to_batches())
    assert found.item_E.tolist() == [1, 2, 3, 2, 3]
    assert found.all_count


def test_there_is_one_pair_for_each_user_and_target_and_one_for_each_swing_partner() -> None:
    rows = sequences()
    table = pairs.item_pairs(events(rows), ITEMS, PairsConfig(), seed=0)
    times = pairs.occurrences(table)
    of_users = np.array(table["kind"].to_pylist()) == "user_item"
    with_a_click = sum(
        any(click != target for click in row[max(0, place - 10) : place])
        for row in rows
        for place, target in enumerate(row)
    )
    assert times[of_users].sum() == with_a_click > of_users.sum()
    assert (times[~of_users] == 1).all()


@pytest.mark.parametrize("rows", [[], [[]], [[3]], [[3, 3, 3]]])
def test_too_few_events_give_no_pair(rows: list[list[int]]) -> None:
    assert pairs.item_pairs(events(rows), ITEMS, PairsConfig(), seed=0).num_rows == 0
