"""Claims about the policy objectives: coefficients by autograd, invariances, what has no part."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from components.training.onerec.reward.policy import advantages, early_clipped, policy_objective
from components.training.onerec.reward.rewards import IndustrialReward, format_advantage

EPSILON, DELTA = 0.2, 0.1
EDGE = 1 + EPSILON + DELTA


def coefficient(
    ratio: float, advantage: float, objective: str, old: float = 0.01, **given
) -> float:
    """∂J / ∂ log π of a group of one item, by autograd."""
    log_p = torch.tensor([[math.log(old * ratio)]], dtype=torch.float64, requires_grad=True)
    log_old = torch.tensor([[math.log(old)]], dtype=torch.float64)
    kept = {"epsilon": EPSILON, "delta": DELTA, **given}
    weight = torch.tensor([[advantage]], dtype=torch.float64)
    policy_objective(log_p, log_old, weight, objective, **kept).backward()  # type: ignore[arg-type]
    assert log_p.grad is not None
    return float(log_p.grad)


def ecpo_by_hand(r: float, a: float) -> float:
    if a > 0:
        return r * a if r <= 1 + EPSILON else 0.0
    if r < 1 - EPSILON:
        return 0.0
    return min(r, EDGE) * a


RATIOS = (0.1, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.29, 1.31, 2.0, 10.0, 50.0)


@pytest.mark.parametrize("a", [-2.0, -0.3, 0.3, 2.0])
@pytest.mark.parametrize("r", RATIOS)
def test_ecpo_has_the_derived_coefficient(r: float, a: float) -> None:
    assert coefficient(r, a, "ecpo") == pytest.approx(ecpo_by_hand(r, a), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("a", [-1.5, 1.5])
@pytest.mark.parametrize("r", RATIOS)
def test_ecpo_without_a_bound_is_grpo(r: float, a: float) -> None:
    ours = coefficient(r, a, "ecpo", delta=1e9)
    assert ours == pytest.approx(coefficient(r, a, "grpo"), rel=1e-9, abs=1e-12)
    # and GRPO's own: unbounded where an item with A < 0 became more probable
    clipped = (a > 0 and r > 1 + EPSILON) or (a < 0 and r < 1 - EPSILON)
    assert coefficient(r, a, "grpo") == pytest.approx(0.0 if clipped else r * a, rel=1e-9)


@pytest.mark.parametrize("old", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("r", [0.1, 1.0, 1.1])
def test_gbpo_has_the_gradient_of_binary_cross_entropy_at_most(r: float, old: float) -> None:
    p = r * old
    up, down = coefficient(r, 1.0, "gbpo", old), coefficient(r, -1.0, "gbpo", old)
    assert up == pytest.approx(p / max(old, p), rel=1e-6)
    assert down == pytest.approx(-p / max(old, 1 - p), rel=1e-6)
    # the coefficients of log π and of log(1 − π) are 1 and −π / (1 − π)
    assert abs(up) <= 1 + 1e-9
    assert abs(down) <= p / (1 - p) + 1e-9


def gradient(reward_BG: Tensor, objective: str) -> Tensor:
    random = torch.Generator().manual_seed(1)
    log_p = (-3 + torch.randn(reward_BG.shape, generator=random)).requires_grad_()
    log_old = (log_p.detach() + 0.3 * torch.randn(reward_BG.shape, generator=random)).float()
    policy_objective(
        log_p,
        log_old,
        advantages(reward_BG),
        objective,  # type: ignore[arg-type]
        epsilon=EPSILON,
        delta=DELTA,
    ).backward()
    assert log_p.grad is not None
    return log_p.grad


@pytest.mark.parametrize("objective", ["ecpo", "grpo", "gbpo"])
def test_equal_rewards_have_no_gradient(objective: str) -> None:
    assert not gradient(torch.full((2, 6), 0.1), objective).any()
    assert gradient(torch.rand(2, 6), objective).any()


@pytest.mark.parametrize("objective", ["ecpo", "grpo", "gbpo"])
def test_rewards_count_up_to_shift_and_scale(objective: str) -> None:
    reward = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    own = gradient(reward, objective)
    # float32 rewards: their own rounding
    torch.testing.assert_close(gradient(4 * reward + 3, objective), own, rtol=1e-4, atol=1e-6)


def test_illegal_items_have_no_advantage_and_move_nobody_elses() -> None:
    reward = torch.tensor([[0.2, 0.8, 0.5]])
    with_illegal = torch.tensor([[0.2, torch.nan, 0.8, 0.5]])
    found = advantages(with_illegal)
    assert found[0, 1] == 0
    torch.testing.assert_close(found[:, [0, 2, 3]], advantages(reward))
    assert not advantages(torch.full((1, 3), torch.nan)).any()


def test_a_missing_beam_leaves_no_trace() -> None:
    log_p = torch.tensor([[-2.0, -3.0]], requires_grad=True)
    log_old = torch.tensor([[-2.0, -torch.inf]])
    given = {"epsilon": EPSILON, "delta": DELTA}
    weight = torch.tensor([[1.0, 0.0]])
    policy_objective(log_p, log_old, weight, "grpo", **given).backward()
    assert log_p.grad is not None
    assert log_p.grad.tolist() == [[0.5, 0.0]]


def test_what_grpo_leaves_unbounded_is_counted() -> None:
    log_old = torch.zeros(1, 4)
    log_p = torch.log(torch.tensor([[EDGE * 1.01, EDGE * 1.01, EDGE * 0.99, 0.5]]))
    weight = torch.tensor([[-1.0, 1.0, -1.0, -1.0]])
    assert early_clipped(log_p, log_old, weight, EPSILON, DELTA) == 0.25


def test_random_k_is_drawn_at_random_and_top_k_is_not() -> None:
    legal = torch.rand(400, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    log_old = torch.arange(16.0).flip(0).expand(400, -1)

    def chosen(choice: str) -> Tensor:
        lot = torch.Generator().manual_seed(3)
        return format_advantage(legal, log_old, 4, choice, lot)  # type: ignore[arg-type]

    top, drawn = chosen("top"), chosen("random")
    assert not top[:, 4:].any()
    assert not (drawn.bool() & ~legal).any()
    assert not (top.bool() & ~legal).any()
    # 400 · 4 draws, half of them legal: every place about 50 times
    assert drawn.sum(0).min() > 25
    assert drawn.sum(0).max() < 80


@pytest.mark.parametrize("objective", ["ecpo", "grpo", "gbpo"])
def test_illegal_samples_have_exactly_no_gradient(objective: str) -> None:
    legal = torch.tensor([[True, False, True, False]])
    lot = torch.Generator().manual_seed(0)
    weight = format_advantage(legal, torch.zeros(1, 4), 4, "random", lot)
    log_p = torch.full((1, 4), -2.0, requires_grad=True)
    log_old = torch.full((1, 4), -2.0)
    policy_objective(
        log_p,
        log_old,
        weight,
        objective,  # type: ignore[arg-type]
        epsilon=EPSILON,
        delta=DELTA,
    ).backward()
    assert log_p.grad is not None
    assert log_p.grad[~legal].tolist() == [0.0, 0.0]
    assert (log_p.grad[legal] > 0).all()


def test_flagged_items_are_worth_less_only_while_they_are_too_many() -> None:
    flagged = torch.tensor([True, False])
    rule = IndustrialReward(flagged, share=0.5, alpha=0.25, memory=0.5)
    reward = torch.ones(1, 4)
    few, many = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 0]])
    assert rule(reward, few).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert rule.exposed == 0.25
    assert rule(reward, many).tolist() == [[0.25] * 4]
    assert rule.exposed == 0.625
    # 0.625 → 0.4375: below the target again
    assert rule(reward, few).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    # an illegal item is no exposure
    rule(reward, torch.tensor([[-1, -1, 1, 1]]))
    assert rule.exposed == 0.21875
