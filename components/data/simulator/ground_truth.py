"""The oracle: what the model of ``behaviour`` says exactly about a user at a time.

It knows the latents that a recommender has to infer, so its ranking is the best any method can
reach in expectation. Exposure is evaluated term by term over the whole catalogue, by another road
than ``sampling`` takes; a test compares the two. For tests and reports, not for large catalogues:
one ranking is O(N).

Shapes: N items in the order of their public ids 1 … N, n items asked for, K topics, T days.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from components.data.simulator import behaviour as law
from components.data.simulator import world as w
from components.data.simulator.config import SimulatorConfig
from components.data.simulator.population import (
    CELL_MS,
    DAY_MS,
    TASTE_SCALE,
    Block,
    count_interactions,
    latent_path,
    laws,
    make_block,
)

Array = np.ndarray


@dataclass(frozen=True)
class Moment:
    """Where in a session a user is, just before the next video.

    Attributes:
        user_id: public id.
        timestamp_ms: milliseconds since 1970-01-01 UTC; only its day matters.
        slot: videos already shown in the session.
        last_item, last_long_view, opening_item: the last video of the session, whether it got a
            long view, and the first video of the session; None in slot 0.
    """

    user_id: int
    timestamp_ms: int
    slot: int = 0
    last_item: int | None = None
    last_long_view: bool = False
    opening_item: int | None = None


@dataclass(frozen=True, eq=False)
class _User:
    liking_C: Array
    generosity: float
    momentum: float
    affinity_TK: Array


class GroundTruth:
    """Probabilities and Bayes-optimal rankings of the platform of ``(config, seed)``."""

    def __init__(self, config: SimulatorConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.world = w.build_world(config, seed)
        by_id = self.world.by_id
        self.weight = self.world.weight[by_id]
        self.topic = self.world.item_topic[by_id].astype(np.int64)
        self.motif = self.world.item_motif[by_id].astype(np.int64)
        self.colour = self.world.item_colour[by_id].astype(np.int64)
        self.theme_of_topic = self.world.theme_of_topic
        self.theme = self.theme_of_topic[self.topic]
        start = np.datetime64(config.start_date, "ms").astype(np.int64)
        self._start_ms = int(start)
        self._block = lru_cache(maxsize=2)(self._make_block)
        self._user = lru_cache(maxsize=4096)(self._make_user)

    def _make_block(self, number: int) -> tuple[Block, Array]:
        block = make_block(self.config, self.seed, number)
        return block, latent_path(self.config, self.seed, block)

    def _make_user(self, user_id: int) -> _User:
        law_ = laws(self.config, self.seed)
        number, row = divmod(user_id - 1, law_.block_users)
        block, path = self._block(number)
        return _User(
            liking_C=block.colour[row].astype(np.float64),
            generosity=float(block.generosity[row]),
            momentum=float(block.momentum[row]),
            affinity_TK=path[:, row].astype(np.float64) @ law_.topic_embedding.T,
        )

    def affinity(self, user_id: int) -> Array:
        """A_uk(d) for all days of the log, [T, K] float64."""
        return self._user(user_id).affinity_TK

    def _affinity_at(self, user_id: int, timestamp_ms: int) -> Array:
        return self.affinity(user_id)[(timestamp_ms - self._start_ms) // DAY_MS]

    def taste(self, user_id: int, timestamp_ms: int) -> Array:
        """θ_uk(d), [K] float64, sums to one."""
        return law.softmax(TASTE_SCALE * self._affinity_at(user_id, timestamp_ms))

    def _by_topic(self, user_id: int) -> Array:
        """P_u(i | k(i)), [N]."""
        mass = self.weight * np.exp(self._user(user_id).liking_C[self.colour])
        total = np.bincount(self.topic, mass, minlength=self.config.num_topics)
        return mass / total[self.topic]

    def next_item(self, moment: Moment) -> Array:
        """P(i | u, d, j, l_j, a) of every item, [N] float64, sums to one."""
        theta = self.taste(moment.user_id, moment.timestamp_ms)
        in_topic = self._by_topic(moment.user_id)
        by_taste = theta[self.topic] * in_topic
        fresh = (
            law.FRESH_POPULARITY * self.weight
            + law.FRESH_TASTE * by_taste
            + law.FRESH_EXPLORE / len(self.weight)
        )
        if moment.last_item is None or moment.opening_item is None:
            return fresh
        j, a = moment.last_item - 1, moment.opening_item - 1
        same_motif = self.motif == self.motif[j]
        motif = np.where(same_motif, self.weight, 0.0) / self.weight[same_motif].sum()
        tree = self.world.by_id[j]
        if self.world.has_next[tree]:
            episode = np.zeros_like(fresh)
            episode[self.world.item_id[tree + 1] - 1] = 1.0
        else:
            episode = motif
        same_theme = self.theme == self.theme[j]
        theme = np.where(same_theme, by_taste, 0.0)
        theme /= theta[self.theme_of_topic == self.theme[j]].sum()
        walk = (
            law.NEXT_EPISODE * episode
            + law.SAME_MOTIF * motif
            + law.SAME_TOPIC * np.where(self.topic == self.topic[j], in_topic, 0.0)
            + law.OPENING_TOPIC * np.where(self.topic == self.topic[a], in_topic, 0.0)
            + law.SAME_THEME * theme
        )
        stay = law.stay_probability(
            float(moment.last_long_view), self._user(moment.user_id).momentum
        )
        shown = (1 - stay) * fresh + stay * walk
        shown[j] = 0.0
        return shown / shown.sum()

    def feedback(
        self, user_id: int, timestamp_ms: int, item_ids: Sequence[int] | Array, slot: int = 0
    ) -> dict[str, Array]:
        """P(feedback | shown) of items [n] in ``slot``, one [n] float64 for each simulated kind."""
        user, tree = self._user(user_id), self.world.position(np.asarray(item_ids))
        topic, colour = self.world.item_topic[tree], self.world.item_colour[tree]
        v = law.match(self._affinity_at(user_id, timestamp_ms)[topic], user.liking_C[colour])
        quality = self.world.quality[tree].astype(np.float64)
        duration = self.world.duration_s[tree].astype(np.float64)
        click = law.sigmoid(law.click_logit(v, quality, slot, self.config.position_bias))
        watched = law.sigmoid(law.watch_logit(v, quality, duration))
        probability = {"click": click, "long_view": click * watched}
        for name, kind in law.SOCIAL.items():
            after = [
                law.sigmoid(law.social_logit(kind, v, quality, long_view, user.generosity))
                for long_view in (0.0, 1.0)
            ]
            probability[name] = click * ((1 - watched) * after[0] + watched * after[1])
        return probability

    def relevance(self, moment: Moment, feedback: str | None = None) -> Array:
        """[N] probability that an item comes next, and gets ``feedback`` where that is given."""
        shown = self.next_item(moment)
        if feedback is None:
            return shown
        ids = np.arange(1, len(shown) + 1)
        given = self.feedback(moment.user_id, moment.timestamp_ms, ids, moment.slot)
        return shown * given[feedback]

    def rank(self, moment: Moment, feedback: str | None = None) -> Array:
        """Item ids [N], the Bayes-optimal ranking: most probable first, ties by id."""
        return np.argsort(-self.relevance(moment, feedback), kind="stable") + 1

    def moment(
        self,
        user_id: int,
        timestamp_ms: int,
        item_ids: Sequence[int],
        timestamps_ms: Sequence[int],
        long_view: Sequence[bool],
    ) -> Moment:
        """The moment after a history of *all* impressions, oldest first.

        Raises nothing on a history with gaps, but is then wrong about the last item: give it the
        impressions without feedback as well.
        """
        cells = np.asarray(timestamps_ms, dtype=np.int64) // CELL_MS
        here = np.flatnonzero(cells == timestamp_ms // CELL_MS)
        if len(here) == 0:
            return Moment(user_id, timestamp_ms)
        return Moment(
            user_id,
            timestamp_ms,
            slot=len(here),
            last_item=int(item_ids[here[-1]]),
            last_long_view=bool(long_view[here[-1]]),
            opening_item=int(item_ids[here[0]]),
        )


def facts(config: SimulatorConfig, seed: int) -> dict[str, Any]:
    """What a report may tell of the truth behind the data; JSON types only.

    ``dirty`` counts the faults put in on purpose by kind, see ``corrupt``.
    """
    from components.data.simulator.corrupt import ROW_KINDS, draw_faults

    world, rows = w.build_world(config, seed), count_interactions(config, seed)
    popularity = np.sort(world.weight)[::-1]
    return {
        "seed": seed,
        "config": config.model_dump(mode="json"),
        "topics": config.num_topics,
        "motifs": len(world.motif_topic),
        "authors": len(np.unique(world.author_id)),
        "interactions_before_faults": rows,
        "dirty": draw_faults(rows, ROW_KINDS, config.dirty_rate, seed).counts,
        "popularity_share_of_top_percent": float(
            popularity[: math.ceil(0.01 * len(popularity))].sum()
        ),
        "taste_half_life_days": float(config.drift_days * math.log(2)),
        "coefficients": {
            name: getattr(law, name)
            for name in sorted(vars(law))
            if name.isupper() and isinstance(getattr(law, name), float)
        },
    }
