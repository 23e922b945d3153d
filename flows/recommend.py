"""The recommender, from raw interactions to a registered model and a report."""

from __future__ import annotations

from typing import Any

from components.pipeline.flow import Flow, Plot

FLOW = Flow(
    name="recommend",
    summary="Curate, train, evaluate and register a generative recommender.",
    stages=(
        "ingest",
        "validate",
        "split",
        "item_features",
        "align_items",
        "semantic_ids",
        "train_recommender",
        "train_reward_model",
        "align_recommender",
        "train_sasrec",
        "evaluate_recommender",
        "register",
        "report",
    ),
    headline={
        "evaluate_recommender": (
            "ndcg_at_10",
            "hr_at_10",
            "ndcg_at_10_minus_sasrec",
            "ndcg_at_10_minus_sasrec_low",
            "coverage_at_10",
            "users",
        ),
        "register": ("is_champion",),
        "train_recommender": ("valid_ndcg_at_10", "best_step", "parameters"),
        "align_recommender": (
            "valid_reward_before",
            "valid_reward",
            "valid_judge_before",
            "valid_judge",
            "best_step",
        ),
        "split": ("train_events",),
        "validate": ("rows_quarantined",),
    },
    plots=(
        Plot("Loss", "training_curve", "curve.csv", "step", ("loss", "valid_loss")),
        Plot("Validation NDCG@10", "training_curve", "curve.csv", "step", ("valid_ndcg_at_10",)),
        Plot(
            "P-Score while aligning",
            "alignment_curve",
            "curve.csv",
            "step",
            ("choice_reward", "choice_judge"),
        ),
        Plot(
            "NDCG@10 while aligning",
            "alignment_curve",
            "curve.csv",
            "step",
            ("choice_ndcg_at_10",),
        ),
        Plot(
            "NDCG@10 by method",
            "evaluation",
            "methods.csv",
            "ndcg_at_10",
            ("method",),
            "bar_horizontal",
        ),
        Plot(
            "NDCG@10 by length of history",
            "evaluation",
            "history.csv",
            "history_from",
            ("onerec", "sasrec", "bigram", "popularity"),
        ),
    ),
)


def __getattr__(name: str) -> Any:
    # Prefect takes seconds to import; a plan or a list of flows must not wait for it.
    if name != "recommend":
        raise AttributeError(name)
    from components.pipeline.prefect_flow import build

    globals()["recommend"] = build(FLOW)
    return globals()["recommend"]
