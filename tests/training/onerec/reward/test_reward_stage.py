"""Claims about `train_reward_model`: who is learned from, what cannot be learned, what resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from onerec_world import ITEMS
from reward_world import (
    ALIGN,
    CONFIG,
    RewardWorld,
    give_all,
)
from stage_harness import Bench

from components.data.contracts import FEEDBACK
from components.pipeline.cpu_threads import cpu_threads
from components.training.onerec.recommender import Recommender
from components.training.onerec.reward import pscore_train
from components.training.onerec.reward.align_stage import AlignRecommenderParams, align_recommender
from components.training.onerec.reward.auc import auc_difference, auc_interval
from components.training.onerec.reward.exposures import (
    Cut,
    Exposures,
    cut_by_time,
    divide,
    usable,
)
from components.training.onerec.reward.features import Labels, known_signals, split_users
from components.training.onerec.reward.pscore_weights import search_weights
from components.training.onerec.reward.stage import TrainRewardModelParams, train_reward_model
from components.training.onerec.reward.workers import RolloutWorker

QUICK = TrainRewardModelParams(
    **{**CONFIG.model_dump(), "epochs": 1, "candidates": 2, "held_out_share": 0.3}
)
DAY_MS = 86_400_000


def bench_of(world: RewardWorld, recommender: Recommender, folder: Path) -> Bench:
    bench = Bench(folder)
    give_all(bench, world, recommender, signals=True)
    return bench


def by_day(exposures: Exposures, days: int) -> Exposures:
    """The same exposures, of whose times only the day is known."""
    time_E = exposures.sequences.time_ms_E
    full_E = exposures.labels.known_EO.all(1)
    edges = np.quantile(time_E[full_E], np.arange(1, days) / days)
    day_E = DAY_MS * np.searchsorted(edges, time_E, side="right").astype(np.int64)
    return replace(exposures, sequences=replace(exposures.sequences, time_ms_E=day_E))


def test_held_out_users_train_nothing_and_choose_nothing(
    world: RewardWorld, recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(world, recommender, tmp_path)
    learned_from: list[np.ndarray] = []
    train = pscore_train.train_pscore

    def training(exposures: Exposures, own: Cut, *more: Any, **named: Any) -> Any:
        learned_from.append(exposures.users(own.train_S))
        return train(exposures, own, *more, **named)

    monkeypatch.setattr(pscore_train, "train_pscore", training)
    bench.run(train_reward_model, QUICK)
    facts = bench.artifacts["reward_model"].read_json()
    user_ids = world.train["user_id"].to_numpy()
    groups = split_users(user_ids, 0.3, 0)
    held_U = groups["held_out"]
    assert 0.2 < held_U.mean() < 0.4
    exposures = world.exposures()
    cut = cut_by_time(exposures, QUICK.valid_share, min_labels=5)
    user_S = exposures.users(cut.train_S)
    for name, own_S in zip(("reward", "judge"), learned_from, strict=True):
        assert facts[name]["exposures"] == groups[name][user_S].sum() == len(own_S)
        # Of all its users and of nobody else's.
        assert np.array_equal(np.unique(own_S), np.unique(user_S[groups[name][user_S]]))
    assert facts["train_exposures"] == (~held_U[user_S]).sum()
    assert facts["valid_exposures"] == len(cut.valid_S)
    # The search was made.
    assert len(facts["candidates_mean_auc"]) == 2
    learned = {name: groups[name] for name in ("reward", "judge")}
    material = divide(exposures, learned, QUICK)
    chosen_by = exposures.users(material.cuts["reward"].valid_S)
    assert 0 < len(chosen_by) < len(cut.valid_S)
    assert not held_U[chosen_by].any()
    # Nor are rollouts made for them.
    drawn, threads = [], []

    class Watched(RolloutWorker):
        def rollout(self, step: int) -> Any:
            made = super().rollout(step)
            start_U1 = self._requests.start_U1
            drawn.append(np.searchsorted(start_U1, made.event_B, side="right") - 1)
            threads.append(torch.get_num_threads())
            return made

    monkeypatch.setattr("components.training.onerec.reward.align.RolloutWorker", Watched)
    config = {**ALIGN.model_dump(), "steps": 4, "checkpoint_every": 4, "users": 16}
    params = AlignRecommenderParams(
        **{**config, "viral_share": 0.05},
        rollout_workers=0,
        viral_tags=["g0", "farm"],
        valid_users=10,
    )
    with cpu_threads(3):
        bench.run(align_recommender, params)
        assert torch.get_num_threads() == 3
    # 4 · 16 draws of 160 users
    assert len(np.unique(np.concatenate(drawn))) > 30
    assert not held_U[np.concatenate(drawn)].any()
    assert set(threads) == {1}
    assert bench.last_run is not None
    notes = " ".join(bench.last_run.notes)
    assert "no item has these viral_tags: farm" in notes
    assert "dropped): those among the 50% of exposures that were played longest" in notes


class Killed(Exception):
    pass


def test_a_killed_stage_goes_on_behind_what_it_has_finished(
    world: RewardWorld, recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[int] = []
    fit = pscore_train._fit

    def counted(*args: Any) -> Any:
        fits.append(torch.get_num_threads())
        return fit(*args)

    monkeypatch.setattr(pscore_train, "_fit", counted)
    params = QUICK.model_copy(update={"candidates": 4})
    whole = bench_of(world, recommender, tmp_path / "whole")
    with cpu_threads(3):
        whole.run(train_reward_model, params, seed=2)
        assert torch.get_num_threads() == 3
    weights = whole.artifacts["reward_model"].read_json()["weights"]
    assert len(set(weights.values())) > 1, "the search must find other weights than equal ones"
    assert fits == [1] * 3, "fits, each with the threads of the parameters"
    # Killed after the search, after the reward and after the judge: one fit more each time.
    bench = bench_of(world, recommender, tmp_path / "killed")
    keep = "components.pipeline.checkpoints.LocalCheckpoints.keep"

    def die(*_: Any) -> None:
        raise Killed

    for done in (1, 1, 1):
        fits.clear()
        with monkeypatch.context() as patched:
            patched.setattr(keep, die)
            with pytest.raises(Killed):
                bench.run(train_reward_model, params, seed=2)
        assert len(fits) == done
    fits.clear()
    bench.run(train_reward_model, params, seed=2)
    assert not fits
    assert bench.digests("reward_model") == whole.digests("reward_model")


@pytest.mark.parametrize("days", [5, 3, 1])
def test_coarse_times_are_cut_too(world: RewardWorld, days: int) -> None:
    exposures = by_day(world.exposures(), days)
    cut = cut_by_time(exposures, 0.15)
    time_E, full_E = exposures.sequences.time_ms_E, exposures.labels.known_EO.all(1)
    assert full_E[cut.valid_S].all()
    assert 0.07 < len(cut.valid_S) / full_E.sum() < 0.31
    assert not np.isin(cut.train_S, cut.valid_S).any()
    newest, oldest = time_E[cut.train_S].max(), time_E[cut.valid_S].min()
    # A fifth is a day of its own; with three days the last one is cut between users.
    assert newest < oldest if days == 5 else newest == oldest
    shared = np.intersect1d(exposures.users(cut.valid_S), exposures.users(cut.train_S[-1:]))
    assert len(shared) <= 1


@pytest.mark.parametrize(("richer", "positive"), [(5, True), (30, True), (300, False)])
def test_rows_that_know_more_move_no_border_if_they_are_few_or_teach_nothing(
    world: RewardWorld, richer: int, positive: bool
) -> None:
    exposures = world.exposures()
    labels = exposures.labels
    known_EO = labels.known_EO & np.isin(labels.names, ["lvtr", "ltr"])
    newest = np.argsort(exposures.sequences.time_ms_E, kind="stable")[-richer:]
    known_EO[newest] = True
    value_EO = labels.value_EO & known_EO
    if not positive:
        value_EO &= np.isin(labels.names, ["lvtr", "ltr"])
    some = replace(exposures, labels=Labels(labels.names, value_EO, known_EO))
    groups = {"all": np.ones(exposures.sequences.num_users, bool)}
    material = divide(some, groups, CONFIG)
    assert len(material.valid_S) == pytest.approx(0.15 * len(known_EO), abs=1)
    assert [labels.names[o] for o in material.objectives] == ["lvtr", "ltr"]


def only(world: RewardWorld, signals: tuple[str, ...]) -> RewardWorld:
    """The world of a source that records these signals alone, and no play time."""
    interactions, train = world.interactions, world.train
    for name in set(FEEDBACK).difference(signals):
        place = interactions.schema.get_field_index(name)
        nothing = pa.nulls(len(interactions), pa.bool_())
        interactions = interactions.set_column(place, name, nothing)
    place = train.schema.get_field_index("watch_time_s")
    field = train.schema.field("watch_time_s")
    empty = pa.array([[np.nan] * len(x) for x in train["watch_time_s"].to_pylist()], field.type)
    return replace(world, interactions=interactions, train=train.set_column(place, field, empty))


def test_too_few_signals_or_users_pass_the_recommender_on(
    world: RewardWorld, recommender: Recommender, tmp_path: Path
) -> None:
    lonely = replace(world, train=world.train.slice(5, 1), interactions=world.interactions)
    cases = {"one signal": only(world, ("like",)), "no signal": only(world, ()), "one user": lonely}
    # So few users that one of the models has none.
    for first in range(4, 9):
        trio = world.train.slice(first, 3)
        groups = split_users(trio["user_id"].to_numpy(), 0.3, 0)
        if not groups["judge"].any():
            cases["no judge"] = replace(world, train=trio)
    assert "no judge" in cases
    for name, case in cases.items():
        bench = bench_of(case, recommender, tmp_path / name)
        params = QUICK.model_copy(update={"min_labels": 2})
        assert bench.run(train_reward_model, params) == {"objectives": 0.0}, name
        assert bench.last_run is not None
        (note,) = bench.last_run.notes
        assert note.endswith("the recommender stays as it is")
        assert bench.artifacts["reward_model"].read_json() == {"objectives": []}
    assert "(ltr with 2 labels" in _note_of(tmp_path / "one", only(world, ("like",)), recommender)


def _note_of(folder: Path, world: RewardWorld, recommender: Recommender) -> str:
    bench = bench_of(world, recommender, folder)
    bench.run(train_reward_model, QUICK.model_copy(update={"min_labels": 2}))
    assert bench.last_run is not None
    return bench.last_run.notes[0]


def test_of_rows_with_equal_keys_a_signal_is_known_if_all_have_it(world: RewardWorld) -> None:
    row = world.interactions.slice(0, 1)
    nothing = pa.nulls(1, pa.bool_())

    def with_only(signals: tuple[str, ...]) -> pa.Table:
        made = row
        for name in FEEDBACK:
            value = pa.array([True]) if name in signals else nothing
            made = made.set_column(made.schema.get_field_index(name), name, value)
        return made

    table = pa.concat_tables([with_only(("click", "like")), with_only(("long_view", "like"))])
    item, time = row["item_id"][0].as_py(), row["timestamp"].cast(pa.int64())[0].as_py()
    train = pa.table(
        {
            "user_id": row["user_id"],
            "item_index": pa.array([[item, item]]),
            "timestamp_ms": pa.array([[time, time + 1]]),
        }
    )
    known_E = known_signals(train, table.to_batches(), np.arange(ITEMS))
    assert known_E.tolist() == [1 << FEEDBACK.index("like"), 0]


def test_a_difference_of_aucs_is_taken_on_the_same_users() -> None:
    rng = np.random.default_rng(0)
    label = rng.random(6000) < 0.3
    user = rng.integers(0, 400, 6000)
    reference = label + rng.normal(size=6000)
    same = auc_difference(reference, reference, label, user, 0)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # A little noise more lowers the AUC beyond doubt, though by less than its own interval.
    worse = auc_difference(reference + 0.2 * rng.normal(size=6000), reference, label, user, 0)
    assert worse.low < worse.value < worse.high < 0
    alone = auc_interval(reference, label, user, 0)
    assert alone.low < alone.value + worse.value


def test_objectives_that_nobody_can_judge_keep_the_mean_weight(world: RewardWorld) -> None:
    exposures = world.exposures()
    cut = cut_by_time(exposures, 0.2)
    value_EO = exposures.labels.value_EO.copy()
    value_EO[cut.valid_S, 3] = False
    labels = Labels(exposures.labels.names, value_EO, exposures.labels.known_EO)
    changed = replace(exposures, labels=labels)
    model = pscore_train._fit(
        changed, labels, cut.train_S, np.ones(8), QUICK, 0, "cpu", lambda share: None
    )
    config = CONFIG.model_copy(update={"candidates": 6})
    for seed in range(20):
        weight_O, tried = search_weights(model, changed, labels, cut, config, seed)
        assert len(tried) == 6
        if np.ptp(weight_O):
            break
    assert np.ptp(weight_O) > 0
    assert weight_O[3] == 1.0
    assert np.delete(weight_O, 3).mean() == pytest.approx(1.0)
    nobody = replace(cut, valid_S=cut.valid_S[:0])
    weight_O, tried = search_weights(model, changed, labels, nobody, config, 0)
    assert weight_O.tolist() == [1.0] * 8
    assert tried == []
    assert usable(labels, cut.valid_S, config.min_labels) == [0, 1, 2, 4, 5, 6, 7]
