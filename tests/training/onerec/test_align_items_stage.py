"""From train sequences to codes of new items: the stages' artifacts, frozen and free of leaks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stage_harness import Bench

from components.curation.item_features.config import ItemFeaturesParams
from components.curation.item_features.embedding import fit
from components.curation.item_features.stage import item_features
from components.data.contracts import INTERACTIONS, ITEMS
from components.data.split_stage import SplitParams, split
from components.pipeline.errors import CorruptArtifactError, DataContractError, ParamsError
from components.training.onerec.config import AlignmentConfig, CaptionConfig, RQVAEConfig
from components.training.onerec.tokenizer.alignment import ItemTokens, align, hold_out
from components.training.onerec.tokenizer.captions import caption_ids
from components.training.onerec.tokenizer.new_items import NewItemEncoder
from components.training.onerec.tokenizer.stage import (
    AlignItemsParams,
    SemanticIdsParams,
    align_items,
    semantic_ids,
)

TOPICS, N, DAY_MS = 8, 160, 86_400_000
FEATURES = {"dimension": 16, "block_dimension": 16, "token_dimension": 12}
CAPTION = CaptionConfig(words=64, length=4, width=16, heads=2, items=16)
ALIGNMENT: dict[str, Any] = {"width": 8, "heads": 2, "states": 16, "steps": 30, "pairs": 64}
ALIGNMENT["caption"] = CAPTION


def items_table(text: bool = True) -> pa.Table:
    """Items of topics that titles, tags and authors tell."""
    rng = np.random.default_rng(0)
    topic = (np.arange(N) % TOPICS).tolist()
    columns: dict[str, Any] = {
        "item_id": list(range(1000, 1000 + N)),
        "title": [f"topic{t} word{rng.integers(20)} word{rng.integers(20)}" for t in topic],
        "caption": [f"about topic{t}" if t % 2 else None for t in topic],
        "tags": [[f"tag{t}", f"tag{rng.integers(30)}"] for t in topic],
        "author_id": [int(t) for t in topic],
        "duration_s": rng.uniform(3, 60, N),
    }
    if not text:
        del columns["title"], columns["caption"]
    return pa.table(
        [pa.array(columns.get(f.name, [None] * N), f.type) for f in ITEMS.schema],
        schema=ITEMS.schema,
    )


def interactions(late_item: int) -> pa.Table:
    """Twenty days; what users see in the last five is shifted by ``late_item``."""
    rng = np.random.default_rng(0)
    rows = 4000
    user, day = rng.integers(0, 100, rows), rng.integers(0, 20, rows)
    item = user % TOPICS + TOPICS * rng.integers(0, N // TOPICS, rows)
    item = np.where(day >= 15, (item + late_item) % N, item)
    time = pa.array(day * DAY_MS + rng.integers(0, DAY_MS, rows))
    columns: dict[str, Any] = {
        "user_id": user,
        "item_id": item + 1000,
        "timestamp": time.cast(INTERACTIONS.schema.field("timestamp").type),
    }
    return pa.table(
        [pa.array(columns.get(f.name, pa.nulls(rows, f.type))) for f in INTERACTIONS.schema],
        schema=INTERACTIONS.schema,
    )


def world(folder: Path, late_item: int = 0, text: bool = True) -> Bench:
    """A bench with all that comes before the alignment."""
    bench = Bench(folder)
    source = {"protocol": "temporal", "valid_from": "1970-01-16", "test_from": "1970-01-18"}
    bench.give("interactions", lambda o: o.write_table(interactions(late_item)))
    bench.give("items", lambda o: o.write_table(items_table(text)))
    bench.give("source", lambda o: o.write_json({"split": source}))
    bench.run(split, SplitParams())
    bench.run(item_features, ItemFeaturesParams(**FEATURES))
    return bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = world(tmp_path_factory.mktemp("align"))
    bench.run(align_items, AlignItemsParams(**ALIGNMENT))
    return bench


def load(bench: Bench) -> NewItemEncoder:
    names = ("item_encoder", "item_aligner", "semantic_ids")
    return NewItemEncoder.load(*(Path(bench.artifacts[name].path()) for name in names))


def catalogue_rows(bench: Bench) -> pa.Table:
    """Rows of items in the order of the catalogue."""
    ids = bench.artifacts["catalogue"].read_table()["item_id"].to_numpy()
    return items_table().take(ids - 1000)


def test_what_users_do_after_the_train_period_changes_no_pair_and_no_embedding(
    bench: Bench, tmp_path: Path
) -> None:
    """Of the same items: one that only a later period names is in the catalogue and counts."""
    other = world(tmp_path, late_item=3)
    other.run(align_items, AlignItemsParams(**ALIGNMENT))
    assert bench.digests("test_examples") != other.digests("test_examples")
    assert bench.digests("valid_examples") != other.digests("valid_examples")
    names = ("item_pairs", "item_tokens", "item_encoder", "aligned_embedding", "item_aligner")
    assert bench.digests(*names) == other.digests(*names)


def test_pairs_are_of_one_topic_and_of_both_kinds(bench: Bench) -> None:
    table = bench.artifacts["item_pairs"].read_table()
    assert set(table["kind"].to_pylist()) == {"user_item", "swing"}
    ids = bench.artifacts["catalogue"].read_table()["item_id"].to_numpy()
    left, right = (ids[table[side].to_numpy()] % TOPICS for side in ("left", "right"))
    assert (left == right).all()
    assert table.num_rows > 500


def test_what_is_learned_is_one_pair_for_each_user_and_target(bench: Bench) -> None:
    """The artifact is that of training on the pairs one by one, each as often as it was given."""
    table = bench.artifacts["item_pairs"].read_table()
    pairs = np.stack([table["left"].to_numpy(), table["right"].to_numpy()], 1)
    times = np.where(np.array(table["kind"]) == "swing", 1, table["weight"].to_numpy()).astype(int)
    assert times.max() > 1
    config = AlignmentConfig(**ALIGNMENT)
    learned = ~hold_out(pairs, config.held_out, 0)
    given = bench.artifacts["item_tokens"].load_state_dict()
    captions = caption_ids(catalogue_rows(bench)["title"].to_pylist(), CAPTION)
    items = ItemTokens(given["tokens"], given["mask"], captions)
    found = align(items, np.repeat(pairs[learned], times[learned], axis=0), config, 0)
    kept = bench.artifacts["item_aligner"].load_state_dict()
    for name, value in found.state_dict().items():
        assert torch.equal(kept[f"aligner.{name}"], value), name


def test_side_by_side_is_both_embeddings_at_variance_one(bench: Bench, tmp_path: Path) -> None:
    both = bench.artifacts["aligned_embedding"].load_arrays()["embedding"]
    fused = bench.artifacts["item_embedding"].load_arrays()["embedding"]
    assert both.shape == (N, FEATURES["dimension"] + 4 * 8)
    for part in (both[:, :16], both[:, 16:]):
        assert float((part**2).mean()) == pytest.approx(1, rel=1e-4)
    ratio = np.linalg.norm(both[:, :16] - both[0, :16], axis=1)[1:]
    ratio /= np.linalg.norm(fused - fused[0], axis=1)[1:]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_parts_can_be_chosen(bench: Bench, tmp_path: Path) -> None:
    metrics = bench.artifacts["aligned_embedding"].read_json()
    other = world(tmp_path)
    for method in ("none", "aligned"):
        found = other.run(align_items, AlignItemsParams(**ALIGNMENT, method=method))
        embedding = other.artifacts["aligned_embedding"].load_arrays()["embedding"]
        if method == "none":
            fused = other.artifacts["item_embedding"].load_arrays()["embedding"]
            assert (embedding == fused).all()
            assert found["pairs"] == 0
        else:
            both = bench.artifacts["aligned_embedding"].load_arrays()["embedding"]
            assert (embedding == both[:, 16:]).all()
            assert found["held_out_recall_at_10_fused"] == metrics["held_out_recall_at_10_fused"]


def test_without_text_or_pairs_there_is_a_note_and_a_result(tmp_path: Path) -> None:
    bench = world(tmp_path, text=False)
    bench.run(align_items, AlignItemsParams(**ALIGNMENT))
    assert bench.last_run is not None
    assert bench.last_run.notes == ["no item has a text: the caption loss is left out"]
    assert "caption_loss" not in bench.last_run.logged[-1][0]
    schema = bench.artifacts["train_sequences"].schema
    bench.give("train_sequences", lambda o: o.write_table(schema.empty_table()))
    bench.run(align_items, AlignItemsParams(**ALIGNMENT))
    assert "are not aligned" in bench.last_run.notes[0]
    bench.run(semantic_ids, SemanticIdsParams(codebook_size=8))
    assert load(bench).encode(catalogue_rows(bench)).shape == (N, 3)


@pytest.mark.parametrize("method", ["plain", "balanced", "rq_vae"])
def test_an_items_row_encodes_to_its_frozen_code(bench: Bench, method: str) -> None:
    own = RQVAEConfig(hidden=[16], latent=8, epochs=20)
    params = SemanticIdsParams(method=method, codebook_size=8, collisions="keep", rq_vae=own)
    bench.run(semantic_ids, params)
    codes = bench.artifacts["semantic_ids"].load_arrays()["codes"]
    kept, rows = load(bench), catalogue_rows(bench)
    batches = bench.artifacts["train_sequences"].batches(["item_index", "positive"])
    whole, _ = fit(rows, batches, ItemFeaturesParams(**FEATURES), 0)
    encoder = replace(kept, encoder=whole)
    found = encoder.encode(rows)
    assert found.dtype == np.int32
    if method == "balanced":
        # Items that balance moved have other codes in the catalogue; most were not moved.
        assert 0.5 < (found == codes).mean() < 1
    else:
        assert (found == codes).all()
    assert encoder.version == bench.artifacts["semantic_ids"].read_json()["version"]
    # A function of the row alone; of so few codes none are nearly as near as others.
    alone = np.concatenate([encoder.encode(rows.slice(i, 1)) for i in range(20)])
    assert (alone == found[:20]).all()
    # What is kept knows no item's history, and encodes items without one as before.
    new = rows.set_column(0, "item_id", pa.array(np.arange(N) + 10**6))
    assert torch.equal(kept.embed(new), encoder.embed(new))
    assert torch.equal(kept.embed(rows), kept.embed(new))
    assert len(kept.encoder.arrays["cooccurrence.block"]) == 0


def test_a_new_item_is_encoded_like_what_it_resembles(bench: Bench) -> None:
    bench.run(semantic_ids, SemanticIdsParams(codebook_size=8, collisions="keep", method="plain"))
    encoder, rows = load(bench), catalogue_rows(bench)
    topic = rows["item_id"].to_numpy() % TOPICS
    new = rows.set_column(0, "item_id", pa.array(np.arange(N) + 10**6))
    codes, known = encoder.encode(new), encoder.encode(rows)
    same = known[:, None, 0] == codes[None, :, 0]
    of_topic = topic[:, None] == topic[None]
    assert same[of_topic].mean() > 2 * same[~of_topic].mean()
    nothing = encoder.encode(pa.table({"item_id": pa.array([7], pa.int64())}))
    assert ((nothing >= 0) & (nothing < 8)).all()


def test_shuffled_ids_are_the_same_ids_of_other_items(bench: Bench) -> None:
    given = {"codebook_size": 8, "collisions": "keep"}
    bench.run(semantic_ids, SemanticIdsParams(**given))
    codes, record = (bench.artifacts["semantic_ids"].load_arrays()["codes"], read(bench))
    bench.run(semantic_ids, SemanticIdsParams(**given, shuffled=True))
    shuffled = bench.artifacts["semantic_ids"].load_arrays()["codes"]
    assert (np.sort(codes.view("i4,i4,i4"), 0) == np.sort(shuffled.view("i4,i4,i4"), 0)).all()
    assert (codes != shuffled).any(1).mean() > 0.5
    # A model of the one must not be served with the other.
    assert read(bench)["version"] != record["version"]


def read(bench: Bench) -> dict[str, Any]:
    record: dict[str, Any] = bench.artifacts["semantic_ids"].read_json()
    return record


def test_an_extra_digit_leaves_no_place_for_new_items(bench: Bench) -> None:
    bench.run(semantic_ids, SemanticIdsParams(codebook_size=8, collisions="extra_digit"))
    assert read(bench)["num_levels"] == 4
    with pytest.raises(ParamsError, match="no place for new items"):
        load(bench)


def test_what_does_not_belong_together_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.run(semantic_ids, SemanticIdsParams(codebook_size=8))
    names = ("item_encoder", "item_aligner", "semantic_ids")
    own = {name: Path(bench.artifacts[name].path()) for name in names}
    other = world(tmp_path / "other", text=False)
    other.run(align_items, AlignItemsParams(**ALIGNMENT), seed=7)
    # As wide as its own, but of another seed and of other rows.
    for name in ("item_encoder", "item_aligner"):
        foreign = own | {name: Path(other.artifacts[name].path())}
        with pytest.raises(CorruptArtifactError, match=rf"(?s)encoded with {name} .* of one run"):
            NewItemEncoder.load(*foreign.values())
        copied = shutil.copytree(own[name], tmp_path / "copies" / name)
        NewItemEncoder.load(*(own | {name: copied}).values())
    before = shutil.copytree(own["semantic_ids"], tmp_path / "before")
    record = json.loads((before / "data.json").read_text())
    del record["item_encoder_digest"]
    (before / "data.json").chmod(0o644)
    (before / "data.json").write_text(json.dumps(record))
    with pytest.raises(
        CorruptArtifactError, match=r"(?s)do not say which item_encoder .*make them again"
    ):
        NewItemEncoder.load(*(own | {"semantic_ids": before}).values())
    with pytest.raises(DataContractError, match="no column 'item_id'"):
        load(bench).encode(pa.table({"title": ["a"]}))


def digests_of_all(folder: Path) -> dict[str, Any]:
    """Of what the stages of the tokenizer make of many words, in wide embeddings."""
    bench = world(folder)
    rng = np.random.default_rng(0)
    titles = [" ".join(f"word{n}" for n in row) for row in rng.integers(0, 500, (N, 6)).tolist()]
    items = items_table()
    items = items.set_column(items.schema.get_field_index("title"), "title", pa.array(titles))
    bench.give("items", lambda o: o.write_table(items))
    wide = {"dimension": 128, "block_dimension": 128, "token_dimension": 128}
    bench.run(item_features, ItemFeaturesParams(**wide))
    bench.run(align_items, AlignItemsParams(steps=3, pairs=256, caption=CAPTION))
    names = ("item_embedding", "item_tokens", "item_encoder", "item_aligner", "aligned_embedding")
    digests = dict(zip(names, bench.digests(*names), strict=True))
    for method in ("balanced", "rq_vae"):
        own = RQVAEConfig(epochs=3)
        bench.run(semantic_ids, SemanticIdsParams(method=method, codebook_size=8, rq_vae=own))
        (digests[method],) = bench.digests("semantic_ids")
    return digests


def test_the_number_of_threads_leaves_no_trace(tmp_path: Path) -> None:
    """Libraries that begin with another number of threads, at sizes that they share out."""
    here = Path(__file__).parent
    threads = torch.get_num_threads() + 1
    own = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}
    places = os.pathsep.join(str(place) for place in (here, here.parents[1], here.parents[2]))
    done = subprocess.run(
        [sys.executable, "-P", str(here / "tokenizer_digests.py"), str(tmp_path / "other")],
        env=os.environ | own | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told.pop("threads") == threads
    assert told == digests_of_all(tmp_path / "here")


def with_no_positive(bench: Bench) -> None:
    """The same events, of which nobody liked any."""
    train = bench.artifacts["train_sequences"].read_table()
    flags = [[False] * len(row) for row in train["item_index"].to_pylist()]
    place = train.schema.get_field_index("positive")
    train = train.set_column(
        place, train.schema.field(place), pa.array(flags, pa.list_(pa.bool_()))
    )
    catalogue = bench.artifacts["catalogue"].read_table()
    place = catalogue.schema.get_field_index("train_positive_count")
    zeros = pa.array([0] * len(catalogue), pa.int64())
    catalogue = catalogue.set_column(place, catalogue.schema.field(place), zeros)
    bench.give("train_sequences", lambda o: o.write_table(train))
    bench.give("catalogue", lambda o: o.write_table(catalogue))


def test_where_no_event_is_positive_all_count_for_co_occurrence_and_for_pairs(
    bench: Bench, tmp_path: Path
) -> None:
    """In this world all events are positive: with none it is the same."""
    other = world(tmp_path)
    with_no_positive(other)
    for stage, params, said in (
        (item_features, ItemFeaturesParams(**FEATURES), "co-occurrence is that of all events"),
        (align_items, AlignItemsParams(**ALIGNMENT), "item pairs are those of all events"),
    ):
        other.run(stage, params)
        assert other.last_run is not None
        assert other.last_run.notes == [f"no train event is positive: {said}"]
    for names in (("item_embedding",), ("item_pairs", "aligned_embedding")):
        assert bench.digests(*names) == other.digests(*names)


def test_visual_features_go_from_their_file_to_codes(tmp_path: Path) -> None:
    bench = world(tmp_path)
    rng = np.random.default_rng(0)
    frames = [rng.normal(size=(3, 20)).tolist() for _ in range(N // 2)]
    visual = pa.table({"item_id": list(range(1000, 1000 + N // 2)), "embedding": frames})
    pq.write_table(visual, tmp_path / "visual.parquet")
    file = str(tmp_path / "visual.parquet")
    found = bench.run(item_features, ItemFeaturesParams(**FEATURES, visual=file, visual_tokens=2))
    assert found["items_with_visual"] == N // 2
    tokens = bench.artifacts["item_tokens"].read_json()
    assert tokens["kinds"][-2:] == ["visual_0", "visual_1"]
    assert tokens["share_of_items"]["visual_1"] == 0.5
    bench.run(align_items, AlignItemsParams(**ALIGNMENT))
    bench.run(semantic_ids, SemanticIdsParams(codebook_size=8, method="plain", collisions="keep"))
    encoder, rows = load(bench), catalogue_rows(bench)
    seen, unseen = encoder.embed(rows, visual), encoder.embed(rows)
    has = np.isin(rows["item_id"].to_numpy(), visual["item_id"].to_numpy())
    assert ((seen != unseen).any(1).numpy() == has).all()
