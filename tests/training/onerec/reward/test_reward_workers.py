"""Claims about who generates, who judges and who learns: on what, by which targets and rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from onerec_world import ITEMS
from pydantic import ValidationError
from reward_world import ALIGN, MODEL, RewardWorld, make_recommender

from components.pipeline.errors import StageError
from components.training.onerec.data import POSITIVE_BIT
from components.training.onerec.decode import DeviceTrie
from components.training.onerec.experts import MixtureOfExperts
from components.training.onerec.features import Features
from components.training.onerec.model import OneRec
from components.training.onerec.recommender import Recommender
from components.training.onerec.reward.align import Parts, Progress, align, in_process
from components.training.onerec.reward.align_stage import AlignRecommenderParams
from components.training.onerec.reward.features import requests_at
from components.training.onerec.reward.rewards import (
    flagged_items,
    format_advantage,
    preference_reward,
)
from components.training.onerec.reward.rollout import Group
from components.training.onerec.reward.workers import (
    CHOICE,
    RewardWorker,
    RolloutWorker,
    Trainer,
    rsft_targets,
    stream,
)
from components.training.onerec.train import TrainingData
from components.training.onerec.trie import build_trie


def test_the_trainer_is_the_policy_that_generates_whatever_targets_it_was_trained_on(
    data: TrainingData, parts: Callable[..., Parts]
) -> None:
    trie = build_trie(data.codes_NQ, data.popularity_N)
    everything = make_recommender(data, trie, "all")
    given = parts(ALIGN.model_copy(update={"sampler": "constrained"}))
    rollout = RolloutWorker(**{**given.rollout, "recommender": everything})
    sft_S = rsft_targets(data.train, data.train.train_targets("all"), ALIGN.rsft_drop, 0)
    trainer = Trainer(**{**given.trainer, "recommender": everything, "sft_S": sft_S})
    made = rollout.rollout(0)
    metrics = trainer.step(made, RewardWorker(**given.reward).score(made))
    # With every ratio 1 the objective is the mean of advantages, which is zero in every group.
    assert metrics["preference_gain"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["early_clipped"] == 0
    # It practises and is fine-tuned on what it learned from: exposures that nobody liked, too.
    positive_E = data.train.feedback_E >> POSITIVE_BIT == 1
    assert not positive_E[trainer._sft_S].all()
    of_positives = Trainer(**given.trainer)
    assert positive_E[of_positives._sft_S].all()
    counted = (t._model.memory.practised_total_FN.sum() for t in (trainer, of_positives))
    assert next(counted) > 1.1 * next(counted)


@pytest.mark.parametrize("drop", [0.5, 0.75])
def test_rsft_drops_the_share_of_all_exposures_that_was_played_least(
    data: TrainingData, drop: float
) -> None:
    train = data.train
    target_S = train.train_targets("positive")
    play_E, play_S = train.play_s_E, train.play_s_E[target_S]
    known_S = np.isfinite(play_S)
    assert 0 < known_S.sum() < len(known_S)
    # By seconds, not by the share of the video; by all exposures, which are played less than these.
    least = np.quantile(play_E[np.isfinite(play_E)], drop)
    assert least < np.quantile(play_S[known_S], drop)
    kept = rsft_targets(train, target_S, drop, seed=0)
    assert np.array_equal(kept, target_S[play_S >= least])
    assert 0 < len(kept) < known_S.sum()


def test_rsft_keeps_all_targets_where_nothing_is_to_be_dropped_or_known(
    data: TrainingData,
) -> None:
    train = data.train
    target_S = train.train_targets("positive")
    assert rsft_targets(train, target_S, 0.0, 0) is target_S
    for unknown in (slice(None), target_S):
        play_E = train.play_s_E.copy()
        play_E[unknown] = np.nan
        assert rsft_targets(replace(train, play_s_E=play_E), target_S, 0.5, 0) is target_S
    # Liked at once, and then left.
    play_E = np.full_like(train.play_s_E, 60.0)
    play_E[target_S] = 1.0
    with pytest.raises(StageError, match=f"each of {len(target_S)} training targets") as empty:
        rsft_targets(replace(train, play_s_E=play_E), target_S, 0.5, 0)
    assert "align_recommender.rsft_drop" in str(empty.value.remedy)


def test_that_nothing_is_left_to_fine_tune_on_is_told_before_any_worker_is_made(
    data: TrainingData, recommender: Recommender, parts: Callable[..., Parts]
) -> None:
    given = parts()
    play_E = np.full_like(data.train.play_s_E, 60.0)
    play_E[data.train.train_targets("positive")] = 1.0
    left_at_once = replace(data, train=replace(data.train, play_s_E=play_E))
    reward = {name: given.reward[name] for name in ("user_UF", "flagged_N")}
    with pytest.raises(StageError, match="nothing is left to fine-tune on"):
        Parts.of(
            recommender,
            left_at_once,
            given.reward["pscore"],
            ALIGN,
            0,
            user_R=given.rollout["user_R"],
            **reward,
        )


def test_of_equal_play_times_a_lot_decides_and_not_the_order_of_users(data: TrainingData) -> None:
    train = data.train
    alike = replace(train, play_s_E=np.full_like(train.play_s_E, 7.0))
    target_S = train.train_targets("all")
    kept, other = (rsft_targets(alike, target_S, 0.5, seed) for seed in (0, 1))
    # Half of the exposures; users' first ones are no targets.
    assert len(kept) == pytest.approx(len(target_S) / 2, abs=30)
    assert not np.array_equal(kept, other)
    share_O = [np.isin(octile, kept).mean() for octile in np.array_split(target_S, 8)]
    # About 400 draws an octile: five standard deviations.
    assert np.abs(np.array(share_O) - 0.5).max() < 0.13


def test_the_supervised_loss_has_the_rsft_targets_and_says_how_many(
    data: TrainingData, parts: Callable[..., Parts]
) -> None:
    target_S = data.train.train_targets("positive")
    kept = rsft_targets(data.train, target_S, ALIGN.rsft_drop, seed=0)
    trainer = Trainer(**parts().trainer)
    batches = [next(trainer._supervised) for _ in range(2 * len(kept) // ALIGN.sft_batch)]
    assert set(np.concatenate(batches)) == set(kept)
    said = trainer.fine_tuned_on()
    assert f"{len(kept)} of {len(target_S)} training targets" in said
    dropped = f"{1 - len(kept) / len(target_S):.1%} dropped"
    assert f"({dropped}): those among the 50% of exposures" in said
    all_of_them = Trainer(**parts(ALIGN.model_copy(update={"rsft_drop": 0.0})).trainer)
    assert f"all {len(target_S)} training targets" in all_of_them.fine_tuned_on()


def test_the_format_objective_is_the_mean_over_all_samples_of_a_group(
    parts: Callable[..., Parts],
) -> None:
    crew = in_process(parts())
    made = crew.rollout[0].rollout(0)
    lot = stream(0, 0, CHOICE)
    free = made.free
    chosen_BG = format_advantage(free.legal_BG, free.log_old_BG, ALIGN.format_k, "random", lot)
    assert 0 < chosen_BG.sum() < chosen_BG.numel()
    metrics = crew.trainer.step(made, crew.reward.score(made))
    # Every ratio is 1 at the first step.
    assert metrics["format_gain"] == pytest.approx(float(chosen_BG.mean()), rel=1e-4)


def test_experts_stay_balanced_while_the_policy_is_aligned(
    data: TrainingData, parts: Callable[..., Parts]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"experts": 4, "active_experts": 2, "memory": {"successors": 0}}
        model = OneRec(type(MODEL)(**{**MODEL.model_dump(), **size}))
    trie = DeviceTrie.on(build_trie(data.codes_NQ, data.popularity_N))
    sparse = Recommender(model.eval(), trie, data.codes_NQ, Features.none(ITEMS))
    given = parts()
    rollout = RolloutWorker(**{**given.rollout, "recommender": sparse})
    trainer = Trainer(**{**given.trainer, "recommender": sparse})
    made = rollout.rollout(0)
    trainer.step(made, RewardWorker(**given.reward).score(made))
    biases = [m.bias_E for m in trainer._model.modules() if isinstance(m, MixtureOfExperts)]
    assert biases
    assert all((bias.abs() > 0).any() for bias in biases)


def test_flagged_items_are_judged_as_worth_less(parts: Callable[..., Parts]) -> None:
    given = parts(ALIGN.model_copy(update={"viral_share": 0.01, "viral_alpha": 0.25}))
    crew = in_process(given)
    made = crew.rollout[0].rollout(0)
    flagged_BG = made.preferred.item_BG < 10
    assert 0 < flagged_BG.float().mean() < 1
    reward = given.reward
    pscore = reward["pscore"]
    requests = requests_at(
        reward["requests"], made.event_B, reward["user_UF"], reward["codes_NQ"], pscore.size.history
    )
    plain_BG = preference_reward(pscore, requests, made.preferred.item_BG)
    expected_BG = torch.where(flagged_BG, 0.25 * plain_BG, plain_BG)
    torch.testing.assert_close(crew.reward.score(made), expected_BG)
    # The curve says how much of the lists they take.
    found = align(crew, given.reward["config"], Progress()).curve
    assert 0 < found[-1]["flagged_share"] < 1
    nobody = {**reward, "flagged_N": torch.zeros(ITEMS, dtype=torch.bool)}
    quiet = in_process(Parts(given.rollout, nobody, given.trainer))
    assert "flagged_share" not in align(quiet, ALIGN, Progress()).curve[-1]


def test_viral_tags_need_a_share_to_exceed_and_unknown_ones_are_named(world: RewardWorld) -> None:
    with pytest.raises(ValidationError, match="viral_share 1 can never be exceeded"):
        AlignRecommenderParams(viral_tags=["g0"])
    flagged_N, unknown = flagged_items(np.arange(ITEMS), world.items, ["g0", "g3", "farm"])
    assert unknown == ["farm"]
    assert flagged_N.nonzero()[:, 0].tolist() == [*range(10), *range(30, 40)]
    assert not flagged_items(np.arange(ITEMS), world.items, [])[0].any()


def test_requests_are_drawn_of_the_given_users_alone(parts: Callable[..., Parts]) -> None:
    user_R = np.array([3, 50, 51, 120])
    given = parts().rollout
    worker = RolloutWorker(**{**given, "user_R": user_R})
    start_U1 = given["requests"].start_U1
    drawn = np.concatenate([worker.rollout(step).event_B for step in range(3)])
    assert set(np.searchsorted(start_U1, drawn, side="right") - 1) == set(user_R.tolist())


@pytest.mark.parametrize(("last", "expected"), [(1.0, [1, 1, 1]), (0.1, [1, 0.55, 0.1])])
def test_the_learning_rate_stays_or_falls_evenly(
    parts: Callable[..., Parts], last: float, expected: list[float]
) -> None:
    config = ALIGN.model_copy(update={"steps": 3, "last_rate": last})
    crew = in_process(parts(config))
    rates = []

    def look(trainer: Trainer) -> None:
        rates.append([part["lr"] for part in trainer._optimiser.param_groups])

    for step in range(3):
        made = crew.rollout[0].rollout(step)
        crew.trainer.step(made, crew.reward.score(made))
        look(crew.trainer)
    assert rates == [pytest.approx([3e-3 * share] * 2) for share in expected]


def test_groups_without_an_advantage_and_repeated_items_are_counted_by_group(
    parts: Callable[..., Parts],
) -> None:
    crew = in_process(parts())
    made = crew.rollout[0].rollout(0)
    B, G = made.preferred.item_BG.shape
    # The same items for everybody: each group has one item twice, and an illegal place.
    item_BG = torch.arange(G).expand(B, -1).clone()
    item_BG[:, 1], item_BG[:, 2] = item_BG[:, 0], -1
    preferred = Group(made.preferred.sid_BGQ, item_BG, made.preferred.log_old_BG)
    reward_BG = torch.arange(float(G)).expand(B, -1).clone()
    reward_BG[: B // 4], reward_BG[:, 2] = 0.5, torch.nan
    metrics = crew.trainer.step(replace(made, preferred=preferred), reward_BG)
    assert metrics["distinct_items"] == pytest.approx((G - 2) / G)
    assert metrics["equal_groups"] == pytest.approx(0.25)
