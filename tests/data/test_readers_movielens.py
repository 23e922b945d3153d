"""MovieLens: a small folder in the layout of ML-1M."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from components.data.readers import text
from components.data.source import Source, open_source
from components.pipeline.errors import DataContractError


def published(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_text("1::3::5::978300760\n1::1::3::978302109\n6::1::4::9\n")
    movies = (
        "1::Toy Story (1995)::Animation|Children's\n"
        '2::"Great" Rüya: a, b (1999)::Drama\n'
        "3::Nothing (2000)::(no genres listed)\n"
    )
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    (folder / "users.dat").write_text("1::F::1::10::48067\n6::M::56::16::02460-1234\n")
    return folder


def read(source: Source, table: str) -> list[dict[str, Any]]:
    return pa.Table.from_batches(list(source.tables[table]())).to_pylist()


def test_ratings_movies_and_people_become_contract_rows(tmp_path: Path) -> None:
    source = open_source(str(published(tmp_path)))
    rows = read(source, "interactions")
    assert [(r["user_id"], r["item_id"], r["rating"]) for r in rows] == [
        (1, 3, 5),
        (1, 1, 3),
        (6, 1, 4),
    ]
    assert [r["timestamp"].timestamp() for r in rows] == [978300760, 978302109, 9]
    assert rows[0]["like"] is None
    items = read(source, "items")
    assert [(i["item_id"], i["title"], i["tags"]) for i in items] == [
        (1, "Toy Story (1995)", ["Animation", "Children's"]),
        (2, '"Great" Rüya: a, b (1999)', ["Drama"]),
        (3, "Nothing (2000)", None),
    ]
    assert read(source, "users")[1] == {
        "user_id": 6,
        "gender": "M",
        "age": "56",
        "occupation": "16",
        "zip_code": "02460-1234",
    }
    assert (source.format, source.split["protocol"]) == ("movielens", "leave_one_out")


def test_absent_people_are_derived(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "users.dat").unlink()
    assert read(open_source(str(folder)), "users") == [{"user_id": 1}, {"user_id": 6}]


def test_lines_cut_by_a_block_are_joined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(open_source(str(published(tmp_path))), "items")
    for block in (1, 7, 50):
        monkeypatch.setattr(text, "BLOCK", block)
        assert read(open_source(str(tmp_path)), "items") == whole


@pytest.mark.parametrize(
    ("line", "place", "told"),
    [
        ("1::2::3", " line 4", "Expected 4 columns, got 3: 1::2::3"),
        ("1::2::3::4::5", " line 4", "Expected 4 columns, got 5"),
        ("1::two::3::4", " line 4 column 'item_id'", "'two'"),
        ("1::2::good::4", " line 4 column 'rating'", "'good'"),
        ("1::2::3::99999999999999999", " row 3 column 'timestamp'", "99999999999999999"),
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 30])
def test_malformed_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, place: str, told: str, block: int
) -> None:
    folder = published(tmp_path)
    with (folder / "ratings.dat").open("a") as file:
        file.write(line + "\n1::1::1::1\n")
    source = open_source(str(folder))
    monkeypatch.setattr(text, "BLOCK", block)
    with pytest.raises(DataContractError) as caught:
        read(source, "interactions")
    assert caught.value.where == f"{folder}/ratings.dat{place}"
    assert told in caught.value.what
    assert caught.value.remedy


def test_blank_line_is_a_row_of_nulls_for_validation_to_judge(tmp_path: Path) -> None:
    folder = published(tmp_path)
    with (folder / "ratings.dat").open("a") as file:
        file.write("\n1::1::1::1")
    rows = read(open_source(str(folder)), "interactions")
    assert [r["user_id"] for r in rows] == [1, 1, 6, None, 1]


def test_movies_must_be_there(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "movies.dat").unlink()
    with pytest.raises(DataContractError, match=r"movies\.dat is missing"):
        open_source(str(folder))


def test_empty_ratings_are_named(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "ratings.dat").write_text("")
    with pytest.raises(DataContractError, match=r"ratings\.dat: the file is empty"):
        open_source(str(folder))
