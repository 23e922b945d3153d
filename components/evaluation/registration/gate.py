"""The champion / challenger gate: a model is replaced only by one that is measurably better.

Shapes: U users.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from components.evaluation.ranking.metrics import gains, hits, outcome, paired_difference

#: An interval over fewer users decides nothing.
MIN_USERS = 30

Decision = Literal["champion", "challenger"]


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, with the figures that decided it.

    Attributes:
        decision: the alias that the version gets.
        reason: one sentence for the report.
        metric: gate metric, e.g. ``ndcg_at_10``.
        users: test users compared.
        ours, champion: mean of the metric; champion is None where nothing was compared.
        difference, low, high: paired difference with its 95 % bootstrap interval; None where
            nothing was compared or too few users were.
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


def cutoff(metric: str) -> int:
    """The K of ``ndcg_at_K`` or ``hr_at_K``."""
    return int(metric.rpartition("_at_")[2])


def per_user(metric: str, rank_U: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Per-user values of ``ndcg_at_K`` or ``hr_at_K`` from 1-based ranks (0: not in the list)."""
    of_rank = gains if metric.startswith("ndcg") else hits
    return of_rank(rank_U, cutoff(metric))


def unopposed(metric: str, ours_U: npt.NDArray[np.integer], reason: str) -> Verdict:
    """The verdict where there is no other model to compare with."""
    return Verdict("champion", reason, metric, len(ours_U), float(per_user(metric, ours_U).mean()))


def judge(
    metric: str,
    ours_U: npt.NDArray[np.integer],
    champion_U: npt.NDArray[np.integer],
    champion_name: str,
    seed: int,
) -> Verdict:
    """Compare a challenger with the champion on the same users, ``MIN_USERS`` or more.

    Args:
        ours_U, champion_U: 1-based rank of each user's target, 0 where the list lacks it.
        champion_name: how the report calls the champion, e.g. ``version 3``.
        seed: of the bootstrap.
    """
    ours, theirs = per_user(metric, ours_U), per_user(metric, champion_U)
    figures = f"{ours.mean():.4f} against {theirs.mean():.4f}"
    if len(ours) < MIN_USERS:
        reason = (
            f"cannot be compared with {champion_name} over {len(ours)} users, a champion needs "
            f"{MIN_USERS} or more; {metric} is {figures}"
        )
        means = float(ours.mean()), float(theirs.mean())
        return Verdict("challenger", reason, metric, len(ours), *means)
    gap = paired_difference(ours, theirs, seed)
    difference = float((ours - theirs).mean())
    words = outcome(gap.low, gap.high)
    remark = ", which includes 0" if words == "does not beat" else ""
    reason = (
        f"{words} {champion_name} on {metric}: {figures}, paired "
        f"difference {difference:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]{remark}, "
        f"over {len(ours):,} users"
    )
    return Verdict(
        "champion" if words == "beats" else "challenger",
        reason,
        metric,
        len(ours),
        float(ours.mean()),
        float(theirs.mean()),
        difference,
        gap.low,
        gap.high,
    )
