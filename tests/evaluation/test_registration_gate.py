"""Claims about the gate: who becomes champion, and that the sentence says why."""

from __future__ import annotations

import math

import numpy as np
import pytest

from components.evaluation.registration.gate import MIN_USERS, cutoff, judge, per_user, unopposed

METRICS = ("ndcg_at_10", "ndcg_at_20", "hr_at_10", "hr_at_20")


def ranks(share_found: float, users: int = 400, seed: int = 0) -> np.ndarray:
    """Ranks 1 … 12 for a share of the users, 0 for the others."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(users) < share_found, rng.integers(1, 13, users), 0)


@pytest.mark.parametrize("metric", METRICS)
def test_per_user_metrics_are_those_of_the_definition(metric: str) -> None:
    k = 20 if metric.endswith("20") else 10
    rank_U = np.array([0, 1, 2, 9, 10, 11, 20, 21, 100])
    expected = []
    for rank in rank_U.tolist():
        found = 1 <= rank <= k
        gain = 1 / math.log2(1 + rank) if found else 0.0
        expected.append(gain if metric.startswith("ndcg") else float(found))
    assert cutoff(metric) == k
    assert per_user(metric, rank_U) == pytest.approx(expected, abs=1e-15)


def test_the_first_model_becomes_champion_without_a_comparison() -> None:
    verdict = unopposed("hr_at_10", np.array([1, 0, 10, 11]), "the first model of this name")
    assert (verdict.decision, verdict.ours, verdict.users) == ("champion", 0.5, 4)
    assert verdict.to_json()["champion"] is None


@pytest.mark.parametrize("metric", METRICS)
def test_a_clearly_better_model_becomes_champion(metric: str) -> None:
    verdict = judge(metric, ranks(0.6), ranks(0.3, seed=1), "version 3", seed=0)
    assert verdict.decision == "champion"
    assert verdict.reason.startswith(f"beats version 3 on {metric}: ")
    assert verdict.low is not None
    assert verdict.low > 0


def test_a_clearly_worse_model_stays_challenger_and_is_called_worse() -> None:
    verdict = judge("ndcg_at_10", ranks(0.3), ranks(0.6, seed=1), "version 3", seed=0)
    assert verdict.decision == "challenger"
    assert verdict.reason.startswith("is worse than version 3 on ndcg_at_10: ")
    assert verdict.high is not None
    assert verdict.high < 0
    assert "includes 0" not in verdict.reason


def test_an_equal_model_stays_challenger_though_nothing_is_worse() -> None:
    verdict = judge("ndcg_at_10", ranks(0.4), ranks(0.4), "version 3", seed=0)
    assert verdict.decision == "challenger"
    assert (verdict.difference, verdict.low, verdict.high) == (0, 0, 0)
    assert verdict.reason.startswith("does not beat version 3")
    assert "[+0.0000, +0.0000], which includes 0" in verdict.reason


def test_a_better_mean_that_luck_explains_stays_challenger() -> None:
    ours, theirs = np.repeat([1, 0], [25, 35]), np.tile([0, 1, 0, 0, 1], 12)
    verdict = judge("hr_at_10", ours, theirs, "version 3", seed=0)
    assert verdict.difference is not None
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.low < 0 < verdict.difference < verdict.high
    assert verdict.decision == "challenger"
    assert verdict.reason.startswith("does not beat version 3")
    assert "which includes 0" in verdict.reason


@pytest.mark.parametrize("users", [1, 2, MIN_USERS - 1])
def test_few_users_make_no_champion_whatever_they_found(users: int) -> None:
    ours, theirs = np.ones(users, int), np.zeros(users, int)
    verdict = judge("ndcg_at_10", ours, theirs, "version 3", seed=0)
    assert verdict.decision == "challenger"
    assert verdict.reason == (
        f"cannot be compared with version 3 over {users} users, a champion needs 30 or more; "
        "ndcg_at_10 is 1.0000 against 0.0000"
    )
    assert (verdict.ours, verdict.champion, verdict.users) == (1, 0, users)
    assert (verdict.difference, verdict.low, verdict.high) == (None, None, None)


def test_thirty_users_can_make_a_champion_and_one_alone_the_first() -> None:
    ours, theirs = np.ones(MIN_USERS, int), np.zeros(MIN_USERS, int)
    assert judge("ndcg_at_10", ours, theirs, "version 3", seed=0).decision == "champion"
    assert unopposed("ndcg_at_10", ours[:1], "the first model of this name").decision == "champion"


def test_the_sentence_holds_the_figures_of_the_verdict() -> None:
    ours, theirs = ranks(0.6), ranks(0.3, seed=1)
    verdict = judge("hr_at_10", ours, theirs, "version 3", seed=0)
    ours_mean = np.mean([1 <= rank <= 10 for rank in ours])
    theirs_mean = np.mean([1 <= rank <= 10 for rank in theirs])
    assert verdict.ours == pytest.approx(ours_mean)
    assert verdict.champion == pytest.approx(theirs_mean)
    assert verdict.difference == pytest.approx(ours_mean - theirs_mean)
    assert f"{ours_mean:.4f} against {theirs_mean:.4f}" in verdict.reason
    assert f"[{verdict.low:+.4f}, {verdict.high:+.4f}]" in verdict.reason
    assert verdict.reason.endswith("over 400 users")


def test_the_same_users_in_pairs_decide_what_their_means_cannot() -> None:
    theirs = np.repeat([1, 0], 50)
    ours = np.repeat([1, 0], [58, 42])
    verdict = judge("hr_at_10", ours, theirs, "version 3", seed=0)
    # Eight users gain and none loses; unpaired, the standard error alone is 0.07.
    assert verdict.difference == pytest.approx(0.08)
    assert verdict.decision == "champion"


def test_the_verdict_is_a_function_of_ranks_and_seed() -> None:
    ours, theirs = ranks(0.5), ranks(0.48, seed=1)
    assert judge("hr_at_10", ours, theirs, "x", 7) == judge("hr_at_10", ours, theirs, "x", 7)
    assert judge("hr_at_10", ours, theirs, "x", 7) != judge("hr_at_10", ours, theirs, "x", 8)
