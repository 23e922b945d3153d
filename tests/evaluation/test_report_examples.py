"""Examples are drawn by hash, read in batches and told as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_run import Content

from components.evaluation.report import examples
from components.pipeline.errors import DataContractError


@dataclass
class Memory:
    """A table as an artifact handle gives it, counting what is read."""

    table: pa.Table
    batch_rows: int = 7
    read: int = 0

    @property
    def schema(self) -> pa.Schema:
        return self.table.schema

    @property
    def rows(self) -> int:
        return int(self.table.num_rows)

    def batches(
        self, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[pa.RecordBatch]:
        for batch in self.table.select(columns).to_batches(max_chunksize=self.batch_rows):
            self.read += batch.num_rows
            yield batch


def users_of(content: Content, **changes: int) -> examples.Users:
    tables = {name: Memory(table) for name, table in content.tables.items()}
    asked: dict[str, Any] = {"count": 10, "history": 4, "shown": 10, "seed": 0} | changes
    return examples.example_users(
        tables["test_examples"],
        tables["recommendations"],
        tables["catalogue"],
        tables["items"],
        target="the last event",
        **asked,
    )


def test_the_sample_does_not_depend_on_the_order_of_the_file() -> None:
    ids = np.arange(5000, dtype=np.int64)
    shuffled = np.random.default_rng(1).permutation(ids)
    samples = [
        examples.sample_ids(Memory(pa.table({"u": v}), rows).batches(["u"]), "u", 10, seed=3)
        for v, rows in ((ids, 5000), (shuffled, 11))
    ]
    assert samples[0] == samples[1]
    assert len(set(samples[0])) == 10


def test_the_sample_is_uniform_over_seeds() -> None:
    table = pa.table({"u": np.arange(20)})
    drawn = Counter(
        user
        for seed in range(800)
        for user in examples.sample_ids(Memory(table).batches(["u"]), "u", 5, seed)
    )
    # Binomial(800, 1/4): mean 200, standard deviation 12.2; five of them leave 1e-5 for 20 counts.
    assert all(abs(drawn[user] - 200) < 62 for user in range(20))


def test_users_are_told_with_the_end_of_their_history_and_the_truth_about_hits() -> None:
    content = Content()
    title = dict(
        zip(
            content.tables["catalogue"]["item_index"].to_pylist(),
            content.tables["items"]["title"].to_pylist(),
            strict=True,
        )
    )
    rows = {r["user_id"]: r for r in content.tables["test_examples"].to_pylist()}
    lists = {r["user_id"]: r["item_index"] for r in content.tables["recommendations"].to_pylist()}
    users = users_of(content, count=20)
    assert users.total == 40
    assert 0 < users.hits < 20
    for user in users.shown:
        row, listed = rows[user.user_id], lists[user.user_id]
        assert [i.title for i in user.history] == [title[i] for i in row["item_index"][-4:]]
        assert [i.positive for i in user.history] == row["positive"][-4:]
        assert user.history_length == len(row["item_index"])
        assert user.target.title == title[row["target"]]
        assert user.rank == (listed.index(row["target"]) + 1 if row["target"] in listed else None)
        assert [r.item.title for r in user.recommendations[:10]] == [title[i] for i in listed[:10]]
        assert [r.rank for r in user.recommendations if r.hit] == ([user.rank] if user.rank else [])


def test_where_every_event_is_positive_no_event_is_called_so() -> None:
    content = Content()
    some, every = users_of(content), content.tables["catalogue"].column("train_count")
    catalogue = content.tables["catalogue"].drop_columns("train_positive_count")
    content.tables["catalogue"] = catalogue.append_column("train_positive_count", every)
    none = users_of(content)
    assert (some.tells_positive, none.tells_positive) == (True, False)
    assert {i.positive for user in some.shown for i in user.history} == {True, False}
    assert {i.positive for user in none.shown for i in user.history} == {None}


@pytest.mark.parametrize("text", ["\u200b", "\u2060\ufeff", "\u200b \u200e", "\u00a0", "\t", ""])
def test_a_title_or_tag_that_nobody_sees_is_none(text: str) -> None:
    table = pa.table({"item_id": [7], "title": [text], "tags": [[text, "a"]]})
    known = examples.describe_items(
        Memory(pa.table({"item_index": [0], "item_id": [7]})), Memory(table), [0]
    )
    assert (known[0].named, known[0].tags) == (False, ("a",))


def test_padding_of_a_list_is_not_an_item() -> None:
    content = Content()
    lists = [[3, 1, -1, -1]] * 40
    content.tables["recommendations"] = pa.table(
        {"user_id": np.arange(40) + 1000, "item_index": pa.array(lists, pa.list_(pa.int32()))}
    )
    for user in users_of(content).shown:
        assert user.list_length == len(user.recommendations) == 2


def test_another_seed_shows_other_users() -> None:
    content = Content()
    first, second = (
        [user.user_id for user in users_of(content, seed=seed).shown] for seed in (0, 1)
    )
    assert first != second
    assert first == [user.user_id for user in users_of(content, seed=0).shown]


def test_an_item_without_title_keeps_its_id_and_tags() -> None:
    table = pa.table({"item_id": [7], "title": pa.array([None], pa.string()), "tags": [["a", "b"]]})
    known = examples.describe_items(
        Memory(pa.table({"item_index": [0], "item_id": [7]})), Memory(table), [0]
    )
    assert (known[0].item_id, known[0].named, known[0].tags) == (7, False, ("a", "b"))


def test_an_item_outside_the_catalogue_is_an_error_that_names_it() -> None:
    content = Content()
    content.tables["catalogue"] = content.tables["catalogue"].slice(0, 20)
    with pytest.raises(DataContractError, match="not in the catalogue"):
        users_of(content)


def test_a_user_without_test_example_is_an_error_that_names_the_user() -> None:
    content = Content()
    content.tables["test_examples"] = content.tables["test_examples"].slice(0, 5)
    with pytest.raises(DataContractError, match=r"user 10\d\d has recommendations"):
        users_of(content)


def test_prefixes_share_their_codes_and_count_all_their_items() -> None:
    rng = np.random.default_rng(0)
    codes_NQ = rng.integers(0, 6, (500, 3)).astype(np.int32)
    chosen = examples.choose_prefixes(codes_NQ, count=3, items=5, seed=0)
    assert len(chosen) == 3
    for code, size, some in chosen:
        assert len(code) == 2
        same = [i for i, row in enumerate(codes_NQ.tolist()) if tuple(row[:2]) == code]
        assert size == len(same) >= examples.MIN_PREFIX_ITEMS
        assert len(some) == 5
        assert set(some) <= set(same)


def test_sparse_codes_fall_back_to_shorter_prefixes() -> None:
    codes_NQ = np.stack([np.arange(60) % 5, np.arange(60), np.arange(60)], 1).astype(np.int32)
    assert {
        len(code) for code, _, _ in examples.choose_prefixes(codes_NQ, count=3, items=5, seed=0)
    } == {1}
    one_level = codes_NQ[:, :1]
    assert len(examples.choose_prefixes(one_level, count=3, items=5, seed=0)) == 3


def test_codes_that_nobody_shares_give_no_example() -> None:
    codes_NQ = np.stack([np.arange(9)] * 2, 1).astype(np.int32)
    assert examples.choose_prefixes(codes_NQ, count=3, items=5, seed=0) == []


def test_quarantine_is_read_only_until_each_rule_has_its_examples() -> None:
    n = 10_000
    table = Memory(
        pa.table(
            {
                "table": ["interactions"] * n,
                "row": np.arange(n),
                "rule": ["a", "b"] * (n // 2),
                "reason": ["because"] * n,
                "record": ["{}"] * n,
            }
        )
    )
    found = examples.quarantine_examples(table, [("interactions", "a"), ("interactions", "b")])
    assert [(q.row, q.rule) for q in found] == [(0, "a"), (2, "a"), (1, "b"), (3, "b")]
    assert table.read < 100
