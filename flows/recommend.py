"""The recommender, from raw interactions to a registered model and a report."""

from __future__ import annotations

from typing import Any

from components.pipeline.flow import Flow

FLOW = Flow(
    name="recommend",
    summary="Curate, train, evaluate and register a generative recommender.",
    stages=(
        "ingest",
        "validate",
        "split",
        "item_features",
        "semantic_ids",
        "train_recommender",
        "train_sasrec",
        "evaluate_recommender",
        "register",
        "report",
    ),
)


def __getattr__(name: str) -> Any:
    # Prefect takes seconds to import; a plan or a list of flows must not wait for it.
    if name != "recommend":
        raise AttributeError(name)
    from components.pipeline.prefect_flow import build

    globals()["recommend"] = build(FLOW)
    return globals()["recommend"]
