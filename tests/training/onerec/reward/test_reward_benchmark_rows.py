"""The rows of the reward benchmark: what is compared with what, over which seeds and users."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from benchmarks import onerec_reward as benchmark
from benchmarks.reward_data import MODELS
from benchmarks.reward_world import KEPT_STEP, by_figure
from components.training.onerec.reward.evaluation import Lists, Offered
from components.training.onerec.reward.stage import REWARD


def test_stability_is_of_the_largest_and_the_median_step_of_every_seed() -> None:
    norms = {
        "grpo_wild": [[1.0, 9.0, 2.0], [3.0, 4.0, 20.0]],
        "ecpo_wild": [[1.0, 3.0], [5.0, 5.0]],
    }
    curves = {n: {"gradient_norm": [np.array(x) for x in of]} for n, of in norms.items()}
    rows = {row.name: row for row in benchmark.stability_figures(curves)}
    assert not any(row.higher_is_better for row in rows.values())
    found = {name: (r.low, r.ours, r.high, r.reference, r.n) for name, r in rows.items()}
    assert found == {
        "grpo_wild_gradient_norm_max": (9, 14.5, 20, None, 2),
        "grpo_wild_gradient_norm_median": (2, 3, 4, None, 2),
        "ecpo_wild_gradient_norm_max": (3, 4, 5, 14.5, 2),
        "ecpo_wild_gradient_norm_median": (2, 3.5, 5, None, 2),
    }


def test_places_without_an_item_are_selected_last() -> None:
    score_UK = np.array([[0.2, np.nan, 0.9, 0.2]], np.float32)
    made = Lists(np.array([[5, -1, 7, 8]]), np.array([8]), {REWARD: score_UK}, np.ones(1))
    selected = made.selected(REWARD)
    # Of equal scores the policy's order stands.
    assert selected.item_UK.tolist() == [[7, 5, 8, -1]]
    assert selected.offered((4,)).ndcg_U == pytest.approx([0.5])
    assert selected.offered((4,)).distinct == 3


def policy(shift: float, seed: int) -> dict[str, np.ndarray]:
    """Figures of 400 users whose spread is much larger than what a policy adds."""
    base_U = np.random.default_rng(9).random(400)
    more_U = shift + 0.01 * np.random.default_rng([1, seed]).random(400)
    flat = {"judge_best_of_8": base_U + more_U, "ndcg_at_10": np.full(400, 0.1 + shift)}
    return {**flat, "legality": base_U, "distinct_at_10": np.array([7.0 + seed])}


def test_figures_are_means_of_seeds_beside_the_same_seeds_of_the_reference() -> None:
    shifts = {"sft": 0.0, "ecpo": 0.03, "rsft_only": 0.01, "shuffled_reward": 0.0, "grpo": 0.02}
    figures: dict[str, Any] = {}
    for name, shift in shifts.items():
        seeds = (0, 1) if name != "grpo" else (0,)
        made = [policy(shift, seed) for seed in seeds]
        figures[name] = {key: [of[key] for of in made] for key in made[0]}
    figures["ecpo_chosen"] = {**figures["ecpo"], KEPT_STEP: [np.array([x]) for x in (0.0, 20.0)]}
    rows = {row.name: row for row in benchmark.arm_figures(figures, {}, benchmark.ARMS)}
    assert rows["test_users"].ours == 400
    sft = np.mean(figures["sft"]["judge_best_of_8"])
    best = rows["ecpo_judge_best_of_8"]
    assert best.reference == pytest.approx(sft)
    assert best.ours == pytest.approx(sft + 0.03)
    assert best.n == 2
    # Paired by user: their own spread has no part in the interval.
    assert best.low == pytest.approx(best.ours)
    assert best.high == pytest.approx(best.ours)
    gap = rows["ecpo_minus_rsft_only_judge_best_of_8"]
    assert gap.ours == pytest.approx(0.02)
    assert gap.low == pytest.approx(0.02)
    assert "ecpo_minus_shuffled_reward_ndcg_at_10" in rows
    # The first seed alone is compared with the first seed alone.
    one = rows["grpo_judge_best_of_8"]
    assert one.n == rows["ecpo_minus_grpo_judge_best_of_8"].n == 1
    assert one.reference == pytest.approx(np.mean(figures["sft"]["judge_best_of_8"][0]))
    # What is counted once has no interval over users, but a spread over seeds.
    distinct = rows["ecpo_distinct_at_10"]
    assert (distinct.low, distinct.ours, distinct.high) == (7, 7.5, 8)
    kept_step = rows["ecpo_chosen_kept_step"]
    assert (kept_step.low, kept_step.ours, kept_step.high) == (0, 10, 20)
    assert kept_step.reference is None


def test_legality_arms_report_all_their_figures_and_the_one_to_reach() -> None:
    names = ("sft", "format_random", "format_none", "format_top")
    figures = {name: {k: [x] for k, x in policy(0.0, 0).items()} for name in names}
    rows = {row.name: row for row in benchmark.arm_figures(figures, {}, benchmark.ARMS)}
    for name in names[1:]:
        for key in policy(0.0, 0):
            assert rows[f"{name}_{key}"].reference is not None
    reached = rows["format_random_legality_to_reach"]
    assert reached.reference == 0.95
    assert reached.ours == pytest.approx(rows["format_random_legality"].ours)
    assert "format_random_minus_format_none_legality" in rows


def test_every_figure_has_its_own_name() -> None:
    users = np.zeros(3)
    best = {(model, k): users + i for i, (model, k) in enumerate(product(MODELS, (8, 32)))}
    mean = {key: values + 10 for key, values in best.items()}
    found = by_figure(Offered(best, mean, users + 20, users + 21, 22))
    assert {name: float(values[0]) for name, values in found.items()} == {
        "reward_best_of_8": 0,
        "reward_best_of_32": 1,
        "judge_best_of_8": 2,
        "judge_best_of_32": 3,
        "reward_mean_of_8": 10,
        "reward_mean_of_32": 11,
        "judge_mean_of_8": 12,
        "judge_mean_of_32": 13,
        "ndcg_at_10": 20,
        "legality": 21,
        "distinct_at_10": 22,
    }
