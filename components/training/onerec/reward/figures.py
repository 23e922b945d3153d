"""Figures of the alignment, for the tracker's pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Panels and their series; those of ``choice`` are of the validation users that choose.
PANELS = {
    "P-Score": {"choice_reward": "reward", "choice_judge": "judge"},
    "NDCG@10": {"choice_ndcg_at_10": "validation"},
    "legal samples": {"choice_legality": "validation", "legality": "training"},
    "gradient norm": {"gradient_norm": "training"},
}


def alignment_figure(
    curve: Sequence[Mapping[str, float]], best_step: int, ndcg_floor: float
) -> Figure:
    """What validation and the trainer found by step, from step 0, the model before.

    Args:
        curve: rows of `Progress.curve`.
        best_step: whose weights are kept, marked in every panel; 0: none are.
        ndcg_floor: the least NDCG@10 of weights that may be kept.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8), layout="constrained")
    axes = figure.subplots(len(PANELS), sharex=True)
    for axis, (label, series) in zip(axes, PANELS.items(), strict=True):
        for name, legend in series.items():
            rows = [row for row in curve if name in row]
            step, value = [row["step"] for row in rows], [row[name] for row in rows]
            axis.plot(step, value, marker=".", label=legend)
        if label == "NDCG@10":
            axis.axhline(ndcg_floor, linestyle="--", color="grey", label="floor")
        if best_step:
            axis.axvline(best_step, color="black", linewidth=0.8)
        axis.set_ylabel(label)
        axis.legend()
        axis.grid(alpha=0.3)
    axes[0].set_title(f"kept: step {best_step}" if best_step else "none is kept")
    axes[-1].set_xlabel("step")
    return figure
