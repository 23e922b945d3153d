"""Examples for the report, read in batches: users, items behind codes, quarantined rows.

Chosen by hashes of a seed, never by what they show; memory holds the chosen rows and one batch,
whatever the number of users and items.

Shapes: N items, Q levels of a semantic id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.evaluation.report import formats
from components.evaluation.report.content import (
    ExampleUser,
    Item,
    Prefix,
    Quarantined,
    Recommendation,
    Users,
)
from components.pipeline.errors import DataContractError

#: A prefix shared by fewer items says nothing about what its items share.
MIN_PREFIX_ITEMS = 4
LONGEST_TEXT = 500
MAX_TAGS = 12


class Table(Protocol):
    """An artifact that holds a table."""

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def rows(self) -> int | None: ...

    def batches(
        self, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[pa.RecordBatch]: ...


def hashed(values: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """SplitMix64 of each value under a seed: a random order that no file order changes."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_ids(batches: Iterable[pa.RecordBatch], column: str, count: int, seed: int) -> list[int]:
    """The ``count`` distinct values of a column with the smallest hashes, in that order."""
    kept = np.empty(0, np.int64)
    for batch in batches:
        values = np.unique(np.concatenate([kept, batch.column(column).to_numpy()]))
        kept = values[np.argsort(hashed(values, seed), kind="stable")[:count]]
    return [int(v) for v in kept]


def rows_where(
    table: Table, column: str, wanted: Iterable[int], columns: list[str]
) -> dict[int, dict[str, Any]]:
    """Rows whose ``column`` is among ``wanted``, by that value; of equal ones the first."""
    values = pa.array(sorted(set(wanted)), pa.int64())
    found: dict[int, dict[str, Any]] = {}
    for batch in table.batches([column, *columns]):
        hit = pc.is_in(batch.column(column).cast(pa.int64()), value_set=values)
        if hit.true_count:
            for row in batch.filter(hit).to_pylist():
                found.setdefault(int(row[column]), row)
    return found


def describe_items(catalogue: Table, items: Table, indexes: Iterable[int]) -> dict[int, Item]:
    """Title and tags of items by their ``item_index``.

    Raises:
        DataContractError: an index that is not in the catalogue.
    """
    wanted = set(indexes)
    ids = rows_where(catalogue, "item_index", wanted, ["item_id"])
    if missing := wanted - ids.keys():
        raise DataContractError(
            f"item_index {min(missing)} is not in the catalogue",
            where="artifact 'recommendations'",
            remedy="run evaluate_recommender again on the catalogue of this run",
        )
    item_ids = {index: int(row["item_id"]) for index, row in ids.items()}
    present = [name for name in ("title", "tags") if name in items.schema.names]
    rows = rows_where(items, "item_id", item_ids.values(), present)
    return {index: _item(item_id, rows.get(item_id, {})) for index, item_id in item_ids.items()}


def _item(item_id: int, row: dict[str, Any]) -> Item:
    title, tags = row.get("title") or "", row.get("tags") or []
    shown = tuple(str(tag)[:LONGEST_TEXT] for tag in tags[:MAX_TAGS] if formats.visible(str(tag)))
    return Item(item_id, str(title)[:LONGEST_TEXT], shown)


def example_users(
    examples: Table,
    recommendations: Table,
    catalogue: Table,
    items: Table,
    *,
    count: int,
    history: int,
    shown: int,
    seed: int,
    target: str,
) -> Users:
    """Test users drawn by hash, with the end of their history and their recommendations.

    Args:
        examples: ``test_examples``.
        recommendations: ``user_id``, ``item_index`` best first.
        count: users; ``history``: newest events of each; ``shown``: recommendations of each, and
            beyond them the hit, if it stands further down.
        target: what `Users` says of its targets.

    Raises:
        DataContractError: no recommendations, or a user who is not a test user.
    """
    chosen = sample_ids(recommendations.batches(["user_id"]), "user_id", count, seed)
    if not chosen:
        raise DataContractError(
            "no user has recommendations",
            where="artifact 'recommendations'",
            remedy="run evaluate_recommender again",
        )
    lists = rows_where(recommendations, "user_id", chosen, ["item_index"])
    rows = rows_where(examples, "user_id", chosen, ["item_index", "positive", "target"])
    if missing := set(chosen) - rows.keys():
        raise DataContractError(
            f"user {min(missing)} has recommendations and is not in test_examples",
            where="artifact 'recommendations'",
            remedy="run evaluate_recommender again on the split of this run",
        )
    needed = {int(rows[user]["target"]) for user in chosen}
    for user in chosen:
        needed.update(_tail(rows[user]["item_index"], history))
        needed.update(_ints(lists[user]["item_index"]))
    known = describe_items(catalogue, items, needed)
    told = tells_positive(catalogue)
    if not told:
        rows = {user: row | {"positive": None} for user, row in rows.items()}
    return Users(
        tuple(_user(user, rows[user], lists[user], known, history, shown) for user in chosen),
        recommendations.rows or len(chosen),
        seed,
        target,
        told,
    )


def tells_positive(catalogue: Table) -> bool:
    """Whether any train event is not positive: where all are, "positive" says nothing."""
    return any(
        not batch.column("train_count").equals(batch.column("train_positive_count"))
        for batch in catalogue.batches(["train_count", "train_positive_count"])
    )


def _user(
    user_id: int,
    row: dict[str, Any],
    listed: dict[str, Any],
    known: dict[int, Item],
    history: int,
    shown: int,
) -> ExampleUser:
    target = int(row["target"])
    ranked = _ints(listed["item_index"])
    rank = ranked.index(target) + 1 if target in ranked else None
    places = [*range(1, min(shown, len(ranked)) + 1)]
    if rank is not None and rank > shown:
        places.append(rank)
    before = [known[i] for i in _tail(row["item_index"], history)]
    liked = [None] * len(before) if row["positive"] is None else row["positive"][-history:]
    return ExampleUser(
        user_id=user_id,
        history_length=len(_ints(row["item_index"])),
        history=tuple(
            Item(i.item_id, i.title, i.tags, p) for i, p in zip(before, liked, strict=True)
        ),
        target=known[target],
        recommendations=tuple(Recommendation(k, known[ranked[k - 1]], k == rank) for k in places),
        rank=rank,
        list_length=len(ranked),
    )


def _ints(value: Any) -> list[int]:
    return [int(v) for v in value if v >= 0] if isinstance(value, list) else []


def _tail(value: Any, count: int) -> list[int]:
    return _ints(value)[-count:]


def choose_prefixes(
    codes_NQ: npt.NDArray[np.int32], *, count: int, items: int, seed: int
) -> list[tuple[tuple[int, ...], int, list[int]]]:
    """Prefixes of semantic ids drawn by hash, each with some of its items.

    The longest prefix (at least one level open) that enough items share is used; the draw is
    among the prefixes of that length with ``MIN_PREFIX_ITEMS`` items or more.

    Returns:
        (codes, number of items, at most ``items`` item indexes) for at most ``count`` prefixes.
    """
    levels = codes_NQ.shape[1]
    for length in range(max(1, levels - 1), 0, -1):
        prefixes, member, sizes = np.unique(
            codes_NQ[:, :length], axis=0, return_inverse=True, return_counts=True
        )
        large = np.flatnonzero(sizes >= MIN_PREFIX_ITEMS)
        if len(large) >= count or length == 1:
            break
    member = member.reshape(-1)
    drawn = large[np.argsort(hashed(large.astype(np.int64), seed), kind="stable")[:count]]
    result = []
    for group in drawn:
        indexes = np.flatnonzero(member == group).astype(np.int64)
        some = indexes[np.argsort(hashed(indexes, seed), kind="stable")[:items]]
        code = tuple(int(c) for c in prefixes[group])
        result.append((code, int(sizes[group]), [int(i) for i in some]))
    return result


def prefix_examples(
    codes_NQ: npt.NDArray[np.int32],
    catalogue: Table,
    items: Table,
    *,
    count: int = 3,
    shown: int = 5,
    seed: int,
) -> tuple[Prefix, ...]:
    """``choose_prefixes`` with titles."""
    chosen = choose_prefixes(codes_NQ, count=count, items=shown, seed=seed)
    known = describe_items(catalogue, items, {i for _, _, some in chosen for i in some})
    return tuple(Prefix(codes, size, tuple(known[i] for i in some)) for codes, size, some in chosen)


def quarantine_examples(
    quarantine: Table, rules: Sequence[tuple[str, str]], *, each: int = 2, most: int = 12
) -> tuple[Quarantined, ...]:
    """The first ``each`` rows of each (table, rule); reading ends when all are found."""
    room = dict.fromkeys(rules, each)
    found: list[Quarantined] = []
    for batch in quarantine.batches(["table", "row", "rule", "reason", "record"]):
        if not any(room.values()) or len(found) >= most:
            break
        for (table, rule), left in room.items():
            if not left:
                continue
            hit = pc.and_(
                pc.equal(batch.column("table"), table), pc.equal(batch.column("rule"), rule)
            )
            rows = batch.filter(hit).slice(0, left).to_pylist()
            room[table, rule] -= len(rows)
            found += [Quarantined(**row) for row in rows]
    return tuple(found[:most])
