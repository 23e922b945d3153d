"""The stated ground-truth model: which video is shown, and what the user does with it.

Written once here as numbers and formulas; ``sampling`` draws from it and ``ground_truth``
evaluates it exactly. Notation: user u, day d, item i with topic k(i), theme h(i), colour o(i),
motif m(i), popularity weight w_i (Zipf-Mandelbrot, Σ w = 1), quality q_i ~ N(0, 1), length T_i
seconds; affinity A_uk(d), taste θ_uk(d) and colour liking c_u as in ``population``; σ the logistic
function.

**Exposure.** Within a topic the policy shows i by popularity times colour liking,

    P_u(i | k) = w_i e^{c_u,o(i)} / Σ_{j: k(j)=k} w_j e^{c_u,o(j)}.

A fresh choice mixes popularity bias, taste and exploration,

    F_ud(i) = 0.25 w_i + 0.65 θ_u,k(i)(d) P_u(i | k(i)) + 0.10 / N.

The first video of a session (slot 0) is drawn from F. Later ones, after item j with long view
l_j ∈ {0, 1} in a session that opened with item a, from

    G(i)  = (1 - ρ) F_ud(i) + ρ M(i),     ρ = σ(-0.4 + 1.4 l_j + 0.5 b_u),   b_u ~ N(0, 1)
    M(i)  = 0.30 S(i) + 0.15 w_i [m(i)=m(j)] / W_m(j) + 0.20 P_u(i | k(j)) + 0.20 P_u(i | k(a))
          + 0.15 [h(i)=h(j)] θ_u,k(i)(d) P_u(i | k(i)) / Σ_{k: h(k)=h(j)} θ_uk(d)

where S puts all mass on the next episode of j's series, or, where j is the last, equals the motif
term; W_m is the weight of a motif. The same video is never shown twice in a row:

    P(i | u, d, j, l_j, a) = G(i) [i ≠ j] / (1 - G(j)).

So the next item depends on the last one (series, motif, topic, theme), on whether it was watched,
on how the session began, on a taste that drifts and on a colour liking: more than popularity or an
item bigram can know. A video may come again later.

**Feedback**, with the match v = A_u,k(i)(d) + 0.5 c_u,o(i) and slot s = 0, 1, …

    click      ~ Bernoulli σ(-1.40 + 1.0 v + 0.5 q_i - β log(1 + s)),           β = position_bias
    watch_time = T_i · U,  U ~ Uniform(0, 0.3)                                     without a click
    watch_time = T_i · min(3, 0.8 e^{0.5 (η + L)}),  L ~ Logistic(0, 1)            with a click
                 η = -0.6 + 0.8 v + 0.5 q_i - 0.7 log(T_i / 4 s)
    long_view  = watch_time ≥ 0.8 T_i;  hence P(long_view | click) = σ(η) exactly
    f          ~ Bernoulli σ(b_f + m_f v + q_f q_i + l_f long_view + g_f g_u) given a click, else 0,

g_u ~ N(0, 1) the generosity of the user, and for f in like, follow, forward, comment and
profile_enter the coefficients of SOCIAL. Given (u, d, i, s) the draws are independent.

**Time.** The next video starts when the last one has been watched, plus 0.4 to 3 seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

FRESH_POPULARITY, FRESH_TASTE, FRESH_EXPLORE = 0.25, 0.65, 0.10
STAY_BIAS, STAY_LONG_VIEW, STAY_USER = -0.4, 1.4, 0.5
NEXT_EPISODE, SAME_MOTIF, SAME_TOPIC, OPENING_TOPIC, SAME_THEME = 0.30, 0.15, 0.20, 0.20, 0.15
MATCH_COLOUR = 0.5
CLICK_BIAS, CLICK_MATCH, CLICK_QUALITY = -1.4, 1.0, 0.5
WATCH_BIAS, WATCH_MATCH, WATCH_QUALITY, WATCH_DURATION = -0.6, 0.8, 0.5, -0.7
TYPICAL_DURATION_S = 4.0
LONG_VIEW_RATIO, WATCH_SPREAD, MOST_LOOPS = 0.8, 0.5, 3.0
SKIP_RATIO = 0.3
GAP_MS = (400, 3_000)


@dataclass(frozen=True)
class Social:
    """Coefficients of one kind of feedback that follows a click."""

    bias: float
    match: float
    quality: float
    long_view: float
    generosity: float


#: Rare kinds have the lower bias; the rates come out near those of public short-video logs.
SOCIAL: dict[str, Social] = {
    "like": Social(-5.6, 0.6, 0.4, 1.6, 0.8),
    "follow": Social(-7.3, 0.5, 0.6, 1.4, 0.5),
    "forward": Social(-7.6, 0.4, 0.8, 1.4, 0.5),
    "comment": Social(-6.6, 0.5, 0.3, 1.3, 0.9),
    "profile_enter": Social(-5.3, 0.4, 0.2, 1.0, 0.3),
}


def sigmoid(x: Array | float) -> Array:
    odds: Array = np.exp(-np.asarray(x))
    return 1.0 / (1.0 + odds)


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    weight = np.exp(x - x.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def stay_probability(long_view: Array | float, momentum: Array | float) -> Array:
    """ρ of a step after an item with ``long_view``, for users with b_u = ``momentum``."""
    return sigmoid(STAY_BIAS + STAY_LONG_VIEW * long_view + STAY_USER * momentum)


def match(affinity: Array, colour_liking: Array) -> Array:
    """v, of A_u,k(i)(d) and c_u,o(i)."""
    return affinity + MATCH_COLOUR * colour_liking


def click_logit(match: Array, quality: Array, slot: Array | int, position_bias: float) -> Array:
    examination = np.float32(position_bias) * np.log1p(np.asarray(slot, dtype=np.float32))
    return CLICK_BIAS + CLICK_MATCH * match + CLICK_QUALITY * quality - examination


def watch_logit(match: Array, quality: Array, duration_s: Array) -> Array:
    """η, the logit of a long view given a click."""
    length = np.log(duration_s / np.float32(TYPICAL_DURATION_S))
    return WATCH_BIAS + WATCH_MATCH * match + WATCH_QUALITY * quality + WATCH_DURATION * length


def social_logit(
    kind: Social, match: Array, quality: Array, long_view: Array | float, generosity: Array | float
) -> Array:
    """Logit of one kind of feedback given a click."""
    return (
        kind.bias
        + kind.match * match
        + kind.quality * quality
        + kind.long_view * long_view
        + kind.generosity * generosity
    )


def watch_ratio(eta: Array, clicked: Array, uniform: Array) -> Array:
    """Share of the video that is watched; ``uniform`` in [0, 1), float32."""
    # The open interval keeps the logistic quantile finite; 1e-7 is the step of float32 near one.
    u = np.clip(uniform, np.float32(1e-7), np.float32(1 - 1e-7))
    quantile = np.log(u / (1 - u))
    watched = LONG_VIEW_RATIO * np.exp(np.float32(WATCH_SPREAD) * (eta + quantile))
    return np.where(clicked, np.minimum(watched, MOST_LOOPS), SKIP_RATIO * uniform).astype(
        np.float32
    )
