"""What the report shows: plain values, chosen and worded by `collect`, drawn by `page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from components.evaluation.ranking.metrics import Outcome, outcome
from components.evaluation.report import formats

#: The metric of the forest plots, the verdicts and the first line.
HEADLINE_METRIC = "ndcg_at_10"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What became of the model.

    Attributes:
        standing: what the model is in the registry from now on.
        headline: one sentence.
        reason: why, in the words of the gate.
        model: registered name and version (``"onerec version 3"``), None if not registered.
        facts: further (name, value) pairs of the gate.
    """

    standing: Literal["champion", "challenger", "not registered"]
    headline: str
    reason: str
    model: str | None
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Method:
    """A method over ``users`` test users.

    Attributes:
        metrics: by name, ``HEADLINE_METRIC`` among them.
        masked: the same with items of the user's history struck out of the lists.
        distinct_items: different items among the first 10 of all lists.
    """

    name: str
    users: int
    metrics: Mapping[str, Estimate]
    masked: Mapping[str, Estimate] = field(default_factory=dict)
    distinct_items: int | None = None


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences ``method − baseline`` of a metric."""

    metric: str
    method: str
    baseline: str
    estimate: Estimate

    @property
    def outcome(self) -> Outcome:
        return outcome(self.estimate.low, self.estimate.high)


@dataclass(frozen=True)
class Evaluation:
    """Ranking metrics of our method beside baselines on the same users and catalogue.

    Attributes:
        history_masked: whether items of a user's history are struck out of the lists.
        control_overlap: share of the first 10 that stay when the histories of users are swapped;
            None if there were too few users to tell.
    """

    ours: str
    methods: tuple[Method, ...]
    differences: tuple[Difference, ...]
    catalogue_size: int
    history_masked: bool
    beams: int | None = None
    control_overlap: float | None = None
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A series over training steps.

    Attributes:
        marked: the step that is pointed out, and the word for it ("best", "kept"); None: no step.
        floor: what no value should be below, and the words for it.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    marked: tuple[float, str] | None = None
    floor: tuple[float, str] | None = None


@dataclass(frozen=True)
class Change:
    """A figure before and after the alignment, on users that chose no aligned weights.

    They may have chosen, among all validation users, the weights that it began with.
    """

    name: str
    before: float
    after: float
    difference: Difference


@dataclass(frozen=True)
class Alignment:
    """What reinforcement learning made of the recommender.

    Attributes:
        steps: how many were done; 0: there was no preference to learn.
        kept_step: whose weights were kept; 0: none, the model before was.
        floor: NDCG@10 below which no weights are kept.
        choosing_users: validation users on whom that was decided; ``curves`` are of them.
        users: other validation users; ``changes`` are of them.
    """

    steps: int
    kept_step: int
    floor: float = 0.0
    choosing_users: int = 0
    users: int = 0
    curves: tuple[Curve, ...] = ()
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Item:
    """An item as a reader sees it; ``positive`` tells that the user liked it (None: not said)."""

    item_id: int
    title: str
    tags: tuple[str, ...] = ()
    positive: bool | None = None

    @property
    def named(self) -> bool:
        return formats.visible(self.title)


@dataclass(frozen=True)
class Prefix:
    """Items that share their first semantic-id codes; ``shown`` of ``count`` are listed."""

    codes: tuple[int, ...]
    count: int
    shown: tuple[Item, ...]


@dataclass(frozen=True)
class Level:
    """Use of one codebook.

    Attributes:
        counts: items per code, one entry a code, any order.
        entropy_bits: entropy of the use; its maximum is log2 of the codebook size.
        mse: mean squared error of an embedding entry after this level.
        relative_error: ``mse`` divided by the variance of the embedding.
    """

    counts: tuple[int, ...]
    entropy_bits: float
    max_entropy_bits: float
    mse: float
    relative_error: float

    @property
    def used(self) -> int:
        return sum(1 for c in self.counts if c)


@dataclass(frozen=True)
class SemanticIds:
    """Statistics of the items' semantic ids.

    Attributes:
        colliding_items: items that share their id, at most ``largest_bucket`` on one.
        colliding_before, largest_before: the same before items were told apart.
        moved: items that got another last code than clustering gave them for that.
    """

    levels: tuple[Level, ...]
    items: int
    distinct: int
    colliding_items: int
    largest_bucket: int
    colliding_before: int
    largest_before: int
    moved: int
    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True)
class Recommendation:
    rank: int
    item: Item
    hit: bool


@dataclass(frozen=True)
class ExampleUser:
    """A test user: newest ``history`` of ``history_length`` events, oldest first.

    Attributes:
        target: the item to be found, see ``Users.target``.
        recommendations: the first of the list, and the hit if it stands further down.
        rank: 1-based place of the target in the list of ``list_length``, None if it is not there.
    """

    user_id: int
    history_length: int
    history: tuple[Item, ...]
    target: Item
    recommendations: tuple[Recommendation, ...]
    rank: int | None
    list_length: int


@dataclass(frozen=True)
class Users:
    """``shown`` of ``total`` users, the first of a sample seeded with ``seed``.

    Attributes:
        target: which event of a user is the target, as words that follow "the target is".
        tells_positive: whether the data tells positive events from others.
    """

    shown: tuple[ExampleUser, ...]
    total: int
    seed: int
    target: str
    tells_positive: bool

    @property
    def hits(self) -> int:
        return sum(1 for user in self.shown if user.rank is not None)


@dataclass(frozen=True)
class BrokenRule:
    """A rule that rows (``broken`` of ``of``) or a whole table (``observed``) did not keep."""

    table: str
    rule: str
    severity: str
    reason: str
    allowed: str
    broken: int
    of: int
    observed: float | None = None


@dataclass(frozen=True)
class TableHealth:
    table: str
    rows_in: int
    passed: int
    quarantined: int


@dataclass(frozen=True)
class Quarantined:
    """A row that was set aside, as JSON."""

    table: str
    row: int
    rule: str
    reason: str
    record: str


@dataclass(frozen=True)
class Health:
    """What validation found; ``checked`` counts the rules that were judged, by ``judge``."""

    tables: tuple[TableHealth, ...]
    checked: int
    judge: str
    broken: tuple[BrokenRule, ...]
    examples: tuple[Quarantined, ...]


@dataclass(frozen=True)
class Artifact:
    """An artifact in the lineage; ``stage`` wrote it."""

    name: str
    digest: str
    stage: str
    rows: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class StageRecord:
    """The execution that made a stage's result, in this run or an earlier one.

    Attributes:
        parents: stages whose artifacts it read.
    """

    name: str
    summary: str
    seconds: float
    peak_rss_bytes: int | None
    finished: datetime
    parents: tuple[str, ...]
    inputs: tuple[Artifact, ...]
    outputs: tuple[Artifact, ...]
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    key: str
    code_digest: str


@dataclass(frozen=True)
class Source:
    """Where the data came from."""

    format: str
    uri: str
    citation: str
    licence: str
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Period:
    """A period of the split: its ``users`` and, in words, the events that it has of them."""

    name: Literal["train", "validation", "test"]
    users: int
    events: str


@dataclass(frozen=True)
class Split:
    """How events were cut into what is learned and what is asked."""

    protocol: str
    periods: tuple[Period, ...]


@dataclass(frozen=True)
class Candidate:
    """A setting of the tuned baseline that was tried; ``best_epoch`` is the one that was kept."""

    settings: tuple[tuple[str, str], ...]
    epochs: int
    best_epoch: int
    score: float


@dataclass(frozen=True)
class Search:
    """The search behind the tuned baseline.

    Attributes:
        chosen: index of the candidate with the best validation NDCG@10.
        cut_short: whether the time limit ended it.
    """

    candidates: tuple[Candidate, ...]
    chosen: int
    cut_short: bool


@dataclass(frozen=True)
class Page:
    """Everything a report shows; ``recommender`` says in a sentence what the model is made of."""

    created: datetime
    verdict: Verdict
    source: Source
    split: Split
    evaluation: Evaluation
    users: Users
    recommender: str
    curves: tuple[Curve, ...]
    alignment: Alignment
    baseline: Search
    semantic_ids: SemanticIds
    health: Health
    stages: tuple[StageRecord, ...]
    report_parents: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    command: str
    params_yaml: str
