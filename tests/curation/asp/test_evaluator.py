"""Claims about judging candidates: what is counted, who is confirmed, who goes on."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from test_sampler import BATCH, EPOCHS, digits

from components.curation.asp.asp_r import AspR
from components.curation.asp.config import AspConfig, ScheduleConfig
from components.curation.asp.evaluator import Candidate, ProxyEvaluator, Report, confirm, halve
from components.curation.asp.rules import Even, shorter
from components.curation.asp.sampler import Sampler
from components.curation.asp.schedule import Schedule
from components.curation.asp.selector import Selector, State
from components.curation.asp.signals import Forward

TRAIN = 1_400


def train(candidate: Candidate, sampler: Sampler, report: Report) -> float:
    """A linear classifier; the accuracy on the last 397 digits."""
    x_ND, y_N = digits()
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 10)
    optimiser = torch.optim.SGD(model.parameters(), lr=candidate["rate"])
    accuracy = 0.0
    for epoch in sampler.epochs():
        for batch in epoch:
            logit_bC, y_b = model(x_ND[batch.index_b]), y_N[batch.index_b]
            loss_b = torch.nn.functional.cross_entropy(logit_bC, y_b, reduction="none")
            optimiser.zero_grad()
            ((loss_b * torch.from_numpy(batch.weight_b)).sum() / batch.size).backward()
            optimiser.step()
            epoch.record(batch, Forward(logit_bC.detach(), y_b))
        epoch.finish()
        with torch.no_grad():
            correct_V = model(x_ND[TRAIN:]).argmax(1) == y_N[TRAIN:]
        accuracy = float(correct_V.float().mean())
        report(accuracy, sampler.samples)
    return accuracy


def evaluator(ratio: float) -> ProxyEvaluator:
    def rule(seed: int) -> Selector:
        return Even(Schedule.of(ScheduleConfig(ratio=ratio), TRAIN, EPOCHS), seed)

    return ProxyEvaluator(train, rule, BATCH)


def test_what_a_candidate_costs_is_counted_where_it_arises() -> None:
    told: list[tuple[float, int]] = []
    outcome = evaluator(0.1)(
        {"rate": 0.5}, 3, lambda metric, samples: told.append((metric, samples))
    )
    assert outcome.samples == 4 * 140 == sum(m.samples for m in outcome.manifests)
    assert outcome.cost == 0.1
    assert [samples for _, samples in told] == [140, 280, 420, 560]
    assert told[-1][0] == outcome.metric > 0.5
    assert outcome.seconds > 0
    assert outcome.state.epoch == EPOCHS
    again = evaluator(0.1)({"rate": 0.5}, 3)
    assert (again.metric, again.manifests) == (outcome.metric, outcome.manifests)
    other = evaluator(0.1)({"rate": 0.5}, 4)
    assert other.manifests[0].digest != outcome.manifests[0].digest


def test_a_candidate_may_have_a_batch_size_of_its_own() -> None:
    steps = []

    def count(candidate: Candidate, sampler: Sampler, report: Report) -> float:
        steps.append(next(sampler.epochs()).steps)
        return 0.0

    of_counts = ProxyEvaluator(count, evaluator(0.1).rule, 70)
    of_counts({})
    of_counts({"batch_size": 35})
    assert steps == [2, 4]


def test_a_report_that_raises_ends_the_training() -> None:
    class Hopeless(Exception):
        pass

    def stop(metric: float, samples: int) -> None:
        raise Hopeless

    with pytest.raises(Hopeless):
        evaluator(0.1)({"rate": 0.5}, 0, stop)


def of_table(table: dict[str, float], trained: list[Any], ratio: float) -> ProxyEvaluator:
    """Metrics looked up, so that what is chosen is known."""

    def look_up(candidate: Candidate, sampler: Sampler, report: Report) -> float:
        trained.append((ratio, candidate["name"]))
        return table[candidate["name"]]

    return ProxyEvaluator(look_up, evaluator(ratio).rule, BATCH)


def test_the_best_by_subsets_are_confirmed_on_all_data() -> None:
    trained: list[Any] = []
    proxy = {"a": 0.5, "b": 0.9, "c": 0.8, "d": 0.7}
    candidates = [{"name": name} for name in proxy]
    by_subsets = of_table(proxy, trained, 0.1)
    judged = [(candidate, by_subsets(candidate)) for candidate in candidates]
    trained.clear()
    ranked = confirm(judged, of_table({"b": 0.6, "c": 0.95, "d": 0.7}, trained, 1.0), top=3)
    assert [r.candidate["name"] for r in ranked] == ["c", "d", "b", "a"]
    assert [name for _, name in trained] == ["b", "c", "d"]
    assert ranked[-1].full is None


def test_a_metric_that_is_not_a_number_wins_nothing() -> None:
    table = {"a": math.nan, "b": 0.5, "c": 0.9, "d": -math.inf}
    for names in ("abcd", "dcba", "bacd"):
        candidates = [{"name": name} for name in names]
        ranked = halve(candidates, [of_table(table, [], 0.1), of_table(table, [], 0.3)], keep=0.5)
        assert ranked[0].candidate["name"] == "c"
        judged = [(c, of_table(table, [], 0.1)(c)) for c in candidates]
        confirmed = confirm(judged, of_table({**table, "c": math.nan}, [], 1.0), top=2)
        assert [r.candidate["name"] for r in confirmed[:2]] == ["b", "c"]


def test_choosing_a_subset_is_paid_for() -> None:
    def slowly(seed: int) -> Selector:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        return evaluator(0.1).rule(seed)

    assert ProxyEvaluator(lambda *_: 0.0, slowly, BATCH)({}).seconds >= 0.2


def test_halving_gives_more_data_to_the_better_candidates() -> None:
    trained: list[Any] = []
    names = "abcdefghi"
    small = {name: place / 10 for place, name in enumerate(names)}
    evaluators = [
        of_table(small, trained, 0.05),
        of_table({**small, "g": 0.99}, trained, 0.3),
        of_table(small, trained, 1.0),
    ]
    ranked = halve([{"name": name} for name in names], evaluators)
    assert [name for ratio, name in trained if ratio == 0.3] == ["i", "h", "g"]
    assert [name for ratio, name in trained if ratio == 1.0] == ["g"]
    assert [r.candidate["name"] for r in ranked] == ["g", "i", "h", "f", "e", "d", "c", "b", "a"]
    assert ranked[0].proxy.metric == 0.6


def test_all_that_halving_cost_is_kept() -> None:
    evaluators = [evaluator(0.1), evaluator(0.5)]
    best, second, last = halve([{"rate": r} for r in (0.5, 0.1, 0.01)], evaluators, keep=0.5)
    assert [outcome.samples for outcome in best.outcomes] == [4 * 140, 4 * 700]
    assert [outcome.samples for outcome in second.outcomes] == [4 * 140, 4 * 700]
    assert [outcome.samples for outcome in last.outcomes] == [4 * 140]


@pytest.mark.parametrize("signals", [False, True])
def test_a_candidate_that_diverges_ranks_last_and_ends_no_search(signals: bool) -> None:
    def rule(seed: int) -> Selector:
        share = Schedule.of(ScheduleConfig(ratio=0.1), TRAIN, EPOCHS)
        return AspR(share, seed, config=AspConfig()) if signals else Even(share, seed)

    judge = ProxyEvaluator(train, rule, BATCH)
    ranked = halve([{"rate": rate} for rate in (1e38, 0.5, 0.1)], [judge, judge], keep=0.7)
    assert [r.candidate["rate"] for r in ranked][-1] == 1e38
    worst = ranked[-1].proxy
    assert math.isnan(worst.metric)
    assert worst.diverged is not None
    assert "not a number" in worst.diverged
    assert all(r.proxy.diverged is None for r in ranked[:2])
    assert worst.seconds > 0


def test_a_training_that_goes_on_counts_what_it_cost_before() -> None:
    class Killed(Exception):
        pass

    def die(metric: float, samples: int) -> None:
        if samples == 280:
            raise Killed

    kept: list[State] = []

    def train_and_keep(candidate: Candidate, sampler: Sampler, report: Report) -> float:
        def told(metric: float, samples: int) -> None:
            kept.append(sampler.state())
            report(metric, samples)

        return train(candidate, sampler, told)

    judge = ProxyEvaluator(train_and_keep, evaluator(0.1).rule, BATCH)
    whole = judge({"rate": 0.5})
    kept.clear()
    with pytest.raises(Killed):
        judge({"rate": 0.5}, report=die)
    state = State.from_bytes(kept[-1].to_bytes())
    assert state.epoch == 2
    resumed = judge({"rate": 0.5}, state=state)
    assert resumed.samples == whole.samples == 560
    assert resumed.manifests == whole.manifests


def test_a_shorter_training_costs_less_than_the_whole_one() -> None:
    def rule(seed: int) -> Selector:
        return Even(shorter(Schedule.of(ScheduleConfig(ratio=0.25), TRAIN, EPOCHS)), seed)

    outcome = ProxyEvaluator(train, rule, BATCH)({"rate": 0.5})
    assert (outcome.samples, outcome.cost) == (TRAIN, 0.25)
