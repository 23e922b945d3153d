"""Static subsets: chosen once, from what a trained network says of all samples.

Each function takes arrays and gives ascending indices, some with weights. What a row of features or
gradients is, its caller knows; gradients are usually those of the last layer (`last_gradients`).
Ties are broken towards the first sample, so equal inputs give equal subsets.

Shapes: N samples, D width, C classes, V validation samples, k samples of the subset.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from components.curation.asp.draw import Strata, draw, largest
from components.pipeline.errors import StageError

Int64 = npt.NDArray[np.int64]
Float = npt.NDArray[np.floating]

#: Similarities of all pairs of a class are held at once.
PAIR_BYTES = 2 << 30


def top(score_N: Float, k: int, strata: Strata | None = None) -> Int64:
    """The k largest scores; with strata each class's share of them.

    The rule of EL2N and GraNd (arXiv 2107.07075), of forgetting (1812.05159), margin and entropy:
    their scores are means over several short trainings.
    """
    value_N = np.asarray(score_N, np.float32)
    if strata is None:
        return largest(value_N, k)[0]
    parts = []
    for stratum, wanted in enumerate(strata.shares(k).tolist()):
        member_s = strata.members(stratum)
        parts.append(member_s[largest(value_N[member_s], wanted)[0]])
    return np.sort(np.concatenate(parts)).astype(np.int64)


def entropy_histogram(entropy_N: Float, k: int, width: float, seed: int) -> Int64:
    """Both tails of the entropy: the rule P1 of proxy data for architecture search (2106.04784).

    Bins of ``log10`` of the entropy; each that is not empty weighs as much as the fullest has more
    than it, and one, shared by its samples.

    Args:
        width: of a bin: 0.5 for ten classes, 0.25 for a hundred and more.
    """
    place_N = np.floor(np.log10(np.maximum(entropy_N, 1e-12)) / width).astype(np.int64)
    bin_N = np.unique(place_N, return_inverse=True)[1]
    count_K = np.bincount(bin_N)
    weight_K = count_K.max() - count_K + 1
    log_p_N = np.log((weight_K / count_K)[bin_N] / weight_K.sum())
    return draw(log_p_N.astype(np.float32), k, seed, 0, in_place=True).index_S


def herding(feature_ND: Float, k: int) -> Int64:
    """Each next sample brings the subset's mean nearest to that of all (Welling 2009)."""
    x_ND = np.asarray(feature_ND, np.float64)
    mean_D = x_ND.mean(0)
    left_N = np.ones(len(x_ND), bool)
    half_norm_N = np.square(x_ND).sum(1) / 2
    total_D = np.zeros_like(mean_D)
    chosen = []
    for taken in range(1, min(k, len(x_ND)) + 1):
        # argmin ‖taken · mean - (total + x)‖² = argmax x · (taken · mean - total) - ‖x‖² / 2
        gain_N = x_ND @ (taken * mean_D - total_D) - half_norm_N
        best = int(np.where(left_N, gain_N, -np.inf).argmax())
        left_N[best] = False
        total_D += x_ND[best]
        chosen.append(best)
    return np.sort(np.array(chosen, np.int64))


def k_center(feature_ND: Float, k: int) -> Int64:
    """Each next sample is the one farthest from the chosen ones (Sener and Savarese, 1708.00489).

    The largest distance that is left is at most twice the least possible. It begins with the sample
    nearest to the mean.
    """
    x_ND = np.asarray(feature_ND, np.float64)
    norm_N = np.square(x_ND).sum(1)

    def squared(point_D: Float) -> Float:
        return np.maximum(norm_N - 2 * (x_ND @ point_D) + point_D @ point_D, 0)

    chosen = [int(squared(x_ND.mean(0)).argmin())]
    distance_N = squared(x_ND[chosen[0]])
    while len(chosen) < min(k, len(x_ND)):
        # Chosen ones, at a distance of 0 up to rounding, are out even if all others equal them.
        distance_N[chosen[-1]] = -1
        chosen.append(int(distance_N.argmax()))
        distance_N = np.where(distance_N < 0, -1, np.minimum(distance_N, squared(x_ND[chosen[-1]])))
    return np.sort(np.array(chosen, np.int64))


def craig(gradient_ND: Float, k: int) -> tuple[Int64, npt.NDArray[np.float32]]:
    """Facility location over gradients (CRAIG, arXiv 1906.01827), greedily: for one class.

    Similarity is the largest distance less the distance; a sample weighs as many as are nearest to
    it.

    Returns:
        ascending indices, and their weights, of sum N.

    Raises:
        StageError: the similarities of all pairs do not fit.
    """
    x_ND = np.asarray(gradient_ND, np.float32)
    size = len(x_ND)
    if 4 * size**2 > PAIR_BYTES:
        raise StageError(
            f"the similarities of {size} samples take {4 * size**2 / 2**30:.1f} GiB",
            where="selector 'craig'",
            remedy=f"give it classes, or a random part, of {math.isqrt(PAIR_BYTES // 4)} at most",
        )
    norm_N = np.square(x_ND).sum(1)
    near_NN = norm_N[:, None] + norm_N - 2 * (x_ND @ x_ND.T)
    np.sqrt(np.maximum(near_NN, 0, out=near_NN), out=near_NN)
    np.subtract(near_NN.max(), near_NN, out=near_NN)
    covered_N = np.zeros(size, np.float32)
    # Gains only fall as others are chosen: an old one is a bound, and most are never computed anew.
    bound_N = near_NN.sum(0, dtype=np.float64)
    chosen: list[int] = []
    for _ in range(min(k, size)):
        fresh = np.zeros(size, bool)
        while not fresh[best := int(bound_N.argmax())]:
            bound_N[best] = np.maximum(near_NN[:, best] - covered_N, 0).sum(dtype=np.float64)
            fresh[best] = True
        chosen.append(best)
        covered_N = np.maximum(covered_N, near_NN[:, best])
        bound_N[best] = -np.inf
    index_k = np.sort(np.array(chosen, np.int64))
    nearest_N = near_NN[:, index_k].argmax(1)
    return index_k, np.bincount(nearest_N, minlength=len(index_k)).astype(np.float32)


def grad_match(
    gradient_ND: Float, k: int, ridge: float = 1.0
) -> tuple[Int64, npt.NDArray[np.float32]]:
    """Weighted samples whose gradients sum to that of all (GradMatch, arXiv 2103.00123).

    Orthogonal matching pursuit with a ridge; the last weights are those of non-negative least
    squares, and samples whose weight is 0 stay, with it.

    Returns:
        ascending indices and weights.
    """
    from scipy.optimize import nnls

    x_ND = np.asarray(gradient_ND, np.float64)
    whole_D = x_ND.sum(0)
    size = min(k, len(x_ND))
    residual_D, chosen = whole_D, list[int]()
    left_N = np.ones(len(x_ND), bool)
    gram_kk = ridge * np.eye(size)
    for taken in range(size):
        best = int(np.where(left_N, x_ND @ residual_D, -np.inf).argmax())
        left_N[best] = False
        chosen.append(best)
        part_tD = x_ND[chosen]
        own_t = part_tD @ x_ND[best]
        gram_kk[taken, : taken + 1] += own_t
        gram_kk[:taken, taken] = own_t[:-1]
        weight_t = np.linalg.solve(gram_kk[: taken + 1, : taken + 1], part_tD @ whole_D)
        residual_D = whole_D - weight_t @ part_tD
    index_k = np.sort(np.array(chosen, np.int64))
    part_kD = x_ND[index_k]
    # The ridge as more rows: ‖xᵀw - g‖² + ridge ‖w‖².
    rows = np.concatenate([part_kD.T, math.sqrt(ridge) * np.eye(len(index_k))])
    weight_k, _ = nnls(rows, np.concatenate([whole_D, np.zeros(len(index_k))]))
    return index_k, weight_k.astype(np.float32)


def glister(
    feature_ND: Float,
    target_N: npt.NDArray[np.integer],
    valid_VD: Float,
    valid_target_V: npt.NDArray[np.integer],
    weight_CD: Float,
    bias_C: Float,
    k: int,
    *,
    rate: float = 0.05,
    rounds: int = 10,
) -> Int64:
    """Samples whose gradient lowers the loss of validation most (GLISTER, arXiv 2012.10630).

    Greedily in rounds: the samples whose gradients point along that of validation are taken, the
    last layer is moved by them, and validation's gradient is that of the moved layer.

    Args:
        valid_VD: of samples for this purpose alone, not of those that candidates are ranked by.
        weight_CD, bias_C: the last layer.
    """
    weight_CD, bias_C = weight_CD.astype(np.float64), bias_C.astype(np.float64)
    left_N = np.ones(len(feature_ND), bool)
    chosen: list[Int64] = []
    for part in np.array_split(np.arange(min(k, len(feature_ND))), rounds):
        if not len(part):
            continue
        error_VC = _errors(valid_VD @ weight_CD.T + bias_C, valid_target_V)
        by_weight_CD = error_VC.T @ valid_VD / len(valid_VD)
        by_bias_C = error_VC.mean(0)
        error_NC = _errors(feature_ND @ weight_CD.T + bias_C, target_N)
        gain_N = (error_NC * (feature_ND @ by_weight_CD.T + by_bias_C)).sum(1)
        taken, _ = largest(np.where(left_N, gain_N, -np.inf).astype(np.float32), len(part))
        left_N[taken] = False
        chosen.append(taken)
        weight_CD = weight_CD - rate * error_NC[taken].T @ feature_ND[taken] / len(taken)
        bias_C = bias_C - rate * error_NC[taken].mean(0)
    return np.sort(np.concatenate(chosen))


def last_gradients(logit_NC: Float, target_N: npt.NDArray[np.integer], feature_ND: Float) -> Float:
    """Gradients of the last layer's weights and biases: float32 [N, C · (D + 1)]."""
    error_NC = _errors(logit_NC, target_N).astype(np.float32)
    with_one = np.concatenate([feature_ND, np.ones((len(feature_ND), 1))], 1).astype(np.float32)
    return (error_NC[:, :, None] * with_one[:, None]).reshape(len(feature_ND), -1)


def _errors(logit_NC: Float, target_N: npt.NDArray[np.integer]) -> Float:
    """``p - onehot(y)``."""
    p_NC = np.exp(logit_NC - logit_NC.max(1, keepdims=True))
    p_NC /= p_NC.sum(1, keepdims=True)
    p_NC[np.arange(len(p_NC)), target_N] -= 1
    return p_NC
