"""The search: it learns what a bigram cannot, chooses on validation, and repeats itself exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from stage_harness import Bench

from components.evaluation.ranking.baselines import by_popularity, count_bigrams, rank_by_bigrams
from components.pipeline.errors import DataContractError
from components.training.sasrec.config import SasrecConfig, SasrecGrid, SasrecParams
from components.training.sasrec.data import read_sequences
from components.training.sasrec.model import Sasrec
from components.training.sasrec.stage import train_sasrec
from components.training.sasrec.train import (
    make_candidate,
    planned_epochs,
    search,
    validation_ndcg,
)

N = 20
ONE_CELL = SasrecGrid(learning_rate=(3e-3,), dropout=(0.1,), width=(32,), tied=(True,))


def second_order(rng: np.random.Generator, users: int, length: int) -> list[list[int]]:
    """The next item follows from the one *before* the last: the last item says nothing."""
    rows = rng.integers(0, N, (users, 2))
    for _ in range(length - 2):
        following = (rows[:, -2] + 7) % N
        noise = rng.random(users) < 0.05
        following = np.where(noise, rng.integers(0, N, users), following)
        rows = np.concatenate([rows, following[:, None]], axis=1)
    return rows.tolist()


def as_table(rows: list[list[int]], positive: list[list[bool]] | None = None) -> pa.Table:
    flags = positive or [[True] * len(row) for row in rows]
    return pa.table(
        {
            "item_index": pa.array(rows, pa.list_(pa.int32())),
            "positive": pa.array(flags, pa.list_(pa.bool_())),
        }
    )


def make_world(seed: int = 0, users: int = 400, length: int = 12) -> tuple[pa.Table, pa.Table, Any]:
    rows = second_order(np.random.default_rng(seed), users, length)
    train = as_table([row[:-1] for row in rows])
    return train, train, np.array([row[-1] for row in rows])


def run_search(
    world: tuple[pa.Table, pa.Table, Any], params: SasrecParams, seed: int = 0, **kwargs: Any
) -> Any:
    train, valid, target = world
    return search(
        params,
        N,
        read_sequences(train.to_batches(), 100),
        read_sequences(valid.to_batches(), 100),
        target,
        seed,
        kwargs.pop("log", lambda metrics, step: None),
        **kwargs,
    )


def test_sasrec_learns_what_no_bigram_can() -> None:
    world = make_world(users=600)
    params = SasrecParams(grid=ONE_CELL, max_length=8, batch_size=64, max_epochs=20, patience=20)
    best = run_search(world, params).best
    train, valid, target = world
    bigrams = count_bigrams(
        train.to_batches(),
        N,
        by_popularity(np.ones(N)),
        positive_context=False,
        positive_target=False,
    )
    last = np.array([row[-1] for row in valid["item_index"].to_pylist()])
    lists = rank_by_bigrams(bigrams, np.arange(N, dtype=np.int32), last, 10)
    place = (lists == target[:, None]) / np.log2(np.arange(10) + 2)
    assert best.best_score > 0.7 > 0.5 > place.sum(1).mean()


def test_validation_ndcg_equals_brute_force() -> None:
    _, valid, target = make_world(users=30)
    params = SasrecParams(max_length=5)
    model = make_candidate(params, N, 0, 0, 1e-3, 0.5, 16, False).model
    total = 0.0
    for row, wanted in zip(valid["item_index"].to_pylist(), target.tolist(), strict=True):
        newest = torch.tensor([row[-5:]])
        model.eval()
        with torch.no_grad():
            scores = model.last_scores(
                newest, torch.ones_like(newest, dtype=torch.bool), torch.tensor([newest.shape[1]])
            )[0].tolist()
        rank = 1 + sum(score > scores[wanted] for score in scores)
        total += 1 / math.log2(1 + rank) if rank <= 10 else 0
    sequences = read_sequences(valid.to_batches(), 100)
    ours = validation_ndcg(model, sequences, target, batch_size=7)
    assert ours == pytest.approx(total / 30, rel=1e-5)


def test_neither_a_constant_nor_a_diverged_model_scores() -> None:
    _, valid, target = make_world(users=30)
    sequences = read_sequences(valid.to_batches(), 100)
    model = make_candidate(SasrecParams(max_length=5), N, 0, 0, 1e-3, 0.5, 16, True).model
    for value in (0.0, math.nan):
        torch.nn.init.constant_(model.norm.weight, value)
        torch.nn.init.zeros_(model.norm.bias)
        assert validation_ndcg(model, sequences, target) == 0


def test_search_halves_and_keeps_the_best_weights() -> None:
    grid = SasrecGrid(learning_rate=(1e-5, 3e-3), dropout=(0.1, 0.9), width=(16,), tied=(True,))
    params = SasrecParams(
        grid=grid, max_length=4, batch_size=16, rung_epochs=2, max_epochs=8, patience=8
    )
    world = make_world(users=400)
    found = run_search(world, params)
    assert sorted(c.epoch for c in found.candidates) == [2, 2, 4, 8]
    assert found.best.learning_rate == 3e-3
    assert found.best.model.config.dropout == 0.1
    assert found.best.best_score == max(score for _, _, score in found.best.curve)
    assert not found.cut_short
    model = Sasrec(found.best.model.config)
    model.load_state_dict(found.best.best_state)
    again = validation_ndcg(model, read_sequences(world[1].to_batches(), 100), world[2])
    assert again == found.best.best_score


def test_search_stops_when_validation_no_longer_rises() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, N, (60, 6)).tolist()  # nothing to learn: validation is noise
    world = (as_table(rows), as_table(rows), rng.integers(0, N, 60))
    found = run_search(world, SasrecParams(grid=ONE_CELL, max_epochs=200, patience=3))
    assert found.best.epoch < 60
    assert found.best.epoch == found.best.best_epoch + 3


def test_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    params = SasrecParams(grid=ONE_CELL, max_length=8, max_epochs=2, rung_epochs=1)
    world = make_world(users=100)
    states = [run_search(world, params, seed).best.best_state for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["item.weight"], states[2]["item.weight"])


def test_clock_cuts_the_search_short_and_says_so() -> None:
    seconds = iter(range(10**6))
    params = SasrecParams(max_length=8, max_epochs=50, max_minutes=1, patience=50)
    found = run_search(make_world(users=100), params, clock=lambda: float(next(seconds)))
    assert found.cut_short
    assert found.best.epoch < 50
    assert found.best.best_state


def test_only_positive_events_are_learned_as_targets() -> None:
    """Item 0 is never positive: a model that learns positives alone never recommends it."""
    rng = np.random.default_rng(0)
    rows = [
        [int(i) for i in row]
        for row in rng.integers(0, 2, (200, 10)) * rng.integers(1, N, (200, 10))
    ]
    flags = [[item != 0 for item in row] for row in rows]
    world = (as_table(rows, flags), as_table(rows, flags), np.zeros(200, np.int64))
    scores = {}
    for targets in ("positive", "all"):
        params = SasrecParams(
            grid=ONE_CELL, targets=targets, max_length=8, batch_size=32, max_epochs=4, patience=9
        )
        scores[targets] = run_search(world, params).best.curve[-1][2]
    assert scores["positive"] == 0
    assert scores["all"] > 0.9


class PulledPlug(Exception):
    """Ends a search at once, as a kill would."""


@pytest.mark.parametrize("epochs", [1, 5, 9, 13])
def test_a_killed_search_goes_on_and_ends_with_the_same_bits(tmp_path: Path, epochs: int) -> None:
    grid = SasrecGrid(learning_rate=(3e-3,), dropout=(0.1, 0.5), width=(8, 16), tied=(True,))
    params = SasrecParams(
        grid=grid, max_length=8, batch_size=32, rung_epochs=2, max_epochs=8, patience=8
    )
    world = make_world(users=120)
    whole = run_search(world, params)
    seen: list[int] = []

    def pull(metrics: dict[str, float], step: int) -> None:
        seen.append(step)
        if len(seen) == epochs:
            raise PulledPlug

    with pytest.raises(PulledPlug):
        run_search(world, params, log=pull, checkpoints=tmp_path)
    resumed = run_search(
        world, params, log=lambda metrics, step: seen.append(step), checkpoints=tmp_path
    )
    assert seen == list(range(1, sum(c.epoch for c in whole.candidates) + 1))
    assert [c.curve for c in resumed.candidates] == [c.curve for c in whole.candidates]
    assert resumed.best.number == whole.best.number
    for name, value in whole.best.best_state.items():
        assert torch.equal(resumed.best.best_state[name], value)


def test_time_spent_before_a_kill_counts(tmp_path: Path) -> None:
    params = SasrecParams(grid=ONE_CELL, max_length=8, max_epochs=50, max_minutes=1, patience=50)

    def pull(metrics: dict[str, float], step: int) -> None:
        raise PulledPlug

    def ticking(seconds: float) -> Callable[[], float]:
        ticks = itertools.count(0.0, seconds)
        return lambda: next(ticks)

    world = make_world(users=100)
    with pytest.raises(PulledPlug):
        run_search(world, params, clock=ticking(5), log=pull, checkpoints=tmp_path)
    resumed = run_search(world, params, clock=ticking(1), checkpoints=tmp_path)
    fresh = run_search(world, params, clock=ticking(1))
    assert resumed.cut_short
    assert 1 < resumed.best.epoch < fresh.best.epoch


@pytest.mark.slow
def test_candidates_that_train_at_once_end_with_the_same_bits(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    give_artifacts(bench)
    grid = SasrecGrid(learning_rate=(3e-3,), dropout=(0.1, 0.5), width=(8, 16), tied=(True,))
    sizes = {"grid": grid, "max_length": 8, "batch_size": 32, "rung_epochs": 2, "max_epochs": 6}
    found = []
    for workers in (1, 2):
        bench.run(train_sasrec, SasrecParams(**sizes, workers=workers))
        artifact = bench.artifacts["sasrec"]
        found.append((artifact.load_state_dict(), artifact.read_json()))
    (alone, record), (together, record_too) = found
    assert record == record_too
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_workers_share_the_time_for_the_rungs() -> None:
    """Deadlines of jobs: as many candidates as there are workers have the same."""
    asked: list[list[float]] = []

    def note(jobs: Any) -> Any:
        asked.append([job()[2] for job in jobs.values()])
        yield from ()

    grid = SasrecGrid(learning_rate=(1e-3, 3e-3), dropout=(0.1, 0.5), width=(16,), tied=(True,))
    params = SasrecParams(grid=grid, max_length=8, rung_epochs=4, max_minutes=1, workers=2)
    found = run_search(make_world(users=100), params, clock=lambda: 0.0, run=note)
    # Four candidates for 4 epochs, two at once; then two for 4 more, at once; then the one.
    assert asked == [pytest.approx([14, 14, 28, 28]), pytest.approx([42, 42]), [60]]
    assert found.cut_short


def give_artifacts(bench: Bench, positive: bool = True) -> None:
    train, _, target = make_world(users=120)
    if not positive:
        rows = train["item_index"].to_pylist()
        train = as_table(rows, [[False] * len(row) for row in rows])
    bench.give(
        "catalogue", lambda o: o.write_table(pa.table({"item_index": np.arange(N, dtype=np.int32)}))
    )
    bench.give("train_sequences", lambda o: o.write_table(train))
    valid = train.append_column("target", pa.array(target, pa.int32()))
    bench.give("valid_examples", lambda o: o.write_table(valid))


def test_stage_writes_a_model_that_scores_what_it_says(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    give_artifacts(bench)
    grid = SasrecGrid(learning_rate=(3e-3,), dropout=(0.1, 0.5), width=(16,), tied=(True, False))
    params = SasrecParams(
        grid=grid, max_length=8, rung_epochs=1, max_epochs=4, workers=1, valid_users=50
    )
    metrics = bench.run(train_sasrec, params)
    artifact = bench.artifacts["sasrec"]
    record = artifact.read_json()
    assert len(record["candidates"]) == 4
    chosen = record["candidates"][record["chosen"]]
    assert chosen["valid_ndcg_at_10"] == metrics["valid_ndcg_at_10"]
    assert metrics["valid_ndcg_at_10"] == max(c["valid_ndcg_at_10"] for c in record["candidates"])
    model = Sasrec(SasrecConfig(**artifact.read_json("config.json")))
    model.load_state_dict(artifact.load_state_dict())
    examples = bench.artifacts["valid_examples"].read_table()
    kept = examples.take(np.arange(50) * len(examples) // 50)
    score = validation_ndcg(
        model,
        read_sequences(kept.select(["item_index", "positive"]).to_batches(), 8),
        kept["target"].to_numpy(),
    )
    assert score == metrics["valid_ndcg_at_10"]


def test_train_events_without_a_positive_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    give_artifacts(bench, positive=False)
    with pytest.raises(DataContractError, match="no train event is positive"):
        bench.run(train_sasrec, SasrecParams())


def test_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValidationError, match="heads"):
        SasrecParams(grid=SasrecGrid(width=(63,)), heads=2)


@pytest.mark.parametrize("candidates", [1, 2, 3, 8, 11])
def test_every_rung_halves_the_candidates_and_doubles_their_epochs(candidates: int) -> None:
    alive, trained = candidates, 0
    for rung in planned_epochs(candidates, rung_epochs=3):
        assert len(rung) == alive
        assert set(rung) == {max(3, trained)}
        trained += rung[0]
        alive = math.ceil(alive / 2)
    assert alive == 1


def test_short_time_thins_out_all_candidates_alike() -> None:
    """A clock that ticks with every look at it: no candidate of the first rung is left out."""
    ticks = iter(range(10**6))
    grid = SasrecGrid(learning_rate=(1e-3, 3e-3), dropout=(0.1, 0.5), width=(16,), tied=(True,))
    params = SasrecParams(grid=grid, max_length=8, rung_epochs=4, max_minutes=3, patience=50)
    found = run_search(make_world(users=100), params, clock=lambda: float(next(ticks)))
    assert found.cut_short
    epochs = sorted(c.epoch for c in found.candidates)
    assert epochs[0] >= 1
