"""Pairs of items that belong together, counted in the training split (arXiv 2506.13695, 2.1).

Two kinds make up D_pair: *user→item*, a positively clicked target with the collaboratively most
similar of its user's latest positive clicks before it, and *item→item*, the pairs of highest Swing
score (arXiv 2010.05525)::

    s(i, j) = Σ_{u, v ∈ U_i ∩ U_j, u ≠ v}  1/√|I_u| · 1/√|I_v| · 1/(α + |I_u ∩ I_v|)

Scores are exact for the events that are counted. Of a user with more positive items than
``items_per_user``, and of an item with more users than ``users_per_item``, a sample drawn by the
seed is counted: an item that everybody has relates everybody to everybody, and tells little.

The report does not say how similar is measured for user→item; here it is Swing, and where that
knows nothing, the latest click.

Shapes: E positive events, U users, N items, C (user, item) pairs that are counted, P item pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from components.training.onerec.config import PairsConfig


Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

ALPHA = 1.0
#: (item, user, user) triples looked at together; bounds memory.
TRIPLES = 4_000_000
#: Kinds of pairs in the table.
USER_ITEM, SWING = "user_item", "swing"
PAIR_SCHEMA = pa.schema(
    [("left", pa.int32()), ("right", pa.int32()), ("kind", pa.string()), ("weight", pa.float64())]
)


@dataclass(frozen=True)
class PositiveEvents:
    """Positive training events, each user's oldest first.

    Attributes:
        user_E, item_E: int64.
        all_count: no event is positive, so these are all events.
    """

    user_E: Int64
    item_E: Int64
    all_count: bool = False


def positive_events(batches: Iterable[pa.RecordBatch]) -> PositiveEvents:
    """Positive events of train sequences (all events, where none is positive).

    Args:
        batches: rows with the list columns ``item_index`` and ``positive``.
    """
    users, items, flags, first = [], [], [], 0
    for batch in batches:
        column = batch.column("item_index")
        length = column.value_lengths().to_numpy(zero_copy_only=False)
        users.append(np.repeat(first + np.arange(len(length)), length))
        items.append(column.flatten().to_numpy().astype(np.int64))
        flags.append(batch.column("positive").flatten().to_numpy(zero_copy_only=False))
        first += len(length)
    empty = np.zeros(0, np.int64)
    user_E, item_E = np.concatenate([empty, *users]), np.concatenate([empty, *items])
    positive_E = np.concatenate([empty, *flags]).astype(bool)
    all_count = bool(len(positive_E)) and not positive_E.any()
    if all_count:
        positive_E[:] = True
    return PositiveEvents(user_E[positive_E], item_E[positive_E], all_count)


@dataclass(frozen=True)
class ItemScores:
    """A score of some pairs of items, the same both ways: ``left < right``, 0 for all others.

    Attributes:
        key_P: int64 ``left · N + right``, ascending, each once.
        score_P: float64.
    """

    num_items: int
    key_P: Int64
    score_P: Float64

    def of(self, one: Int64, other: Int64) -> Float64:
        """Scores of pairs, in the shape of the arguments."""
        key = np.minimum(one, other) * self.num_items + np.maximum(one, other)
        if not len(self.key_P):
            return np.zeros(key.shape)
        place = np.searchsorted(self.key_P, key).clip(max=len(self.key_P) - 1)
        return np.where(self.key_P[place] == key, self.score_P[place], 0.0)

    def nearest(self, partners: int) -> tuple[Int64, Int64, Float64]:
        """The best partners of every item: left, right and score, grouped by left, best first."""
        one, other = np.divmod(self.key_P, self.num_items)
        left, right = np.concatenate([one, other]), np.concatenate([other, one])
        score = np.concatenate([self.score_P, self.score_P])
        order = np.lexsort((right, -score, left))
        left, right, score = left[order], right[order], score[order]
        kept = np.arange(len(left)) - np.searchsorted(left, left) < partners
        return left[kept], right[kept], score[kept]


def swing(events: PositiveEvents, num_items: int, config: PairsConfig, seed: int) -> ItemScores:
    """Swing scores of all pairs of items that two users or more have in common."""
    user_C, item_C = _counted(events, config, seed)
    # |I_u| is the user's own count, before an item's sample of users took some of them.
    size_U = np.bincount(user_C, minlength=1)
    user_C, item_C = _sampled(item_C, user_C, config.users_per_item, seed + 1)[::-1]
    scores = _Sums()
    for left_T, right_T, item_T in _common_items(user_C, item_C):
        # Triples of one pair of users follow each other: they are its common items.
        _, first, count = np.unique(
            np.stack([left_T, right_T]), axis=1, return_index=True, return_counts=True
        )
        several = count > 1
        first, count = first[several], count[several]
        pair_weight = 2 / (np.sqrt(size_U[left_T[first]] * size_U[right_T[first]].astype(float)))
        pair_weight /= ALPHA + count
        for apart in range(1, int(count.max(initial=1))):
            wide = count > apart
            pairs = count[wide] - apart
            at = np.repeat(first[wide], pairs) + _ramp(pairs)
            # Items of a group ascend, so the smaller comes first.
            scores.add(
                item_T[at] * num_items + item_T[at + apart], np.repeat(pair_weight[wide], pairs)
            )
    return ItemScores(num_items, *scores.total())


def _counted(events: PositiveEvents, config: PairsConfig, seed: int) -> tuple[Int64, Int64]:
    """Distinct (user, item) pairs, ascending, a sample of users' items where they are many."""
    items = int(events.item_E.max(initial=0)) + 1
    key_C = np.unique(events.user_E * items + events.item_E)
    return _sampled(*np.divmod(key_C, items), config.items_per_user, seed)


def _sampled(group_C: Int64, value_C: Int64, most: int, seed: int) -> tuple[Int64, Int64]:
    """At most so many values of every group, drawn at random; ascending by group, then value."""
    lot_C = np.random.default_rng(seed).permutation(len(group_C))
    order = np.lexsort((lot_C, group_C))
    ordered = group_C[order]
    kept = order[np.arange(len(order)) - np.searchsorted(ordered, ordered) < most]
    kept = kept[np.lexsort((value_C[kept], group_C[kept]))]
    return group_C[kept], value_C[kept]


def _common_items(user_C: Int64, item_C: Int64) -> Iterator[tuple[Int64, Int64, Int64]]:
    """(user, later user, item that both have) in chunks of whole users, sorted so."""
    by_item = np.lexsort((user_C, item_C))
    start_C = np.empty(len(item_C), np.int64)  # where the users after this one begin
    start_C[by_item] = np.arange(1, len(item_C) + 1)
    end_C = np.searchsorted(item_C[by_item], item_C, side="right")
    by_user = np.lexsort((item_C, user_C))
    user_C, item_C, start_C, end_C = (x[by_user] for x in (user_C, item_C, start_C, end_C))
    users_by_item = user_C[np.argsort(by_user)][by_item]
    triples_C = end_C - start_C
    # A chunk ends with a user: his pairs are then complete.
    last_of_user = np.flatnonzero(user_C != np.append(user_C[1:], -1)).tolist()
    cumulative = np.cumsum(triples_C)
    done, before = 0, 0
    for last in last_of_user:
        if int(cumulative[last]) - before < TRIPLES and last != last_of_user[-1]:
            continue
        part = slice(done, last + 1)
        count = triples_C[part]
        left = np.repeat(user_C[part], count)
        right = users_by_item[np.repeat(start_C[part], count) + _ramp(count)]
        item = np.repeat(item_C[part], count)
        order = np.lexsort((item, right, left))
        yield left[order], right[order], item[order]
        done, before = last + 1, int(cumulative[last])


def _ramp(count: Int64) -> Int64:
    """0 … count - 1 of each entry, one after the other."""
    return np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)


class _Sums:
    """Sums by key; what waits is merged only when it is as much as what is merged already."""

    def __init__(self) -> None:
        self._key = np.zeros(0, np.int64)
        self._sum = np.zeros(0)
        self._waiting: list[tuple[Int64, Float64]] = []
        self._rows = 0

    def add(self, key: Int64, value: Float64) -> None:
        self._waiting.append((key, value))
        self._rows += len(key)
        if self._rows > max(TRIPLES, len(self._key)):
            self.total()

    def total(self) -> tuple[Int64, Float64]:
        keys = np.concatenate([self._key, *(key for key, _ in self._waiting)])
        values = np.concatenate([self._sum, *(value for _, value in self._waiting)])
        self._key, place = np.unique(keys, return_inverse=True)
        self._sum = np.bincount(place, values, minlength=len(self._key)).astype(np.float64)
        self._waiting, self._rows = [], 0
        return self._key, self._sum


def user_item_pairs(
    events: PositiveEvents, scores: ItemScores, latest: int
) -> tuple[Int64, Int64, Float64]:
    """Each positive target with the most similar of the ``latest`` positive clicks before it.

    Returns:
        target, click and how many targets of users gave the pair, each pair once. A target without
        an earlier click of another item gives none.
    """
    user_E, item_E = events.user_E, events.item_E
    best_E = np.full(len(item_E), -1.0)
    click_E = np.full(len(item_E), -1, np.int64)
    # From the latest click back: only a higher score replaces it.
    for distance in range(1, latest + 1):
        before, target = item_E[:-distance], item_E[distance:]
        score = np.where(
            (user_E[:-distance] == user_E[distance:]) & (before != target),
            scores.of(target, before),
            -1.0,
        )
        better = score > best_E[distance:]
        best_E[distance:][better] = score[better]
        click_E[distance:][better] = before[better]
    kept = click_E >= 0
    items = scores.num_items
    key, count = np.unique(item_E[kept] * items + click_E[kept], return_counts=True)
    target, click = np.divmod(key, items)
    return target, click, count.astype(np.float64)


def item_pairs(events: PositiveEvents, num_items: int, config: PairsConfig, seed: int) -> pa.Table:
    """D_pair: both kinds of pairs, by `PAIR_SCHEMA`.

    ``weight`` is the Swing score, or how many targets of users gave a user→item pair.
    """
    scores = swing(events, num_items, config, seed)
    parts = {
        USER_ITEM: user_item_pairs(events, scores, config.latest),
        SWING: scores.nearest(config.partners),
    }
    return pa.concat_tables(
        pa.table(
            [left, right, pa.array([kind] * len(left), pa.string()), weight],
            names=PAIR_SCHEMA.names,
        ).cast(PAIR_SCHEMA)
        for kind, (left, right, weight) in parts.items()
    )


def occurrences(table: pa.Table) -> Float64:
    """How often D_pair holds each row of `item_pairs`: float64 [P].

    A user→item pair once for each user and target that gave it; a Swing pair once. The report does
    not say how the two kinds are mixed; this is their union.
    """
    is_user_item_P = pc.equal(table["kind"], USER_ITEM).to_numpy()
    return np.where(is_user_item_P, table["weight"].to_numpy(), 1.0)
