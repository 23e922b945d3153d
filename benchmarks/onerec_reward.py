"""Reinforcement learning of the recommender: ECPO beside GRPO and GBPO, judged by another model.

Data comes from the recommend flow (`--until semantic_ids`): KuaiRand-Pure where it is at hand, the
simulator elsewhere. Two preference models learn from disjoint users; one is the reward, the other,
the *judge*, never trains anything. Every arm takes the defaults of the `align_recommender` stage
and changes what `ARMS` says; its weights are those after its last step. ``rsft_only`` goes on with
supervised fine-tuning alone, and ``shuffled_reward`` deals every reward to another item: what ECPO
gains over these is reward learning. All figures are of test requests of users without a preference
model, on whom nothing is chosen (`reward_data.py` says who sees whom). Of a policy they are the
highest P-Score of the first K items of beam search ("best", as in the report's Pass@K) and their
mean, NDCG@10, and the share of legal ids among unconstrained samples.

``ecpo_chosen`` has weights chosen by the stage's rule, but on other measurements: lists are of 128
beams and of 1,000 users here, of 32 beams and 500 users there, so the stage may keep another
checkpoint. ``kept_step`` says after which step they were kept; 0: none.

``sft_selected`` and ``ecpo_selected`` are the same weights with reward-model selection (section 2.6
of the report): the legal items among all beams in the order of the model that is the reward, so
that only the judge and NDCG@10 tell whether it helps. SASRec with selection is left out: no SASRec
is trained here.

``format_none_sampled``, groups of 16 and 64, ``ecpo_sampled`` and the ``…_stale`` arms have the
first seed alone: their intervals say nothing of other seeds. The report's group of 256 is missing:
a step generates, scores and learns from eight times as many items as with the default of 32, too
long for two cores. Of the ``…_wild`` arms only the gradient is looked at: a seed's largest norm of
a step, and its median one.

Figures are means over seeds and users. The reference of an arm is the supervised model (SFT) of the
same seeds; low and high are its value plus the 95 % interval of paired bootstrap over users of the
difference of seed means, so that a gain is beyond doubt where low exceeds the reference. Of
``…_minus_…`` they are that interval itself, of the seeds that both have; of everything else the
lowest and the highest seed. n counts seeds; of AUCs, the positive labels.

``REELFLOW_BENCH_HOME`` keeps the artifacts of the flow, the models and the arms: a second call goes
on where one was cut.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.flow_runs import shared_data
from benchmarks.processes import one_thread_each
from benchmarks.result import Result
from benchmarks.reward_data import (
    MODELS,
    Place,
    Size,
    prepare,
    train_preferences,
    train_recommender,
)
from benchmarks.reward_world import CURVE, KEPT_STEP, Arm, World

SUMMARY = "Reward learning of OneRec: ECPO, GRPO and GBPO under an independent judge; legality"

DATA = "kuairand_pure"
SEEDS = (0, 1, 2)
FULL = Size(sft_steps=1200, valid_users=1000, test_users=2000, widths=(8, 32, 128), samples=32)
QUICK = Size(10, 30, 30, (8, 32), 8, pscore=(("epochs", 1), ("candidates", 2)))
#: A simulated platform of a few seconds.
SMALL = (
    *(f"ingest.simulator.{s}" for s in ("users=150", "items=200", "interactions=6000")),
    "ingest.simulator.render_videos=false",
    "validate.great_expectations=false",
    "align_items.method=none",
)

SFT, RSFT, OURS, CONTROL = "sft", "rsft_only", "ecpo", "shuffled_reward"
#: Enough samples, weight and steps for the format reward to matter; how many are enough is seen by
#: the legality of the train users' rollouts.
_FORMAT = {
    "steps": 200,
    "learning_rate": 5e-4,
    "format_group": 64,
    "format_k": 32,
    "format_weight": 40.0,
}
#: Rollouts of the weights before the first step, whatever is learned since; a checkpoint would send
#: the newest ones.
_STALE = {"max_staleness": 10_000, "checkpoint_every": 10_000}
#: High rates under such rollouts: where a gradient without a bound shows.
_WILD = {
    **_STALE,
    "preference_weight": 5.0,
    "format_weight": 0.0,
    "learning_rate": 1e-2,
    "sampler": "constrained",
    "sft_batch": 32,
    "clip": None,
}
ARMS: Mapping[str, Arm] = {
    SFT: Arm(None, selects=True, all_seeds=True),
    OURS: Arm({}, chooses=True, selects=True, all_seeds=True),
    RSFT: Arm({"preference_weight": 0.0, "format_weight": 0.0}, all_seeds=True),
    CONTROL: Arm({}, shuffled=True, all_seeds=True),
    "grpo": Arm({"objective": "grpo"}, all_seeds=True),
    "format_random": Arm(_FORMAT, all_seeds=True),
    "format_top": Arm({**_FORMAT, "format_choice": "top"}, all_seeds=True),
    "format_none": Arm({**_FORMAT, "format_weight": 0.0}, all_seeds=True),
    "format_none_sampled": Arm({**_FORMAT, "format_weight": 0.0, "sampler": "sample"}),
    "gbpo": Arm({"objective": "gbpo"}, all_seeds=True),
    "ecpo_group_16": Arm({"group": 16}),
    "ecpo_group_64": Arm({"group": 64}),
    "ecpo_sampled": Arm({"sampler": "constrained"}),
    "ecpo_stale": Arm(_STALE),
    "grpo_stale": Arm({**_STALE, "objective": "grpo"}),
    "gbpo_stale": Arm({**_STALE, "objective": "gbpo"}),
}
#: Of these only the gradient is looked at.
STABILITY: Mapping[str, Arm] = {
    f"{objective}_wild": Arm({**_WILD, "objective": objective}, all_seeds=True, offers=False)
    for objective in ("grpo", "ecpo", "gbpo")
}
#: The arm whose gradient the others' are compared with.
UNBOUNDED = "grpo_wild"
PAIRS = (
    (OURS, RSFT),
    (OURS, CONTROL),
    (OURS, "grpo"),
    (OURS, "gbpo"),
    (OURS, "ecpo_sampled"),
    (OURS, "ecpo_stale"),
    (OURS, "ecpo_group_16"),
    (OURS, "ecpo_group_64"),
    ("ecpo_chosen", RSFT),
    ("ecpo_chosen", CONTROL),
    ("sft_selected", SFT),
    ("ecpo_selected", OURS),
    ("ecpo_selected", "sft_selected"),
    ("format_random", "format_none"),
    ("format_random", "format_top"),
)
#: What the report's format reward reaches with samples drawn at random (Fig. 12).
TARGET_LEGALITY = 0.95
#: A small run's arms: one of each kind.
FEW = (SFT, OURS, RSFT, "format_top", "ecpo_wild", UNBOUNDED)
TINY = {"steps": 2, "users": 4, "sft_batch": 32}

Float = npt.NDArray[np.float64]
#: By policy and by figure: one array a seed, of users or of what is counted once.
Figures = dict[str, dict[str, list[Float]]]
#: By arm and by what its steps said: one array a seed, of steps.
Curves = dict[str, dict[str, list[Float]]]


def run(quick: bool = False) -> list[Result]:
    """All arms; ``quick`` is a small simulated platform, one seed, few arms and two steps each."""
    with tempfile.TemporaryDirectory(prefix="bench_reward_") as temporary:
        home = Path(os.environ.get("REELFLOW_BENCH_HOME") or temporary).resolve()
        data = None if quick else shared_data(DATA)
        place = prepare(home, QUICK if quick else FULL, () if data else SMALL, data)
        arms = {**ARMS, **STABILITY}
        if quick:
            arms = {name: smaller(arms[name]) for name in FEW}
        seeds = SEEDS[:1] if quick else SEEDS
        figures, curves = measure(place, arms, seeds)
        learned = [preferences_of(place, seed) for seed in seeds]
    return [*preference_figures(learned), *arm_figures(figures, curves, arms)]


def smaller(arm: Arm) -> Arm:
    """The same in two steps, each with a checkpoint unless the arm says when they are."""
    if arm.settings is None:
        return arm
    return replace(arm, settings={"checkpoint_every": 1, **arm.settings, **TINY})


def measure(place: Place, arms: Mapping[str, Arm], seeds: Iterable[int]) -> tuple[Figures, Curves]:
    """Train and measure all arms that are not there yet."""
    figures: Figures = {}
    curves: Curves = {}
    with one_thread_each() as pool:
        trained = {
            seed: [
                pool.submit(train_recommender, place, seed),
                pool.submit(train_preferences, place, seed),
            ]
            for seed in seeds
        }
        jobs: list[tuple[str, Future[Any]]] = []
        for number, (seed, models) in enumerate(trained.items()):
            for model in models:
                model.result()
            jobs += [
                (name, pool.submit(_measured, place, seed, name, arm))
                for name, arm in arms.items()
                if arm.all_seeds or number == 0
            ]
        for name, job in jobs:
            for part, found in job.result().items():
                into = (
                    curves.setdefault(name, {}) if part == CURVE else figures.setdefault(part, {})
                )
                for key, values in found.items():
                    into.setdefault(key, []).append(values)
    return figures, curves


def _measured(place: Place, seed: int, name: str, arm: Arm) -> dict[str, dict[str, Float]]:
    return World.load(place, seed).measured(name, arm)


def preferences_of(place: Place, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """AUCs of a seed's preference models by objective."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(
        (train_preferences(place, seed) / "auc.json").read_text()
    )
    return found


def preference_figures(learned: list[dict[str, dict[str, dict[str, Any]]]]) -> list[Result]:
    """AUCs of both models: of p, beside the best fixed sum of the towers; of the towers.

    Means over seeds; low and high are the means of their intervals over users, which are no
    narrower than the interval of the mean.
    """
    rows = []
    for model, objectives in learned[0].items():
        for objective, first in objectives.items():
            found = [seed[model][objective] for seed in learned]
            fixed = float(np.mean([f["sum_auc"] for f in found]))
            for figure, reference in (("p_auc", fixed), ("tower_auc", None), ("tower_gauc", None)):
                mean, low, high = (
                    float(np.mean([f[figure][x] for f in found])) for x in ("value", "low", "high")
                )
                name, unit = f"{model}_{figure}_{objective}", figure.split("_")[1].upper()
                n = first["positives"]
                rows.append(Result(name, mean, reference, unit, low, high, n, True))
    return rows


def arm_figures(figures: Figures, curves: Curves, arms: Mapping[str, Arm]) -> list[Result]:
    """Every policy beside the supervised model, pairs of policies, and what the steps said."""
    sft = figures[SFT]
    users = float(len(sft["ndcg_at_10"][0]))
    rows = [Result("test_users", users, None, "users", users, users, len(sft["ndcg_at_10"]), True)]
    for policy, found in figures.items():
        for key, ours in found.items():
            name, unit = f"{policy}_{key}", unit_of(key)
            if policy == SFT or len(ours[0]) == 1:
                compared = policy != SFT and key in sft
                reference = float(np.mean(sft[key][: len(ours)])) if compared else None
                rows.append(_of_seeds(name, [float(x.mean()) for x in ours], reference, unit))
            else:
                rows.append(_beside(name, ours, sft[key], unit))
    for policy, other in PAIRS:
        if policy in figures and other in figures:
            for key, ours in figures[policy].items():
                if len(ours[0]) > 1:
                    name = f"{policy}_minus_{other}_{key}"
                    rows.append(_difference(name, ours, figures[other][key], unit_of(key)))
    if "format_random" in figures:
        reached = [float(x.mean()) for x in figures["format_random"]["legality"]]
        name = "format_random_legality_to_reach"
        rows.append(_of_seeds(name, reached, TARGET_LEGALITY, "of samples"))
    for name, curve in curves.items():
        rows += curve_figures(name, curve, planned_steps(arms[name]))
    return [*rows, *stability_figures({n: c for n, c in curves.items() if n in STABILITY})]


def curve_figures(name: str, curve: Mapping[str, list[Float]], planned: int) -> list[Result]:
    """How often the early clip would act, how old the rollouts were, and whether an arm ended."""
    steps = [float(len(x)) for x in curve["step"]]
    rows = []
    if min(steps) < planned:
        rows.append(_of_seeds(f"{name}_steps", steps, float(planned), "steps"))
    # Seeds that broke in their first step say no more.
    if max(steps) > 0:
        clipped = [float(x.mean()) for x in curve["early_clipped"]]
        stale = [float(x.max()) for x in curve["staleness"]]
        rows += [
            _of_seeds(f"{name}_early_clipped", clipped, None, "of items"),
            _of_seeds(f"{name}_max_staleness", stale, None, "steps"),
        ]
    return rows


def stability_figures(curves: Curves) -> list[Result]:
    """Gradient norms of a seed's steps: the largest, and the median one.

    The reference of the largest is GRPO's. Seeds without a step have none.
    """
    norms = {name: curve.get("gradient_norm", []) for name, curve in curves.items()}
    largest = {n: [float(x.max()) for x in norm] for n, norm in norms.items() if norm}
    rows = []
    for name, values in largest.items():
        known = name != UNBOUNDED and UNBOUNDED in largest
        reference = float(np.mean(largest[UNBOUNDED])) if known else None
        medians = [float(np.median(x)) for x in norms[name]]
        for figure, found, beside in (("max", values, reference), ("median", medians, None)):
            row = _of_seeds(f"{name}_gradient_norm_{figure}", found, beside, "norm")
            rows.append(replace(row, higher_is_better=False))
    return rows


def planned_steps(arm: Arm) -> int:
    from components.training.onerec.reward.config import AlignConfig

    return AlignConfig(**(arm.settings or {})).steps


def unit_of(figure: str) -> str:
    if figure.startswith(MODELS):
        return "P-Score"
    return {
        "ndcg_at_10": "NDCG@10",
        "legality": "of samples",
        "distinct_at_10": "items",
        KEPT_STEP: "steps",
    }[figure]


def _beside(name: str, ours: list[Float], theirs: list[Float], unit: str) -> Result:
    """A policy's mean beside the supervised model's of the same seeds."""
    gap = _difference(name, ours, theirs, unit)
    reference = float(np.mean(theirs[: len(ours)]))
    low, high = reference + gap.low, reference + gap.high
    return Result(name, reference + gap.ours, reference, unit, low, high, gap.n, True)


def _difference(name: str, ours: list[Float], theirs: list[Float], unit: str) -> Result:
    """Of the seeds that both have: the mean difference, by user paired."""
    from components.evaluation.ranking.metrics import paired_difference

    n = min(len(ours), len(theirs))
    gap = paired_difference(np.mean(ours[:n], 0), np.mean(theirs[:n], 0), seed=0)
    return Result(name, gap.mean, None, unit, gap.low, gap.high, n, True)


def _of_seeds(name: str, values: list[float], reference: float | None, unit: str) -> Result:
    """The mean over seeds, with the lowest and the highest."""
    mean, low, high = float(np.mean(values)), min(values), max(values)
    return Result(name, mean, reference, unit, low, high, len(values), True)
