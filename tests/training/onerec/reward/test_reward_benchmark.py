"""The benchmark of the reward system: who is reported of, what arms change and are trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from onerec_world import ITEMS, examples
from reward_world import make_reward_world, rows_of, sequence_rows
from safetensors.numpy import save_file

from benchmarks import onerec_reward as benchmark
from benchmarks.kept import kept
from benchmarks.reward_data import (
    HELD_OUT,
    MODELS,
    Files,
    Place,
    Size,
    groups_of,
    train_preferences,
)
from benchmarks.reward_world import CURVE, KEPT_STEP, Arm, World, by_figure, shuffled
from components.training.onerec.reward import (
    align,
    choice,
    evaluation,
    pscore_measure,
    pscore_train,
)
from components.training.onerec.reward.align import Progress
from components.training.onerec.reward.config import AlignConfig
from components.training.onerec.reward.exposures import Cut
from components.training.onerec.reward.features import requests_after, requests_at, user_features
from components.training.onerec.reward.rewards import preference_reward
from components.training.onerec.reward.stage import REWARD
from components.training.onerec.reward.workers import with_weights

SIZE = Size(
    sft_steps=4,
    valid_users=20,
    test_users=12,
    widths=(4, 8),
    samples=8,
    pscore=(("epochs", 1), ("candidates", 1), ("min_labels", 5), ("held_out_share", 0.4)),
)
TINY = {
    "users": 8,
    "group": 8,
    "format_group": 8,
    "format_k": 4,
    "sft_batch": 16,
    "checkpoint_every": 3,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Artifacts as the flow leaves them, of a small world."""
    world, folder = make_reward_world(users=80), tmp_path_factory.mktemp("reward_benchmark")
    counts = dict.fromkeys(("train_count", "train_positive_count"), world.popularity_N)
    tables = {
        "catalogue": pa.table({"item_id": np.arange(ITEMS), **counts}),
        "items": world.items,
        "users": world.users,
        "interactions": world.interactions,
        "train_sequences": world.train,
        "valid_examples": world.valid,
        "test_examples": examples(sequence_rows(rows_of(60, seed=2))),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / name)
    embedding = {"embedding": world.embedding_NC.numpy()}
    for name in ("item_embedding", "aligned_embedding"):
        save_file(embedding, folder / name)
    save_file({"codes": world.codes_NQ}, folder / "semantic_ids")
    return Place(folder / "kept", Files(*(folder / name for name in Files._fields)), SIZE)


@pytest.fixture(scope="module")
def world(place: Place) -> World:
    return World.load(place, 0)


def held(ids: np.ndarray) -> np.ndarray:
    return groups_of(ids, SIZE)[HELD_OUT]


def test_users_who_are_reported_of_chose_and_taught_nothing(world: World) -> None:
    assert held(world.test.user_id_U).all()
    assert not held(world.data.valid.user_id_U).any()
    # Rollouts are made for all users with a model, and for them alone.
    train_ids = world.data.train.user_id_U
    assert world.user_R.tolist() == [u for u, h in enumerate(held(train_ids)) if not h]
    assert 0 < len(world.user_R) < len(train_ids)
    # They are users of the same files, and there are some of either kind.
    assert len(world.test_U) == SIZE.test_users
    assert len(world.choose_U) == SIZE.valid_users


def test_preference_models_see_their_own_users_and_are_measured_on_others(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, Cut]] = []
    measured: list[np.ndarray] = []
    train, measure = pscore_train.train_pscore, pscore_measure.measure_pscore

    def training(exposures: Any, cut: Cut, *more: Any, **named: Any) -> Any:
        # Each chooses its own w^xtr.
        assert named.get("weight_O") is None
        given.append((exposures, cut))
        return train(exposures, cut, *more, **named)

    def measuring(model: Any, exposures: Any, valid_S: np.ndarray, *more: Any) -> Any:
        measured.append(exposures.users(valid_S))
        return measure(model, exposures, valid_S, *more)

    monkeypatch.setattr(pscore_train, "train_pscore", training)
    monkeypatch.setattr(pscore_measure, "measure_pscore", measuring)
    elsewhere = replace(place, folder=tmp_path)
    train_preferences(elsewhere, 1)
    assert len(given) == len(measured) == len(MODELS)
    for name, (exposures, cut), users in zip(MODELS, given, measured, strict=True):
        ids = exposures.sequences.user_id_U
        own_U = groups_of(ids, SIZE)[name]
        for event_S in (cut.train_S, cut.valid_S):
            assert len(event_S)
            assert own_U[exposures.users(event_S)].all()
        assert len(users)
        assert held(ids[users]).all()
    # A second call reads what the first one left.
    rows = {
        row.name: row for row in benchmark.preference_figures([
            benchmark.preferences_of(elsewhere, 1)
        ])
    }  # fmt: skip
    assert len(given) == len(MODELS)
    assert {"reward_p_auc_ctr", "judge_tower_gauc_ctr"} <= set(rows)
    assert rows["judge_p_auc_ctr"].low <= rows["judge_p_auc_ctr"].ours


def test_an_arm_changes_the_stages_defaults_by_what_it_says() -> None:
    assert AlignConfig(**benchmark.ARMS[benchmark.OURS].settings) == AlignConfig()
    for name, arm in {**benchmark.ARMS, **benchmark.STABILITY}.items():
        if arm.settings is None:
            continue
        config = AlignConfig(**arm.settings)
        stale = name.endswith(("_stale", "_wild"))
        assert (config.max_staleness > config.steps) == stale
        # Rollouts are older than the trainer in every arm, or no ratio would differ from one.
        assert config.max_staleness > 0
        assert config.ahead == AlignConfig().ahead
    rsft = AlignConfig(**benchmark.ARMS[benchmark.RSFT].settings)
    assert rsft.preference_weight == rsft.format_weight == 0
    named = {name for pair in benchmark.PAIRS for name in pair}
    arms = benchmark.ARMS
    chosen = {f"{name}_chosen" for name, arm in arms.items() if arm.chooses}
    selected = {f"{name}_selected" for name, arm in arms.items() if arm.selects}
    assert named <= set(arms) | chosen | selected
    assert {("sft_selected", "sft"), ("ecpo_selected", "ecpo")} <= set(benchmark.PAIRS)
    # Arms of one seed are those that the benchmark says are, each but one compared with ECPO.
    alone = {name for name, arm in arms.items() if not arm.all_seeds}
    compared = {"ecpo_group_16", "ecpo_group_64", "ecpo_sampled", "ecpo_stale"}
    assert alone == compared | {"format_none_sampled", "grpo_stale", "gbpo_stale"}
    assert {other for policy, other in benchmark.PAIRS if policy == "ecpo"} > compared | {"gbpo"}
    assert all(arm.all_seeds for arm in benchmark.STABILITY.values())


def test_a_small_run_keeps_of_an_arm_all_but_its_size(world: World) -> None:
    for name, arm in {**benchmark.ARMS, **benchmark.STABILITY}.items():
        small = benchmark.smaller(arm)
        if arm.settings is None:
            assert small == arm
            continue
        assert replace(small, settings=arm.settings) == arm
        assert small.settings is not None
        different = {key for key, x in arm.settings.items() if small.settings[key] != x}
        assert different <= set(benchmark.TINY), name
        checkpoint_every = AlignConfig(**small.settings).checkpoint_every
        assert checkpoint_every == arm.settings.get("checkpoint_every", 1)
    # Rollouts are as old as they can be within two steps, and nothing else is measured.
    wild = world.measured("ecpo_wild", benchmark.smaller(benchmark.STABILITY["ecpo_wild"]))
    assert list(wild) == [CURVE]
    assert wild[CURVE]["staleness"].tolist() == [0, 1]


def test_the_early_clip_acts_and_tells_the_arms_apart(world: World) -> None:
    wild = {**TINY, "steps": 6, "learning_rate": 2e-2, "preference_weight": 5.0, "clip": None}
    found = {
        objective: world.measured(f"{objective}_apart", Arm({**wild, "objective": objective}))
        for objective in ("ecpo", "grpo")
    }
    ecpo, grpo = (found[name][CURVE] for name in ("ecpo", "grpo"))
    assert ecpo["staleness"].max() == AlignConfig().max_staleness
    assert ecpo["early_clipped"].max() > 0
    stale = world.measured(
        "stale", Arm({**TINY, **benchmark.ARMS["ecpo_stale"].settings, "steps": 5})
    )
    assert stale[CURVE]["staleness"].tolist() == [0, 1, 2, 3, 4]
    assert (ecpo["gradient_norm"] != grpo["gradient_norm"]).any()
    rows = {
        r.name: r for r in benchmark.curve_figures("ecpo", {k: [x] for k, x in ecpo.items()}, 6)
    }
    assert rows["ecpo_early_clipped"].ours == pytest.approx(ecpo["early_clipped"].mean())
    assert rows["ecpo_max_staleness"].ours == 2
    assert "ecpo_steps" not in rows


def test_weights_are_chosen_on_the_one_kind_of_users_and_measured_on_the_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, offer = [], evaluation.offer

    def offering(policy: Any, pscores: Any, sequences: Any, event_U: Any, *more: Any, **named: Any):
        asked.append((sequences is world.test, np.array_equal(event_U, world.test_U)))
        return offer(policy, pscores, sequences, event_U, *more, **named)

    monkeypatch.setattr(evaluation, "offer", offering)
    arm = Arm({**TINY, "steps": 2, "checkpoint_every": 1}, chooses=True)
    found = world.measured("ecpo_choosing", arm)
    # Before, two checkpoints; then both policies.
    assert asked == [(False, False)] * 3 + [(True, True)] * 2
    assert set(found) == {"ecpo_choosing", "ecpo_choosing_chosen", CURVE}
    assert found["ecpo_choosing_chosen"][KEPT_STEP] in (0, 1, 2)
    # A second call trains and measures nothing.
    again = world.measured("ecpo_choosing", arm)
    assert len(asked) == 5
    for part, of in found.items():
        assert all(np.array_equal(x, again[part][key]) for key, x in of.items())


def test_an_arm_that_breaks_keeps_what_it_had(world: World) -> None:
    broken = Arm({**TINY, "steps": 5, "learning_rate": 1e9, "objective": "grpo", "clip": None})
    found = world.measured("grpo_wild", broken)
    done = len(found[CURVE]["step"])
    assert 0 < done < 5
    assert np.isfinite(found[CURVE]["gradient_norm"]).all()
    curve = {key: [x] for key, x in found[CURVE].items()}
    rows = {row.name: row for row in benchmark.curve_figures("grpo_wild", curve, 5)}
    assert rows["grpo_wild_steps"].ours == done
    assert rows["grpo_wild_steps"].reference == 5


def test_an_arm_that_breaks_in_its_first_step_says_so(world: World) -> None:
    # Finite logits, whose gradient is not.
    weights = world.recommender.model.state_dict()
    scale = "decoder_norm.weight"
    huge = with_weights(world.recommender, {**weights, scale: 1e25 * weights[scale]})
    arm = Arm({**TINY, "steps": 3, "clip": None})
    found = replace(world, recommender=huge).measured("grpo_huge", arm)
    assert list(found[CURVE]) == ["step"]
    assert len(found[CURVE]["step"]) == 0
    # Beside a seed that went on.
    other = {"step": np.arange(3.0), "early_clipped": np.full(3, 0.5), "staleness": np.ones(3)}
    seeds = ([found[CURVE]], [found[CURVE], {**other, "gradient_norm": np.arange(3.0)}])
    for curves in seeds:
        merged: dict[str, list[np.ndarray]] = {}
        for curve in curves:
            for key, values in curve.items():
                merged.setdefault(key, []).append(values)
        rows = {row.name: row for row in benchmark.curve_figures("grpo_wild", merged, 3)}
        steps = rows["grpo_wild_steps"]
        assert (steps.low, steps.reference, steps.n) == (0, 3, len(curves))
        stable = benchmark.stability_figures({"grpo_wild": merged})
        assert len(stable) == (0 if len(curves) == 1 else 2)
        assert ("grpo_wild_early_clipped" in rows) == bool(stable)


def test_selected_lists_are_the_policys_items_in_the_order_of_the_reward(world: World) -> None:
    lists = world.lists(world.recommender)
    selected = lists.selected(REWARD)
    score_UK, item_UK = lists.score_UK, lists.item_UK
    assert np.array_equal(np.sort(selected.item_UK, 1), np.sort(item_UK, 1))
    assert not np.array_equal(selected.item_UK, item_UK)
    for user in range(len(item_UK)):
        order = sorted(range(item_UK.shape[1]), key=lambda k: -score_UK[REWARD][user, k])
        assert selected.item_UK[user].tolist() == item_UK[user, order].tolist()
        assert selected.score_UK["judge"][user].tolist() == score_UK["judge"][user, order].tolist()
    # The model that trains orders; what is said of the order is the target's place and the judge.
    four = selected.offered((4,))
    assert (four.best[REWARD, 4] == score_UK[REWARD].max(1)).all()
    assert four.mean["judge", 4] == pytest.approx(selected.score_UK["judge"][:, :4].mean(1))
    place = [np.flatnonzero(i[:10] == t) for i, t in zip(selected.item_UK, lists.target_U)]
    gain_U = [1 / np.log2(2 + p[0]) if len(p) else 0.0 for p in place]
    assert four.ndcg_U == pytest.approx(gain_U)
    found = world.measured("sft", benchmark.ARMS["sft"])
    assert set(found) == {"sft", "sft_selected"}
    shorter = by_figure(four)
    assert set(found["sft_selected"]) == set(shorter) - {"legality"}
    assert all(np.array_equal(x, shorter[key]) for key, x in found["sft_selected"].items())


@pytest.mark.slow
def test_seeds_and_arms_are_shared_out_to_processes(world: World) -> None:
    arms = {"sft": Arm(None, all_seeds=True), "first": Arm({**TINY, "steps": 1})}
    figures, curves = benchmark.measure(world.place, arms, (0, 1))
    assert [len(of["ndcg_at_10"]) for of in figures.values()] == [2, 1]
    assert list(curves) == ["first"]
    # In the order of the seeds, and what this process would have found.
    for seed, legality_U in enumerate(figures["sft"]["legality"]):
        here = World.load(world.place, seed).measured("sft", arms["sft"])
        assert np.array_equal(here["sft"]["legality"], legality_U)


def test_what_was_cut_short_is_made_again(tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "model", cut)
    assert not (tmp_path / "model").exists()
    kept(tmp_path / "model", lambda folder: (folder / "whole").touch())
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["whole"]


def test_the_reward_is_of_the_model_that_does_not_judge(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    crews, in_process = [], align.in_process

    def made(parts: Any) -> Any:
        crews.append(in_process(parts))
        return crews[-1]

    monkeypatch.setattr(align, "in_process", made)
    world.aligned(Arm({**TINY, "steps": 1}))
    (crew,) = crews
    reward = world.pscores[REWARD]
    assert crew.reward._pscore is reward
    rollouts = crew.rollout[0].rollout(0)
    requests, user_ids = requests_after(world.data.train), world.data.train.user_id_U
    user_B = np.searchsorted(requests.start_U1, rollouts.event_B, side="right") - 1
    table = pq.read_table(world.place.files.users)
    user_BF = user_features(user_ids[user_B], table, reward.size.user_buckets)
    # Of each request by itself: its user's features, and nobody else's.
    plain = requests_at(
        requests, rollouts.event_B, world.train_UF, world.data.codes_NQ, reward.size.history
    )
    by_hand = replace(plain, user_BF=torch.from_numpy(user_BF))
    expected_BG = preference_reward(reward, by_hand, rollouts.preferred.item_BG)
    scores_BG = crew.reward.score(rollouts)
    torch.testing.assert_close(scores_BG, expected_BG)
    judged_BG = preference_reward(world.pscores["judge"], by_hand, rollouts.preferred.item_BG)
    assert not torch.allclose(scores_BG, judged_BG)
    # Users differ in what is known of them, or their order would not matter.
    assert len(np.unique(user_BF, axis=0)) > 1


def test_the_control_learns_from_other_rewards_than_the_arm(world: World) -> None:
    settings = {**TINY, "steps": 2}
    weights = [world.aligned(Arm(settings, shuffled=s))[1] for s in (False, True, True)]
    differ = [name for name, x in weights[0].items() if not torch.equal(x, weights[1][name])]
    assert differ
    assert all(torch.equal(x, weights[2][name]) for name, x in weights[1].items())


@pytest.mark.parametrize("kept_step", [0, 1])
def test_chosen_weights_are_those_that_were_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, kept_step: int
) -> None:
    # The stage's rule is tested with the stage; here only the first step, or none, is better.
    def first_alone(now: Progress, *_: Any) -> None:
        if now.step == kept_step:
            now.best_step = now.step
            now.best_weights = now.trainer.weights
            kept_weights.append(now.best_weights)

    kept_weights: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(choice, "keep_if_better", first_alone)
    measured, offer = [], evaluation.offer

    def offering(policy: Any, pscores: Any, sequences: Any, *more: Any, **named: Any) -> Any:
        if sequences is world.test:
            measured.append(policy.model.state_dict())
        return offer(policy, pscores, sequences, *more, **named)

    monkeypatch.setattr(evaluation, "offer", offering)
    arm = Arm({**TINY, "steps": 2, "checkpoint_every": 1}, chooses=True)
    found = world.measured(f"ecpo_keeping_{kept_step}", arm)
    last, chosen = measured
    expected = kept_weights[0] if kept_step else world.recommender.model.state_dict()
    assert all(torch.equal(x, chosen[name]) for name, x in expected.items())
    assert any(not torch.equal(x, chosen[name]) for name, x in last.items())
    assert found[f"ecpo_keeping_{kept_step}_chosen"][KEPT_STEP] == kept_step


def test_the_control_deals_the_same_rewards_to_other_items() -> None:
    reward = torch.rand(6, 16)
    dealt = shuffled(lambda rollouts: reward, 0)(None)
    assert not torch.equal(dealt, reward)
    assert torch.equal(dealt.sort(1).values, reward.sort(1).values)
