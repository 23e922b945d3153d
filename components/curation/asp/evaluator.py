"""Judges candidates of a search by training each on subsets, and the best of them on all data.

A candidate is a mapping of parameters and whoever searches says how it is trained. Every candidate
selects for itself, from nothing; all are judged on the same whole validation data. What is paid is
counted where it arises: samples trained on, and seconds with the selection in them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.curation.asp.sampler import Sampler
from components.curation.asp.selector import Diverged, Manifest, Selector, State

Candidate = Mapping[str, Any]
#: Told of validations in between: the metric, and the samples trained on up to then. It may raise
#: to end a hopeless training.
Report = Callable[[float, int], None]
#: Trains a candidate through the epochs of a sampler; returns its validation metric.
Train = Callable[[Candidate, Sampler, Report], float]


@dataclass(frozen=True)
class Outcome:
    """What one training gave and cost.

    Attributes:
        metric: on validation, higher is better; one that is not a number ranks last.
        samples: trained on: the sum of the sizes of the subsets.
        seconds: of processor time of this process, selection and validation in it.
        cost: samples by those of the training on all data, R.
        manifests: one an epoch.
        state: of the rule at the end.
        diverged: how the training ended before its time; its metric is not a number then.
    """

    metric: float
    samples: int
    seconds: float
    cost: float
    manifests: tuple[Manifest, ...]
    state: State
    diverged: str | None = None

    @property
    def rank_by(self) -> float:
        """The metric, below all others where it is not a number."""
        return self.metric if math.isfinite(self.metric) else -math.inf


@dataclass(frozen=True)
class ProxyEvaluator:
    """Judges candidates by a rule.

    Attributes:
        train: how a candidate is trained.
        rule: a fresh rule for a seed.
        batch_size: samples of a step; a candidate that has one of its own gives it as
            ``batch_size``.
    """

    train: Train
    rule: Callable[[int], Selector]
    batch_size: int

    def __call__(
        self,
        candidate: Candidate,
        seed: int = 0,
        report: Report = lambda metric, samples: None,
        state: State | None = None,
    ) -> Outcome:
        """Train a candidate on subsets; one that diverges ranks last, with what it cost.

        Args:
            state: of the rule, to go on from: ``train`` then goes on from its own checkpoint of
                that epoch. Samples count from the beginning, seconds from the call.

        Raises:
            Whatever else ``train`` and ``report`` raise.
        """
        start = time.process_time()
        selector = self.rule(seed)
        sampler = Sampler(selector, int(candidate.get("batch_size", self.batch_size)))
        if state is not None:
            sampler.restore(state)
        metric, diverged = math.nan, None
        try:
            metric = float(self.train(candidate, sampler, report))
        except Diverged as error:
            diverged = str(error)
        return Outcome(
            metric,
            sampler.samples,
            time.process_time() - start,
            sampler.samples / selector.schedule.whole,
            tuple(sampler.manifests),
            sampler.state(),
            diverged,
        )


@dataclass(frozen=True)
class Ranked:
    """A candidate with what it gave on subsets and, where it was confirmed, on all data.

    Attributes:
        earlier: of the smaller subsets before, from the smallest.
    """

    candidate: Candidate
    proxy: Outcome
    full: Outcome | None = None
    earlier: tuple[Outcome, ...] = ()

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """All that was paid for."""
        return (*self.earlier, self.proxy, *([self.full] if self.full else []))


def confirm(
    judged: Sequence[tuple[Candidate, Outcome]],
    on_all_data: ProxyEvaluator,
    top: int = 3,
    seed: int = 0,
) -> list[Ranked]:
    """Train the best candidates on all data: those first, by what that gives, then the others.

    Args:
        on_all_data: an evaluator whose rule takes all samples.
        top: how many are trained again.
    """
    by_proxy = sorted(judged, key=lambda pair: -pair[1].rank_by)
    best = [Ranked(c, outcome, on_all_data(c, seed)) for c, outcome in by_proxy[:top]]
    best.sort(key=lambda ranked: -(ranked.full.rank_by if ranked.full else 0.0))
    return best + [Ranked(candidate, outcome) for candidate, outcome in by_proxy[top:]]


def halve(
    candidates: Sequence[Candidate],
    evaluators: Sequence[ProxyEvaluator],
    *,
    keep: float = 1 / 3,
    seed: int = 0,
) -> list[Ranked]:
    """Successive halving with the ratio as fidelity: few samples for all, more for the better ones.

    Args:
        evaluators: of rising ratios.
        keep: share of the candidates that go on to the next ratio, one at least.

    Returns:
        all candidates, those that came farther first, each with its last outcome.
    """
    left: list[tuple[Candidate, tuple[Outcome, ...]]] = [(c, ()) for c in candidates]
    out: list[Ranked] = []
    for rung, evaluator in enumerate(evaluators):
        judged = sorted(
            (Ranked(c, evaluator(c, seed), earlier=earlier) for c, earlier in left),
            key=lambda ranked: -ranked.proxy.rank_by,
        )
        is_last = rung == len(evaluators) - 1
        kept = len(judged) if is_last else max(1, round(keep * len(judged)))
        left = [(ranked.candidate, ranked.outcomes) for ranked in judged[:kept]]
        out = (judged if is_last else judged[kept:]) + out
    return out
