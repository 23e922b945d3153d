"""Figures of the alignment, for the tracker's pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("reward", "P-Score of a group"),
    ("legality", "legal unconstrained samples"),
    ("gradient_norm", "gradient norm"),
)


def alignment_figure(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Reward, legality and gradient norm by step.

    Args:
        curve: rows of `Progress.curve`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots(len(PANELS), sharex=True)
    for axis, (name, label) in zip(axes, PANELS, strict=True):
        axis.plot([row["step"] for row in curve], [row[name] for row in curve])
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    return figure
