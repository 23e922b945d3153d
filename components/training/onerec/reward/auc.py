"""Area under the ROC curve with ties, over all exposures and within users, and its uncertainty.

Shapes: S exposures, U users, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

RESAMPLES = 200


@dataclass(frozen=True)
class Auc:
    """An AUC with its 95 % interval and standard error over resampled users."""

    value: float
    low: float
    high: float
    error: float


def auc(score_S: npt.NDArray, label_S: npt.NDArray, weight_S: npt.NDArray | None = None) -> float:
    """P(score of a positive > score of a negative) + ½ P(equal); NaN if one class is missing."""
    weight_S = np.ones(len(score_S)) if weight_S is None else weight_S
    order = np.argsort(score_S, kind="stable")
    return _sorted_auc(score_S[order], label_S[order].astype(bool), weight_S[order])


def _sorted_auc(score_S: npt.NDArray, label_S: npt.NDArray, weight_S: npt.NDArray) -> float:
    if not len(score_S):
        return float("nan")
    first_T = np.flatnonzero(np.r_[True, score_S[1:] != score_S[:-1]])
    positive_T = np.add.reduceat(weight_S * label_S, first_T)
    negative_T = np.add.reduceat(weight_S * ~label_S, first_T)
    below_T = np.cumsum(negative_T) - negative_T
    pairs = positive_T.sum() * negative_T.sum()
    return float((positive_T * (below_T + 0.5 * negative_T)).sum() / pairs) if pairs else np.nan


def auc_interval(score_S: npt.NDArray, label_S: npt.NDArray, user_S: npt.NDArray, seed: int) -> Auc:
    """AUC, resampled by users: exposures of one user are not independent."""
    return _summary(*_resampled(score_S, label_S, user_S, seed))


def auc_difference(
    score_S: npt.NDArray,
    reference_S: npt.NDArray,
    label_S: npt.NDArray,
    user_S: npt.NDArray,
    seed: int,
) -> Auc:
    """AUC of a score less that of another on the same exposures, both resampled by the same users.

    The interval is that of the difference.
    """
    ours, ours_R = _resampled(score_S, label_S, user_S, seed)
    theirs, theirs_R = _resampled(reference_S, label_S, user_S, seed)
    return _summary(ours - theirs, ours_R - theirs_R)


def _resampled(
    score_S: npt.NDArray, label_S: npt.NDArray, user_S: npt.NDArray, seed: int
) -> tuple[float, Float]:
    """The AUC, and that of every resample of users: the same ones for one seed, NaN where one class
    is missing."""
    order = np.argsort(score_S, kind="stable")
    score_S, label_S, user_S = score_S[order], label_S[order].astype(bool), user_S[order]
    _, user_S = np.unique(user_S, return_inverse=True)
    users = int(user_S.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    drawn = [
        _sorted_auc(
            score_S, label_S, np.bincount(rng.integers(0, users, users), None, users)[user_S]
        )
        for _ in range(RESAMPLES if users else 0)
    ]
    return _sorted_auc(score_S, label_S, np.ones(len(score_S))), np.array(drawn)


def gauc_interval(
    score_S: npt.NDArray, label_S: npt.NDArray, user_S: npt.NDArray, seed: int
) -> Auc:
    """Mean AUC within users who have both classes, each weighing by the exposures; resampled."""
    order = np.lexsort((score_S, user_S))
    score_S, label_S, user_S = score_S[order], label_S[order].astype(bool), user_S[order]
    begins = np.r_[True, (user_S[1:] != user_S[:-1]) | (score_S[1:] != score_S[:-1])]
    first_T = np.flatnonzero(begins) if len(score_S) else np.zeros(0, int)
    if not len(first_T):
        return _summary(float("nan"), np.zeros(0))
    positive_T = np.add.reduceat(label_S.astype(float), first_T)
    negative_T = np.add.reduceat((~label_S).astype(float), first_T)
    _, user_T = np.unique(user_S[first_T], return_inverse=True)
    before_T = np.cumsum(negative_T) - negative_T
    start_U = np.searchsorted(user_T, np.arange(user_T[-1] + 1))
    below_T = before_T - before_T[start_U][user_T]
    won_U = np.bincount(user_T, positive_T * (below_T + 0.5 * negative_T))
    positive_U, negative_U = np.bincount(user_T, positive_T), np.bincount(user_T, negative_T)
    both_U = (positive_U > 0) & (negative_U > 0)
    auc_U = won_U[both_U] / (positive_U * negative_U)[both_U]
    weight_U = (positive_U + negative_U)[both_U]
    if not len(auc_U):
        return _summary(float("nan"), np.zeros(0))
    drawn_RU = np.random.default_rng(seed).integers(0, len(auc_U), (RESAMPLES, len(auc_U)))
    means_R = (auc_U * weight_U)[drawn_RU].sum(1) / weight_U[drawn_RU].sum(1)
    return _summary(float(np.average(auc_U, weights=weight_U)), means_R)


def _summary(value: float, drawn_R: Float) -> Auc:
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if not len(drawn_R):
        return Auc(value, float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(drawn_R, [0.025, 0.975])
    return Auc(value, float(low), float(high), float(drawn_R.std()))
