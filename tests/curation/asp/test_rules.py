"""Claims about all selection rules: sizes, seeds, states, and what each prefers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from components.curation.asp.asp_r import AspR
from components.curation.asp.config import AspConfig, ScheduleConfig
from components.curation.asp.portfolio import SIGNALS as PORTFOLIO
from components.curation.asp.portfolio import TASTES, Portfolio
from components.curation.asp.ranks import Ranks
from components.curation.asp.rules import Even, Given, Hardest, InfoBatch, shorter
from components.curation.asp.schedule import Schedule
from components.curation.asp.selector import Manifest, Seen, Selector, gini
from components.pipeline.errors import StageError

N, EPOCHS = 400, 6
SIGNALS = ("loss", "el2n", "grand_last", "entropy", "margin")
CLASS_N = np.repeat(np.arange(4), (200, 100, 80, 20))


def config(ratio: float = 0.25, **settings: object) -> AspConfig:
    return AspConfig(schedule=ScheduleConfig(ratio=ratio), **settings)


def asp_r(chosen: AspConfig | None = None, size: int = N, seed: int = 0, **more: object) -> AspR:
    chosen = chosen or config()
    return AspR(Schedule.of(chosen.schedule, size, EPOCHS), seed, config=chosen, **more)


def portfolio(epochs: int = EPOCHS, seed: int = 0) -> Portfolio:
    every_signal = config(signals=dict.fromkeys(PORTFOLIO, 1.0))
    return Portfolio(
        Schedule.of(every_signal.schedule, N, epochs), seed, config=every_signal, every=1
    )


def schedule(ratio: float = 0.25, epochs: int = EPOCHS, size: int = N) -> Schedule:
    return Schedule.of(ScheduleConfig(ratio=ratio), size, epochs)


RULES: dict[str, Callable[[], Selector]] = {
    "asp_r": asp_r,
    "asp_r_all_signals": lambda: asp_r(
        config(signals={**dict.fromkeys(SIGNALS, 1.0), "forgetting": 0.5}, noise_share=0.05)
    ),
    "asp_r_stratified": lambda: asp_r(config(stratified=True), class_N=CLASS_N),
    "asp_r_unbiased": lambda: asp_r(config(mode="unbiased")),
    "asp_r_infobatch": lambda: asp_r(config(mode="infobatch")),
    "portfolio": lambda: portfolio(),
    "even": lambda: Even(schedule(), 0),
    "even_static": lambda: Even(schedule(), 0, static=True),
    "even_stratified": lambda: Even(schedule(), 0, class_N=CLASS_N),
    "given": lambda: Given(schedule(), 0, index_S=np.arange(0, N, 4)),
    "hardest": lambda: Hardest(schedule(), 0),
    "infobatch": lambda: InfoBatch(schedule(), 0),
}


def seen_of(selector: Selector, index_S: np.ndarray, hardness_N: np.ndarray | None = None) -> Seen:
    """Signals that stay with a sample, and some noise of the epoch."""
    rng = np.random.default_rng(selector.epoch)
    hard_N = np.linspace(0, 1, N) if hardness_N is None else hardness_N
    value_S = (hard_N[index_S] + 0.05 * rng.random(len(index_S))).astype(np.float32)
    return Seen(index_S, dict.fromkeys(SIGNALS, value_S), rng.random(len(index_S)) > value_S)


def run(selector: Selector, epochs: int = EPOCHS) -> list[Manifest]:
    """The manifests of the next epochs."""
    found = []
    for _ in range(epochs):
        subset = selector.select(selector.epoch + 1)
        selector.observe(seen_of(selector, subset.index_S))
        if selector.wants_validation:
            selector.judge(1 / selector.epoch)
        found.append(Manifest.of(selector, subset))
    return found


@pytest.mark.parametrize("name", RULES)
def test_subsets_have_their_size_and_no_sample_twice(name: str) -> None:
    selector = RULES[name]()
    for epoch in range(1, EPOCHS + 1):
        subset = selector.select(epoch)
        assert (np.diff(subset.index_S) > 0).all()
        assert 0 <= subset.index_S[0] <= subset.index_S[-1] < N
        if name != "infobatch":
            assert len(subset.index_S) == 100
        if subset.weight_S is not None:
            assert subset.weight_S.shape == subset.index_S.shape
            assert subset.weight_S.min() > 0
        if "stratified" in name:
            assert np.bincount(CLASS_N[subset.index_S]).tolist() == [50, 25, 20, 5]
        selector.observe(seen_of(selector, subset.index_S))
    assert selector.visit_N.sum() == sum(selector.visit_N)


@pytest.mark.parametrize("name", RULES)
def test_a_run_that_was_killed_goes_on_to_the_same_subsets(name: str) -> None:
    def record(manifests: list[Manifest]) -> list[tuple]:
        return [(m.epoch, m.digest, m.samples, m.gini, m.never_seen) for m in manifests]

    whole = record(run(RULES[name]()))
    killed = RULES[name]()
    begun = record(run(killed, 2))
    state = killed.state()
    run(killed, 1)
    resumed = RULES[name]()
    resumed.restore(state)
    assert begun + record(run(resumed, EPOCHS - 2)) == whole


@pytest.mark.parametrize("name", ["asp_r", "even", "hardest"])
def test_subsets_change_with_epoch_and_seed(name: str) -> None:
    digests = [m.digest for m in run(RULES[name]())]
    assert len(set(digests)) == EPOCHS
    other = RULES[name]()
    other.seed = 1
    assert not set(digests) & {m.digest for m in run(other)}


def test_static_subsets_do_not_change() -> None:
    for name in ("even_static", "given"):
        (last,) = {m.never_seen for m in run(RULES[name]())}
        assert last == 0.75


@pytest.mark.parametrize(
    ("fact", "other"),
    [
        ("seed", lambda: asp_r(seed=1)),
        ("rule", lambda: asp_r(config(temperature=0.5))),
        ("rule", lambda: Even(schedule(), 0)),
        ("samples", lambda: asp_r(size=N + 1)),
        ("sizes", lambda: AspR(schedule(0.5), 0, config=config())),
        ("data", lambda: asp_r(data_digest="b")),
    ],
)
def test_a_state_of_something_else_is_refused(fact: str, other: Callable[[], Selector]) -> None:
    selector = asp_r(data_digest="a") if fact == "data" else asp_r()
    run(selector, 2)
    with pytest.raises(StageError, match=f"the state of the selection has {fact} ") as refused:
        other().restore(selector.state())
    assert "begin without a state" in str(refused.value)


@pytest.mark.parametrize("name", ["asp_r", "hardest", "infobatch"])
def test_a_signal_that_is_not_a_number_is_told_and_changes_nothing(name: str) -> None:
    selector = RULES[name]()
    run(selector, 1)
    before = selector.state()
    index_S = selector.select(2).index_S
    seen = seen_of(selector, index_S)
    for value_S in {id(x): x for x in seen.signals.values()}.values():
        value_S[7] = np.nan
    message = rf"of 1 of {len(index_S)} samples is not a number in epoch 2, first of sample "
    with pytest.raises(StageError, match=message + str(index_S[7])):
        selector.observe(seen)
    after = selector.state()
    assert after.epoch == 1
    assert all(np.array_equal(x, after.arrays[name]) for name, x in before.arrays.items())


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        config(ratio)


@pytest.mark.parametrize(
    "wrong",
    [
        {"signals": {"el2n": 0.0}},
        {"signals": {"el2n": 1.0, "loss": -1.0}},
        {"signals": {}},
        {"signals": {"nothing": 1.0}},
        {"schedule": {"kind": "linear"}},
        {"schedule": {"last_ratio": 0.5}},
    ],
)
def test_rules_that_say_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        AspConfig(**wrong)


def test_all_data_needs_no_draw_and_is_in_the_order_of_plain_training() -> None:
    whole = asp_r(config(1.0))
    for epoch in (1, 2):
        subset = whole.select(epoch)
        assert np.array_equal(subset.index_S, np.arange(N))
        assert subset.weight_S is None
        whole.observe(seen_of(whole, subset.index_S))


def test_equal_scores_or_an_even_share_of_1_draw_all_samples_alike() -> None:
    alike = config(uniform_share=1.0)
    many = AspR(Schedule.of(alike.schedule, N, 800), 0, config=alike)
    for _ in range(800):
        many.observe(seen_of(many, many.select(many.epoch + 1).index_S))
    assert many.visit_N.mean() == 200
    # Each count is binomial: 800 draws of a quarter.
    assert many.visit_N.std() == pytest.approx(math.sqrt(800 * 0.25 * 0.75), rel=0.15)
    assert abs(np.corrcoef(many.visit_N, np.arange(N))[0, 1]) < 4 / math.sqrt(N)


def test_hard_samples_are_drawn_more_often_and_easy_ones_still() -> None:
    rule = config(0.25)
    selector = AspR(Schedule.of(rule.schedule, N, 60), 0, config=rule)
    run(selector, 60)
    easy, middle, hard = (part.mean() for part in np.array_split(selector.visit_N, 3))
    assert hard > 1.3 * middle > 1.3 * easy
    assert (selector.visit_N > 0).mean() > 0.99


def test_scores_are_moving_averages_of_visits_and_variances_of_what_moved() -> None:
    selector = asp_r(config(1.0, signals={"loss": 1.0, "el2n": 1.0}))
    index_S = np.arange(N)

    def observe(loss: float, el2n: float, correct: bool) -> None:
        signals = {"loss": loss, "el2n": el2n}
        given = {name: np.full(N, value, np.float32) for name, value in signals.items()}
        selector.observe(Seen(index_S, given, np.full(N, correct)))

    observe(2.0, 1.0, True)
    assert selector.score_MN[:, 0].tolist() == [2.0, 1.0]
    assert selector.variance_N[0] == 0
    observe(1.0, 0.5, False)
    assert selector.score_MN[:, 3].tolist() == [1.5, 0.75]
    # Half of (1 - 1.5)² beside half of nothing.
    assert selector.variance_N[3] == pytest.approx(0.125)
    assert selector.last_N[3] == 2
    long = AspR(Schedule.of(ScheduleConfig(ratio=1.0), N, 21), 0, config=config(1.0))
    assert (selector.decay, long.decay) == (0.5, 0.8)


def test_forgetting_counts_from_right_to_wrong() -> None:
    selector = asp_r(config(1.0, signals={"forgetting": 1.0}))
    assert selector.signals == ()
    right = {0: [1, 0, 1, 0, 0, 1], 1: [0, 0, 0, 1, 1, 1], 2: [1, 1, 1, 1, 1, 0]}
    for epoch in range(EPOCHS):
        correct_S = np.ones(N, bool)
        for sample, of_epochs in right.items():
            correct_S[sample] = of_epochs[epoch]
        selector.observe(Seen(np.arange(N), {}, correct_S))
    assert selector.forgotten_N[:4].tolist() == [2, 0, 1, 0]
    assert selector.score_MN[0, :4].tolist() == [2, 0, 1, 0]


def test_planted_informative_samples_are_found_and_planted_mistakes_left() -> None:
    """A tenth is hard; with a guard, the hardest of all, mislabelled ones, are drawn like any."""
    hardness_N = np.full(N, 0.1)
    hardness_N[:40] = 1.0

    def share_of_planted(selector: Selector) -> float:
        picked = []
        for epoch in range(1, 61):
            index_S = selector.select(epoch).index_S
            picked.append(np.mean(index_S < 40))
            selector.observe(seen_of(selector, index_S, hardness_N))
        return float(np.mean(picked[30:]))

    def rule(**settings: object) -> AspR:
        chosen = config(0.1, uniform_share=0.2, staleness=0.0, uncertainty=0.0, **settings)
        return AspR(Schedule.of(chosen.schedule, N, 60), 0, config=chosen)

    found, guarded = share_of_planted(rule()), share_of_planted(rule(noise_share=0.1))
    hardest = share_of_planted(Hardest(schedule(0.1, 60), 0))
    assert found > 0.2 > 0.15 > guarded
    assert guarded < 0.5 * hardest


def test_unbiased_weights_give_the_gradient_of_all_data_on_average() -> None:
    rng = np.random.default_rng(0)
    gradient_ND = rng.normal(size=(N, 5)) + np.linspace(0, 2, N)[:, None]
    rule = config(0.25, mode="unbiased", max_weight=None, normalised=False)
    sums = []
    for seed in range(400):
        selector = AspR(Schedule.of(rule.schedule, N, EPOCHS), seed, config=rule)
        selector.score_MN[0], selector.last_N[:] = np.linspace(0, 1, N), 1
        subset = selector.select(2)
        assert subset.weight_S is not None
        sums.append((subset.weight_S[:, None] * gradient_ND[subset.index_S]).mean(0))
    error_D = np.std(sums, 0) / math.sqrt(len(sums))
    assert (np.abs(np.mean(sums, 0) - gradient_ND.mean(0)) < 4 * error_D).all()
    # Without weights it is far from that: the rule prefers the end.
    index_S = selector.select(2).index_S
    assert gradient_ND[index_S].mean() > gradient_ND.mean() + 0.1


def test_infobatch_leaves_out_easy_samples_and_weighs_the_rest_of_them_more() -> None:
    selector = InfoBatch(schedule(1.0, 8), 0)
    assert len(selector.select(1).index_S) == N  # all have the initial loss
    loss_N = np.where(np.arange(N) < 300, 0.5, 2.5).astype(np.float32)
    selector.observe(Seen(np.arange(N), {"loss": loss_N}, np.ones(N, bool)))
    subset = selector.select(2)
    assert subset.weight_S is not None
    low_S = subset.index_S < 300
    assert (int(low_S.sum()), int((~low_S).sum())) == (150, 100)
    assert set(subset.weight_S[low_S]) == {2.0}
    assert set(subset.weight_S[~low_S]) == {1.0}
    assert subset.weight_S.sum() == N
    assert len(selector.select(8).index_S) == N  # 7 of 8 epochs are over


def test_asp_r_in_the_mode_of_infobatch_has_the_size_and_stands_for_all() -> None:
    rule = config(0.7, mode="infobatch", normalised=False, uncertainty=0.0, staleness=0.0)
    selector = AspR(Schedule.of(rule.schedule, N, EPOCHS), 0, config=rule)
    selector.score_MN[0], selector.last_N[:] = np.linspace(0, 1, N), 1
    subset = selector.select(2)
    assert subset.weight_S is not None
    assert len(subset.index_S) == 280
    assert subset.weight_S.sum() == pytest.approx(N)
    assert set(subset.index_S) >= set(range(N // 2, N))
    assert np.unique(subset.weight_S).tolist() == pytest.approx([1.0, 2.5])


def test_ranks_are_those_of_a_sort_among_the_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    score_N = np.round(rng.normal(size=5_000), 2).astype(np.float32)
    seen_N = rng.random(5_000) < 0.7
    ranks = Ranks.among(score_N, seen_N)
    ordered = np.sort(score_N[seen_N])
    below, upto = (np.searchsorted(ordered, score_N, side) for side in ("left", "right"))
    expected_N = ((below + upto) / 2 / len(ordered))[seen_N]
    assert np.abs(ranks.of(score_N[seen_N]) - expected_N).max() < 2e-3
    assert ranks.highest == pytest.approx(expected_N.max(), abs=1e-6)
    # Many scores are counted instead of sorted, to the same ranks.
    monkeypatch.setattr("components.curation.asp.ranks.SORTED", 10)
    counted = Ranks.among(score_N, seen_N)
    assert counted.place_K is None
    assert np.array_equal(counted.of(score_N[seen_N]), ranks.of(score_N[seen_N]))
    assert counted.highest == ranks.highest


def test_schedules_have_their_ends_their_tail_and_their_cost() -> None:
    linear = Schedule.of(ScheduleConfig(ratio=0.1, kind="linear", last_ratio=0.5), 100, 5)
    assert linear.count_T.tolist() == [10, 20, 30, 40, 50]
    assert linear.cost == 0.3
    cosine = Schedule.of(ScheduleConfig(ratio=0.1, kind="cosine", last_ratio=0.5), 100, 5)
    assert (cosine.count_T[0], cosine.count_T[2], cosine.count_T[-1]) == (10, 30, 50)
    assert cosine.count_T[1] < 20
    tail = Schedule.of(ScheduleConfig(ratio=0.1, full_tail=0.25), 101, 8)
    assert tail.count_T.tolist() == [10] * 6 + [101] * 2
    assert tail.steps(4) == 6 * 3 + 2 * 26
    assert schedule(1e-9).count(1) == 1
    assert shorter(schedule(0.3, 40)).epochs == 12
    assert shorter(schedule(0.01, 10)).epochs == 1


def test_gini_is_the_mean_difference_over_twice_the_mean() -> None:
    count_N = np.random.default_rng(0).integers(0, 9, 200)
    pairs = np.abs(count_N[:, None] - count_N[None]).mean()
    assert gini(count_N) == pytest.approx(pairs / (2 * count_N.mean()))
    assert gini(np.full(5, 3)) == gini(np.zeros(5, int)) == 0


def test_a_portfolio_learns_which_taste_lowers_the_loss() -> None:
    """The loss falls when samples are drawn by their margin, and by nothing else."""
    selector, loss, picked = portfolio(400), 10.0, []
    for _ in range(400):
        subset = selector.select(selector.epoch + 1)
        margin = "margin" in selector.taste().signals
        picked.append(margin)
        loss -= 0.01 if margin else -0.002
        selector.observe(seen_of(selector, subset.index_S))
        selector.judge(loss)
    good = np.array(["margin" in taste.signals for taste in TASTES])
    assert selector.likely_A[good].sum() > 0.6
    assert np.mean(picked[300:]) > 1.5 * good.mean()
    assert selector.likely_A.min() >= selector.explore / len(TASTES)


def test_a_portfolio_is_told_when_the_loss_is_no_number() -> None:
    selector = portfolio()
    selector.observe(seen_of(selector, selector.select(1).index_S))
    with pytest.raises(StageError, match="the loss of held-out samples is nan after epoch 1"):
        selector.judge(math.nan)
    with pytest.raises(ValueError, match="needs the signals loss"):
        Portfolio(schedule(), 0, config=config())
