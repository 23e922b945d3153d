"""Claims about all selection rules: sizes, seeds, states, and what each prefers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

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
from components.curation.asp.selector import Diverged, Manifest, Seen, Selector, State, gini
from components.pipeline.errors import StageError

N, EPOCHS = 400, 6
SIGNALS = ("loss", "el2n", "grand_last", "entropy", "margin")
CLASS_N = np.repeat(np.arange(4), (200, 100, 80, 20))


def asp_r(
    chosen: AspConfig | None = None,
    ratio: float = 0.25,
    epochs: int = EPOCHS,
    seed: int = 0,
    **more: object,
) -> AspR:
    return AspR(schedule(ratio, epochs), seed, config=chosen or AspConfig(), **more)


def portfolio(epochs: int = EPOCHS, seed: int = 0) -> Portfolio:
    every_signal = AspConfig(signals=dict.fromkeys(PORTFOLIO, 1.0))
    return Portfolio(schedule(epochs=epochs), seed, config=every_signal, every=1)


def schedule(ratio: float = 0.25, epochs: int = EPOCHS, size: int = N) -> Schedule:
    return Schedule.of(ScheduleConfig(ratio=ratio), size, epochs)


RULES: dict[str, Callable[[], Selector]] = {
    "asp_r": asp_r,
    "asp_r_all_signals": lambda: asp_r(
        AspConfig(signals={**dict.fromkeys(SIGNALS, 1.0), "forgetting": 0.5}, noise_share=0.05)
    ),
    "asp_r_stratified": lambda: asp_r(AspConfig(stratified=True), class_N=CLASS_N),
    "asp_r_unbiased": lambda: asp_r(AspConfig(mode="unbiased")),
    "asp_r_infobatch": lambda: asp_r(AspConfig(mode="infobatch")),
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
        ("rule", lambda: asp_r(AspConfig(temperature=0.5))),
        ("rule", lambda: Even(schedule(), 0)),
        ("samples", lambda: AspR(schedule(size=N + 1), 0, config=AspConfig())),
        ("sizes", lambda: asp_r(ratio=0.5)),
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
    message = rf"of 1 of {len(index_S)} samples is not a number up to 1e\+09 in epoch 2, first of "
    message += "sample "
    with pytest.raises(Diverged, match=message + str(index_S[7])):
        selector.observe(seen)
    after = selector.state()
    assert after.epoch == 1
    assert all(np.array_equal(x, after.arrays[name]) for name, x in before.arrays.items())


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5])
def test_a_ratio_outside_of_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        ScheduleConfig(ratio=ratio)


@pytest.mark.parametrize(
    "wrong",
    [
        {"signals": {"el2n": 0.0}},
        {"signals": {"el2n": 1.0, "loss": -1.0}},
        {"signals": {}},
        {"signals": {"nothing": 1.0}},
        {"signals": {"el2n": math.nan}},
        {"signals": {"el2n": math.inf}},
        {"mode": "infobatch", "stratified": True},
    ],
)
def test_rules_that_say_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        AspConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"kind": "linear"}, {"last_ratio": 0.5}])
def test_a_schedule_that_ends_nowhere_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        ScheduleConfig(**wrong)


def test_all_data_needs_no_draw_and_is_in_the_order_of_plain_training() -> None:
    whole = asp_r(ratio=1.0)
    for epoch in (1, 2):
        subset = whole.select(epoch)
        assert np.array_equal(subset.index_S, np.arange(N))
        assert subset.weight_S is None
        whole.observe(seen_of(whole, subset.index_S))


def test_equal_scores_or_an_even_share_of_1_draw_all_samples_alike() -> None:
    many = asp_r(AspConfig(uniform_share=1.0), epochs=800)
    for _ in range(800):
        many.observe(seen_of(many, many.select(many.epoch + 1).index_S))
    # Each count is binomial: 800 draws of a quarter.
    assert many.visit_N.std() == pytest.approx(math.sqrt(800 * 0.25 * 0.75), rel=0.15)
    assert abs(np.corrcoef(many.visit_N, np.arange(N))[0, 1]) < 4 / math.sqrt(N)


def test_hard_samples_are_drawn_more_often_and_easy_ones_still() -> None:
    selector = asp_r(epochs=60)
    run(selector, 60)
    easy, middle, hard = (part.mean() for part in np.array_split(selector.visit_N, 3))
    assert hard > 1.3 * middle > 1.3 * easy
    assert (selector.visit_N > 0).mean() > 0.99


def test_scores_are_moving_averages_of_visits_and_variances_of_what_moved() -> None:
    selector = asp_r(AspConfig(signals={"loss": 1.0, "el2n": 1.0}), 1.0)
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
    long = asp_r(ratio=1.0, epochs=21)
    assert (selector.decay, long.decay) == (0.5, 0.8)


def test_forgetting_counts_from_right_to_wrong() -> None:
    selector = asp_r(AspConfig(signals={"forgetting": 1.0}), 1.0)
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
        chosen = AspConfig(uniform_share=0.2, staleness=0.0, uncertainty=0.0, **settings)
        return asp_r(chosen, 0.1, 60)

    found, guarded = share_of_planted(rule()), share_of_planted(rule(noise_share=0.1))
    hardest = share_of_planted(Hardest(schedule(0.1, 60), 0))
    assert found > 0.2 > 0.15 > guarded
    assert guarded < 0.5 * hardest


def test_unbiased_weights_give_the_gradient_of_all_data_on_average() -> None:
    rng = np.random.default_rng(0)
    gradient_ND = rng.normal(size=(N, 5)) + np.linspace(0, 2, N)[:, None]
    rule = AspConfig(mode="unbiased", max_weight=None, normalised=False)
    sums = []
    for seed in range(400):
        selector = asp_r(rule, seed=seed)
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
    assert [len(selector.select(epoch).index_S) for epoch in (7, 8)] == [250, N]  # 7 of 8 prune


def test_asp_r_in_the_mode_of_infobatch_has_the_size_and_stands_for_all() -> None:
    rule = AspConfig(mode="infobatch", normalised=False, uncertainty=0.0, staleness=0.0)

    def drawn(ratio: float) -> tuple[int, int, list[float]]:
        """How many of the easy half and of the hard one, and their weights."""
        selector = asp_r(rule, ratio)
        selector.score_MN[0], selector.last_N[:] = np.linspace(0, 1, N), 1
        subset = selector.select(2)
        assert subset.weight_S is not None
        assert subset.weight_S.sum() == pytest.approx(N)
        easy_S = subset.index_S < N // 2
        weights = {float(w) for w in subset.weight_S[easy_S]}
        return int(easy_S.sum()), int((~easy_S).sum()), [*weights, *set(subset.weight_S[~easy_S])]

    assert drawn(0.9) == (160, 200, pytest.approx([1.25, 1.0]))
    # Where not all hard ones have room, the easy ones are still there, half as likely.
    assert drawn(0.3) == (40, 80, pytest.approx([5.0, 2.5]))


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
        Portfolio(schedule(), 0, config=AspConfig())


def test_probabilities_are_those_of_the_formula() -> None:
    """Written out for eight samples; every parameter matters."""
    config = AspConfig(
        signals={"loss": 1.0, "el2n": 0.5},
        uncertainty=0.3,
        staleness=0.4,
        temperature=0.2,
        uniform_share=0.25,
    )
    selector = AspR(Schedule(8, np.full(9, 4)), 0, config=config)
    selector.score_MN[:] = np.array(
        [[0.1, 0.9, 0.4, 0.4, 0.7, 0.0, 0.2, 0.0], [0.3, 0.2, 0.8, 0.1, 0.9, 0.0, 0.6, 0.0]]
    )
    selector.variance_N[:] = [0.0, 0.04, 0.01, 0.0, 0.16, 0.0, 0.09, 0.0]
    selector.last_N[:] = [4, 3, 4, 1, 2, 0, 4, 0]
    epoch = 5
    selector.epoch = epoch - 1
    # Ranks (rank - 1/2) / 6 among the six seen; equal ones share theirs; unseen ones the highest.
    loss = np.array([0.5, 5.5, 3.0, 3.0, 4.5, 5.5, 1.5, 5.5]) / 6
    el2n = np.array([2.5, 1.5, 4.5, 0.5, 5.5, 5.5, 3.5, 5.5]) / 6
    # Half of the samples an epoch: two epochs until all would have been drawn.
    waited = np.minimum(1, (epoch - selector.last_N) / 2)
    moved = np.sqrt(selector.variance_N) / 0.4
    utility = loss + 0.5 * el2n + 0.3 * moved + 0.4 * waited
    likely = np.exp(utility / 0.2)
    p_N = 0.75 * likely / likely.sum() + 0.25 / 8
    log_p_N, entropy, _ = selector._probabilities(epoch)
    np.testing.assert_allclose(log_p_N, np.log(p_N), atol=2e-3)
    assert entropy == pytest.approx(-(p_N * np.log(p_N)).sum(), abs=1e-4)
    assert selector.select(epoch).entropy == pytest.approx(entropy)


def test_the_first_epochs_are_drawn_evenly() -> None:
    selector = asp_r(AspConfig(warm_up=2))
    selector.score_MN[0], selector.last_N[:] = np.linspace(0, 1, N), 1
    even = [selector.select(epoch).entropy == math.log(N) for epoch in (1, 2, 3)]
    assert even == [True, True, False]


def test_what_is_left_to_the_rule_depends_on_ratio_and_epochs() -> None:
    assert (asp_r(ratio=0.1).uniform_share, asp_r(ratio=0.11).uniform_share) == (0.7, 0.5)
    assert asp_r(AspConfig(uniform_share=0.2), 0.05).uniform_share == 0.2


def test_weights_are_cut_off_and_have_the_mean_of_1() -> None:
    def weights(**settings: object) -> np.ndarray:
        rule = AspConfig(mode="unbiased", temperature=0.1, uniform_share=0.05, **settings)
        selector = asp_r(rule)
        selector.score_MN[0], selector.last_N[:] = np.linspace(0, 1, N), 1
        weight_S = selector.select(3).weight_S
        assert weight_S is not None
        return weight_S

    free = weights(max_weight=None, normalised=False)
    assert free.max() > 2
    np.testing.assert_allclose(weights(max_weight=2.0, normalised=False), np.minimum(free, 2))
    assert weights(max_weight=2.0).mean() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_cold_softmax_gives_no_weight_that_is_no_number(share: float) -> None:
    rule = AspConfig(mode="unbiased", temperature=0.001, uniform_share=share)
    selector = asp_r(rule)
    selector.score_MN[0], selector.last_N[:] = np.linspace(0, 1, N), 1
    subset = selector.select(3)
    assert subset.weight_S is not None
    assert np.isfinite(subset.weight_S).all()
    assert subset.entropy is not None
    assert math.isfinite(subset.entropy)


def test_a_huge_signal_ends_the_training_instead_of_freezing_the_choice() -> None:
    selector = asp_r(AspConfig(signals={"loss": 1.0}))
    index_S = selector.select(1).index_S
    value_S = np.ones(len(index_S), np.float32)
    value_S[3] = 3e20
    with pytest.raises(Diverged, match=r"up to 1e\+09 in epoch 1.*3e\+20"):
        selector.observe(Seen(index_S, {"loss": value_S}, np.ones(len(index_S), bool)))
    assert not selector.last_N.any()


def test_the_guard_is_for_what_is_hard_by_all_signals_together() -> None:
    rng = np.random.default_rng(0)
    selector = asp_r(
        AspConfig(
            signals={"el2n": 1.0, "entropy": 1.0}, noise_share=0.1, uncertainty=0.0, staleness=0.0
        )
    )
    selector.score_MN[:] = rng.random((2, N))
    selector.last_N[:] = 1
    utility_N = selector._utility(2, np.ones(N, bool), selector.config.signals)
    together_N = selector.score_MN.sum(0)
    hardest = np.argsort(-together_N)[: N // 10 - 4]
    assert np.unique(utility_N[hardest]).size == 1
    assert utility_N[hardest[0]] == pytest.approx(np.median(utility_N), abs=0.02)


def test_a_sample_never_seen_is_preferred_no_more_than_the_best_one_by_a_signal_to_avoid() -> None:
    """Most share the smallest value, whose rank is their mean."""
    selector = portfolio()
    row = selector.names.index("forgetting")
    selector.last_N[:360] = 1
    selector.score_MN[row, :36] = 1
    taste = {"forgetting": -1.0}
    utility_N = selector._utility(1, selector.last_N > 0, taste)
    waited_N = np.where(selector.last_N > 0, 0, 0.2 * 1 / 4)
    own_N = utility_N - waited_N
    assert own_N[380] == pytest.approx(own_N[100], abs=1e-6)
    assert own_N[380] > own_N[5]


@pytest.mark.parametrize(("weight", "alike"), [(1.0, 40), (-1.0, 1)])
def test_who_avoids_a_signal_needs_no_guard(weight: float, alike: int) -> None:
    signals = AspConfig(signals={"el2n": 1.0}, noise_share=0.1, uncertainty=0.0, staleness=0.0)
    selector = asp_r(signals)
    selector.score_MN[0], selector.last_N[:] = np.linspace(0, 1, N), 1
    utility_N = selector._utility(2, np.ones(N, bool), {"el2n": weight})
    assert np.unique(utility_N, return_counts=True)[1].max() == pytest.approx(alike, abs=1)


def test_uncertainty_is_of_the_first_signal_that_is_not_counted() -> None:
    selector = asp_r(AspConfig(signals={"forgetting": 1.0, "loss": 1.0}), 1.0)
    for value in (0.0, 1.0):
        given = {"loss": np.full(N, value, np.float32)}
        selector.observe(Seen(np.arange(N), given, np.ones(N, bool)))
    assert selector.variance_N[0] == pytest.approx(0.125)


@pytest.mark.parametrize("rule", ["asp_r", "even"])
def test_classes_smaller_than_their_share_have_it_over_the_epochs(rule: str) -> None:
    class_N = np.repeat(np.arange(3), (300, 97, 3))
    share = schedule(0.1, 400)
    config = AspConfig(stratified=True)
    selector = (
        AspR(share, 0, config=config, class_N=class_N)
        if rule == "asp_r"
        else Even(share, 0, class_N=class_N)
    )
    drawn_CT = np.array(
        [np.bincount(class_N[selector.select(t).index_S], minlength=3) for t in range(1, 401)]
    ).T
    assert set(drawn_CT.sum(0)) == {40}
    assert set(drawn_CT[2]) == {0, 1}
    # Binomial: 0.3 of the epochs.
    assert drawn_CT[2].mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 400))
    assert drawn_CT[1].mean() == pytest.approx(9.7, abs=0.1)


def test_weights_of_strata_stand_for_classes_that_an_epoch_may_leave_out() -> None:
    class_N = np.repeat(np.arange(3), (300, 97, 3))
    value_N = np.where(class_N == 2, 50.0, 1.0)
    rule = AspConfig(mode="unbiased", stratified=True, max_weight=None, normalised=False)
    means = []
    for seed in range(2_000):
        selector = asp_r(rule, 0.1, seed=seed, class_N=class_N)
        subset = selector.select(1)
        assert subset.weight_S is not None
        means.append((subset.weight_S * value_N[subset.index_S]).mean())
    error = np.std(means) / math.sqrt(len(means))
    assert abs(np.mean(means) - value_N.mean()) < 4 * error


@pytest.mark.parametrize(
    ("class_N", "says"),
    [
        (CLASS_N[:50], "50 of them for 400 samples"),
        (np.where(np.arange(N) == 7, -1, CLASS_N), "-1 of sample 7"),
        (CLASS_N.astype(float), "float64 of shape"),
        (CLASS_N[:, None], "of shape"),
    ],
)
def test_classes_that_are_none_are_refused(class_N: np.ndarray, says: str) -> None:
    for rule in (
        lambda: asp_r(AspConfig(stratified=True), class_N=class_N),
        lambda: Even(schedule(), 0, class_N=class_N),
    ):
        with pytest.raises(StageError, match=says):
            rule()


def test_a_state_of_other_classes_is_refused() -> None:
    other_N = np.roll(CLASS_N, 1)
    for rule in (
        lambda class_N: asp_r(AspConfig(stratified=True), class_N=class_N),
        lambda class_N: Even(schedule(), 0, class_N=class_N),
    ):
        with pytest.raises(StageError, match="has rule"):
            rule(other_N).restore(rule(CLASS_N).state())


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: replace(s, arrays={}),
        lambda s: replace(s, arrays={**s.arrays, "more": np.zeros(1)}),
        lambda s: replace(s, arrays={**s.arrays, "score_MN": np.float32(1)}),
        lambda s: replace(s, arrays={**s.arrays, "last_N": s.arrays["last_N"].astype(np.int64)}),
        lambda s: replace(s, epoch=99),
        lambda s: replace(s, epoch=-1),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_of_it_taken_up(
    damage: Callable[[State], State],
) -> None:
    saved = asp_r()
    run(saved, 3)
    fresh = asp_r()
    with pytest.raises(StageError, match="the state of the selection is of epoch"):
        fresh.restore(damage(saved.state()))
    assert fresh.epoch == 0
    assert not any(x.any() for x in fresh.arrays().values())


@pytest.mark.parametrize("name", RULES)
def test_a_state_survives_as_bytes(name: str) -> None:
    rule = RULES[name]()
    run(rule, 3)
    again = RULES[name]()
    again.restore(State.from_bytes(rule.state().to_bytes()))
    assert np.array_equal(again.select(4).index_S, rule.select(4).index_S)
    assert again.state().to_bytes() == rule.state().to_bytes()


@pytest.mark.parametrize("data", [b"", b"nothing", b"\x08" + bytes(30)])
def test_other_bytes_are_no_state(data: bytes) -> None:
    with pytest.raises(StageError, match="no state of a selection"):
        State.from_bytes(data)
    whole = asp_r().state().to_bytes()
    with pytest.raises(StageError, match="no state of a selection"):
        State.from_bytes(whole[:-1])


@pytest.mark.parametrize(
    ("index_S", "says"),
    [
        (np.array([7, 3, 9, 1]), "not ascending"),
        (np.array([1, 3, 3, 9]), "there twice"),
        (np.array([1, 3, 9]), "3 indices, the schedule has 100"),
        (np.arange(301, 401), "of 400 samples"),
    ],
)
def test_a_given_subset_that_is_none_is_refused(index_S: np.ndarray, says: str) -> None:
    with pytest.raises(StageError, match=says):
        Given(schedule(), 0, index_S=index_S)


def test_a_shorter_training_is_counted_beside_the_whole_one() -> None:
    short = shorter(schedule(0.1, 25))
    assert short.epochs == 3  # 2.5: halves go up
    assert short.cost == 3 / 25


def test_all_the_published_code_does_infobatch_does() -> None:
    selector = InfoBatch(schedule(1.0, 10), 0)
    loss_N = np.where(np.arange(N) < 301, 0.5, 2.5).astype(np.float32)
    selector.observe(Seen(np.arange(N), {"loss": loss_N}, np.ones(N, bool)))
    # 8.75 epochs of 10: the ninth has all; of 301 easy ones 150 are kept.
    assert [len(selector.select(epoch).index_S) for epoch in (8, 9)] == [150 + 99, N]
    with pytest.raises(ValueError, match="prune_share"):
        InfoBatch(schedule(), 0, prune_share=1.0)


def test_no_epoch_is_observed_beyond_the_last_nor_without_its_signals() -> None:
    selector = asp_r()
    index_S = selector.select(1).index_S
    with pytest.raises(ValueError, match="wants the signals el2n"):
        selector.observe(Seen(index_S, {}, np.ones(len(index_S), bool)))
    assert (selector.epoch, selector.visit_N.sum()) == (0, 0)
    run(selector)
    with pytest.raises(ValueError, match="all 6 epochs"):
        selector.observe(seen_of(selector, index_S))
