"""Figures of a training run, for the tracker's pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training_figure(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Loss of training and validation, and validation NDCG@10, by step.

    Args:
        curve: rows of `TrainState.curve`: ``step`` with ``loss`` (nats) or what validation found,
            ``valid_loss`` and ``valid_ndcg_at_10``, or both.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    panels = {
        "loss, nats": {"loss": "training", "valid_loss": "validation"},
        "validation NDCG@10": {"valid_ndcg_at_10": ""},
    }
    axes = figure.subplots(len(panels), sharex=True)
    for axis, (label, series) in zip(axes, panels.items(), strict=True):
        for name, legend in series.items():
            rows = [row for row in curve if name in row]
            step, value = [row["step"] for row in rows], [row[name] for row in rows]
            axis.plot(step, value, marker=".", label=legend)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("step")
    return figure
