"""What is drawn obeys what is stated: frequencies against the oracle's exact probabilities.

Bounds are in standard errors. With fixed seeds nothing is random here; 4.5 standard errors keep
the test honest under any other seed (one false alarm in 150,000 comparisons).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pytest

from components.data.contracts import FEEDBACK
from components.data.simulator.config import SimulatorConfig
from components.data.simulator.ground_truth import GroundTruth, Moment, facts
from components.data.simulator.stream import simulate
from components.data.simulator.world import build_world

STANDARD_ERRORS = 4.5
#: Nobody dislikes anything there.
SIMULATED = tuple(name for name in FEEDBACK if name != "dislike")
CONFIG = SimulatorConfig(
    users=1_500, items=1_000, interactions=100_000, render_videos=False, dirty_rate=0.0
)
HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Log:
    """The interactions, and of each row its slot and the row of its session's first video."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    slot: np.ndarray
    opening: np.ndarray
    watched: np.ndarray
    feedback: dict[str, np.ndarray]

    def moment(self, row: int) -> Moment:
        user, time = int(self.user[row]), int(self.time[row])
        if self.slot[row] == 0:
            return Moment(user, time)
        return Moment(
            user,
            time,
            int(self.slot[row]),
            int(self.item[row - 1]),
            bool(self.feedback["long_view"][row - 1]),
            int(self.item[self.opening[row]]),
        )


@lru_cache
def platform(config: SimulatorConfig = CONFIG, seed: int = 5) -> tuple[GroundTruth, Log]:
    read = pa.Table.from_batches(list(simulate(config, seed).tables["interactions"]()))
    user, time = read["user_id"].to_numpy(), read["timestamp"].to_numpy().astype(np.int64)
    # Sessions are found as a reader of the log would: a user's pause of over 20 minutes.
    pause = np.diff(time) - (1000 * read["watch_time_s"].to_numpy()[:-1]).astype(np.int64)
    starts = np.concatenate([[True], (np.diff(user) != 0) | (pause > HOUR_MS / 3)])
    rows = np.arange(len(user))
    opening = np.maximum.accumulate(np.where(starts, rows, 0))
    log = Log(
        user=user,
        item=read["item_id"].to_numpy(),
        time=time,
        slot=rows - opening,
        opening=opening,
        watched=read["watch_time_s"].to_numpy() / read["duration_s"].to_numpy(),
        feedback={name: read[name].to_numpy() for name in SIMULATED},
    )
    return GroundTruth(config, seed), log


def within(observed: np.ndarray, probability: np.ndarray) -> None:
    """Σ of independent Bernoulli draws against Σ p, in standard errors."""
    error = np.sqrt((probability * (1 - probability)).sum())
    assert abs(observed.sum() - probability.sum()) < STANDARD_ERRORS * error + 1e-9


def sample(rows: np.ndarray, count: int) -> np.ndarray:
    return np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False)


@pytest.mark.parametrize("first", [True, False], ids=["session_start", "within_session"])
def test_shown_items_follow_the_stated_exposure(first: bool) -> None:
    truth, log = platform()
    rows = sample(np.flatnonzero((log.slot == 0) == first), 4_000)
    stated = np.stack([truth.next_item(log.moment(row)) for row in rows])
    shown = log.item[rows] - 1
    here = np.arange(len(rows))
    np.testing.assert_allclose(stated.sum(1), 1.0, rtol=1e-9)

    # The log-likelihood of what was shown, against its exact mean and variance.
    surprise = np.log(np.maximum(stated, 1e-300))
    mean = (stated * surprise).sum(1)
    variance = (stated * surprise**2).sum(1) - mean**2
    error = np.sqrt(variance.sum())
    assert abs((surprise[here, shown] - mean).sum()) < STANDARD_ERRORS * error

    # Groups of items that each term of the mixture feeds differently.
    last = np.array([max(row - 1, 0) for row in rows])
    groups = {
        "head": truth.weight > np.quantile(truth.weight, 0.98),
        "tail": truth.weight < np.quantile(truth.weight, 0.3),
    }
    events = {name: np.broadcast_to(g, stated.shape) for name, g in groups.items()}
    if not first:
        motif, topic, theme = (
            a[log.item[last] - 1] for a in (truth.motif, truth.topic, truth.theme)
        )
        bingers = np.array([truth._user(int(u)).momentum > 0 for u in log.user[rows]])
        opened = truth.topic[log.item[log.opening[rows]] - 1]
        events |= {
            "motif": truth.motif == motif[:, None],
            "topic": truth.topic == topic[:, None],
            "theme": truth.theme == theme[:, None],
            "opening_topic": (truth.topic == opened[:, None]) & (topic != opened)[:, None],
            "after_long_view": (truth.topic == topic[:, None])
            & log.feedback["long_view"][last][:, None],
            "after_anything_by_bingers": (truth.topic == topic[:, None]) & bingers[:, None],
            "after_skip": (truth.topic == topic[:, None])
            & ~log.feedback["long_view"][last][:, None],
        }
    for event in events.values():
        within(event[here, shown], (stated * event).sum(1))


def test_within_a_session_no_item_follows_itself() -> None:
    _, log = platform()
    same = log.item[1:] == log.item[:-1]
    assert not same[log.slot[1:] > 0].any()


def test_next_episodes_are_shown_as_often_as_stated() -> None:
    truth, log = platform()
    rows = sample(np.flatnonzero(log.slot > 0), 3_000)
    tree = truth.world.position(log.item[rows - 1])
    rows, tree = rows[truth.world.has_next[tree]], tree[truth.world.has_next[tree]]
    following = truth.world.item_id[tree + 1]
    stated = np.array(
        [truth.next_item(log.moment(r))[f - 1] for r, f in zip(rows, following, strict=True)]
    )
    within(log.item[rows] == following, stated)
    assert stated.mean() > 0.1


@pytest.mark.parametrize("name", SIMULATED)
def test_feedback_is_as_frequent_as_stated_in_every_tenth_of_probability(name: str) -> None:
    _, log = platform()
    stated = _stated_feedback()[name]
    given = log.feedback[name][: len(stated)]
    within(given, stated)
    for tenth in np.array_split(np.argsort(stated, kind="stable"), 10):
        within(given[tenth], stated[tenth])
    assert stated.std() > 0.3 * stated.mean()


@lru_cache
def _stated_feedback() -> dict[str, np.ndarray]:
    """Of all rows of the first 600 users, asked for by user, day and slot."""
    truth, log = platform()
    count = int(np.searchsorted(log.user, 600, side="right"))
    stated = {name: np.empty(count) for name in SIMULATED}
    day = log.time // (24 * HOUR_MS)
    keys = np.stack([log.user, day, log.slot])[:, :count]
    order = np.lexsort(keys[::-1])
    cuts = np.flatnonzero((np.diff(keys[:, order]) != 0).any(0)) + 1
    for rows in np.split(order, cuts):
        r = rows[0]
        p = truth.feedback(int(log.user[r]), int(log.time[r]), log.item[rows], int(log.slot[r]))
        for name in SIMULATED:
            stated[name][rows] = p[name]
    return stated


def test_watch_ratios_follow_the_stated_distributions() -> None:
    _, log = platform()
    stated = _stated_feedback()
    count = len(stated["click"])
    click, watched = log.feedback["click"][:count], log.watched[:count]
    # Without a click: uniform on 0 … 0.3. Kolmogorov-Smirnov distance at 4.5 standard errors.
    skipped = np.sort(watched[~click]) / 0.3
    steps = np.arange(1, len(skipped) + 1) / len(skipped)
    assert np.abs(skipped - steps).max() < STANDARD_ERRORS * 0.5 / np.sqrt(len(skipped))
    # With a click: log(ratio / 0.8) / 0.5 is logistic around η = logit P(long_view | click).
    conditional = stated["long_view"][click] / stated["click"][click]
    eta = np.log(conditional / (1 - conditional))
    for ratio in (0.2, 0.5, 1.5, 2.9):
        beyond = 1 / (1 + np.exp(-(eta - np.log(ratio / 0.8) / 0.5)))
        within(watched[click] >= ratio, beyond)


def test_later_slots_are_clicked_less_by_the_stated_bias() -> None:
    truth, log = platform()
    user, time, item = int(log.user[0]), int(log.time[0]), [int(log.item[0])]

    def logit(slot: int) -> float:
        p = truth.feedback(user, time, item, slot)["click"][0]
        return float(np.log(p / (1 - p)))

    assert logit(0) - logit(9) == pytest.approx(CONFIG.position_bias * np.log(10))
    unbiased = GroundTruth(CONFIG.model_copy(update={"position_bias": 0.0}), 5)
    first, later = (unbiased.feedback(user, time, item, slot)["click"][0] for slot in (0, 9))
    assert first == later


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_taste_drifts_as_an_ornstein_uhlenbeck_process(share: float) -> None:
    config = CONFIG.model_copy(update={"drift_share": share, "interactions": 10_000})
    truth = GroundTruth(config, 1)
    affinity = np.stack([truth.affinity(u) for u in range(1, 1_001)])
    for lag in (1, 5, 20):
        centred = affinity - affinity.mean((0, 1))
        observed = (centred[:, :-lag] * centred[:, lag:]).mean() / (centred**2).mean()
        stated = 1 - share + share * np.exp(-lag / config.drift_days)
        # 1,000 users of 12 independent latents: correlations are known to about 0.02.
        assert observed == pytest.approx(stated, abs=0.05)
    assert (affinity**2).mean() == pytest.approx(1.0, abs=0.1)


def test_drift_changes_the_favourite_topic_of_many_users_within_the_month() -> None:
    truth, _ = platform()
    affinity = np.stack([truth.affinity(u) for u in range(1, 501)])
    moved = affinity[:, 0].argmax(1) != affinity[:, -1].argmax(1)
    assert moved.mean() > 0.4


def test_user_features_tell_part_of_the_taste() -> None:
    source = simulate(CONFIG, 5)
    users = pa.Table.from_batches(list(source.tables["users"]())).to_pandas()
    truth, _ = platform()
    taste = np.stack([truth.affinity(u).mean(0) for u in users["user_id"]])
    total = taste.var(0).mean()
    for feature in ("gender", "age", "region", "device"):
        means = users[[feature]].assign(**{str(k): taste[:, k] for k in range(taste.shape[1])})
        explained = means.groupby(feature).transform("mean").to_numpy().var(0).mean() / total
        # Labels shuffled over 1,500 users explain at most 7/1500 = 0.5 % on average.
        assert explained > 0.015


def test_bayes_ranking_beats_popularity_and_bigram_on_the_next_item() -> None:
    truth, log = platform()
    day = (log.time - log.time.min()) // (24 * HOUR_MS)
    train = day < 27
    popularity = np.bincount(log.item[train] - 1, minlength=CONFIG.items).astype(float)
    bigram = np.zeros((CONFIG.items, CONFIG.items))
    pairs = np.flatnonzero(train[1:] & (log.slot[1:] > 0))
    np.add.at(bigram, (log.item[pairs] - 1, log.item[pairs + 1] - 1), 1)

    rows = sample(np.flatnonzero(~train & (log.slot > 0)), 1_200)
    gain = {"bayes": [], "popularity": [], "bigram": []}
    for row in rows:
        target = log.item[row] - 1
        scores = {
            "bayes": truth.relevance(log.moment(row)),
            "popularity": popularity,
            "bigram": bigram[log.item[row - 1] - 1] + 1e-6 * popularity,
        }
        for name, score in scores.items():
            rank = 1 + (score > score[target]).sum()
            gain[name].append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
    ndcg = {name: np.array(values) for name, values in gain.items()}
    assert ndcg["bayes"].mean() > 2.5 * ndcg["popularity"].mean()
    difference = ndcg["bayes"] - ndcg["bigram"]
    assert difference.mean() > 3 * difference.std() / np.sqrt(len(rows))


def test_ranking_for_a_kind_of_feedback_orders_by_the_joint_probability() -> None:
    truth, log = platform()
    moment = log.moment(int(np.flatnonzero(log.slot > 0)[0]))
    ids = np.arange(1, CONFIG.items + 1)
    joint = (
        truth.next_item(moment)
        * (truth.feedback(moment.user_id, moment.timestamp_ms, ids, moment.slot)["like"])
    )
    ranked = truth.rank(moment, "like")
    assert sorted(ranked) == list(ids)
    assert (np.diff(joint[ranked - 1]) <= 0).all()


def test_moment_of_a_history_is_the_moment_of_the_log() -> None:
    truth, log = platform()
    for row in sample(np.flatnonzero(log.user == log.user[0]), 30):
        past = np.arange(np.searchsorted(log.user, log.user[row]), row)
        found = truth.moment(
            int(log.user[row]),
            int(log.time[row]),
            log.item[past],
            log.time[past],
            log.feedback["long_view"][past],
        )
        assert found == log.moment(int(row))


def test_facts_are_json_and_count_what_is_simulated() -> None:
    import json

    told = json.loads(json.dumps(facts(CONFIG, 5)))
    assert told["interactions_before_faults"] == len(platform()[1].user)
    assert told["motifs"] == len(build_world(CONFIG, 5).motif_topic)
    assert simulate(CONFIG, 5).ground_truth["seed"] == 5
