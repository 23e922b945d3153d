"""Ranks of several methods on the same users: per-user records, intervals, paired differences.

Shapes: U users, B batch, K length of a list, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.evaluation.ranking.baselines import by_popularity, count_bigrams
from components.evaluation.ranking.metrics import (
    gains,
    hits,
    intervals,
    masked_target_ranks,
    mean_overlap,
    target_ranks,
)
from components.evaluation.ranking.rankers import BigramRanker, PopularityRanker, Ranker

if TYPE_CHECKING:
    from components.pipeline.artifacts import Input

__all__ = [
    "Tally",
    "by_history",
    "by_method",
    "choose_bigram",
    "choose_popularity",
    "headline",
    "mean_overlap",
    "sample_examples",
    "spread",
    "summarise",
]

VALID_USERS = 2_000
#: Shortest history of each group of users; a history longer than the last belongs to the last.
HISTORY_FROM = (0, 1, 2, 5, 10, 20, 50, 100, 200)
METRICS = {"hr": hits, "ndcg": gains}
SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("method", pa.dictionary(pa.int8(), pa.string())),
        ("rank", pa.int32()),
        ("masked_rank", pa.int32()),
    ]
)


class Tally:
    """Collects the rank of every user's target under every method.

    Args:
        methods: names, ours first.
        cutoffs: list lengths at which metrics are taken; ranks beyond the largest count as 0.
    """

    def __init__(self, methods: Sequence[str], cutoffs: Sequence[int]) -> None:
        self.methods, self.cutoffs = list(methods), list(cutoffs)
        self._users: dict[str, list[npt.NDArray[np.int64]]] = {m: [] for m in methods}
        self._ranks: dict[str, list[npt.NDArray[np.integer]]] = {m: [] for m in methods}
        self._masked: dict[str, list[npt.NDArray[np.integer]]] = {m: [] for m in methods}
        self._history: dict[str, list[npt.NDArray[np.int64]]] = {m: [] for m in methods}
        self._items: dict[str, dict[int, set[int]]] = {
            m: {k: set() for k in cutoffs} for m in methods
        }

    def add(
        self,
        method: str,
        examples: pa.RecordBatch,
        lists_BK: npt.NDArray[np.int32],
        seen_BK: npt.NDArray[np.bool_],
    ) -> None:
        """Take in one batch of lists; ``seen_BK`` marks what is in the user's history."""
        target_B = examples.column("target").to_numpy()
        longest = max(self.cutoffs)
        rank_B = target_ranks(lists_BK[:, :longest], target_B)
        masked_B = masked_target_ranks(lists_BK, target_B, seen_BK)
        self._users[method].append(examples.column("user_id").to_numpy())
        self._history[method].append(_lengths(examples.column("item_index")))
        self._ranks[method].append(rank_B)
        self._masked[method].append(np.where(masked_B <= longest, masked_B, 0))
        for k, items in self._items[method].items():
            items.update(np.unique(lists_BK[:, :k]).tolist())

    def ranks(self, method: str) -> npt.NDArray[np.integer]:
        return np.concatenate(self._ranks[method])

    def masked_ranks(self, method: str) -> npt.NDArray[np.integer]:
        return np.concatenate(self._masked[method])

    def history(self, method: str) -> npt.NDArray[np.int64]:
        """Events in each user's history."""
        return np.concatenate(self._history[method])

    def distinct_items(self, method: str, k: int) -> int:
        """Different items among the first ``k`` of all lists."""
        return len(self._items[method][k] - {-1})

    def table(self) -> pa.Table:
        """One row a user and method: the record from which any pair of runs can be compared."""
        parts = [
            pa.table(
                {
                    "user_id": np.concatenate(self._users[method]),
                    "method": pa.array([method] * len(self.ranks(method))).dictionary_encode(),
                    "rank": self.ranks(method).astype(np.int32),
                    "masked_rank": self.masked_ranks(method).astype(np.int32),
                }
            ).cast(SCHEMA)
            for method in self.methods
        ]
        return pa.concat_tables(parts).unify_dictionaries()


def summarise(tally: Tally, ours: str, seed: int) -> dict[str, Any]:
    """Metrics with 95 % intervals a method, and ours minus each baseline, paired over users."""
    names = [f"{metric}_at_{k}" for metric in METRICS for k in tally.cutoffs]
    methods: dict[str, Any] = {}
    differences: list[dict[str, Any]] = []
    own = _values(tally.ranks(ours), tally.cutoffs)
    for method in tally.methods:
        values = _values(tally.ranks(method), tally.cutoffs)
        masked = _values(tally.masked_ranks(method), tally.cutoffs)
        methods[method] = {
            "n": len(values),
            "metrics": _named(names, intervals(values, seed)),
            "masked_metrics": _named(names, intervals(masked, seed)),
            "distinct_items": {str(k): tally.distinct_items(method, k) for k in tally.cutoffs},
        }
        if method != ours:
            gap = _named(names, intervals(own - values, seed))
            differences += [
                {"metric": name, "method": ours, "baseline": method, **estimate}
                for name, estimate in gap.items()
            ]
    return {"methods": methods, "differences": differences}


def headline(summary: dict[str, Any], ours: str) -> dict[str, float]:
    """The figures for the tracker: all of ours, NDCG@10 of the others, and the differences."""
    flat = {
        name: estimate["value"] for name, estimate in summary["methods"][ours]["metrics"].items()
    }
    for method, record in summary["methods"].items():
        if method != ours:
            for name in ("ndcg_at_10", "hr_at_10"):
                flat[f"{method}_{name}"] = record["metrics"][name]["value"]
    for difference in summary["differences"]:
        if difference["metric"] == "ndcg_at_10":
            stem = f"ndcg_at_10_minus_{difference['baseline']}"
            flat[stem] = difference["value"]
            flat[f"{stem}_low"] = difference["low"]
            flat[f"{stem}_high"] = difference["high"]
    return flat


def by_method(summary: dict[str, Any]) -> pa.Table:
    """One row a method, one column a metric: what a bar chart needs."""
    methods = summary["methods"]
    metrics = list(next(iter(methods.values()))["metrics"])
    return pa.table(
        {
            "method": list(methods),
            **{m: [record["metrics"][m]["value"] for record in methods.values()] for m in metrics},
        }
    )


def by_history(tally: Tally, k: int) -> pa.Table:
    """NDCG@``k`` of every method by the length of the history: one row a group that has users.

    ``history_from`` is the shortest history of the group.
    """
    edges = np.array(HISTORY_FROM)
    columns: dict[str, npt.NDArray[Any]] = {}
    for method in tally.methods:
        group_U = np.searchsorted(edges, tally.history(method), side="right") - 1
        users_G = np.bincount(group_U, minlength=len(edges))
        gain_G = np.bincount(group_U, gains(tally.ranks(method), k), minlength=len(edges))
        filled = users_G > 0
        columns |= {"history_from": edges[filled], "users": users_G[filled]}
        columns[method] = gain_G[filled] / users_G[filled]
    return pa.table(columns)


def _lengths(lists: pa.Array) -> npt.NDArray[np.int64]:
    return lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def spread(total: int, count: int) -> npt.NDArray[np.int64]:
    """``count`` rows spread evenly over ``total``, first and last among them; all if fewer."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(np.int64))


def sample_examples(examples: Input) -> pa.RecordBatch | None:
    """At most ``VALID_USERS`` examples spread over the table; None if there are none."""
    rows = spread(examples.rows or 0, VALID_USERS)
    parts, first = [], 0
    for batch in examples.batches(batch_size=8192):
        here = rows[(rows >= first) & (rows < first + len(batch))] - first
        parts.append(batch.take(pa.array(here)))
        first += len(batch)
    return pa.concat_batches(parts) if len(rows) else None


def choose_popularity(
    events_N: npt.NDArray[np.integer],
    positives_N: npt.NDArray[np.integer],
    valid: pa.RecordBatch | None,
) -> PopularityRanker:
    """Counts all events or positive ones, whichever ranks validation better."""
    candidates = [PopularityRanker(by_popularity(counts)) for counts in (positives_N, events_N)]
    return max(candidates, key=lambda ranker: _validation_ndcg(ranker, valid))


def choose_bigram(
    train: Input,
    num_items: int,
    events_N: npt.NDArray[np.integer],
    positives_N: npt.NDArray[np.integer],
    valid: pa.RecordBatch | None,
) -> BigramRanker:
    """Successors of any or of positive events, chosen on validation like popularity."""
    popularity = choose_popularity(events_N, positives_N, valid).popularity
    candidates = []
    for context, target in ((False, True), (True, True), (False, False)):
        batches = train.batches(["item_index", "positive"])
        bigrams = count_bigrams(
            batches, num_items, popularity, positive_context=context, positive_target=target
        )
        candidates.append(BigramRanker(bigrams, popularity, context))
    return max(candidates, key=lambda ranker: _validation_ndcg(ranker, valid))


def _validation_ndcg(ranker: Ranker, valid: pa.RecordBatch | None) -> float:
    if valid is None or not len(valid):
        return 0.0
    ranks = target_ranks(ranker.rank(valid, 10), valid.column("target").to_numpy())
    return float(gains(ranks, 10).mean())


def _values(rank_U: npt.NDArray[np.integer], cutoffs: Sequence[int]) -> npt.NDArray[np.float64]:
    columns = [of(rank_U, k) for of in METRICS.values() for k in cutoffs]
    return np.stack(columns, 1)


def _named(names: list[str], estimates: Sequence[Any]) -> dict[str, dict[str, float]]:
    return {
        name: {"value": e.mean, "low": e.low, "high": e.high}
        for name, e in zip(names, estimates, strict=True)
    }
