"""The users of the simulated platform: features, latent tastes that drift, and when they come.

Users are made in blocks of a size fixed by the config. A block is a function of (config, seed,
block number) alone, so that any user can be made again without those before.

**Taste.** User u has a latent z_u(d) ∈ R^D on day d, an Ornstein-Uhlenbeck process sampled daily,

    z_u(d) = μ_u + √δ x_u(d),   x_u(0) ~ N(0, I),
    x_u(d+1) = e^{-1/τ} x_u(d) + √(1 - e^{-2/τ}) ε,   ε ~ N(0, I)

with δ = ``drift_share`` and τ = ``drift_days``. Its mean μ_u = √(1-δ) (√0.3 f_u + √0.7 ν_u), with
ν_u ~ N(0, I) and f_u the sum of one effect vector for each categorical feature of the user, scaled
to unit variance: features tell part of the taste. Topic k has an embedding e_k of unit length,
half of its square norm shared by its theme. The *affinity* of u to topic k is
A_uk(d) = z_u(d)·e_k, about N(0, 1), and the taste is θ_uk(d) = softmax_k(s A_uk(d)),
s = TASTE_SCALE. Colours are liked by a constant c_u ~ N(0, COLOUR_SCALE² I), in part told by the
features in the same way.

**Activity.** λ_u = Λ exp(1.1 g_u), g_u ~ N(0, 1), correlated 0.3 with one direction of μ_u. The
user opens a session in a two-hour cell with probability 1 - exp(-λ_u w_cell), w the curve of the
day. Λ is solved for the expected number of interactions. Session length is geometric, mean 8 before
truncation at 24. A session starts in the first 40 minutes of its cell.

Shapes: B users of a block, S sessions of a block, K topics, D latent, T days, C colours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from components.data.simulator import world as w
from components.data.simulator.config import (
    CELLS_PER_DAY,
    MAX_SESSION_LENGTH,
    MEAN_SESSION_LENGTH,
    SimulatorConfig,
)

Array = np.ndarray

LATENT = 12
TASTE_SCALE = 1.8
COLOUR_SCALE = 1.2
FEATURE_SHARE = 0.3
ACTIVITY_SIGMA = 1.1
#: name → (values, frequencies)
FEATURES: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "gender": (("female", "male", "unknown"), (0.48, 0.46, 0.06)),
    "age": (
        ("under_18", "18_24", "25_34", "35_44", "45_54", "over_54"),
        (0.10, 0.26, 0.28, 0.18, 0.11, 0.07),
    ),
    "region": (
        ("north", "north_east", "east", "south_east", "south", "south_west", "west", "abroad"),
        (0.16, 0.08, 0.22, 0.12, 0.18, 0.12, 0.08, 0.04),
    ),
    "device": (("phone_low", "phone_mid", "phone_high", "tablet"), (0.30, 0.42, 0.22, 0.06)),
}
#: Activity degree by quantile of g_u.
ACTIVITY: dict[str, float] = {"low": 0.40, "middle": 0.75, "high": 0.95, "full": 1.0}
#: Relative traffic of the two-hour cells of a day, from midnight UTC.
DAY_CURVE = np.array([0.5, 0.2, 0.2, 0.5, 0.9, 1.0, 1.3, 1.1, 1.1, 1.4, 2.0, 1.8])
DAY_CURVE = DAY_CURVE / DAY_CURVE.mean()

DAY_MS = 86_400_000
CELL_MS = DAY_MS // CELLS_PER_DAY
_START_WINDOW_MS = 2_400_000


@dataclass(frozen=True, eq=False)
class Laws:
    """What all users share.

    Attributes:
        topic_embedding: [K, D] e_k. effects: feature → [values, D + C].
        activity_direction: [D]. activity_scale: Λ.
        block_users: users of a block but the last. num_blocks: blocks of all users.
    """

    topic_embedding: Array
    effects: dict[str, Array]
    activity_direction: Array
    activity_scale: float
    block_users: int
    num_blocks: int


@dataclass(frozen=True, eq=False)
class Block:
    """Users ``first_user … first_user + B - 1`` (public ids, from 1).

    Attributes:
        features: name → [B] index into the values of FEATURES; ``activity_degree`` likewise.
        mean: [B, D] μ_u. colour: [B, C] c_u. generosity, momentum: [B] N(0, 1).
        activity: [B] λ_u.
    """

    number: int
    first_user: int
    features: dict[str, Array]
    mean: Array
    colour: Array
    generosity: Array
    momentum: Array
    activity: Array

    def __len__(self) -> int:
        return len(self.activity)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Sessions [S] of a block by user, then time.

    Attributes:
        user: row in the block. day: of the log, from 0. length: number of videos.
        start_ms: milliseconds since the start of the log.
    """

    user: Array
    day: Array
    start_ms: Array
    length: Array


@lru_cache(maxsize=4)
def laws(config: SimulatorConfig, seed: int) -> Laws:
    """The constants of the population of ``(config, seed)``."""
    rng = w.generator(seed, w.POPULATION)
    theme = _unit_rows(rng.standard_normal((config.themes, LATENT)))
    own = _unit_rows(rng.standard_normal((config.num_topics, LATENT)))
    topic = _unit_rows(np.repeat(theme, config.topics_per_theme, axis=0) + own)
    effects = {}
    for name, (values, frequency) in FEATURES.items():
        effect = rng.standard_normal((len(values), LATENT + len(w.COLOURS)))
        p = np.asarray(frequency)[:, None]
        effect -= (p * effect).sum(0)
        effects[name] = effect / np.sqrt((p * effect**2).sum(0) * len(FEATURES))
    direction = _unit_rows(rng.standard_normal((1, LATENT)))[0]

    # A block makes about 131,072 interactions and holds at most 4M (user, cell) pairs.
    per_user = config.interactions / config.users
    cells = config.days * CELLS_PER_DAY
    block = int(max(1, min(131_072 / per_user, 4_000_000 / cells, 16_384, config.users)))
    return Laws(
        topic_embedding=topic.astype(np.float32),
        effects=effects,
        activity_direction=direction,
        activity_scale=_solve_activity(config),
        block_users=block,
        num_blocks=-(-config.users // block),
    )


def _unit_rows(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _length_cdf() -> Array:
    """[MAX_SESSION_LENGTH] cumulative distribution of the session length."""
    stop = 1.0 / MEAN_SESSION_LENGTH
    pmf = stop * (1 - stop) ** np.arange(MAX_SESSION_LENGTH)
    return np.cumsum(pmf / pmf.sum())


def mean_session_length() -> float:
    return float(MAX_SESSION_LENGTH - _length_cdf()[:-1].sum())


def _solve_activity(config: SimulatorConfig) -> float:
    """Λ such that the expected number of interactions is the one asked for (bisection)."""
    middles = (np.arange(2048) + 0.5) / 2048
    relative = np.exp(ACTIVITY_SIGMA * _normal_quantiles(middles.tolist()))
    wanted = config.interactions / (config.users * config.days * mean_session_length())

    def sessions_a_day(scale: float) -> float:
        rate = scale * relative[:, None] * DAY_CURVE
        return float(-np.expm1(-rate).sum(1).mean())

    low, high = 1e-12, 1e6
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if sessions_a_day(middle) < wanted else (low, middle)
    return float(np.sqrt(low * high))


def make_block(config: SimulatorConfig, seed: int, number: int) -> Block:
    """Block ``number`` of the users."""
    law = laws(config, seed)
    rng = w.generator(seed, w.POPULATION, number + 1)
    first = number * law.block_users
    size = min(law.block_users, config.users - first)
    features, told = {}, np.zeros((size, LATENT + len(w.COLOURS)))
    for name, (_, frequency) in FEATURES.items():
        cut = np.cumsum(frequency)[:-1]
        features[name] = np.searchsorted(cut, rng.random(size), side="right").astype(np.int8)
        told += law.effects[name][features[name]]
    own = rng.standard_normal(told.shape)
    standard = np.sqrt(FEATURE_SHARE) * told + np.sqrt(1 - FEATURE_SHARE) * own
    active = 0.3 * standard[:, :LATENT] @ law.activity_direction
    active += np.sqrt(1 - 0.3**2) * rng.standard_normal(size)
    cuts = _normal_quantiles(tuple(ACTIVITY.values())[:-1])
    features["activity_degree"] = np.searchsorted(cuts, active).astype(np.int8)
    return Block(
        number=number,
        first_user=first + 1,
        features=features,
        mean=(np.sqrt(1 - config.drift_share) * standard[:, :LATENT]).astype(np.float32),
        colour=(COLOUR_SCALE * standard[:, LATENT:]).astype(np.float32),
        generosity=rng.standard_normal(size, dtype=np.float32),
        momentum=rng.standard_normal(size, dtype=np.float32),
        activity=law.activity_scale * np.exp(ACTIVITY_SIGMA * active),
    )


def _normal_quantiles(probabilities: Iterable[float]) -> Array:
    return np.array([NormalDist().inv_cdf(p) for p in probabilities])


def latent_path(config: SimulatorConfig, seed: int, block: Block) -> Array:
    """z_u(d), [T, B, D] float32."""
    rng = w.generator(seed, w.DRIFT, block.number)
    keep = float(np.exp(-1.0 / config.drift_days))
    path = rng.standard_normal((config.days, *block.mean.shape), dtype=np.float32)
    path[1:] *= np.float32(np.sqrt(1 - keep**2))
    for day in range(1, config.days):
        path[day] += np.float32(keep) * path[day - 1]
    path *= np.float32(np.sqrt(config.drift_share))
    path += block.mean
    return path


def make_schedule(config: SimulatorConfig, seed: int, block: Block) -> Schedule:
    """When the users of a block come, and how many videos each session has."""
    rng = w.generator(seed, w.SCHEDULE, block.number)
    come = -np.expm1(-block.activity[:, None] * DAY_CURVE).astype(np.float32)
    draws = rng.random((len(block), config.days, CELLS_PER_DAY), dtype=np.float32)
    user, day, cell = np.nonzero(draws < come[:, None, :])
    count = len(user)
    offset = rng.integers(_START_WINDOW_MS, size=count, dtype=np.int64)
    length = 1 + np.searchsorted(_length_cdf()[:-1], rng.random(count), side="right")
    return Schedule(
        user=user.astype(np.int32),
        day=day.astype(np.int32),
        start_ms=day * DAY_MS + cell * CELL_MS + offset,
        length=length.astype(np.int32),
    )


def count_interactions(config: SimulatorConfig, seed: int) -> int:
    """How many interactions `simulate` yields, without simulating them."""
    total = 0
    for number in range(laws(config, seed).num_blocks):
        schedule = make_schedule(config, seed, make_block(config, seed, number))
        total += int(schedule.length.sum())
    return total
