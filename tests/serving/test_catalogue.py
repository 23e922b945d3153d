"""Claims about the live catalogue: new items are recommended at once, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from registration_world import BEAMS, ITEMS, Model, codebooks, first_catalogue, model_files
from safetensors.torch import load_file, save_file
from stage_harness import Bench

from components.evaluation.registration.serving import (
    ENCODER_FILES,
    ServedRecommender,
)
from components.pipeline.errors import CorruptArtifactError, UsageError
from components.serving.catalogue import Catalogue
from components.serving.journal import SCHEMA, Journal
from components.serving.schema import NewItem, Request, requests_table
from components.training.onerec.config import RQVAEConfig, TokenizerConfig
from components.training.onerec.tokenizer import rq_vae, semantic_ids
from components.training.onerec.tokenizer.new_items import NewItemEncoder

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
    copy = with_record(files, tmp_path, {"version": "another"})
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
    tokenizer = TokenizerConfig(method="rq_vae", rq_vae=own).model_dump(mode="json")
    place = with_record(files, tmp_path, {"tokenizer": tokenizer, "dimension": 5})
    codes = load_file(place / "model.safetensors")["codes"]
    save_file({"codes": codes, **quantizer.state()}, place / "model.safetensors")
    catalogue = Catalogue(files | {"semantic_ids": place}, Journal(tmp_path))
    x_MD = 20 * torch.randn(40, 5)
    said = catalogue.add([NewItem(item_id=n, embedding=row) for n, row in enumerate(x_MD.tolist())])
    wanted = semantic_ids.encode(x_MD, quantizer).tolist()
    assert [item["semantic_id"] for item in said] == wanted
    assert len({tuple(code) for code in wanted}) > 1


def test_content_is_embedded_by_the_frozen_encoder_among_items_that_are_told_otherwise(
    catalogue: Catalogue, files: dict[str, Path]
) -> None:
    told: list[dict[str, Any]] = [
        {"semantic_id": [1, 2, 1]},
        {"title": "red star", "tags": ["t3", "all"], "author_id": 1000 // 7, "duration_s": 7.5},
        {"embedding": embedding_of([2, 2, 2])},
        {"caption": "a blue ring"},
        {"author_id": 5},
    ]
    said = catalogue.add([NewItem(item_id=n, **item) for n, item in enumerate(told)])
    encoder = NewItemEncoder.load(*(files[n] for n in (*ENCODER_FILES, "semantic_ids")))
    alone = [pa.Table.from_pylist([told[n] | {"item_id": n}]) for n in (1, 3, 4)]
    wanted = [encoder.encode(row)[0].tolist() for row in alone]
    found = [item["semantic_id"] for item in said]
    assert (found[0], found[2]) == ([1, 2, 1], [2, 2, 2])
    assert [found[n] for n in (1, 3, 4)] == wanted
    assert len({tuple(code) for code in wanted}) > 1
    # The model reads of it what it reads of its own items: content, author and tags.
    features = catalogue.now.served.recommender.features
    items, content_MD = features.items, features.items.content_ND
    assert content_MD is not None
    for row, n in zip(alone, (1, 3, 4), strict=True):
        assert content_MD[ITEMS + n].tolist() == encoder.embed(row)[0].tolist()
    assert items.author_N[ITEMS + 1] == items.author_N[0] != 0
    assert items.tag_NT[ITEMS + 1, 0] == 1 + features.vocabulary.tags.index("t3")


def test_content_and_its_own_embedding_are_one_way_also_after_a_restart(
    files: dict[str, Path], tmp_path: Path
) -> None:
    content: dict[str, Any] = {"title": "red star", "tags": ["t3", "all"]}
    by_content = Catalogue(files, Journal(tmp_path / "content"))
    by_content.add([NewItem(item_id=NEW, **content)])
    encoder = NewItemEncoder.load(*(files[n] for n in (*ENCODER_FILES, "semantic_ids")))
    (row,) = encoder.embed(pa.Table.from_pylist([content | {"item_id": 1}])).tolist()
    by_embedding = Catalogue(files, Journal(tmp_path / "embedding"))
    by_embedding.add([NewItem(item_id=NEW, embedding=row, **content)])
    history = [*HISTORY, {"item_id": NEW, "timestamp_ms": 10**12 + 10**9}]
    one, *others = (
        lists(catalogue.now.served, history)
        for catalogue in (
            by_content,
            by_embedding,
            Catalogue(files, Journal(tmp_path / "content")),
        )
    )
    assert NEW in one[0]
    assert others == [one] * 2


def with_extra_digit(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    tokenizer = TokenizerConfig(collisions="extra_digit").model_dump(mode="json")
    return files | {"semantic_ids": with_record(files, folder, {"tokenizer": tokenizer})}


def shuffled(files: dict[str, Path], folder: Path) -> dict[str, Path]:
    return files | {"semantic_ids": with_record(files, folder, {"shuffled": True})}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_extra_digit, "an extra digit have no place for new items"),
        (shuffled, "shuffled say nothing of items"),
    ],
)
def test_a_model_that_cannot_encode_serves_and_says_why(
    files: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    catalogue = Catalogue(change(files, tmp_path), Journal(tmp_path / "journal"))
    good = NewItem(item_id=NEW, semantic_id=[1, 1, 1])
    with pytest.raises(UsageError, match=rf"(?s)items\[1\]: .*{message}.*semantic_id, .*train"):
        catalogue.add([good, NewItem(item_id=NEW + 1, title="red star")])
    told = NewItem(item_id=NEW + 1, embedding=embedding_of([2, 2, 2]))
    with pytest.raises(UsageError, match=rf"items\[0\].embedding: .*{message}"):
        catalogue.add([told])
    catalogue.add([good])
    assert NEW in lists(catalogue.now.served, HISTORY)[0]


def with_record(files: dict[str, Path], folder: Path, changes: dict[str, Any]) -> Path:
    """The semantic ids with another record."""
    place = folder / "semantic_ids"
    shutil.copytree(files["semantic_ids"], place)
    record = json.loads((place / "data.json").read_text()) | changes
    (place / "data.json").write_text(json.dumps(record))
    return place


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"semantic_id": [1, 1]}, r"items\[1\].semantic_id: a semantic id .* 3 codes below 8"),
        ({"semantic_id": [1, 1, 8]}, r"items\[1\].semantic_id"),
        ({"embedding": [1.0]}, r"items\[1\].embedding: 1 values, .* has 8"),
        ({"title": "", "tags": []}, r"items\[1\]: nothing is said of the item"),
        ({}, r"items\[1\]: nothing is said of the item"),
        ({"title": " ", "tags": ["", " "]}, r"items\[1\]: nothing is said of the item"),
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


def with_rows(folder: Path, *rows: dict[str, Any]) -> Journal:
    journal = Journal(folder)
    full = [dict.fromkeys(SCHEMA.names) | {"withdrawn": False} | row for row in rows]
    journal.change(lambda kept: kept.update({row["item_id"]: row for row in full}))
    return journal


def test_the_last_item_is_not_one_of_other_codebooks(
    files: dict[str, Path], tmp_path: Path
) -> None:
    *others, last = first_catalogue().tolist()
    gone = [{"item_id": item_id, "withdrawn": True} for item_id in others]
    outdated = {"item_id": NEW, "semantic_id": [1, 1, 1], "version": "another"}
    catalogue = Catalogue(files, with_rows(tmp_path / "left", *gone, outdated))
    with pytest.raises(UsageError, match="the last item"):
        catalogue.withdraw(last)
    assert (catalogue.now.recommendable, catalogue.now.outdated) == (1, 1)
    # All may be gone nevertheless: another champion has other codebooks.
    gone.append({"item_id": last, "withdrawn": True})
    with pytest.raises(UsageError, match=r"(?s)all 60 items were withdrawn, and of 1 others"):
        Catalogue(files, with_rows(tmp_path / "none", *gone, outdated))


@pytest.mark.parametrize("semantic_id", [[1, 1], [1, 1, 8], [1, -1, 1], [1, None, 1], []])
def test_a_semantic_id_that_no_model_wrote_is_told_and_the_rest_serves_on(
    files: dict[str, Path], tmp_path: Path, semantic_id: list[int | None]
) -> None:
    catalogue = Catalogue(files, Journal(tmp_path))
    catalogue.add([NewItem(item_id=NEW, semantic_id=[1, 1, 1])])
    wrong = {"item_id": NEW + 1, "semantic_id": semantic_id, "version": catalogue.version}
    with_rows(tmp_path, wrong)
    with pytest.raises(CorruptArtifactError, match=rf"item {NEW + 1} has .* 3 codes below 8"):
        catalogue.refresh()
    assert catalogue.now.recommendable == ITEMS + 1
    with_rows(tmp_path, wrong | {"semantic_id": [1, 1, 1]})
    assert catalogue.refresh()
    assert catalogue.now.recommendable == ITEMS + 2


def test_who_reads_while_others_write_finds_one_whole_table(tmp_path: Path) -> None:
    journal, changes = with_rows(tmp_path, {"item_id": 0}), 60

    def write(writer: int) -> None:
        for _ in range(changes):
            # Longer and shorter in turn, so that pages of two tables do not fit together.
            with_rows(tmp_path, {"item_id": writer, "title": "x" * (7919 * writer % 50)})
            writer += 2

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, first) for first in (1, 2)]
        while not all(writer.done() for writer in writers):
            assert set(range(3)) & journal.read().keys()
        for writer in writers:
            writer.result()
    assert set(journal.read()) == set(range(2 * changes + 1))


def test_a_broken_journal_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"no table")
    with pytest.raises(CorruptArtifactError, match=r"(?s)items\.parquet.*post the items again"):
        Catalogue(files, Journal(tmp_path))
