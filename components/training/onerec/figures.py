"""Figures of a training run, for the tracker's pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training_figure(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Training loss and validation NDCG@10 by step.

    Args:
        curve: rows of `TrainState.curve`: ``step`` with ``loss`` (nats), ``valid_ndcg_at_10``, or
            both.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(2, sharex=True)
    for axis, name, label in zip(
        axes, ("loss", "valid_ndcg_at_10"), ("loss, nats", "validation NDCG@10"), strict=True
    ):
        rows = [row for row in curve if name in row]
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], marker=".")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    return figure
