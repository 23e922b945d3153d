"""Item embeddings: what lies near what, and that no event after the train period moves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_harness import Bench

from components.curation.item_features.config import ItemFeaturesParams
from components.curation.item_features.embedding import (
    combine,
    cooccurrence_counts,
    fit,
    ppmi,
)
from components.curation.item_features.stage import item_features
from components.data.contracts import INTERACTIONS, ITEMS
from components.data.split_stage import SplitParams, split

TOPICS, PER_TOPIC = 12, 10
N = TOPICS * PER_TOPIC
DAY_MS = 86_400_000
SMALL = {"dimension": 24, "block_dimension": 32, "token_dimension": 16}


def titles(rng: np.random.Generator) -> list[str]:
    """Titles of two topic words and four common ones: text that tells the topic, not loudly."""
    topic_words = [[f"topic{t}word{w}" for w in range(6)] for t in range(TOPICS)]
    common = [f"common{w}" for w in range(40)]
    return [
        " ".join([*rng.choice(topic_words[i // PER_TOPIC], 2), *rng.choice(common, 4)])
        for i in range(N)
    ]


def sequences(rng: np.random.Generator, users: int = 300, length: int = 12) -> pa.Table:
    """Users who take the items of one group, of which each topic has one: no text tells it."""
    group = rng.integers(0, PER_TOPIC, users)
    items = [(rng.integers(0, TOPICS, length) * PER_TOPIC + g).tolist() for g in group.tolist()]
    return sequence_table(items)


def sequence_table(items: list[list[int]]) -> pa.Table:
    return pa.table(
        {
            "item_index": pa.array(items, pa.list_(pa.int32())),
            "positive": pa.array([[True] * len(row) for row in items], pa.list_(pa.bool_())),
        }
    )


def make(
    texts: list[str],
    train: pa.Table,
    tags: list[list[str] | None] | None = None,
    authors: list[int | None] | None = None,
    seed: int = 0,
    **params: Any,
) -> npt.NDArray[np.float32]:
    items = items_table(texts, tags, authors)
    batches = train.to_batches(max_chunksize=97)
    encoder, _ = fit(items, batches, ItemFeaturesParams(**SMALL | params), seed)
    return encoder.encode(items).embedding_ND


def items_table(
    texts: list[str],
    tags: list[list[str] | None] | None = None,
    authors: list[int | None] | None = None,
) -> pa.Table:
    columns = {"item_id": list(range(len(texts))), "title": texts}
    columns |= {"tags": tags} if tags else {}
    columns |= {"author_id": authors} if authors else {}
    return pa.table(
        [pa.array(columns.get(f.name, [None] * len(texts)), f.type) for f in ITEMS.schema],
        schema=ITEMS.schema,
    )


def cosine(embedding: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    norm = np.linalg.norm(embedding, axis=1, keepdims=True)
    unit = embedding / np.maximum(norm, 1e-9)
    return unit @ unit.T


def share_of_neighbours(embedding: npt.NDArray[np.float32], label: npt.NDArray[np.int64]) -> float:
    """Share of the five nearest items that have the same label."""
    near = cosine(embedding) - 2 * np.eye(len(embedding))
    nearest = np.argsort(-near, axis=1)[:, :5]
    return float((label[nearest] == label[:, None]).mean())


def test_near_duplicate_titles_lie_nearer_than_other_items() -> None:
    rng = np.random.default_rng(0)
    texts = titles(rng)
    texts[1], texts[51] = texts[0] + "!", texts[50].replace("common", "common ")
    near = cosine(make(texts, sequences(rng)))
    others = near[0][2:]
    assert near[0, 1] > np.quantile(others, 0.99)
    assert near[50, 51] > np.quantile(near[50][np.arange(N) != 50], 0.95)


def test_text_tags_and_author_each_gather_their_items() -> None:
    rng = np.random.default_rng(1)
    topic = np.arange(N) // PER_TOPIC
    nothing = sequence_table([[0]])
    none = {"text_weight": 0, "tags_weight": 0, "author_weight": 0, "cooccurrence_weight": 0}
    chance = (PER_TOPIC - 1) / (N - 1)
    cases = {
        "text_weight": make(titles(rng), nothing, **none | {"text_weight": 1}),
        "tags_weight": make(
            [""] * N,
            nothing,
            tags=[[f"tag{t}", "all"] for t in topic],
            **none | {"tags_weight": 1},
        ),
        "author_weight": make(
            [""] * N, nothing, authors=topic.tolist(), **none | {"author_weight": 1}
        ),
    }
    for name, embedding in cases.items():
        assert share_of_neighbours(embedding, topic) > 5 * chance, name


def test_items_that_occur_together_lie_nearer() -> None:
    rng = np.random.default_rng(2)
    embedding = make([""] * N, sequences(rng))
    group = np.arange(N) % PER_TOPIC
    assert share_of_neighbours(embedding, group) > 0.9


def test_shuffled_pairs_teach_nothing() -> None:
    """Control: the same events dealt out to other users leave neighbours at chance."""
    rng = np.random.default_rng(3)
    train = sequences(rng)
    lists = np.array(train["item_index"].to_pylist())
    shuffled = rng.permutation(lists.ravel()).reshape(lists.shape)
    group = np.arange(N) % PER_TOPIC
    chance = (TOPICS - 1) / (N - 1)
    embedding = make([""] * N, sequence_table(shuffled.tolist()))
    assert share_of_neighbours(embedding, group) < 2 * chance


def test_text_and_history_together_know_more_than_either() -> None:
    rng = np.random.default_rng(4)
    texts, train = titles(rng), sequences(rng, users=60, length=6)
    topic, group = np.arange(N) // PER_TOPIC, np.arange(N) % PER_TOPIC
    both = make(texts, train)
    text = make(texts, train, cooccurrence_weight=0)
    history = make(texts, train, text_weight=0)
    assert share_of_neighbours(both, group) > share_of_neighbours(text, group) + 0.2
    assert share_of_neighbours(both, topic) > share_of_neighbours(history, topic) + 0.1


def test_new_item_lies_near_what_it_resembles() -> None:
    rng = np.random.default_rng(5)
    texts = titles(rng)
    texts[17] = texts[23]
    lists = [
        [i for i in row if i != 17] for row in sequences(rng)["item_index"].to_pylist()
    ]  # 17 has no history, 23 has; they share their text
    near = cosine(make(texts, sequence_table(lists)))
    assert near[17].argsort()[-2] == 23


def test_item_that_nothing_is_known_of_has_a_finite_vector() -> None:
    rng = np.random.default_rng(6)
    texts = titles(rng)
    texts[0] = ""
    lists = [[i for i in row if i] for row in sequences(rng)["item_index"].to_pylist()]
    embedding = make(texts, sequence_table(lists))
    assert np.isfinite(embedding).all()
    assert np.linalg.norm(embedding[0]) < np.median(np.linalg.norm(embedding, axis=1))


def test_same_seed_gives_the_same_bits() -> None:
    texts, train = titles(np.random.default_rng(7)), sequences(np.random.default_rng(7))
    assert make(texts, train).tobytes() == make(texts, train).tobytes()


def test_counts_equal_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(8)
    items = [rng.integers(0, 9, rng.integers(0, 15)).tolist() for _ in range(40)]
    flags = [(rng.random(len(row)) < 0.6).tolist() for row in items]
    table = pa.table(
        {
            "item_index": pa.array(items, pa.list_(pa.int32())),
            "positive": pa.array(flags, pa.list_(pa.bool_())),
        }
    )
    for positive_only in (False, True):
        expected = np.zeros((9, 9))
        for row, keep in zip(items, flags, strict=True):
            kept = [i for i, ok in zip(row, keep, strict=True) if ok or not positive_only]
            for a in range(len(kept)):
                for b in range(a + 1, min(a + 4, len(kept))):
                    if kept[a] != kept[b]:
                        expected[kept[a], kept[b]] += 1 / (b - a)
                        expected[kept[b], kept[a]] += 1 / (b - a)
        counts = cooccurrence_counts(
            table.to_batches(max_chunksize=7), 9, 3, positive_only=positive_only
        )
        np.testing.assert_allclose(counts.toarray(), expected, rtol=1e-6)


def test_ppmi_equals_its_dense_formula() -> None:
    rng = np.random.default_rng(9)
    items = [rng.integers(0, 9, 12).tolist() for _ in range(20)]
    counts = cooccurrence_counts(sequence_table(items).to_batches(), 9, 2, positive_only=False)
    dense = counts.toarray().astype(np.float64)
    joint, mass = dense / dense.sum(), dense.sum(1)
    context = mass**0.75 / (mass**0.75).sum()
    with np.errstate(divide="ignore"):
        expected = np.maximum(0, np.log(joint / np.outer(mass / mass.sum(), context)))
    np.testing.assert_allclose(ppmi(counts).toarray(), expected, atol=1e-5)


def rotated(
    block: npt.NDArray[np.float32], weight: float, params: ItemFeaturesParams
) -> npt.NDArray[np.float32]:
    mean, rotation = combine([(block, weight)], params)
    return (weight * block - mean) @ rotation


def test_without_whitening_all_dimensions_keep_the_distances() -> None:
    rng = np.random.default_rng(10)
    block = rng.normal(size=(50, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
    params = ItemFeaturesParams(dimension=8, whitening=0)
    embedding = rotated(block, 2.0, params)

    def gaps(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.linalg.norm(x[:, None] - x[None], axis=2)

    ratio = gaps(embedding)[~np.eye(50, dtype=bool)] / gaps(block)[~np.eye(50, dtype=bool)]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
    assert (embedding**2).mean() == pytest.approx(1, rel=1e-4)


def test_full_whitening_gives_all_dimensions_equal_variance() -> None:
    rng = np.random.default_rng(11)
    block = rng.normal(size=(500, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
    embedding = rotated(block, 1.0, ItemFeaturesParams(dimension=8, whitening=1))
    np.testing.assert_allclose(embedding.var(0), 1, rtol=1e-3)


def test_author_of_a_single_item_says_nothing() -> None:
    items = items_table([""] * 7, authors=[1, 1, 2, None, 3, 3, 3])
    encoder, known = fit(items, [], ItemFeaturesParams(**SMALL), 0)
    assert known["author"] == 5
    author = encoder.facts["kinds"].index("author")
    assert (
        encoder.encode(items).mask_NM[:, author].tolist() == [True] * 2 + [False] * 2 + [True] * 3
    )


def test_no_block_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="all weights are 0"):
        ItemFeaturesParams(text_weight=0, tags_weight=0, author_weight=0, cooccurrence_weight=0)


def interactions(rng: np.random.Generator, late_item: int) -> pa.Table:
    """Twenty days of events; those of the last five concern items shifted by `late_item`."""
    rows = 4000
    day = rng.integers(0, 20, rows)
    item = rng.integers(0, N, rows)
    item = np.where(day >= 15, (item + late_item) % N, item)
    columns: dict[str, Any] = {
        "user_id": rng.integers(0, 80, rows),
        "item_id": item,
        "timestamp": pa.array(day * DAY_MS + rng.integers(0, DAY_MS, rows)).cast(
            INTERACTIONS.schema.field("timestamp").type
        ),
    }
    return pa.table(
        [pa.array(columns.get(f.name, pa.nulls(rows, f.type))) for f in INTERACTIONS.schema],
        schema=INTERACTIONS.schema,
    )


def run_stages(folder: Path, late_item: int) -> tuple[Bench, dict[str, float]]:
    bench = Bench(folder)
    texts = titles(np.random.default_rng(0))
    items = {"item_id": list(range(N - 1, 19, -1)), "title": texts[: N - 20]}  # 20 have no row
    table = pa.table(
        [
            pa.array(items[f.name], f.type) if f.name in items else pa.nulls(N - 20, f.type)
            for f in ITEMS.schema
        ],
        schema=ITEMS.schema,
    )
    source = {"protocol": "temporal", "valid_from": "1970-01-16", "test_from": "1970-01-18"}
    bench.give(
        "interactions", lambda o: o.write_table(interactions(np.random.default_rng(0), late_item))
    )
    bench.give("items", lambda o: o.write_table(table))
    bench.give("source", lambda o: o.write_json({"split": source}))
    bench.run(split, SplitParams())
    return bench, bench.run(item_features, ItemFeaturesParams(**SMALL))


def test_events_after_valid_from_change_no_embedding(tmp_path: Path) -> None:
    one, metrics = run_stages(tmp_path / "a", late_item=0)
    other, _ = run_stages(tmp_path / "b", late_item=37)
    assert one.digests("test_examples") != other.digests("test_examples")
    assert one.digests("item_embedding") == other.digests("item_embedding")
    embedding = one.artifacts["item_embedding"].load_arrays()["embedding"]
    assert embedding.shape == (N, SMALL["dimension"])
    assert metrics["items_with_text"] == N - 20


def test_rows_follow_the_catalogue_and_not_the_items_table(tmp_path: Path) -> None:
    bench, _ = run_stages(tmp_path, late_item=0)
    embedding = bench.artifacts["item_embedding"].load_arrays()["embedding"]
    catalogue = bench.artifacts["catalogue"].read_table()["item_id"].to_pylist()
    # The items table runs backwards: item id N - 1 has the first title, a topic-0 title.
    texts = titles(np.random.default_rng(0))
    text_of = {item: texts[N - 1 - item] for item in range(20, N)}
    index = [catalogue.index(item) for item in text_of]
    expected = make(list(text_of.values()), sequence_table([[0]]), cooccurrence_weight=0)
    order = np.corrcoef(cosine(embedding[index]).ravel(), cosine(expected).ravel())[0, 1]
    assert order > 0.5


def test_history_finds_held_out_successors_that_text_misses(shared_data: Path) -> None:
    """Real sequences: the item before last → the validation target, among all items."""
    folder = shared_data / "amazon_scientific"
    lists = pq.read_table(folder / "sequences.parquet")["item_ids"].to_pylist()
    rows = pq.read_table(folder / "items.parquet", columns=["item_id", "title"]).sort_by("item_id")
    context = np.array([row[-3] for row in lists])
    target = np.array([row[-2] for row in lists])
    train = sequence_table([row[:-2] for row in lists])

    def recall_at_10(**params: Any) -> float:
        near = cosine(
            make(rows["title"].to_pylist(), train, dimension=64, block_dimension=64, **params)
        )
        score = near[context]
        score[np.arange(len(context)), context] = -2
        rank = (score > score[np.arange(len(target)), target][:, None]).sum(1)
        return float((rank < 10).mean())

    text, both = recall_at_10(cooccurrence_weight=0), recall_at_10()
    assert both > 1.1 * text > 10 * 10 / len(rows)
