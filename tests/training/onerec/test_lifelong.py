"""Claims about the lifelong pathway (arXiv 2506.13695, section 2.2)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
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
    pad,
    trained_size,
    users_table,
    walk,
)

from components.data.split import SEQUENCE_SCHEMA
from components.training.onerec.config import (
    FeatureConfig,
    LifelongConfig,
    MemoryConfig,
    OneRecConfig,
    TrainConfig,
)
from components.training.onerec.data import Events, Sequences, assemble, read_sequences
from components.training.onerec.decode import DeviceTrie
from components.training.onerec.encoder import LifelongPathway
from components.training.onerec.features import Features
from components.training.onerec.lifelong import (
    Clusters,
    _cube_root,
    cluster_histories,
    hierarchical_kmeans,
)
from components.training.onerec.model import OneRec
from components.training.onerec.stage import shorter_histories
from components.training.onerec.train import TrainingData, train, validate
from components.training.onerec.trie import build_trie

LEAF = 8
FEATURES = FeatureConfig(min_count=1)


def of_size(*, entries: int = 60, leaf: int = LEAF) -> OneRecConfig:
    return OneRecConfig(
        codebook_size=16,
        d_model=32,
        heads=4,
        ffn=48,
        short_term=5,
        positive_feedback=8,
        dropout=0.0,
        num_items=ITEMS,
        lifelong=LifelongConfig(entries=entries, leaf=leaf, queries=3),
        features=FEATURES,
        **known().sizes(FEATURES),  # type: ignore[arg-type]
    )


def known() -> Features:
    users = users_table()
    return Features.fit(items_table(), users, users["user_id"], FEATURES, content())


def long_histories(users: int = 12, longest: int = 120) -> pa.Table:
    return pa.Table.from_pylist(walk(users, seed=3, longest=longest), schema=SEQUENCE_SCHEMA)


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return read_sequences(long_histories().to_batches())


def clusters_of(sequences: Sequences, event_S: np.ndarray, entries: int = 1000) -> Clusters:
    config = LifelongConfig(entries=entries, leaf=LEAF)
    return cluster_histories(sequences, event_S, known().items, config)


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Points around points around points: float32 [prod(shape), 6]; each level ten times closer."""
    rng = np.random.default_rng(seed)
    x = np.zeros((1, 6))
    for level, n in enumerate(shape):
        x = (x[:, None] + rng.normal(size=(len(x), n, 6)) / 30**level).reshape(-1, 6)
    return x.astype(np.float32)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = len(np.unique(np.stack([a, b]), axis=1)[0])
    return pairs == len(np.unique(a)) == len(np.unique(b))


def test_every_step_cuts_into_the_cube_root_of_the_set() -> None:
    """512 items are cut into 8, each of 64 into 4, and leaves of 16 are not cut."""
    x = blobs((8, 4, 16))
    order = np.random.default_rng(1).permutation(len(x))
    leaf_P = hierarchical_kmeans(x, order, np.array([0, 512]), leaf=20)
    assert same_partition(leaf_P, order // 16)
    # A step earlier it stops where clusters of 64 may stay.
    leaf_P = hierarchical_kmeans(x, order, np.array([0, 512]), leaf=64)
    assert same_partition(leaf_P, order // 64)


def test_cube_roots_are_exact() -> None:
    expected, root = [], 0
    for n in range(20_000):
        root += (root + 1) ** 3 <= n
        expected.append(root)
    assert [_cube_root(n) for n in range(20_000)] == expected


def test_examples_with_shorter_histories_than_training_reads_are_told(
    sequences: Sequences,
) -> None:
    def of_lengths(*length: int) -> Sequences:
        return replace(sequences, start_U1=np.concatenate([[0], np.cumsum(length)]))

    train, examples = of_lengths(300, 20), of_lengths(101, 21)
    assert shorter_histories(train, examples, entries=256) == 100
    assert shorter_histories(train, examples, entries=100) == 0
    assert shorter_histories(of_lengths(90), examples, entries=256) == 0
    assert shorter_histories(train, examples, entries=0) == 0


@pytest.mark.parametrize("leaf", [8, 20])
def test_leaves_part_every_set_and_none_is_larger_than_the_limit(leaf: int) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(900, 16)).astype(np.float32)
    size = rng.integers(0, 500, 30)
    size[:3] = 0, leaf, leaf + 1
    start = np.concatenate([[0], np.cumsum(size)])
    item_P = np.concatenate([rng.permutation(900)[:n] for n in size])
    leaf_P = hierarchical_kmeans(x, item_P, start, leaf)
    assert set(leaf_P.tolist()) == set(range(leaf_P.max() + 1))
    set_P = np.arange(30).repeat(size)
    for s in range(30):
        held, counts = np.unique(leaf_P[set_P == s], return_counts=True)
        assert counts.max(initial=0) <= (1 if size[s] <= leaf else leaf)
        # No leaf reaches into another set, and numbers ascend by set.
        assert not np.isin(held, leaf_P[set_P != s]).any()
        assert s == 0 or not len(held) or held.min() > leaf_P[set_P < s].max(initial=-1)


def test_a_set_is_clustered_the_same_alone_and_among_others() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 32)).astype(np.float32)
    size = rng.integers(15, 120, 40)
    size[::4] = 60  # many sets of one size are computed as one stack
    item_P = np.concatenate([rng.permutation(400)[:n] for n in size])
    start = np.concatenate([[0], np.cumsum(size)])
    together = hierarchical_kmeans(x, item_P, start, 20)
    for s in range(40):
        own = item_P[start[s] : start[s + 1]]
        alone = hierarchical_kmeans(x, own, np.array([0, len(own)]), 20)
        ours = together[start[s] : start[s + 1]]
        np.testing.assert_array_equal(alone, ours - ours.min())


def test_equal_items_are_cut_too() -> None:
    x = np.zeros((100, 4), np.float32)
    leaf_P = hierarchical_kmeans(x, np.arange(100), np.array([0, 100]), 20)
    assert np.bincount(leaf_P).max() <= 20


def test_a_leaf_too_small_for_the_cube_root_is_refused() -> None:
    with pytest.raises(ValueError, match="never cut"):
        hierarchical_kmeans(np.zeros((9, 2), np.float32), np.arange(9), np.array([0, 9]), 7)


def test_features_of_a_cluster_equal_a_loop_over_its_events(sequences: Sequences) -> None:
    targets = sequences.train_targets("all")
    made = clusters_of(sequences, targets)
    assert len(made.end_K) > 30
    x, tables = content(), known().items
    for k, end in enumerate(made.end_K):
        held = made.cluster_X[made.start_K1[k] : made.start_K1[k + 1]]
        begin = end - len(held)
        assert begin in sequences.start_U1
        for c in np.unique(held):
            events = begin + np.flatnonzero(held == c)
            items = np.unique(sequences.item_E[events])
            assert len(items) <= LEAF
            apart = np.linalg.norm(x[items] - x[items].mean(0), axis=1)
            chosen = sequences.item_E[made.event_C[c]]
            assert apart[items == chosen] == pytest.approx(apart.min(), abs=1e-6)
            assert made.event_C[c] == events[sequences.item_E[events] == chosen].max()
            assert made.time_ms_C[c] == pytest.approx(sequences.time_ms_E[events].mean(), abs=1)
            for ours, buckets in (
                (made.watch_C[c], sequences.watch_E[events]),
                (made.duration_C[c], sequences.duration_E[events]),
            ):
                seen = buckets[buckets > 0]
                assert ours == (round(float(seen.mean())) if len(seen) else 0)
            part = slice(made.tag_start_C1[c], made.tag_start_C1[c + 1])
            weights = np.zeros(20)
            of_items = sequences.item_E[events]
            tagged = of_items[tables.tag_weight_NT[of_items].any(1)]
            for item in tagged:
                np.add.at(weights, tables.tag_NT[item], tables.tag_weight_NT[item] / len(tagged))
            ours_T = np.zeros(20)
            ours_T[made.tag_J[part]] = made.tag_weight_J[part]
            np.testing.assert_allclose(ours_T, weights, atol=1e-6)


@pytest.mark.parametrize("entries", [7, 30, 1000])
def test_rows_stand_for_the_newest_events_one_by_one(sequences: Sequences, entries: int) -> None:
    """As many as there are, each read from a snapshot that ends before the request."""
    targets = sequences.train_targets("all")
    made = clusters_of(sequences, targets, entries)
    rows = made.rows(sequences.start_U1, targets)
    begin = sequences.start_U1[np.searchsorted(sequences.start_U1, targets, side="right") - 1]
    np.testing.assert_array_equal(rows.count_BL.sum(1), np.minimum(targets - begin, entries))
    clustered = 0
    for b, event in enumerate(targets):
        real = rows.count_BL[b] > 0
        assert (rows.event_BL[b][real] < event).all()
        assert (rows.event_BL[b][real] >= begin[b]).all()
        own = rows.event_BL[b][real & (rows.cluster_BL[b] < 0)]
        used = rows.cluster_BL[b][real & (rows.cluster_BL[b] >= 0)]
        assert len(np.unique(used)) == len(used)
        expected = list(range(max(begin[b], event - entries), event))
        if len(used):
            clustered += 1
            first_X = [np.flatnonzero(made.cluster_X == c)[0] for c in used]
            (k,) = set((np.searchsorted(made.start_K1, first_X, side="right") - 1).tolist())
            assert made.end_K[k] <= event
            # A fifth of what is read at most came after the snapshot.
            assert event - made.end_K[k] <= min(event - begin[b], entries) / 5
            held = made.cluster_X[made.start_K1[k] : made.start_K1[k + 1]]
            window = held[[e - begin[b] for e in expected if e < made.end_K[k]]]
            count = dict(zip(*np.unique(window, return_counts=True), strict=True))
            ours = zip(used, rows.count_BL[b][real & (rows.cluster_BL[b] >= 0)], strict=True)
            assert dict(ours) == count
            expected = [e for e in expected if e >= made.end_K[k]]
        assert sorted(own) == expected
    assert clustered > 20


def test_histories_of_few_items_stay_as_they_are() -> None:
    rows = walk(3, seed=4, longest=60)
    for row in rows:
        row["item_index"] = [i % LEAF for i in row["item_index"]]
    sequences = read_sequences(pa.Table.from_pylist(rows, schema=SEQUENCE_SCHEMA).to_batches())
    targets = sequences.example_targets()
    made = clusters_of(sequences, targets)
    assert not len(made.end_K)
    rows_of = made.rows(sequences.start_U1, targets)
    assert (rows_of.cluster_BL == -1).all()
    assert set(np.unique(rows_of.count_BL)) <= {0, 1}
    short = clusters_of(sequences, sequences.start_U1[:-1] + LEAF)
    assert not len(short.end_K)


def test_what_comes_at_or_after_a_request_changes_nothing_it_reads(sequences: Sequences) -> None:
    config, table = of_size(), long_histories()
    user = int(np.argmax(np.diff(sequences.start_U1)))
    codes = np.stack([np.arange(ITEMS) % 16] * 3, 1)

    def read(rows: list[dict], events: np.ndarray) -> Events:
        changed = read_sequences(pa.Table.from_pylist(rows, schema=SEQUENCE_SCHEMA).to_batches())
        # All targets, so that snapshots of later requests are made beside those of ours.
        attached = known().attach(changed, changed.train_targets("all"), config)
        return assemble(attached, events, codes, config).pathways["lifelong"]

    for place in (20, 40, 60):
        event = sequences.start_U1[user] + np.array([place])
        before = read(table.to_pylist(), event)
        assert before.count_BL is not None
        assert (before.count_BL > 1).any()
        rows = table.to_pylist()
        for name, lie in (("item_index", 3), ("feedback", 127), ("watch_time_s", 1e3)):
            rows[user][name][place:] = [lie] * len(rows[user][name][place:])
        later = rows[user]["timestamp_ms"]
        later[place + 1 :] = [2**41] * len(later[place + 1 :])
        after = vars(read(rows, event))
        assert all(torch.equal(values, after[name]) for name, values in vars(before).items())


def test_a_row_with_a_count_is_as_many_equal_rows(sequences: Sequences) -> None:
    """The pathway against v_l as printed: every entry a row of its own."""
    torch.manual_seed(0)
    config = of_size(entries=40)
    model = trained_size(OneRec(config))
    pathway = model.pathways["lifelong"]
    assert isinstance(pathway, LifelongPathway)
    targets = sequences.train_targets("all")[30::40]
    attached = known().attach(sequences, targets, config)
    codes = np.stack([np.arange(ITEMS) % 16] * 3, 1)
    batch = assemble(attached, targets, codes, config)
    events = batch.pathways["lifelong"]
    assert events.count_BL is not None
    ours, _ = pathway(batch)
    for b in range(len(targets)):
        times = events.count_BL[b].long()
        whole = {
            name: values[b].repeat_interleave(times, 0)[None]
            for name, values in vars(events).items()
        }
        whole["count_BL"] = torch.ones(1, int(times.sum()))
        alone = replace(batch, pathways={"lifelong": Events(**whole)})
        assert torch.allclose(pathway(alone)[0][0], ours[b], atol=1e-4)


def test_all_pathways_answer_alone_what_they_answer_in_a_batch(world: World) -> None:
    torch.manual_seed(0)
    config = of_size()
    model = trained_size(OneRec(config))
    raw = read_sequences(long_histories().to_batches())
    targets = np.concatenate([raw.train_targets("all")[5::60], raw.start_U1[:2]])
    features = known()
    together = assemble(features.attach(raw, targets, config), targets, world.codes_NQ, config)
    assert list(model.pathways) == ["static", "short_term", "positive_feedback", "lifelong"]
    both = model.sid_log_probs(together, together.target_BQ)
    assert torch.isfinite(both).all()
    for b in range(len(targets)):
        one = targets[b : b + 1]
        alone = assemble(features.attach(raw, one, config), one, world.codes_NQ, config)
        ours = model.sid_log_probs(alone, alone.target_BQ)[0]
        assert torch.allclose(ours, both[b], atol=1e-4)


def test_padding_of_no_pathway_changes_anything(world: World, sequences: Sequences) -> None:
    torch.manual_seed(0)
    config = of_size()
    model = trained_size(OneRec(config))
    # Short enough that every pathway has room for what is padded.
    targets = sequences.start_U1[:-1] + 2
    batch = assemble(known().attach(sequences, targets, config), targets, world.codes_NQ, config)
    padded = replace(batch, pathways={n: pad(e, 3, junk=2) for n, e in batch.pathways.items()})
    ours = model.sid_log_probs(batch, batch.target_BQ)
    assert torch.allclose(ours, model.sid_log_probs(padded, batch.target_BQ), atol=1e-5)


@pytest.mark.parametrize("feature", ["author_BL", "tag_BLT", "tag_weight_BLT", "count_BL"])
def test_every_feature_of_the_lifelong_rows_reaches_the_output(
    world: World, sequences: Sequences, feature: str
) -> None:
    torch.manual_seed(0)
    config = of_size()
    model = trained_size(OneRec(config))
    targets = sequences.train_targets("all")[30::40]
    batch = assemble(known().attach(sequences, targets, config), targets, world.codes_NQ, config)
    events = batch.pathways["lifelong"]
    value = getattr(events, feature)
    rows = {"author_BL": config.author_rows, "tag_BLT": config.tag_rows}
    other = (value + 1) % rows[feature] if feature in rows else value * torch.rand(value.shape)
    changed = Events(**{**vars(events), feature: other})
    swapped = replace(batch, pathways={**batch.pathways, "lifelong": changed})
    with torch.no_grad():
        before, after = (model.sid_log_probs(b, batch.target_BQ) for b in (batch, swapped))
    assert float((before - after).abs().max()) > 1e-4


def test_what_was_long_ago_decides_where_recent_events_do_not() -> None:
    """Thirty old events of one group, twelve random ones, then the target of the old group."""
    world = make_world()
    rng = np.random.default_rng(0)

    def rows(users: int, first: int) -> list[dict]:
        made = [
            row for row in walk(4 * users, seed=first, longest=80) if len(row["positive"]) >= 43
        ]
        for row in made:
            groups = np.full(43, rng.integers(GROUPS))
            groups[30:42] = rng.integers(0, GROUPS, 12)
            row["item_index"] = (10 * groups + rng.integers(0, 10, 43)).tolist()
            for name in SEQUENCE_SCHEMA.names[2:]:
                row[name] = row[name][:43]
            # In training only the last event is learned as a target.
            row["positive"] = [False] * 42 + [True]
        return made

    lists, valid = SEQUENCE_SCHEMA.names[1:], rows(60, 1)
    data = TrainingData(
        read_sequences(pa.Table.from_pylist(rows(140, 0), schema=SEQUENCE_SCHEMA).to_batches()),
        read_sequences(examples(valid).to_batches()),
        world.codes_NQ,
        world.popularity_N,
        known(),
    )
    training = TrainConfig(
        epochs=14,
        batch_size=32,
        learning_rate=6e-3,
        warmup_steps=10,
        evaluate_every=56,
        valid_beams=20,
    )
    shape = {"encoder_layers": 1, "decoder_layers": 1, "static_rows": [], "positive_feedback": 0}
    small = {"d_model": 16, "heads": 2, "memory": MemoryConfig(successors=0)}
    config = of_size().model_copy(update={**shape, **small})
    state = train(config, data, training)
    # Ten of sixty items can follow where the old group is known.
    oracle = float((1 / np.log2(np.arange(2, 12))).sum()) / 10
    assert state.best_score > 0.8 * oracle
    model = OneRec(config)
    model.load_state_dict(state.best_weights)
    trie = DeviceTrie.on(build_trie(data.codes_NQ, data.popularity_N))
    # The same requests without what was long ago.
    recent = [{**row, **{n: row[n][30:] for n in lists}} for row in valid]
    young = read_sequences(examples(recent).to_batches())
    young = known().attach(young, young.example_targets(), config)
    told = validate(model, trie, replace(data, valid=young), training)
    assert told["valid_ndcg_at_10"] < 0.4 * oracle
