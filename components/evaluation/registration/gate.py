"""The champion / challenger gate: a model is replaced only by one that is measurably better."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from components.evaluation.ranking.metrics import gains, hits, paired_difference

Decision = Literal["champion", "challenger"]


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, with the figures that decided it.

    Attributes:
        decision: the alias that the new version gets.
        reason: one sentence for the report.
        metric: gate metric, e.g. ``ndcg_at_10``.
        users: test users compared.
        ours, champion: mean of the metric; champion is None when there was none.
        difference, low, high: paired difference with its 95 % bootstrap interval.
    """

    decision: Decision
    reason: str
    metric: str
    users: int
    ours: float
    champion: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def per_user(metric: str, rank_U: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Per-user values of ``ndcg_at_K`` or ``hr_at_K`` from 1-based ranks (0: not in the list)."""
    name, _, k = metric.partition("_at_")
    return gains(rank_U, int(k)) if name == "ndcg" else hits(rank_U, int(k))


def judge(
    metric: str,
    ours_U: npt.NDArray[np.integer],
    champion_U: npt.NDArray[np.integer] | None,
    champion_name: str,
    seed: int,
) -> Verdict:
    """Compare a challenger with the champion on the same users.

    Args:
        ours_U, champion_U: 1-based ranks of each user's target; None where there is no champion.
        champion_name: how the report calls the champion, e.g. ``version 3``.
    """
    ours = per_user(metric, ours_U)
    mean = float(ours.mean())
    if champion_U is None:
        return Verdict("champion", "the first model of this name", metric, len(ours), mean)
    theirs = per_user(metric, champion_U)
    gap = paired_difference(ours, theirs, seed)
    better = gap.low > 0
    verb = "beats" if better else "does not beat"
    reason = (
        f"{verb} {champion_name} on {metric}: {mean:.4f} against {theirs.mean():.4f}, paired "
        f"difference {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}] over {len(ours):,} users"
    )
    return Verdict(
        "champion" if better else "challenger",
        reason,
        metric,
        len(ours),
        mean,
        float(theirs.mean()),
        gap.mean,
        gap.low,
        gap.high,
    )
