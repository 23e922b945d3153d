"""Claims about the preference model: what it reads, what it learns, and how it is measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onerec_world import GROUPS, ITEMS
from reward_world import CONFIG, SIZE, RewardWorld
from sklearn.metrics import roc_auc_score

from components.pipeline.errors import DataContractError
from components.training.onerec.data import FEEDBACK_BITS, POSITIVE_BIT
from components.training.onerec.reward.auc import auc, auc_interval, gauc_interval
from components.training.onerec.reward.exposures import (
    Cut,
    Exposures,
    cut_by_time,
    divide,
    of_objectives,
    usable,
)
from components.training.onerec.reward.features import (
    OBJECTIVES,
    Labels,
    hashed,
    requests_after,
    split_users,
)
from components.training.onerec.reward.pscore import PScore, fused_loss, load_pscore, save_pscore
from components.training.onerec.reward.pscore_measure import measure_pscore, score_exposures
from components.training.onerec.reward.pscore_train import train_pscore
from components.training.onerec.reward.pscore_weights import choose_weights
from components.training.onerec.reward.rewards import preference_reward


@pytest.fixture(scope="module")
def exposures(world: RewardWorld) -> Exposures:
    return world.exposures()


@pytest.fixture(scope="module")
def cut(exposures: Exposures) -> Cut:
    return cut_by_time(exposures, 0.2)


@pytest.fixture(scope="module")
def trained(exposures: Exposures, cut: Cut) -> PScore:
    objectives = usable(exposures.labels, cut.train_S, CONFIG.min_labels)
    return train_pscore(exposures, cut, objectives, CONFIG, 0).model


def test_an_unrecorded_signal_is_unknown_and_no_negative(
    world: RewardWorld, exposures: Exposures
) -> None:
    names, known = exposures.labels.names, exposures.labels.known_EO
    assert names == ("ctr", "lvtr", "ltr", "wtr", "ftr", "cmtr", "ptr", "vtr")
    # In every second half all is known, before it long views and likes alone.
    full = known.all(1)
    assert 0 < full.sum() < len(full)
    assert known[~full][:, [names.index("lvtr"), names.index("ltr")]].all()
    assert not known[~full][:, [names.index("ctr"), names.index("vtr")]].any()
    # The same values as the source says, event by event.
    rows = world.interactions.to_pylist()
    said = {(r["user_id"], r["item_id"], r["timestamp"].timestamp()): r["click"] for r in rows}
    click = names.index("ctr")
    users = np.repeat(world.train["user_id"].to_numpy(), np.diff(exposures.sequences.start_U1))
    for event in range(0, len(users), 7):
        time = float(exposures.sequences.time_ms_E[event]) / 1000
        expected = said[int(users[event]), int(exposures.sequences.item_E[event]), time]
        found = exposures.labels.value_EO[event, click] if known[event, click] else None
        assert found == expected


def test_validation_comes_after_training_and_is_fully_labelled(
    exposures: Exposures, cut: Cut
) -> None:
    time_E = exposures.sequences.time_ms_E
    assert time_E[cut.valid_S].min() > time_E[cut.train_S].max()
    assert exposures.labels.known_EO[cut.valid_S].all()
    # Exposures that nobody liked are learned from too.
    assert (exposures.sequences.feedback_E[cut.train_S] == 0).any()


def test_as_many_exposures_as_asked_for_are_learned_from_whoever_is_held_out(
    exposures: Exposures,
) -> None:
    groups = split_users(exposures.sequences.user_id_U, 0.3, seed=0)
    learned = {name: groups[name] for name in ("reward", "judge")}
    whole, few = (
        divide(exposures, learned, CONFIG.model_copy(update={"max_exposures": most})).cuts
        for most in (100_000, 500)
    )
    before, after = (np.concatenate([of[n].train_S for n in learned]) for of in (whole, few))
    assert len(before) > 500 == len(after)
    # The newest ones.
    time_E = exposures.sequences.time_ms_E
    assert time_E[after].min() >= time_E[np.setdiff1d(before, after)].max()
    for name, own_U in learned.items():
        assert len(few[name].train_S)
        assert own_U[exposures.users(few[name].train_S)].all()


def test_a_source_without_feedback_is_refused(exposures: Exposures) -> None:
    nothing = np.zeros((len(exposures.sequences.item_E), 0), bool)
    silent = Exposures(
        exposures.sequences,
        Labels((), nothing, nothing),
        exposures.user_UF,
        exposures.codes_NQ,
        exposures.items,
    )
    with pytest.raises(DataContractError, match="no feedback"):
        cut_by_time(silent, 0.2)


def test_users_of_the_two_models_and_the_held_out_ones_are_disjoint() -> None:
    groups = split_users(np.arange(5000), 0.2, seed=3)
    assert (sum(g.astype(int) for g in groups.values()) == 1).all()
    shares = [g.mean() for g in groups.values()]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.03)
    other = split_users(np.arange(5000), 0.2, seed=4)
    assert not np.array_equal(groups["reward"], other["reward"])
    assert split_users(np.arange(7), 0.0, 0)["held_out"].sum() == 0


def test_a_score_reads_nothing_of_the_exposure_but_item_and_time(
    trained: PScore, exposures: Exposures, cut: Cut
) -> None:
    event_S = cut.valid_S[:20]
    before = score_exposures(trained, exposures, event_S)[1]
    sequences = exposures.sequences
    user_S = exposures.users(event_S)
    hidden = np.zeros(len(sequences.item_E), bool)
    for event, user in zip(event_S, user_S, strict=True):
        hidden[event : sequences.start_U1[user + 1]] = True
    # Events of a user up to the exposure stay; a user with several of them is looked at once.
    first = np.unique(user_S, return_index=True)[1]
    feedback, watch = sequences.feedback_E.copy(), sequences.watch_E.copy()
    sequences.feedback_E[hidden] ^= 0xFF
    sequences.watch_E[hidden] = 1
    try:
        after = score_exposures(trained, exposures, event_S)[1]
    finally:
        sequences.feedback_E[:], sequences.watch_E[:] = feedback, watch
    assert np.array_equal(before[first], after[first])
    # and what was before it does count, every bit of it
    for bit in range(FEEDBACK_BITS):
        sequences.feedback_E[event_S[first] - 1] ^= 1 << bit
        changed = score_exposures(trained, exposures, event_S)[1]
        sequences.feedback_E[:] = feedback
        assert not np.allclose(before[first], changed[first], rtol=1e-6), bit


def test_it_learns_and_fusion_hears_the_towers(
    trained: PScore, exposures: Exposures, cut: Cut
) -> None:
    found = measure_pscore(trained, exposures, cut.valid_S, CONFIG, 0)
    assert set(found) == set(exposures.labels.names)
    # The best possible is 0.81: one sixth of the items, at 0.9 against 0.1.
    assert np.mean([m.tower_auc.value for m in found.values()]) > 0.7
    assert np.mean([m.p_auc.value for m in found.values()]) > 0.7
    assert all(m.p_auc.low <= m.p_auc.value <= m.p_auc.high for m in found.values())
    event_B = cut.valid_S[:4]
    item_B1 = torch.from_numpy(exposures.sequences.item_E[event_B].astype(np.int64))[:, None]
    _, p = trained(exposures.requests(event_B, SIZE.history), item_B1)
    trained.zero_grad()
    p.sum().backward()
    assert trained.tower_mid.grad is not None
    assert trained.tower_mid.grad.flatten(1).any(1).all(), "a tower the fusion does not read"
    trained.zero_grad()


def test_shuffled_labels_teach_nothing(exposures: Exposures, cut: Cut) -> None:
    labels = exposures.labels
    order = np.random.default_rng(0).permutation(len(cut.train_S))
    value_EO, known_EO = labels.value_EO.copy(), labels.known_EO.copy()
    value_EO[cut.train_S] = value_EO[cut.train_S[order]]
    known_EO[cut.train_S] = known_EO[cut.train_S[order]]
    shuffled = Exposures(
        exposures.sequences,
        Labels(labels.names, value_EO, known_EO),
        exposures.user_UF,
        exposures.codes_NQ,
        exposures.items,
    )
    plain = CONFIG.model_copy(update={"candidates": 1})
    model = train_pscore(shuffled, cut, list(range(8)), plain, 0).model
    found = measure_pscore(model, exposures, cut.valid_S, CONFIG, 0)
    # About 300 exposures: the standard error of an AUC is 0.03.
    assert np.mean([m.p_auc.value for m in found.values()]) == pytest.approx(0.5, abs=0.06)


def test_one_objective_is_plain_binary_cross_entropy(exposures: Exposures, cut: Cut) -> None:
    config = CONFIG.model_copy(update={"tower_weight": 0.0, "epochs": 1, "learning_rate": 1e-2})
    ours = train_pscore(exposures, cut, [1], config, 0).model
    # The same again, written out with torch's own loss.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = PScore(SIZE, ("lvtr",), exposures.items).train()
        label_S = torch.from_numpy(exposures.labels.value_EO[:, 1]).float()
        rate = (label_S[cut.train_S].sum() + 1) / (len(cut.train_S) + 2)
        plain.tower_bias.data[:] = torch.log(rate / (1 - rate))
        optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.01)
        order = cut.train_S[np.random.default_rng(0).permutation(len(cut.train_S))]
        batches = [order[i : i + 128] for i in range(0, len(order), 128)]
        for step, event_B in enumerate(batches):
            optimiser.param_groups[0]["lr"] = 0.5e-2 * (1 + np.cos(np.pi * step / len(batches)))
            item_B1 = torch.from_numpy(exposures.sequences.item_E[event_B].astype(np.int64))[
                :, None
            ]
            _, p = plain(exposures.requests(event_B, SIZE.history), item_B1)
            loss = F.binary_cross_entropy_with_logits(p[:, 0], label_S[event_B])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimiser.step()
    mine, theirs = (score_exposures(m.eval(), exposures, cut.valid_S)[1] for m in (ours, plain))
    # float32, twenty steps
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_the_loss_leaves_out_what_is_unknown() -> None:
    p = torch.tensor([0.3, -1.0, 2.0])
    towers = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    known = torch.tensor([[1, 0], [1, 0], [0, 0]], dtype=torch.bool)
    weight = torch.tensor([2.0, 5.0])
    found = fused_loss(p, towers, label, known, weight, 0.5)
    bce = F.binary_cross_entropy_with_logits
    seen = label[:2, 0].float()
    expected = 2 * bce(p[:2], seen) + 0.5 * bce(towers[:2, 0], seen)
    torch.testing.assert_close(found, expected)


def test_of_weights_that_lower_no_objective_the_best_are_chosen() -> None:
    asked = []

    def falls(w: int) -> bool:
        asked.append(w)
        return w == 2

    assert choose_weights(np.array([0.65, 0.68, 0.72, 0.60]), falls) == 1
    assert asked == [2, 1]
    assert choose_weights(np.array([0.65, 0.61, 0.72]), falls) == 0
    assert choose_weights(np.array([0.65, 0.65]), falls) == 0


def test_auc_and_its_intervals_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    label = rng.random(600) < 0.3
    score = np.round(label * 0.5 + rng.normal(size=600), 1)  # with ties
    user = rng.integers(0, 40, 600)
    assert auc(score, label) == pytest.approx(roc_auc_score(label, score))
    weight = rng.integers(0, 4, 600).astype(float)
    expected = roc_auc_score(label, score, sample_weight=weight)
    assert auc(score, label, weight) == pytest.approx(expected)
    found = auc_interval(score, label, user, 0)
    assert found.low < found.value < found.high
    by_user = [
        (roc_auc_score(label[user == u], score[user == u]), (user == u).sum())
        for u in range(40)
        if 0 < label[user == u].sum() < (user == u).sum()
    ]
    expected = np.average(*np.array(by_user).T[:1], weights=np.array(by_user).T[1])
    assert gauc_interval(score, label, user, 0).value == pytest.approx(expected)
    assert np.isnan(auc(score, np.ones(600, bool)))
    assert np.isnan(gauc_interval(score, np.ones(600, bool), user, 0).value)


def test_any_item_can_be_scored_and_a_saved_model_gives_the_same(
    trained: PScore, exposures: Exposures, cut: Cut, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    requests = exposures.requests(cut.valid_S[:3], SIZE.history)
    item_BG = torch.arange(ITEMS).expand(3, -1).clone()
    item_BG[1, 5] = -1
    found = preference_reward(trained, requests, item_BG)
    assert found.isnan().sum() == 1
    assert found[1, 5].isnan()
    kept = found[~found.isnan()]
    assert ((kept > 0) & (kept < 1)).all()
    # one at a time
    alone = torch.cat(
        [preference_reward(trained, requests, item_BG[:, i : i + 1]) for i in range(9)], 1
    )
    torch.testing.assert_close(alone, found[:, :9], equal_nan=True, rtol=1e-5, atol=1e-6)
    save_pscore(trained, tmp_path, "reward")
    again = preference_reward(load_pscore(tmp_path, "reward"), requests, item_BG)
    assert torch.equal(again.nan_to_num(), found.nan_to_num())
    # A user's own group of items is worth more to it than another's.
    user_B = exposures.users(cut.valid_S[:3])
    own = (
        torch.arange(ITEMS)[None] // (ITEMS // GROUPS) == torch.from_numpy(user_B % GROUPS)[:, None]
    )
    assert found.nanmean() < found[own].nanmean()


def test_requests_come_after_the_whole_history(exposures: Exposures) -> None:
    sequences = exposures.sequences
    requests = requests_after(sequences)
    event_U = requests.example_targets()
    assert len(requests.item_E) == len(sequences.item_E) + sequences.num_users
    kept = np.delete(np.arange(len(requests.item_E)), event_U)
    assert np.array_equal(requests.item_E[kept], sequences.item_E)
    assert np.array_equal(requests.feedback_E[kept], sequences.feedback_E)
    assert (requests.time_ms_E[event_U] > sequences.time_ms_E[sequences.start_U1[1:] - 1]).all()
    assert not requests.feedback_E[event_U].any()
    assert np.array_equal(
        requests.positive_event, np.flatnonzero(requests.feedback_E >> POSITIVE_BIT)
    )
    assert requests.positives_before_E1[-1] == len(requests.positive_event)


def test_objectives_without_labels_of_both_kinds_are_left_out(exposures: Exposures) -> None:
    labels = exposures.labels
    value_EO = labels.value_EO.copy()
    value_EO[:, 3] = False
    rare = Labels(labels.names, value_EO, labels.known_EO)
    event_S = np.arange(len(value_EO))
    assert usable(rare, event_S, 5) == [0, 1, 2, 4, 5, 6, 7]
    assert of_objectives(rare, [0, 7]).names == ("ctr", "vtr")
    assert "dislike" not in OBJECTIVES.values()


def test_hashes_stay_within_their_table_and_spread() -> None:
    bucket = hashed(np.arange(10_000), 64)
    assert bucket.min() == 1
    assert bucket.max() == 63
    # 159 a bucket: five standard deviations
    assert np.abs(np.bincount(bucket)[1:] - 10_000 / 63).max() < 65
