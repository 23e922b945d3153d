"""Policy objectives over whole items: GRPO, ECPO (arXiv 2506.13695, 2.4.1), GBPO (2508.20900).

The ratio is that of the item's joint probability over all its codes. Everything is a function of
log-probabilities and advantages; who sampled the items and what they are worth is said elsewhere.
Of GBPO's report only the objective is here: it is an arm with the same advantages as the others,
not that report's ±1 and 0 from the play times of real exposures.

Shapes: B users, G items generated for each.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

#: Rewards closer than this are equal: what float32 leaves of a standard deviation of zero.
EQUAL = 1e-6

Objective = Literal["ecpo", "grpo", "gbpo"]


def advantages(reward_BG: Tensor) -> Tensor:
    """``(r − mean) / std`` within each group: float32 [B, G].

    NaN rewards (illegal items) count in neither mean nor std and have advantage 0, as has a group
    whose rewards are all equal.
    """
    scored_BG = reward_BG.isfinite()
    count_B1 = scored_BG.sum(1, keepdim=True).clamp_min(1)
    known_BG = reward_BG.masked_fill(~scored_BG, 0).double()
    mean_B1 = known_BG.sum(1, keepdim=True) / count_B1
    off_BG = (known_BG - mean_B1).masked_fill(~scored_BG, 0)
    std_B1 = (off_BG.square().sum(1, keepdim=True) / count_B1).sqrt()
    size_B1 = known_BG.abs().amax(1, keepdim=True)
    differ_B1 = std_B1 > EQUAL * size_B1
    return torch.where(differ_B1, off_BG / std_B1.where(differ_B1, 1.0), 0.0).float()


def ratios(
    log_p_BG: Tensor,
    log_old_BG: Tensor,
    advantage_BG: Tensor,
    objective: Objective,
    epsilon: float,
    delta: float,
) -> Tensor:
    """ρ = π_θ / π'_old with the denominator of each objective, which carries no gradient.

    * GRPO: ``π'_old = π_old``.
    * ECPO: ``π'_old = max(sg[π_θ] / (1 + ε + δ), π_old)``.
    * GBPO: ``max(π_old, sg[π_θ])`` for A ≥ 0, ``max(π_old, 1 − sg[π_θ])`` for A < 0.
    """
    stopped_BG = log_p_BG.detach()
    if objective == "grpo":
        below_BG = log_old_BG
    elif objective == "ecpo":
        below_BG = torch.maximum(stopped_BG - math.log(1 + epsilon + delta), log_old_BG)
    else:
        # log(1 − π), finite also where π rounds to one.
        tiny = torch.finfo(stopped_BG.dtype).tiny
        rest_BG = (-torch.expm1(stopped_BG)).clamp_min(tiny).log()
        bound_BG = torch.where(advantage_BG >= 0, stopped_BG, rest_BG)
        below_BG = torch.maximum(log_old_BG, bound_BG)
    return (log_p_BG - below_BG).exp()


def policy_objective(
    log_p_BG: Tensor,
    log_old_BG: Tensor,
    advantage_BG: Tensor,
    objective: Objective,
    *,
    epsilon: float,
    delta: float,
) -> Tensor:
    """J to be maximised, a scalar: mean over users of the mean over their group.

    ``min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)`` for GRPO and ECPO, ``ρ A`` for GBPO, which has no clip.

    Args:
        log_p_BG: log π_θ of the items, with gradient.
        log_old_BG: log π_old, as it was when they were generated.
        advantage_BG: 0 leaves an item out.
    """
    # What is left out may have a log-probability of minus infinity; 0 · ∞ would not be a number.
    log_old_BG = torch.where(advantage_BG == 0, log_p_BG.detach(), log_old_BG)
    rho_BG = ratios(log_p_BG, log_old_BG, advantage_BG, objective, epsilon, delta)
    gain_BG = rho_BG * advantage_BG
    if objective != "gbpo":
        clipped_BG = rho_BG.clamp(1 - epsilon, 1 + epsilon) * advantage_BG
        gain_BG = torch.minimum(gain_BG, clipped_BG)
    return gain_BG.mean()


def early_clipped(
    log_p_BG: Tensor, log_old_BG: Tensor, advantage_BG: Tensor, epsilon: float, delta: float
) -> float:
    """Share of items with A < 0 and ``π_θ / π_old > 1 + ε + δ``: where GRPO's gradient has no
    bound."""
    beyond_BG = log_p_BG.detach() - log_old_BG > math.log(1 + epsilon + delta)
    return float((beyond_BG & (advantage_BG < 0)).float().mean())
