"""The `report` stage: one self-contained HTML page about a run."""

from __future__ import annotations

from pydantic import Field

from components.pipeline.params_base import Params, Seed
from components.pipeline.stage import REGISTRY, Inputs, Outputs, Run, stage


class ReportParams(Params):
    """How many examples the report shows."""

    seed: Seed = Field(0, description="chooses the example users and semantic-id prefixes")
    example_users: int = Field(10, ge=1, le=20, description="test users shown with their lists")
    history: int = Field(8, ge=1, le=20, description="newest events shown of each user")
    recommendations: int = Field(10, ge=1, le=20, description="recommendations shown of each user")


@stage(
    inputs=(
        "data_health",
        "quarantine",
        "catalogue",
        "items",
        "test_examples",
        "semantic_ids",
        "recommender",
        "training_curve",
        "alignment_curve",
        "sasrec",
        "evaluation",
        "recommendations",
        "registration",
        "source",
    ),
    outputs=("report",),
    params=ReportParams,
)
def report(params: ReportParams, inputs: Inputs, outputs: Outputs, run: Run) -> dict[str, float]:
    """Writes one self-contained HTML page about the run: results, data, cost, lineage."""
    from pathlib import Path

    from components.evaluation.report.collect import collect
    from components.evaluation.report.page import render

    summaries = {name: known.summary for name, known in REGISTRY.items()}
    html = render(collect(inputs, params, summaries)).encode()
    Path(outputs["report"].path("report.html")).write_bytes(html)
    return {"report_bytes": float(len(html))}
