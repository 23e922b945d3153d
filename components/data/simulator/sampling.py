"""Draws the sessions of one block of users from the model of ``behaviour``, all sessions at once.

A step of the loop is one slot of every session that is that long, so a block costs at most
MAX_SESSION_LENGTH steps of array operations, whatever its number of interactions.

Shapes: S sessions, R rows (interactions) of the block, n rows of one step, K topics, C colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from components.data.simulator import behaviour as law
from components.data.simulator import world as w
from components.data.simulator.config import SimulatorConfig
from components.data.simulator.population import (
    TASTE_SCALE,
    Block,
    Schedule,
    latent_path,
    laws,
    make_block,
    make_schedule,
)

Array = np.ndarray

_FRESH = np.cumsum([law.FRESH_POPULARITY, law.FRESH_TASTE]).astype(np.float32)
_TREE = np.cumsum([law.NEXT_EPISODE, law.SAME_MOTIF, law.SAME_TOPIC, law.OPENING_TOPIC]).astype(
    np.float32
)


@dataclass(frozen=True, eq=False)
class Log:
    """Interactions of a block by user then time, arrays [R]; ``item`` is the tree position."""

    user_id: Array
    item: Array
    timestamp_ms: Array
    watch_time_s: Array
    duration_s: Array
    feedback: dict[str, Array]


@dataclass(frozen=True, eq=False)
class _Last:
    """What the next choice of n sessions depends on: item [n], its long view, topic of slot 0."""

    item: Array
    long_view: Array
    opening_topic: Array

    def at(self, rows: Array | slice) -> _Last:
        return _Last(self.item[rows], self.long_view[rows], self.opening_topic[rows])


class _Choice:
    """A choice of n items in the making: an item, else a topic, else a slice of popularity.

    The slice [low, high) of the cumulative popularity is that of all items at first.
    """

    def __init__(self, n: int) -> None:
        self.low, self.high = np.zeros(n), np.ones(n)
        self.item = np.full(n, -1, dtype=np.int32)
        self.topic = np.full(n, -1, dtype=np.int32)


class _Policy:
    """The logging policy for the sessions of one block."""

    def __init__(self, world: w.World, block: Block, affinity_SK: Array, user_S: Array) -> None:
        self.world = world
        self.user_S = user_S
        self.momentum_B = block.momentum
        self.taste_SK = np.exp(np.float32(TASTE_SCALE) * affinity_SK)
        self.cumulative_SK = np.cumsum(self.taste_SK, axis=1)
        self.liking_BC = np.exp(block.colour)
        self.palette_bounds = world.cumulative[world.palette_start]
        groups = np.diff(self.palette_bounds).reshape(-1, len(w.COLOURS))
        self.palette_KC = groups.astype(np.float32)
        self.motif_bounds = world.cumulative[world.motif_start]

    def draw(self, session: Array, last: _Last | None, rng: np.random.Generator) -> Array:
        """Next items [n] of sessions [n]; ``last`` is None in slot 0."""
        item = self._propose(session, last, rng)
        if last is None:
            return item
        again = np.flatnonzero(item == last.item)
        while len(again):
            item[again] = self._propose(session[again], last.at(again), rng)
            again = again[item[again] == last.item[again]]
        return item

    def _propose(self, session: Array, last: _Last | None, rng: np.random.Generator) -> Array:
        """Draws from G (or F in slot 0) of ``behaviour``."""
        n, world = len(session), self.world
        choice = _Choice(n)
        kind = rng.random(n, dtype=np.float32)
        fresh = np.arange(n)
        if last is not None:
            stay = rng.random(n, dtype=np.float32) < law.stay_probability(
                last.long_view, self.momentum_B[self.user_S[session]]
            )
            fresh = np.flatnonzero(~stay)
            self._walk_tree(np.flatnonzero(stay), kind, session, last, choice, rng)
        source = np.searchsorted(_FRESH, kind[fresh], side="right")
        rows = fresh[source == 1]
        choice.topic[rows] = _pick(self.cumulative_SK[session[rows]], rng)
        rows = fresh[source == 2]
        choice.item[rows] = rng.integers(world.num_items, size=len(rows), dtype=np.int32)

        rows = np.flatnonzero(choice.topic >= 0)
        group = self._palette_group(choice.topic[rows], self.user_S[session[rows]], rng)
        choice.low[rows] = self.palette_bounds[group]
        choice.high[rows] = self.palette_bounds[group + 1]

        rows = np.flatnonzero(choice.item < 0)
        low, high = choice.low[rows], choice.high[rows]
        choice.item[rows] = world.locate(low + rng.random(len(rows)) * (high - low))
        return choice.item

    def _walk_tree(
        self,
        rows: Array,
        kind: Array,
        session: Array,
        last: _Last,
        choice: _Choice,
        rng: np.random.Generator,
    ) -> None:
        """Draws from M of ``behaviour`` into the ``rows`` of ``choice``."""
        world, before = self.world, last.item[rows]
        branch = np.searchsorted(_TREE, kind[rows], side="right")
        next_episode = (branch == 0) & world.has_next[before]
        choice.item[rows[next_episode]] = before[next_episode] + 1
        same_motif = (branch <= 1) & ~next_episode
        motif = world.item_motif[before[same_motif]]
        choice.low[rows[same_motif]] = self.motif_bounds[motif]
        choice.high[rows[same_motif]] = self.motif_bounds[motif + 1]
        same_topic = branch == 2
        choice.topic[rows[same_topic]] = world.item_topic[before[same_topic]]
        opening = rows[branch == 3]
        choice.topic[opening] = last.opening_topic[opening]
        same_theme = branch == 4
        width = world.config.topics_per_theme
        first = world.item_topic[before[same_theme]].astype(np.int32) // width * width
        topics = first[:, None] + np.arange(width)
        taste = self.taste_SK[session[rows[same_theme]][:, None], topics]
        choice.topic[rows[same_theme]] = first + _pick(np.cumsum(taste, axis=1), rng)

    def _palette_group(self, topic: Array, user: Array, rng: np.random.Generator) -> Array:
        """(topic, colour) group drawn by popularity times colour liking."""
        weight = np.cumsum(self.palette_KC[topic] * self.liking_BC[user], axis=1)
        return topic.astype(np.int64) * len(w.COLOURS) + _pick(weight, rng)


def _pick(cumulative: Array, rng: np.random.Generator) -> Array:
    """Index [n] drawn from each row of cumulative weights [n, K] float32."""
    total = cumulative[:, -1]
    mass = rng.random(len(cumulative), dtype=np.float32) * total
    # The product may round up to the total, which no cumulative weight exceeds.
    mass = np.minimum(mass, np.nextafter(total, np.float32(0)))
    return (cumulative > mass[:, None]).argmax(1)


def session_affinity(config: SimulatorConfig, seed: int, block: Block, schedule: Schedule) -> Array:
    """A_uk(d) of every session, [S, K] float32."""
    latent = latent_path(config, seed, block)[schedule.day, schedule.user]
    return latent @ laws(config, seed).topic_embedding.T


def simulate_block(world: w.World, number: int) -> Log:
    """All interactions of block ``number``."""
    config, seed = world.config, world.seed
    block = make_block(config, seed, number)
    schedule = make_schedule(config, seed, block)
    rng = w.generator(seed, w.BEHAVIOUR, number)
    affinity_SK = session_affinity(config, seed, block, schedule)
    policy = _Policy(world, block, affinity_SK, schedule.user)

    first_row = np.cumsum(schedule.length) - schedule.length
    rows = int(schedule.length.sum())
    item = np.empty(rows, dtype=np.int32)
    match = np.empty(rows, dtype=np.float32)
    watched = np.empty(rows, dtype=np.float32)
    click = np.empty(rows, dtype=np.bool_)
    long_view = np.empty(rows, dtype=np.bool_)

    # Longest first, so that the sessions alive in slot s are a prefix.
    order = np.argsort(-schedule.length, kind="stable")
    alive = np.searchsorted(
        -schedule.length[order], -np.arange(1, 1 + schedule.length.max(initial=0)), "right"
    )
    last: _Last | None = None
    for slot, n in enumerate(alive):
        session = order[:n]
        last = None if last is None else last.at(slice(n))
        now = policy.draw(session, last, rng)
        topic, user = world.item_topic[now], schedule.user[session]
        v = law.match(affinity_SK[session, topic], block.colour[user, world.item_colour[now]])
        quality, duration = world.quality[now], world.duration_s[now]
        clicked = rng.random(n, dtype=np.float32) < law.sigmoid(
            law.click_logit(v, quality, slot, config.position_bias)
        )
        ratio = law.watch_ratio(
            law.watch_logit(v, quality, duration), clicked, rng.random(n, dtype=np.float32)
        )
        seconds = ratio * duration
        watched_long = seconds >= np.float32(law.LONG_VIEW_RATIO) * duration
        row = first_row[session] + slot
        item[row], match[row], watched[row] = now, v, seconds
        click[row], long_view[row] = clicked, watched_long
        last = _Last(
            now, watched_long, topic.astype(np.int32) if last is None else last.opening_topic
        )

    user = np.repeat(schedule.user, schedule.length)
    feedback = {"click": click, "long_view": long_view}
    feedback |= _social(block, world, user, item, match, click, long_view, rng)
    return Log(
        user_id=block.first_user + user.astype(np.int64),
        item=item,
        timestamp_ms=_timestamps(schedule, first_row, watched, rng),
        watch_time_s=watched,
        duration_s=world.duration_s[item],
        feedback=feedback,
    )


def _social(
    block: Block,
    world: w.World,
    user: Array,
    item: Array,
    match: Array,
    click: Array,
    long_view: Array,
    rng: np.random.Generator,
) -> dict[str, Array]:
    """The feedback that only a click can bring."""
    rows = np.flatnonzero(click)
    v, quality = match[rows], world.quality[item[rows]]
    watched_long, generosity = long_view[rows].astype(np.float32), block.generosity[user[rows]]
    feedback = {}
    for name, kind in law.SOCIAL.items():
        probability = law.sigmoid(law.social_logit(kind, v, quality, watched_long, generosity))
        given = np.zeros(len(item), dtype=np.bool_)
        given[rows] = rng.random(len(rows), dtype=np.float32) < probability
        feedback[name] = given
    return feedback


def _timestamps(
    schedule: Schedule, first_row: Array, watched: Array, rng: np.random.Generator
) -> Array:
    """Milliseconds since the start of the log at which each video started."""
    step = (1000 * watched).astype(np.int64)
    step += rng.integers(*law.GAP_MS, size=len(watched), dtype=np.int64)
    elapsed = np.cumsum(step) - step
    return elapsed + np.repeat(schedule.start_ms - elapsed[first_row], schedule.length)
