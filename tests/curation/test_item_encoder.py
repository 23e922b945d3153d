"""The frozen encoder of items: rows that come later, tokens of their own, visual features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import TfidfTransformer

from components.curation.item_features import embedding
from components.curation.item_features.config import ItemFeaturesParams
from components.curation.item_features.embedding import fit
from components.curation.item_features.stage import visual_digest
from components.data import item_encoder, visual_features
from components.data.item_encoder import ItemEncoder
from components.pipeline.errors import DataContractError, ParamsError

N, TOPICS = 90, 6
PARAMS = ItemFeaturesParams(dimension=16, block_dimension=24, token_dimension=12)


def items(first: int = 0, count: int = N, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    topic = (np.arange(first, first + count) % TOPICS).tolist()
    return pa.table(
        {
            "item_id": pa.array(range(first, first + count), pa.int64()),
            "title": [f"Topic{t} w{rng.integers(15)} w{rng.integers(15)}" for t in topic],
            "caption": [f"all about topic{t}" if t % 2 else None for t in topic],
            "tags": [[f"tag{t}", f"tag{rng.integers(20)}"] for t in topic],
            "author_id": [t if t < 5 else None for t in topic],
            "duration_s": rng.uniform(2, 90, count),
        }
    )


def train() -> list[pa.RecordBatch]:
    """Users who stay with a topic; the last ten items have no history."""
    rng = np.random.default_rng(1)
    rows = [
        (u % TOPICS + TOPICS * rng.integers(0, (N - 10) // TOPICS, 8)).tolist() for u in range(120)
    ]
    table = pa.table(
        {
            "item_index": pa.array(rows, pa.list_(pa.int32())),
            "positive": pa.array([[True] * 8] * 120, pa.list_(pa.bool_())),
        }
    )
    return table.to_batches()


@pytest.fixture(scope="module")
def encoder() -> ItemEncoder:
    return fit(items(), train(), PARAMS, seed=0)[0]


def test_a_row_is_encoded_alike_alone_and_after_being_kept(
    encoder: ItemEncoder, tmp_path: Path
) -> None:
    import json

    from safetensors.numpy import save_file

    save_file(
        {k: np.ascontiguousarray(v) for k, v in encoder.arrays.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "data.json").write_text(json.dumps(encoder.facts))
    again = ItemEncoder.load(tmp_path)
    together = encoder.encode(items())
    for row in (0, 37, N - 1):
        alone = again.encode(items().slice(row, 1))
        for name, values in vars(together).items():
            assert (getattr(alone, name)[0] == values[row]).all(), name


def test_encoding_in_parts_changes_nothing(
    encoder: ItemEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = encoder.encode(items())
    monkeypatch.setattr(item_encoder, "ROWS", 7)
    parts = encoder.encode(items())
    assert (parts.embedding_ND == together.embedding_ND).all()
    assert (parts.token_NMt == together.token_NMt).all()


def test_a_new_row_lies_near_the_items_of_its_topic(encoder: ItemEncoder) -> None:
    known = encoder.encode(items()).embedding_ND
    new = encoder.encode(items(first=10_020, count=30, seed=5)).embedding_ND
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (new, known)]
    nearest = (unit[0] @ unit[1].T).argmax(1)
    assert (nearest % TOPICS == (np.arange(30) + 10_020) % TOPICS).mean() > 0.9


def test_tokens_are_those_that_an_item_has(encoder: ItemEncoder) -> None:
    kinds = encoder.facts["kinds"]
    assert kinds == [
        "title", "caption", "characters", "tags", "author", "numeric", "cooccurrence",
    ]  # fmt: skip
    found = encoder.encode(items())
    has = dict(zip(kinds, found.mask_NM.T, strict=True))
    assert (has["caption"] == (np.arange(N) % TOPICS % 2 == 1)).all()
    assert (has["author"] == (np.arange(N) % TOPICS < 5)).all()
    assert not has["cooccurrence"][-10:].any()
    assert has["cooccurrence"][:-14].all()
    assert found.token_NMt.shape == (N, 7, 12)
    assert not found.token_NMt[~found.mask_NM].any()
    nothing = encoder.encode(pa.table({"item_id": pa.array([-5], pa.int64())}))
    assert not nothing.mask_NM.any()
    assert np.isfinite(nothing.embedding_ND).all()


def test_co_occurrence_as_a_token_can_be_switched_off() -> None:
    params = PARAMS.model_copy(update={"cooccurrence_token": False})
    other, _ = fit(items(), train(), params, seed=0)
    assert "cooccurrence" not in other.facts["kinds"]
    with_it = fit(items(), train(), PARAMS, seed=0)[0].encode(items())
    assert (other.encode(items()).embedding_ND == with_it.embedding_ND).all()
    assert (other.encode(items()).token_NMt == with_it.token_NMt[:, :-1]).all()


def test_term_weights_are_those_of_scikit_learn() -> None:
    counts = item_encoder.word_counts(items()["title"].to_pylist())
    counts = counts[:, np.flatnonzero(counts.getnnz(axis=0) > 1)]
    theirs = TfidfTransformer(sublinear_tf=True).fit(counts)
    ours = item_encoder.weigh_terms(counts, theirs.idf_, text=True)
    np.testing.assert_allclose(ours.toarray(), theirs.transform(counts).toarray(), rtol=1e-5)
    fitted = embedding._fit_terms({"words": counts}, 8, 0, text=True)
    # Terms of a single item are left out a second time: here there are none.
    np.testing.assert_allclose(fitted["words.idf"], theirs.idf_, rtol=1e-6)


def test_at_most_so_many_terms_are_kept_those_of_most_items(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding, "MAX_TERMS", 10)
    counts = item_encoder.word_counts(items()["title"].to_pylist())
    kept = embedding._fit_terms({"words": counts}, 8, 0, text=True)["words.columns"]
    items_F = counts.getnnz(axis=0)
    assert len(kept) == 10
    assert items_F[kept].min() >= np.sort(items_F)[-10]


def test_numbers_that_are_alike_have_tokens_that_are_alike(encoder: ItemEncoder) -> None:
    rows = items(count=3).set_column(5, "duration_s", pa.array([10.0, 11.0, 80.0], pa.float32()))
    rows = rows.take([0, 0, 0]).set_column(5, "duration_s", rows["duration_s"])
    a, b, c = encoder.encode(rows).token_NMt[:, encoder.facts["kinds"].index("numeric")]
    assert np.linalg.norm(a - b) < 0.5 * np.linalg.norm(a - c)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (pa.table({"title": ["a"]}), "no column 'item_id'"),
        (pa.table({"item_id": pa.array([None], pa.int64())}), "items row 0 column 'item_id'"),
        (pa.table({"item_id": [1], "tags": ["a"]}), "items column 'tags': string cannot be read"),
    ],
)
def test_rows_that_break_the_contract_are_refused(
    encoder: ItemEncoder, rows: pa.Table, said: str
) -> None:
    with pytest.raises(DataContractError, match=said):
        encoder.encode(rows)


def frames(width: int = 20, ids: range = range(N)) -> pa.Table:
    """One to three vectors an item, of its topic."""
    rng = np.random.default_rng(2)
    topics = rng.normal(size=(TOPICS, width))
    rows = [(topics[i % TOPICS] + 0.1 * rng.normal(size=(1 + i % 3, width))).tolist() for i in ids]
    return pa.table({"item_id": list(ids), "embedding": rows})


@pytest.mark.parametrize("kind", ["one", "several"])
def test_visual_features_become_tokens(kind: str, tmp_path: Path) -> None:
    table = frames(ids=range(0, N, 2))
    if kind == "one":
        first = [row[0] for row in table["embedding"].to_pylist()]
        table = table.set_column(1, "embedding", pa.array(first, pa.list_(pa.float32(), 20)))
    file = tmp_path / "visual.parquet"
    pq.write_table(table, file)
    params = PARAMS.model_copy(update={"visual": str(file), "visual_tokens": 2})
    assert visual_digest(PARAMS) is None
    assert visual_digest(params) == visual_features.digest(str(file))
    visual = visual_features.read(str(file))
    encoder, known = fit(items(), train(), params, 0, visual)
    places = ["visual_0", "visual_1"] if kind == "several" else ["visual_0"]
    assert encoder.facts["kinds"][7:] == places
    assert known["visual"] == N // 2
    found = encoder.encode(items(), visual)
    assert (found.mask_NM[:, 7] == (np.arange(N) % 2 == 0)).all()
    if kind == "several":
        assert (found.mask_NM[:, 8] == ((np.arange(N) % 2 == 0) & (np.arange(N) % 3 > 0))).all()
    seen = found.token_NMt[::2, 7]
    near = seen @ seen.T
    topic = np.arange(0, N, 2) % TOPICS
    same = topic[:, None] == topic[None]
    assert near[same].min() > near[~same].max()
    # An item without a picture is encoded without.
    assert not encoder.encode(items()).mask_NM[:, 7:].any()
    with pytest.raises(DataContractError, match="width 9, but the item encoder knows 20"):
        encoder.encode(items(), visual_features.features(frames(width=9), "new"))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"item_id": [1]}, "no column 'embedding'"),
        ({"item_id": ["a"], "embedding": [[1.0]]}, "item ids are string"),
        (
            {"item_id": pa.array([1, 2**63 + 5], pa.uint64()), "embedding": [[1.0], [2.0]]},
            "row 1 column 'item_id': item id 9223372036854775813 is no int64",
        ),
        ({"item_id": [1], "embedding": [1.0]}, "double is no list of floats"),
        ({"item_id": [1], "embedding": [["a"]]}, "no list of floats"),
        ({"item_id": [1, 1], "embedding": [[1.0], [2.0]]}, "row 1 column 'item_id': item 1 is"),
        ({"item_id": [1, None], "embedding": [[1.0], [2.0]]}, "row 1 column 'item_id': a null"),
        ({"item_id": [1, 2], "embedding": [[1.0], None]}, "row 1 column 'embedding': a null"),
        ({"item_id": [1, 2], "embedding": [[1.0], [1.0, 2.0]]}, "row 1 .*a vector of 2 numbers"),
        ({"item_id": [1, 2], "embedding": [[[1.0]], [[2.0], [3.0, 4.0]]]}, "row 1 .*of 2 numbers"),
        ({"item_id": [1, 2], "embedding": [[1.0], [float("nan")]]}, "row 1 .*not finite"),
        ({"item_id": [1, 2], "embedding": [[1.0], [None]]}, "row 1 .*not finite"),
    ],
)
def test_a_wrong_table_of_visual_features_is_refused(
    columns: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "visual.parquet"
    pq.write_table(pa.table(columns), file)
    with pytest.raises(DataContractError, match=said) as caught:
        visual_features.read(str(file))
    assert str(file) in str(caught.value)


def test_a_file_of_visual_features_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"item_features\.visual: there is no file"):
        visual_features.read(str(tmp_path / "missing.parquet"))
    file = tmp_path / "text.parquet"
    file.write_text("no parquet")
    with pytest.raises(DataContractError, match="no readable parquet file"):
        visual_features.read(str(file))
