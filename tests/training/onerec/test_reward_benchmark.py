"""The benchmark of the reward system pairs the same users, and its control deals fair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import onerec_reward as benchmark
from components.training.onerec.reward.evaluation import Offered


def offered(shift: float, ndcg: float) -> Offered:
    rng = np.random.default_rng(0)
    scores = {("judge", 8): rng.random(400)}
    return Offered(
        {key: x + shift for key, x in scores.items()},
        {key: x / 2 + shift * rng.random(400) for key, x in scores.items()},
        np.full(400, ndcg),
        rng.random(400),
        7,
    )


def test_a_gain_has_the_interval_of_the_paired_difference() -> None:
    before, after = offered(0.0, 0.1), offered(0.01, 0.1)
    rows = {row.name: row for row in benchmark.gains("ecpo", before, after)}
    best = rows["ecpo_judge_best_of_8"]
    assert best.reference == pytest.approx(before.best["judge", 8].mean())
    # Everybody gained the same: the spread of the users themselves has no part in it.
    assert best.low == pytest.approx(best.ours)
    assert best.high == pytest.approx(best.ours)
    mean = rows["ecpo_judge_mean_of_8"]
    assert mean.reference < mean.low < mean.ours < mean.high < mean.reference + 0.01
    same = rows["ecpo_ndcg_at_10"]
    assert same.low == same.ours == same.reference == pytest.approx(0.1)


def test_the_control_deals_the_same_rewards_to_other_items() -> None:
    reward = torch.rand(6, 16)
    dealt = benchmark._shuffled(lambda rollouts: reward)(None)
    assert not torch.equal(dealt, reward)
    assert torch.equal(dealt.sort(1).values, reward.sort(1).values)
