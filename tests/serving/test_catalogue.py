"""Claims about the live catalogue: new items are recommended at once, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from registration_world import BEAMS, ITEMS, Model, codebooks, first_catalogue, model_files
from safetensors.torch import load_file, save_file
from stage_harness import Bench

from components.evaluation.registration.serving import ServedRecommender
from components.pipeline.errors import CorruptArtifactError, UsageError
from components.serving.catalogue import Catalogue
from components.serving.journal import CONTENT, Journal
from components.serving.schema import NewItem, Request, requests_table
from components.training.onerec.config import RQVAEConfig
from components.training.onerec.tokenizer import rq_vae, semantic_ids

NEW = 77
HISTORY = [{"item_id": 1000 + 3 * n, "timestamp_ms": 10**12 + n * 10**7} for n in range(4)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    bench = Bench(tmp_path_factory.mktemp("catalogue"))
    Model(first_catalogue(), seed=1).fill(bench)
    return model_files(bench)


@pytest.fixture
def catalogue(files: dict[str, Path], tmp_path: Path) -> Catalogue:
    return Catalogue(files, Journal(tmp_path))


def lists(served: ServedRecommender, *histories: list[dict[str, Any]]) -> list[dict[int, float]]:
    table = requests_table([Request.model_validate({"history": h}) for h in histories])
    answers = served.recommend(table, top_n=10 * ITEMS, beams=BEAMS)
    rows = zip(answers["item_ids"].to_pylist(), answers["scores"].to_pylist(), strict=True)
    return [dict(zip(items, scores, strict=True)) for items, scores in rows]


def embedding_of(code: list[int]) -> list[float]:
    return [
        float(x) for x in np.sum([codebooks()[level, c] for level, c in enumerate(code)], axis=0)
    ]


def test_a_new_item_of_a_known_id_stands_behind_its_items_and_nothing_else_moves(
    catalogue: Catalogue, files: dict[str, Path]
) -> None:
    (before,) = lists(ServedRecommender.from_files(files), HISTORY)
    code = [0, 1, 0]  # that of item 6
    said = catalogue.add([NewItem(item_id=NEW, embedding=embedding_of(code))])
    assert said == [{"item_id": NEW, "semantic_id": code, "status": "added"}]
    (after,) = lists(catalogue.now.served, HISTORY)
    assert after[NEW] == pytest.approx(after[1018], abs=1e-6)
    ranked = list(after)
    ranked.remove(NEW)
    assert ranked == list(before)
    assert [after[item] for item in ranked] == pytest.approx(list(before.values()), abs=1e-5)


def test_a_new_id_is_legal_from_now_on(catalogue: Catalogue) -> None:
    code = [7, 7, 7]  # no item of the model has any of these codes
    catalogue.add([NewItem(item_id=NEW, semantic_id=code)])
    (found,) = lists(catalogue.now.served, HISTORY)
    assert len(found) == ITEMS + 1
    assert np.isfinite(found[NEW])


def test_a_new_item_in_a_history_is_read_by_its_semantic_id(catalogue: Catalogue) -> None:
    """And by its tags. One embedding of zeros for all new items: those of one id say the same."""
    catalogue.add(
        [NewItem(item_id=NEW + n, semantic_id=code) for n, code in enumerate([[5, 3, 0]] * 2)]
    )
    catalogue.add([NewItem(item_id=NEW + 2, semantic_id=[1, 0, 1])])
    catalogue.add([NewItem(item_id=NEW + 3, semantic_id=[5, 3, 0], tags=["all", "t1"])])
    asked = [
        [*HISTORY, {"item_id": item, "timestamp_ms": 10**12 + 10**9}]
        for item in (NEW, NEW + 1, NEW + 2, NEW + 3, 5)
    ]
    one, same, other, tagged, unknown = lists(catalogue.now.served, *asked)
    assert one == pytest.approx(same, abs=1e-6)
    assert max(abs(one[item] - other[item]) for item in one) > 1e-3
    assert max(abs(one[item] - tagged[item]) for item in one) > 1e-3
    assert max(abs(one[item] - unknown[item]) for item in one) > 1e-3


def test_a_restart_has_them_and_another_replica_finds_them(
    catalogue: Catalogue, files: dict[str, Path], tmp_path: Path
) -> None:
    other = Catalogue(files, Journal(tmp_path))
    assert not other.refresh()
    catalogue.add([NewItem(item_id=NEW, semantic_id=[1, 1, 1], title="new", tags=["a"])])
    assert catalogue.withdraw(1000)
    assert other.refresh()
    again = Catalogue(files, Journal(tmp_path))
    for one in (catalogue, other, again):
        (found,) = lists(one.now.served, HISTORY)
        assert NEW in found
        assert 1000 not in found
        assert (one.now.recommendable, one.now.new, one.now.withdrawn) == (ITEMS, 1, 1)


def test_a_withdrawn_item_is_still_read_in_histories_and_may_come_back(
    catalogue: Catalogue,
) -> None:
    (before,) = lists(catalogue.now.served, HISTORY)
    assert catalogue.withdraw(1000)
    (without,) = lists(catalogue.now.served, HISTORY)
    assert {item: score for item, score in before.items() if item != 1000} == pytest.approx(without)
    (said,) = catalogue.add([NewItem(item_id=1000)])
    assert said["status"] == "restored"
    assert lists(catalogue.now.served, HISTORY) == [pytest.approx(before)]
    assert not catalogue.withdraw(5)


def test_an_item_that_the_model_knows_keeps_its_id(catalogue: Catalogue) -> None:
    (said,) = catalogue.add([NewItem(item_id=1000, semantic_id=[7, 7, 7])])
    assert said == {"item_id": 1000, "semantic_id": [0, 0, 0], "status": "known"}
    assert catalogue.now.recommendable == ITEMS


def test_items_of_other_codebooks_wait_until_they_are_posted_again(
    catalogue: Catalogue, files: dict[str, Path], tmp_path: Path
) -> None:
    catalogue.add([NewItem(item_id=NEW, semantic_id=[1, 1, 1])])
    copy = tmp_path / "semantic_ids"
    shutil.copytree(files["semantic_ids"], copy)
    told = json.loads((copy / "data.json").read_text()) | {"version": "another"}
    (copy / "data.json").write_text(json.dumps(told))
    model = tmp_path / "recommender"
    shutil.copytree(files["recommender"], model)
    config = json.loads((model / "config.json").read_text()) | {"semantic_ids_version": "another"}
    (model / "config.json").write_text(json.dumps(config))
    later = Catalogue(files | {"semantic_ids": copy, "recommender": model}, Journal(tmp_path))
    assert (later.now.new, later.now.outdated, later.now.recommendable) == (0, 1, ITEMS)
    (said,) = later.add([NewItem(item_id=NEW, semantic_id=[1, 1, 1])])
    assert said["status"] == "updated"
    assert (later.now.new, later.now.outdated) == (1, 0)


def test_an_embedding_is_encoded_by_whatever_quantiser_the_model_carries(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """An RQ-VAE of other widths than the defaults; its own encoding is the oracle."""
    own = RQVAEConfig(hidden=[7, 6], latent=3)
    torch.manual_seed(0)
    quantizer = rq_vae.RQVAE(5, 3, 8, own)
    torch.nn.init.normal_(quantizer.codebooks)
    place = tmp_path / "semantic_ids"
    shutil.copytree(files["semantic_ids"], place)
    told = json.loads((place / "data.json").read_text()) | {"method": "rq_vae"}
    (place / "data.json").write_text(json.dumps(told))
    codes = load_file(place / "model.safetensors")["codes"]
    save_file({"codes": codes, **quantizer.state()}, place / "model.safetensors")
    catalogue = Catalogue(files | {"semantic_ids": place}, Journal(tmp_path))
    x_MD = 20 * torch.randn(40, 5)
    said = catalogue.add([NewItem(item_id=n, embedding=row) for n, row in enumerate(x_MD.tolist())])
    wanted = semantic_ids.encode(x_MD, quantizer).tolist()
    assert [item["semantic_id"] for item in said] == wanted
    assert len({tuple(code) for code in wanted}) > 1


class ByTags:
    """An encoder whose codes are written in the tags."""

    def encode(self, items: pa.Table) -> np.ndarray:
        assert items.column_names == ["item_id", *CONTENT]
        return np.array(
            [[int(tag) for tag in tags] for tags in items["tags"].to_pylist()], np.int32
        )


def test_content_is_encoded_by_the_encoder_among_items_that_are_told_otherwise(
    files: dict[str, Path], tmp_path: Path
) -> None:
    catalogue = Catalogue(files, Journal(tmp_path), ByTags())
    said = catalogue.add(
        [
            NewItem(item_id=1, semantic_id=[1, 2, 1]),
            NewItem(item_id=2, tags=["3", "0", "1"]),
            NewItem(item_id=3, embedding=embedding_of([2, 2, 2])),
            NewItem(item_id=4, tags=["4", "1", "0"]),
        ]
    )
    assert [item["semantic_id"] for item in said] == [[1, 2, 1], [3, 0, 1], [2, 2, 2], [4, 1, 0]]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"semantic_id": [1, 1]}, r"items\[1\].semantic_id: a semantic id .* 3 codes below 8"),
        ({"semantic_id": [1, 1, 8]}, r"items\[1\].semantic_id"),
        ({"embedding": [1.0]}, r"items\[1\].embedding: 1 values, .* has 8"),
        ({"title": "only words"}, r"items\[1\]: this model carries no encoder"),
    ],
)
def test_what_cannot_be_encoded_takes_nothing_in(
    catalogue: Catalogue, tmp_path: Path, item: dict[str, Any], message: str
) -> None:
    good = NewItem(item_id=NEW, semantic_id=[1, 1, 1])
    with pytest.raises(UsageError, match=message):
        catalogue.add([good, NewItem(item_id=NEW + 1, **item)])
    assert catalogue.now.recommendable == ITEMS
    assert Journal(tmp_path).read() == {}


def test_the_last_item_stays(catalogue: Catalogue) -> None:
    *others, last = first_catalogue().tolist()
    catalogue._journal.change(
        lambda rows: rows.update(
            {
                i: dict.fromkeys(("semantic_id", "version")) | {"item_id": i, "withdrawn": True}
                for i in others
            }
        )
    )
    assert catalogue.refresh()
    (found,) = lists(catalogue.now.served, HISTORY)
    assert list(found) == [last]
    with pytest.raises(UsageError, match="the last item"):
        catalogue.withdraw(last)


def test_a_broken_journal_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"no table")
    with pytest.raises(CorruptArtifactError, match=r"(?s)items\.parquet.*post the items again"):
        Catalogue(files, Journal(tmp_path))
