"""Claims about side features: vocabularies, what they make of tables, and that models read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from onerec_world import (
    GROUPS,
    ITEMS,
    World,
    content,
    examples,
    items_table,
    make_world,
    trained_size,
    users_table,
    walk,
)
from safetensors.numpy import save_file

from components.data.split import CATALOGUE_SCHEMA, SEQUENCE_SCHEMA
from components.training.onerec.config import (
    FeatureConfig,
    LifelongConfig,
    MemoryConfig,
    OneRecConfig,
    TrainConfig,
)
from components.training.onerec.data import Batch, Events, assemble, read_sequences
from components.training.onerec.decode import DeviceTrie
from components.training.onerec.features import UNKNOWN_USER, Features, Vocabulary
from components.training.onerec.model import OneRec
from components.training.onerec.stage import read_training_data
from components.training.onerec.train import TrainingData, train, validate
from components.training.onerec.trie import build_trie

LEAST = FeatureConfig(min_count=1)


def fit(config: FeatureConfig = LEAST, train_users: Any = None, **tables: pa.Table) -> Features:
    users = tables.get("users", users_table())
    train_users = users["user_id"] if train_users is None else pa.array(train_users)
    return Features.fit(tables.get("items", items_table()), users, train_users, config, content())


def config_of(features: Features, **changes: Any) -> OneRecConfig:
    size: dict[str, Any] = {
        "codebook_size": 16,
        "d_model": 32,
        "heads": 4,
        "ffn": 48,
        "short_term": 5,
        "positive_feedback": 8,
        "dropout": 0.0,
        "num_items": ITEMS,
        "features": LEAST,
    }
    return OneRecConfig(**{**size, **features.sizes(LEAST), **changes})


def test_rows_are_those_of_the_most_frequent_values_of_train_users() -> None:
    users = pa.table(
        {
            "user_id": np.arange(12),
            "city": ["b"] * 4 + ["a"] * 3 + ["c"] * 1 + ["d"] * 4,
            "vip": [True, False] * 6,
            "level": [7, None, 7, 7, 7, 8, 8, 8, 8, 7, 7, 7],
            "score": np.linspace(0, 1, 12),
        }
    )
    features = fit(FeatureConfig(min_count=2), train_users=range(8), users=users)
    vocabulary = features.vocabulary
    # 'd' is of no train user, 'c' of one; a score is no category.
    assert vocabulary.columns == {
        "city": ("b", "a"),
        "vip": ("false", "true"),
        "level": ("7", "8"),
    }
    assert vocabulary.static_rows == [3, 3, 3]
    rows = features.static_of(np.arange(12))
    assert rows[:, 0].tolist() == [1] * 4 + [2] * 3 + [0] * 5
    assert rows[:3, 1].tolist() == [2, 1, 2]
    assert rows[:6, 2].tolist() == [1, 0, 1, 1, 1, 2]
    assert fit(FeatureConfig(min_count=2, values=1), range(8), users=users).vocabulary.columns[
        "city"
    ] == ("b",)
    assert not fit(FeatureConfig(static=False), users=users).vocabulary.static_rows


def test_a_column_of_categories_is_one_whatever_its_encoding() -> None:
    town = pa.array(["b", "a", "b", None])
    columns = {
        "plain": town,
        "large": town.cast(pa.large_string()),
        "dict": town.dictionary_encode(),
    }
    others = {"null": pa.nulls(4), "none": pa.nulls(4, pa.string()), "list": pa.array([["a"]] * 4)}
    users = pa.table({"user_id": np.arange(4)} | columns | others)
    features = fit(FeatureConfig(min_count=1), train_users=range(4), users=users)
    assert features.vocabulary.columns == dict.fromkeys(columns, ("b", "a"))
    assert features.static_of(np.arange(4)).tolist() == [[row] * 3 for row in (1, 2, 1, 0)]


def test_a_tag_is_counted_once_an_item() -> None:
    items = pa.table({"author_id": [1, 2, 3], "tags": [["x"] * 9, ["y"], [None, "y"]]})
    users = pa.table({"user_id": [1]})
    vocabulary = Vocabulary.fit(items, users, pa.array([1]), FeatureConfig(min_count=2))
    assert vocabulary.tags == ("y",)


def test_users_without_a_row_a_value_or_a_table_are_unknown() -> None:
    features = fit()
    assert features.static_of(np.array([1, 999, UNKNOWN_USER])).tolist() == [[0, 0]] * 3
    assert features.static_of(np.array([10]))[0, 1] == 0  # hides its town
    bare = fit(users=pa.table({"user_id": np.arange(5)}))
    assert bare.vocabulary.static_rows == []
    assert bare.static_of(np.arange(7)).shape == (7, 0)
    nobody = fit(users=pa.table({"user_id": pa.array([], pa.int64())}))
    assert nobody.static_of(np.arange(2)).shape == (2, 0)


def test_hashed_ids_know_every_user_but_none_without_an_id() -> None:
    features = fit(FeatureConfig(min_count=1, user_buckets=40))
    ids = np.append(np.arange(-500, 500), UNKNOWN_USER)
    rows = features.static_of(ids)
    assert features.vocabulary.static_rows[0] == 41
    assert rows[-1, 0] == 0
    assert set(rows[:-1, 0].tolist()) == set(range(1, 41))
    # A pure function of the id: another batch, another table, the same row.
    np.testing.assert_array_equal(features.static_of(ids[::-7])[:, 0], rows[::-7, 0])


def test_authors_have_rows_of_their_own_until_there_are_too_many() -> None:
    items = items_table()
    features = fit()
    author = items["author_id"].to_pylist()
    rows = features.items.author_N.tolist()
    assert [row == 0 for row in rows] == [a is None for a in author]
    assert len({(a, r) for a, r in zip(author, rows, strict=True)}) == len(set(author)) == 8
    few = fit(FeatureConfig(min_count=1, authors=4))
    assert few.vocabulary.author_rows == 5
    assert set(few.items.author_N.tolist()) <= set(range(5))
    assert [r == 0 for r in few.items.author_N.tolist()] == [a is None for a in author]
    assert fit(FeatureConfig(authors=0)).vocabulary.author_rows == 0
    many = items.set_column(1, "author_id", pa.array(np.arange(ITEMS) * 10**12))
    assert len(set(fit(items=many).items.author_N.tolist())) == ITEMS


def test_tags_are_means_and_new_items_find_their_rows() -> None:
    features = fit(FeatureConfig(min_count=6, tags=3))
    listed = items_table()["tags"].to_pylist()
    counts = {t: sum(t in (tags or []) for tags in listed) for tags in listed for t in tags or []}
    known = sorted((t for t in counts if counts[t] >= 6), key=lambda t: (-counts[t], t))[:3]
    assert list(features.vocabulary.tags) == known
    for n, tags in enumerate(listed):
        expected = [1 + known.index(t) for t in tags or [] if t in known]
        real = features.items.tag_weight_NT[n] > 0
        assert features.items.tag_NT[n][real].tolist() == expected
        np.testing.assert_allclose(features.items.tag_weight_NT[n][real], 1 / max(1, len(expected)))
    new = pa.table(
        {
            "author_id": pa.array([101, 5555, None], pa.int64()),
            "tags": pa.array([["new", "all"], None, ["x"] * 20 + ["all"]], pa.list_(pa.string())),
        }
    )
    made = features.vocabulary.items(new)
    assert made.author_N[0] == features.items.author_N[1]
    assert made.author_N[1:].tolist() == [0, 0]
    assert made.tag_NT.tolist() == [[1 + known.index("all")], [0], [1 + known.index("all")]]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    features = fit(FeatureConfig(min_count=1, user_buckets=9))
    features.save(tmp_path)
    loaded = Features.load(tmp_path)
    ids = np.array([0, 2, 3, UNKNOWN_USER])
    np.testing.assert_array_equal(loaded.static_of(ids), features.static_of(ids))
    for name, values in vars(features.items).items():
        np.testing.assert_array_equal(getattr(loaded.items, name), values)
    assert loaded.sizes(LEAST) == features.sizes(LEAST)
    assert loaded.vocabulary.columns == features.vocabulary.columns


def test_files_of_a_run_make_the_features_of_its_catalogue(tmp_path: Path, world: World) -> None:
    """Item ids are no indices, one item has no row, rows come in any order."""
    item_id = np.arange(ITEMS) * 3 + 10
    items = items_table().set_column(0, "item_id", pa.array(item_id))
    order = np.random.default_rng(0).permutation(ITEMS - 1)
    zeros = np.zeros(ITEMS, np.int64)
    catalogue = pa.table(
        [np.arange(ITEMS, dtype=np.int32), item_id, zeros, zeros], schema=CATALOGUE_SCHEMA
    )
    tables = {
        "catalogue": catalogue,
        "items": items.take(pa.array(order)),
        "users": users_table(),
        "train": world.train,
        "valid": world.valid,
    }
    files = {name: tmp_path / f"{name}.parquet" for name in tables}
    for name, table in tables.items():
        pq.write_table(table, files[name])
    for name, key, values in (
        ("semantic_ids", "codes", world.codes_NQ),
        ("aligned_embedding", "embedding", content()),
    ):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({key: values}, files[name])
    size = OneRecConfig(features=LEAST, lifelong=LifelongConfig(entries=9))
    made = read_training_data(files, size).features
    assert made is not None
    expected = fit(items=items)
    np.testing.assert_array_equal(made.items.author_N[:-1], expected.items.author_N[:-1])
    assert made.items.author_N[-1] == 0
    np.testing.assert_array_equal(made.items.tag_NT[:-1], expected.items.tag_NT[:-1])
    np.testing.assert_array_equal(made.static_UF, expected.static_UF)
    assert made.items.content_ND is not None
    blind = OneRecConfig(features=FeatureConfig(content=False))
    assert read_training_data(files, blind).features.items.content_ND is None  # type: ignore[union-attr]


def attached_batch(features: Features, config: OneRecConfig, world: World) -> Batch:
    sequences = read_sequences(world.train.to_batches())
    targets = sequences.train_targets("all")[3:400:9]
    return assemble(features.attach(sequences, targets, config), targets, world.codes_NQ, config)


def test_features_of_events_are_those_of_their_items(world: World) -> None:
    features = fit()
    config = config_of(features)
    batch = attached_batch(features, config, world)
    for events in batch.pathways.values():
        assert events.author_BL is not None
        assert events.tag_BLT is not None
        assert events.tag_weight_BLT is not None
        item, real = events.item_BL.numpy(), events.mask_BL.numpy()
        for ours, table in (
            (events.author_BL, features.items.author_N),
            (events.tag_BLT, features.items.tag_NT),
            (events.tag_weight_BLT, features.items.tag_weight_NT),
            (events.content_BLD, features.items.content_ND),
        ):
            np.testing.assert_array_equal(ours.numpy()[real], table[item[real]])
            assert not ours.numpy()[~real].any()
    assert batch.static_BF is not None
    sequences = read_sequences(world.train.to_batches())
    user = np.searchsorted(sequences.start_U1, sequences.train_targets("all")[3:400:9], "right") - 1
    ids = np.array(world.train["user_id"].to_pylist())[user]
    np.testing.assert_array_equal(batch.static_BF, features.static_of(ids))


@pytest.mark.parametrize("feature", ["author_BL", "tag_BLT", "tag_weight_BLT", "content_BLD"])
@pytest.mark.parametrize("pathway", ["short_term", "positive_feedback"])
def test_every_side_feature_of_events_reaches_the_output(
    world: World, pathway: str, feature: str
) -> None:
    features = fit()
    config = config_of(features)
    torch.manual_seed(0)
    model, batch = trained_size(OneRec(config)), attached_batch(features, config, world)
    events = batch.pathways[pathway]
    rows = {"author_BL": config.author_rows, "tag_BLT": config.tag_rows, "tag_weight_BLT": 2}
    given = getattr(events, feature)
    moved = given.flip(-1) if feature == "content_BLD" else (given + 1) % rows[feature]
    changed = {**vars(events), feature: moved}
    other = replace(batch, pathways={**batch.pathways, pathway: Events(**changed)})
    with torch.no_grad():
        before, after = (model.sid_log_probs(b, batch.target_BQ) for b in (batch, other))
    assert float((before - after).abs().max()) > 1e-3


def test_each_static_feature_reaches_the_output_and_starts_without_a_say(world: World) -> None:
    features = fit(FeatureConfig(min_count=1, user_buckets=30))
    config = config_of(features)
    torch.manual_seed(0)
    fresh, batch = OneRec(config).eval(), attached_batch(features, config, world)
    assert batch.static_BF is not None
    assert batch.static_BF.shape[1] == 3
    for f in range(3):
        changed = batch.static_BF.clone()
        changed[:, f] = (changed[:, f] + 1) % config.static_rows[f]
        other = replace(batch, static_BF=changed)
        for model, moves in ((fresh, False), (trained_size(OneRec(config)), True)):
            with torch.no_grad():
                before, after = (model.sid_log_probs(b, batch.target_BQ) for b in (batch, other))
            assert bool((before - after).abs().max() > 1e-3) == moves


def test_sequences_without_side_information_are_refused(world: World) -> None:
    features, sequences = fit(), read_sequences(world.train.to_batches())
    for changes in ({"static_rows": []}, {"author_rows": 0, "tag_rows": 0}):
        config = config_of(features, **changes)
        with pytest.raises(ValueError, match=r"Features\.attach"):
            assemble(sequences, np.array([3]), world.codes_NQ, config)
    plain = config_of(features)
    without = features.attach(sequences, np.array([3]), plain)
    long = plain.model_copy(update={"lifelong": LifelongConfig(entries=9)})
    with pytest.raises(ValueError, match="lifelong clusters"):
        assemble(without, np.array([3]), world.codes_NQ, long)


def count(config: OneRecConfig) -> int:
    return sum(p.numel() for p in OneRec(config).parameters())


@pytest.mark.parametrize(("item_input", "grows"), [("sid", False), ("vid", True), ("both", True)])
def test_only_tables_of_items_grow_with_the_catalogue(item_input: str, grows: bool) -> None:
    sizes = [
        count(
            config_of(fit(), item_input=item_input, num_items=n, memory=MemoryConfig(successors=0))
        )
        for n in (100, 10_000)
    ]
    assert sizes[1] - sizes[0] == (9_900 * 32 if grows else 0)


@pytest.mark.parametrize(
    ("item_input", "reads_sid", "reads_vid"),
    [("sid", True, False), ("vid", False, True), ("both", True, True)],
)
def test_an_item_is_read_by_what_the_parameters_say(
    world: World, item_input: str, reads_sid: bool, reads_vid: bool
) -> None:
    features = fit()
    config = config_of(features, item_input=item_input)
    torch.manual_seed(0)
    model, batch = trained_size(OneRec(config)), attached_batch(features, config, world)
    events = batch.pathways["short_term"]
    for name, reads, top in (("sid_BLQ", reads_sid, 16), ("item_BL", reads_vid, ITEMS)):
        changed = Events(**{**vars(events), name: (getattr(events, name) + 1) % top})
        other = replace(batch, pathways={**batch.pathways, "short_term": changed})
        recall = model.recall(batch)
        with torch.no_grad():
            logits = [
                model.level_logits(*model.encode(b), batch.target_BQ, recall)[0]
                for b in (batch, other)
            ]
        assert bool((logits[0] - logits[1]).abs().max() > 1e-3) == reads


def test_what_users_are_decides_where_their_histories_do_not() -> None:
    """One event of any group, then one of the group that the town of the user likes."""
    world = make_world()
    rng = np.random.default_rng(0)

    def rows(users: int, first: int) -> list[dict[str, list]]:
        made = walk(users, seed=first, longest=3)
        for u, row in enumerate(made, first):
            row["user_id"] = u  # type: ignore[assignment]
            groups = np.array([rng.integers(GROUPS), u % GROUPS])
            row["item_index"] = (groups * 10 + rng.integers(0, 10, 2)).tolist()
            for name in SEQUENCE_SCHEMA.names[2:]:
                row[name] = row[name][:2]
        return made

    user_id = np.arange(3000)
    towns = [f"town {u % GROUPS}" for u in user_id.tolist()]
    users = pa.table({"user_id": user_id, "town": towns})
    features = fit(users=users, train_users=np.arange(600))
    data = TrainingData(
        read_sequences(pa.Table.from_pylist(rows(600, 0), schema=SEQUENCE_SCHEMA).to_batches()),
        read_sequences(examples(rows(200, 2500)).to_batches()),
        world.codes_NQ,
        world.popularity_N,
        features,
    )
    training = TrainConfig(
        epochs=10,
        batch_size=48,
        learning_rate=6e-3,
        warmup_steps=10,
        evaluate_every=60,
        valid_beams=20,
        targets="all",
    )
    size = {"encoder_layers": 1, "decoder_layers": 1, "dropout": 0.1, "positive_feedback": 0}
    config = config_of(features, memory=MemoryConfig(successors=0), d_model=16, **size)
    state = train(config, data, training)
    # Ten of sixty items can follow where the town is known.
    oracle = float((1 / np.log2(np.arange(2, 12))).sum()) / 10
    model = OneRec(config)
    model.load_state_dict(state.best_weights)
    trie = DeviceTrie.on(build_trie(data.codes_NQ, data.popularity_N))

    def score(static_UF: np.ndarray) -> float:
        side = replace(features, static_UF=static_UF)
        valid = side.attach(data.valid, data.valid.example_targets(), config)
        told = validate(model, trie, replace(data, valid=valid), training)
        return told["valid_ndcg_at_10"] / oracle

    assert score(features.static_UF) == pytest.approx(state.best_score / oracle)
    assert score(features.static_UF) > 0.85
    assert score(np.roll(features.static_UF, 1)) < 0.1
    # Of users who are told nothing about it has learned to say what suits all of them.
    assert 0.05 < score(0 * features.static_UF) < 0.4
