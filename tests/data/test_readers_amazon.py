"""Amazon reviews: sequences with item texts, and the published JSON lines."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.data.readers import text
from components.data.source import Source, open_source
from components.pipeline.errors import DataContractError


def read(source: Source, table: str) -> list[dict[str, Any]]:
    return pa.Table.from_batches(list(source.tables[table]())).to_pylist()


def sequences(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    given = {"user_id": pa.array([4, 2], pa.int32()), "item_ids": [[1, 0, 2], [2]]}
    pq.write_table(pa.table(given), folder / "sequences.parquet")
    items = {
        "item_id": pa.array([0, 1, 2], pa.int32()),
        "title": ["Tape", " Hose ", ""],
        "description": ["", "A hose.", ""],
        "brand": ["", "Hose, Inc.", ""],
        "categories": ["Office,Tape", "Industrial,Tubing, Pipe & Hose,Hose", ""],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    return folder


def test_sequences_become_events_in_their_order(tmp_path: Path) -> None:
    source = open_source(str(sequences(tmp_path)))
    rows = read(source, "interactions")
    days = [datetime.date(2000, 1, day) for day in (1, 2, 3, 1)]
    assert [(r["user_id"], r["item_id"], r["timestamp"].date()) for r in rows] == list(
        zip([4, 4, 4, 2], [1, 0, 2, 2], days, strict=True)
    )
    assert {r["like"] for r in rows} == {r["watch_time_s"] for r in rows} == {None}
    assert read(source, "users") == [{"user_id": 2}, {"user_id": 4}]
    assert source.rows == {"interactions": 4, "items": 3, "users": 2}
    assert source.split["protocol"] == "leave_one_out"


def test_item_texts_are_null_where_empty_and_names_keep_their_commas(tmp_path: Path) -> None:
    items = read(open_source(str(sequences(tmp_path))), "items")
    assert [(i["title"], i["caption"], i["tags"]) for i in items] == [
        ("Tape", None, ["Office", "Tape"]),
        (
            "Hose",
            "A hose.",
            ["Industrial", "Tubing, Pipe & Hose", "Hose", "brand:Hose, Inc."],
        ),
        (None, None, None),
    ]


def test_sequences_of_text_are_refused(tmp_path: Path) -> None:
    sequences(tmp_path)
    pq.write_table(pa.table({"user_id": [1], "item_ids": ["1 2"]}), tmp_path / "sequences.parquet")
    with pytest.raises(DataContractError, match="column 'item_ids': the column is string"):
        open_source(str(tmp_path))


def test_real_counts(shared_data: Path) -> None:
    source = open_source(str(shared_data / "amazon_scientific"))
    assert source.rows == {"interactions": 58_492, "items": 4_344, "users": 8_317}
    events = pa.Table.from_batches(list(source.tables["interactions"]()))
    assert events.num_rows == 58_492
    given = pq.read_table(shared_data / "amazon_scientific" / "sequences.parquet").to_pylist()
    frame = events.to_pandas().sort_values(["user_id", "timestamp"])
    got = frame.groupby("user_id")["item_id"].agg(list)
    assert got.to_dict() == {row["user_id"]: row["item_ids"] for row in given}
    items = pa.Table.from_batches(list(source.tables["items"]()))
    assert (items.num_rows, items["title"].null_count, items["caption"].null_count) == (
        4344,
        0,
        123,
    )


REVIEWS = [
    ("Z", "B00", 5.0, 100),
    ("A", "B07", 4, 50),
    ("M", "B00", 1.0, 7),
    ("A", "B03", 3.0, 60),
]
META = [
    {"asin": "B03", "title": "", "brand": "X"},
    {"asin": "B99", "title": "never reviewed"},
    {
        "asin": "B07",
        "title": "Nuts &amp; Bolts",
        "description": ["One.", " Two. "],
        "brand": "Acme",
        "category": ["Tools", "Nuts"],
    },
    {"asin": "B07", "title": "listed twice"},
]


def published(folder: Path, reviews: str, meta: str, meta_lines: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"overall": stars, "reviewerID": user, "asin": asin, "style": {"a": "b"}}
            | {"unixReviewTime": time, "reviewText": "x" * 40}
        )
        for user, asin, stars, time in REVIEWS
    ]
    for name, content in ((reviews, lines), (meta, meta_lines)):
        data = ("\n".join(content) + "\n").encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


LAYOUTS = {
    "2018": ("Tools_5.json.gz", "meta_Tools.json.gz", [json.dumps(m) for m in META]),
    "2014": ("reviews_Tools_5.json", "meta_Tools.json", [repr(m) for m in META]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reviews_get_dense_ids_in_the_order_of_their_text(tmp_path: Path, layout: str) -> None:
    source = open_source(str(published(tmp_path, *LAYOUTS[layout])))
    users, products = sorted({r[0] for r in REVIEWS}), sorted({r[1] for r in REVIEWS})
    rows = read(source, "interactions")
    assert [
        (r["user_id"], r["item_id"], r["rating"], r["timestamp"].timestamp()) for r in rows
    ] == [(users.index(u), products.index(p), stars, time) for u, p, stars, time in REVIEWS]
    assert read(source, "users") == [{"user_id": 0}, {"user_id": 1}, {"user_id": 2}]
    items = {item["item_id"]: item for item in read(source, "items")}
    assert len(items) == 3
    assert items[2]["title"] == "Nuts & Bolts"
    assert items[2]["caption"] == "One. Two."
    assert items[2]["tags"] == ["Tools", "Nuts", "brand:Acme"]
    assert (items[1]["title"], items[1]["tags"]) == (None, ["brand:X"])
    assert (items[0]["title"], items[0]["tags"]) == (None, None)


def test_reviews_without_products_have_bare_items(tmp_path: Path) -> None:
    folder = published(tmp_path, *LAYOUTS["2014"])
    (folder / "meta_Tools.json").unlink()
    source = open_source(str(folder))
    assert [item["item_id"] for item in read(source, "items")] == [0, 1, 2]
    assert any("no meta_" in note for note in source.notes)


def test_categories_may_be_lists_of_lists(tmp_path: Path) -> None:
    meta = repr({"asin": "B00", "title": "T", "categories": [["A", "B"], ["A", "C"]]})
    source = open_source(str(published(tmp_path, "reviews_x.json", "meta_x.json", [meta])))
    assert next(i for i in read(source, "items") if i["title"])["tags"] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{oops", "{oops"),
        ('{"reviewerID": 7, "asin": "B", "overall": 1, "unixReviewTime": 1}', "7"),
        ('{"reviewerID": "A", "asin": "B", "overall": 1, "unixReviewTime": 1.5}', "1.5"),
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 400])
def test_broken_review_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, told: str, block: int
) -> None:
    folder = published(tmp_path, *LAYOUTS["2014"])
    with (folder / "reviews_Tools_5.json").open("a") as file:
        file.write(line + "\n")
    monkeypatch.setattr(text, "BLOCK", block)
    with pytest.raises(DataContractError) as caught:
        read(open_source(str(folder)), "interactions")
    assert caught.value.where == f"{folder}/reviews_Tools_5.json line 5"
    assert told in caught.value.what


def test_review_in_another_encoding_names_its_line(tmp_path: Path) -> None:
    folder = published(tmp_path, *LAYOUTS["2014"])
    line = '{"reviewerID": "Zoé", "asin": "B00", "overall": 1, "unixReviewTime": 1}\n'
    with (folder / "reviews_Tools_5.json").open("ab") as file:
        file.write(line.encode() + line.encode("latin-1"))
    with pytest.raises(DataContractError, match="UTF8") as caught:
        read(open_source(str(folder)), "users")
    assert caught.value.where == f"{folder}/reviews_Tools_5.json line 6"


def test_review_without_a_key_is_refused_when_opened(tmp_path: Path) -> None:
    folder = published(tmp_path, *LAYOUTS["2014"])
    (folder / "reviews_Tools_5.json").write_text('{"user_id": "A", "rating": 5}\n')
    with pytest.raises(DataContractError, match="the key 'reviewerID' is missing"):
        open_source(str(folder))


@pytest.mark.parametrize("asin", [["B00"], {"id": "B00"}, 7])
def test_product_whose_id_is_no_text_names_its_line(tmp_path: Path, asin: Any) -> None:
    lines = [json.dumps({"asin": "B00", "title": "T"}), json.dumps({"asin": asin, "title": "T"})]
    folder = published(tmp_path, "reviews_x.json", "meta_x.json", lines)
    with pytest.raises(DataContractError, match=r"'asin' is .*, not text") as caught:
        read(open_source(str(folder)), "items")
    assert caught.value.where == f"{folder}/meta_x.json line 2"


def test_cut_gzip_and_broken_product_are_named(tmp_path: Path) -> None:
    folder = published(tmp_path, *LAYOUTS["2018"])
    whole = (folder / "Tools_5.json.gz").read_bytes()
    meta = folder / "meta_Tools.json.gz"
    meta.write_bytes(gzip.compress(b'{"asin": "B00"\n'))
    with pytest.raises(DataContractError, match=r"meta_Tools\.json\.gz line 1"):
        read(open_source(str(folder)), "items")
    (folder / "Tools_5.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataContractError, match=r"Tools_5\.json\.gz"):
        read(open_source(str(folder)), "interactions")
