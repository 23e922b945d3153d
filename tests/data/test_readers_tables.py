"""Folders of contract tables: what is accepted, what is refused and where the message points."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data.contracts import INTERACTIONS, ITEMS, TIMESTAMP
from components.data.readers.files import rebatch
from components.data.source import Source, list_formats, open_source, prepare
from components.pipeline.errors import DataContractError, UsageError

ROWS = 1000
TIMES = np.arange(ROWS, dtype=np.int64) * 1000 + 1_600_000_000_000


def interactions(**replaced: Any) -> pa.Table:
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "user_id": random.integers(0, 50, ROWS),
        "item_id": random.integers(100, 140, ROWS),
        "timestamp": pa.array(TIMES).cast(TIMESTAMP),
        "watch_time_s": pa.array(random.random(ROWS), pa.float32()),
        "like": random.random(ROWS) < 0.1,
    }
    columns |= replaced
    return pa.table({name: value for name, value in columns.items() if value is not None})


def write(folder: Path, name: str, table: pa.Table, **options: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return folder


def read(source: Source, table: str) -> pa.Table:
    return pa.Table.from_batches(list(source.tables[table]()))


def read_all(folder: Path) -> None:
    for stream in open_source(str(folder)).tables.values():
        list(stream())


def refused(folder: Path) -> DataContractError:
    """What opening and reading all of a folder raises."""
    with pytest.raises(DataContractError) as caught:
        read_all(folder)
    assert caught.value.remedy
    return caught.value


def test_contract_columns_pass_unchanged_and_missing_ones_are_null(tmp_path: Path) -> None:
    table = interactions()
    source = open_source(str(write(tmp_path, "interactions.parquet", table)))
    got = read(source, "interactions")
    assert got.schema.names == INTERACTIONS.schema.names
    assert all(field.nullable for field in got.schema)
    assert got.select(table.column_names).to_pylist() == table.to_pylist()
    assert got["rating"].null_count == ROWS
    assert (source.format, source.rows["interactions"]) == ("tables", ROWS)


def test_streams_start_again_each_time_they_are_called(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path, "interactions.parquet", interactions())))
    half_read = source.tables["interactions"]()
    next(half_read)
    assert read(source, "interactions").equals(read(source, "interactions"))


ACCEPTED: dict[str, Callable[[pa.Table], pa.Array]] = {
    "int32": lambda t: t["user_id"].cast(pa.int32()),
    "uint64": lambda t: t["user_id"].cast(pa.uint64()),
    "whole_float": lambda t: t["user_id"].cast(pa.float64()),
    "decimal": lambda t: t["user_id"].cast(pa.decimal128(20, 0)),
    "dictionary": lambda t: t["user_id"].dictionary_encode(),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_integers_of_any_width_become_int64(tmp_path: Path, kind: str) -> None:
    table = interactions()
    folder = write(tmp_path, "interactions.parquet", interactions(user_id=ACCEPTED[kind](table)))
    assert read(open_source(str(folder)), "interactions")["user_id"].equals(table["user_id"])


@pytest.mark.parametrize(
    "times",
    [
        pa.array(TIMES // 1000, pa.timestamp("s")),
        pa.array(TIMES, pa.timestamp("ms")),
        pa.array(TIMES * 1000, pa.timestamp("us", "UTC")),
        pa.array(TIMES * 1_000_000, pa.timestamp("ns", "Asia/Shanghai")),
    ],
    ids=lambda times: str(times.type),
)
def test_timestamps_keep_their_instant_and_naive_ones_are_utc(
    tmp_path: Path, times: pa.Array
) -> None:
    # Parquet has no unit of seconds and stores such a column as milliseconds.
    folder = write(tmp_path, "interactions.parquet", interactions(timestamp=times))
    got = read(open_source(str(folder)), "interactions")["timestamp"]
    assert got.type == TIMESTAMP
    assert got.cast(pa.int64()).to_pylist() == TIMES.tolist()


def test_nan_is_read_as_missing_and_nulls_pass_through(tmp_path: Path) -> None:
    watch = np.ones(ROWS)
    watch[3] = np.nan
    users = pa.array([None if row == 7 else row for row in range(ROWS)], pa.int64())
    table = interactions(user_id=users, watch_time_s=watch)
    got = read(open_source(str(write(tmp_path, "interactions.parquet", table))), "interactions")
    assert np.flatnonzero(got["watch_time_s"].is_null()).tolist() == [3]
    assert np.flatnonzero(got["user_id"].is_null()).tolist() == [7]
    assert got["watch_time_s"].type == pa.float32()


def test_flags_may_be_zero_and_one(tmp_path: Path) -> None:
    flags = np.arange(ROWS) % 2
    for name, column in {"int": pa.array(flags, pa.int8()), "float": flags.astype(float)}.items():
        folder = write(tmp_path / name, "interactions.parquet", interactions(like=column))
        got = read(open_source(str(folder)), "interactions")["like"]
        assert got.to_pylist() == (flags == 1).tolist()


def test_texts_and_tags_may_be_dictionaries_or_large(tmp_path: Path) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    write(
        tmp_path,
        "items.parquet",
        pa.table(
            {
                "tags": pa.array([["a", "b"], None], pa.large_list(pa.large_string())),
                "caption": pa.array(["x", "y"], pa.large_string()),
                "title": pa.array(["t", None]).dictionary_encode(),
                "item_id": pa.array([2, 1], pa.int16()),
                "author_id": [5.0, float("nan")],
                "shelf": [1, 2],
            }
        ),
    )
    source = open_source(str(tmp_path))
    got = read(source, "items")
    assert got.schema.names == ITEMS.schema.names
    assert got.select(["item_id", "title", "caption", "tags", "author_id"]).to_pylist() == [
        {"item_id": 2, "title": "t", "caption": "x", "tags": ["a", "b"], "author_id": 5},
        {"item_id": 1, "title": None, "caption": "y", "tags": None, "author_id": None},
    ]
    assert "items: columns left out: shelf" in source.notes


def test_users_keep_further_columns_as_categories(tmp_path: Path) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    users = pa.table(
        {
            "city": pa.array(["x", None]).dictionary_encode(),
            "user_id": [1, 2],
            "age": [30.0, None],
            "vip": [True, False],
            "spend": [1.5, 2.0],
            "level": pa.array([1, 2], pa.uint8()),
            "__index_level_0__": [0, 1],
        }
    )
    source = open_source(str(write(tmp_path, "users.parquet", users)))
    got = read(source, "users")
    assert got.to_pylist() == [
        {"user_id": 1, "city": "x", "age": 30, "vip": True, "level": 1},
        {"user_id": 2, "city": None, "age": None, "vip": False, "level": 2},
    ]
    assert "users: columns left out: spend" in source.notes


def test_absent_items_and_users_are_the_distinct_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.data.readers.derive.MERGE_AT", 64)
    table = interactions(item_id=pa.array([None, *range(ROWS - 1)]), user_id=np.arange(ROWS) % 77)
    source = open_source(str(write(tmp_path, "interactions.parquet", table, row_group_size=100)))
    assert read(source, "items")["item_id"].to_pylist() == list(range(ROWS - 1))
    assert read(source, "users").to_pydict() == {"user_id": list(range(77))}
    assert len(source.notes) == 2


def test_parts_are_read_in_order_and_folders_of_days_fill_the_date(tmp_path: Path) -> None:
    table = interactions()
    for day, start in (("2024-05-01", 0), ("2024-05-02", 500)):
        write(tmp_path, f"interactions/date={day}/part-0.parquet", table.slice(start, 500))
    write(tmp_path, "interactions/date=2024-05-02/part-1.parquet", table.slice(0, 0))
    write(tmp_path, "interactions/_temporary/part-9.parquet", table)
    got = read(open_source(str(tmp_path)), "interactions")
    assert got["user_id"].equals(pa.chunked_array(table["user_id"].chunks))
    days = got["date"].to_pylist()
    assert (days[499], days[500]) == (datetime.date(2024, 5, 1), datetime.date(2024, 5, 2))


def test_folder_of_unknown_days_has_none_and_others_must_be_days(tmp_path: Path) -> None:
    write(tmp_path, "interactions/date=__HIVE_DEFAULT_PARTITION__/0.parquet", interactions())
    assert read(open_source(str(tmp_path)), "interactions")["date"].null_count == ROWS
    write(tmp_path, "interactions/date=today/0.parquet", interactions())
    assert refused(tmp_path).what == "the folder 'date=today' is not a day"


def test_parts_may_differ_in_width_but_not_in_kind(tmp_path: Path) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    write(tmp_path, "users/0.parquet", pa.table({"user_id": [1], "age": [3]}))
    write(tmp_path, "users/1.parquet", pa.table({"user_id": pa.array([2], pa.int32())}))
    users = read(open_source(str(tmp_path)), "users")
    assert users.to_pydict() == {"user_id": [1, 2], "age": [3, None]}
    write(tmp_path, "users/2.parquet", pa.table({"user_id": [3], "age": ["old"]}))
    assert "users/2.parquet column 'age'" in str(refused(tmp_path).where)


def test_many_small_row_groups_come_in_batches_of_usual_size(tmp_path: Path) -> None:
    table = pa.concat_tables([interactions()] * 20)
    folder = write(tmp_path, "interactions.parquet", table, row_group_size=64)
    sizes = [len(batch) for batch in open_source(str(folder)).tables["interactions"]()]
    assert sizes == [20 * ROWS]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_rebatching_keeps_rows_and_bounds_sizes(lengths: list[int], rows: int) -> None:
    numbers = iter(range(sum(lengths)))
    batches = [
        pa.record_batch({"n": pa.array([next(numbers) for _ in range(n)], pa.int64())})
        for n in lengths
    ]
    got = list(rebatch(iter(batches), rows))
    assert [n for batch in got for n in batch["n"].to_pylist()] == list(range(sum(lengths)))
    assert all(1 <= len(batch) <= rows for batch in got)


def test_missing_column_names_file_column_and_the_near_name(tmp_path: Path) -> None:
    table = interactions().rename_columns(
        ["userid", "item_id", "timestamp", "watch_time_s", "like"]
    )
    error = refused(write(tmp_path, "interactions.parquet", table))
    assert error.where == f"{tmp_path}/interactions.parquet"
    assert "the column 'user_id' is missing" in error.what
    assert "rename 'userid' to 'user_id'" in str(error.remedy)


def bad_at(row: int, value: Any, fill: Any, kind: pa.DataType) -> pa.Array:
    return pa.array([value if r == row else fill for r in range(ROWS)], kind)


REFUSED: dict[str, tuple[str, pa.Array, int, str]] = {
    "text id": ("user_id", pa.array([None, *["u7"] * (ROWS - 1)]), 1, "'u7'"),
    "uint64 too large": ("item_id", bad_at(600, 2**63, 1, pa.uint64()), 600, str(2**63)),
    "fraction": ("user_id", bad_at(31, 1.5, 1.0, pa.float64()), 31, "'1.5'"),
    "inexact float id": ("user_id", bad_at(31, 2.0**60, 1.0, pa.float64()), 31, "e+18"),
    "epoch integers": ("timestamp", pa.array(TIMES), 0, "'1600000000000'"),
    "text times": ("timestamp", pa.array(["2024-05-01"] * ROWS), 0, "'2024-05-01'"),
    "microseconds": ("timestamp", bad_at(999, 1, 1000, pa.timestamp("us")), 999, "000001"),
    "flag of two": ("like", bad_at(500, 2, 1, pa.int8()), 500, "'2'"),
    "text flag": ("like", pa.array(["yes"] * ROWS), 0, "'yes'"),
    "text number": ("watch_time_s", pa.array(["3.5"] * ROWS), 0, "'3.5'"),
    "too large": ("watch_time_s", bad_at(2, 1e300, 1.0, pa.float64()), 2, "'1e+300'"),
    "flag for number": ("rating", pa.array([True] * ROWS), 0, "'True'"),
    "day as integer": ("date", pa.array([20240501] * ROWS), 0, "'20240501'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_type_or_value_names_file_row_column_and_value(tmp_path: Path, case: str) -> None:
    column, values, row, shown = REFUSED[case]
    error = refused(write(tmp_path, "interactions.parquet", interactions(**{column: values})))
    assert error.where == f"{tmp_path}/interactions.parquet row {row} column '{column}'"
    assert shown in error.what


def test_rows_are_counted_over_batches_and_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.data.readers.tables.INTERACTION_ROWS", 64)
    table = interactions(user_id=bad_at(777, 2**63, 1, pa.uint64()))
    error = refused(write(tmp_path, "interactions.parquet", table, row_group_size=100))
    assert "row 777 column 'user_id'" in str(error.where)


def test_epoch_integers_are_refused_with_the_way_to_say_what_they_are(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "interactions.parquet", interactions(timestamp=TIMES)))
    assert "values.cast(pyarrow.timestamp('ms', 'UTC'))" in str(error.remedy)


def test_all_null_column_of_any_type_is_missing_data(tmp_path: Path) -> None:
    table = interactions(like=pa.nulls(ROWS, pa.string()), rating=pa.nulls(ROWS))
    got = read(open_source(str(write(tmp_path, "interactions.parquet", table))), "interactions")
    assert got["like"].null_count == got["rating"].null_count == ROWS


def test_joined_tags_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    write(tmp_path, "items.parquet", pa.table({"item_id": [1], "tags": ["a,b"]}))
    error = refused(tmp_path)
    assert error.where == f"{tmp_path}/items.parquet row 0 column 'tags'"
    assert "split joined text" in str(error.remedy)


def not_utf8(row: int, rows: int) -> pa.Array:
    """Texts of which the one at ``row`` is in another encoding."""
    texts = [b"caf\xe9" if r == row else "café".encode() for r in range(rows)]
    data = pa.array(texts, pa.binary())
    return pa.StringArray.from_buffers(rows, *data.buffers()[1:])


@pytest.mark.parametrize(
    ("column", "spoiled"),
    [
        ("title", lambda texts: texts),
        ("caption", lambda texts: pa.chunked_array([texts.dictionary_encode()])),
        ("tags", lambda texts: pa.ListArray.from_arrays(list(range(len(texts) + 1)), texts)),
    ],
    ids=["plain", "dictionary", "list"],
)
def test_text_in_another_encoding_names_file_row_and_column(
    tmp_path: Path, column: str, spoiled: Callable[[pa.Array], pa.Array]
) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    table = pa.table({"item_id": np.arange(100), column: spoiled(not_utf8(70, 100))})
    error = refused(write(tmp_path, "items.parquet", table))
    assert error.where == f"{tmp_path}/items.parquet row 70 column '{column}'"
    assert error.what == r"the text b'caf\xe9' is not UTF-8"


def test_category_of_a_user_in_another_encoding_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    table = pa.table({"user_id": np.arange(100), "city": not_utf8(3, 100)})
    error = refused(write(tmp_path, "users.parquet", table))
    assert error.where == f"{tmp_path}/users.parquet row 3 column 'city'"


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200 : len(data) // 2] = bytes(len(data) // 2 - 200)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("table", "harm", "told"),
    [
        ("interactions", lambda path: path.write_bytes(b""), "is empty"),
        ("interactions", lambda path: path.write_bytes(path.read_bytes()[:900]), "is cut off"),
        ("interactions", lambda path: path.write_text("not parquet"), "is text, not parquet"),
        ("interactions", damage_middle, "cannot be read"),
        ("items", lambda path: pq.write_table(pq.read_table(path).slice(0, 0), path), "no rows"),
    ],
    ids=["empty", "cut", "text", "damaged page", "no rows"],
)
def test_unreadable_file_is_named(
    tmp_path: Path, table: str, harm: Callable[[Path], None], told: str
) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    write(tmp_path, "items.parquet", pa.table({"item_id": [1]}))
    harm(tmp_path / f"{table}.parquet")
    error = refused(tmp_path)
    assert str(error.where).startswith(f"{tmp_path}/{table}.parquet")
    assert told in error.what


def test_folder_of_no_format_lists_what_is_there_and_what_each_format_needs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    error = refused(tmp_path)
    assert "notes.txt" in error.what
    for entry in list_formats()[1:]:
        assert f"{entry.name}: {entry.files}" in str(error.remedy)


def test_no_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match="no such folder"):
        open_source(str(tmp_path / "absent"))
    write(tmp_path, "interactions.parquet", interactions())
    with pytest.raises(DataContractError, match="a file, not a folder"):
        open_source(str(tmp_path / "interactions.parquet"))
    (tmp_path / "void").mkdir()
    with pytest.raises(DataContractError, match="the folder is empty"):
        open_source(str(tmp_path / "void"))


def test_folder_that_fits_two_formats_asks_which(tmp_path: Path) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    (tmp_path / "ratings.dat").write_text("1::2::3::4\n")
    with pytest.raises(DataContractError, match="several formats: tables, movielens"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), "tables").format == "tables"


def test_unknown_format_suggests_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'movielens'"):
        open_source(str(tmp_path), "movielense")


def test_a_table_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    write(tmp_path, "interactions/0.parquet", interactions())
    assert "keep one of them" in str(refused(tmp_path).remedy)


def test_prepared_tables_read_back_the_same_with_split_and_citation(tmp_path: Path) -> None:
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml" / "ratings.dat").write_text("1::10::5::978300760\n2::10::3::978302109\n")
    (tmp_path / "ml" / "movies.dat").write_text("10::Heat (1995)::Action|Crime\n")
    out = tmp_path / "out"
    assert prepare(str(tmp_path / "ml"), str(out)) == {"interactions": 2, "items": 1, "users": 2}
    assert sorted(p.name for p in out.iterdir()) == [
        "interactions.parquet",
        "items.parquet",
        "source.json",
        "users.parquet",
    ]
    before, after = open_source(str(tmp_path / "ml")), open_source(str(out))
    for name in before.tables:
        assert read(before, name).equals(read(after, name))
    assert (after.citation, after.split) == (before.citation, before.split)


def test_prepare_that_breaks_leaves_the_earlier_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(write(tmp_path / "good", "interactions.parquet", interactions())), str(out))
    kept = (out / "interactions.parquet").read_bytes()
    bad = interactions(user_id=bad_at(999, 2**63, 1, pa.uint64()))
    with pytest.raises(DataContractError):
        prepare(str(write(tmp_path / "bad", "interactions.parquet", bad)), str(out))
    assert (out / "interactions.parquet").read_bytes() == kept
    assert not list(out.glob(".*"))


def test_prepare_refuses_its_own_folder_and_a_bare_format_name(tmp_path: Path) -> None:
    folder = str(write(tmp_path, "interactions.parquet", interactions()))
    with pytest.raises(UsageError, match="would replace"):
        prepare(folder, folder + "/")
    with pytest.raises(UsageError, match="is a format, not data"):
        prepare("kuairand", str(tmp_path / "out"))


@pytest.mark.parametrize("way", ["other spelling", "link", "link in the path", "file URI"])
def test_prepare_knows_its_own_folder_by_any_name(tmp_path: Path, way: str) -> None:
    folder = write(tmp_path / "data #1", "interactions.parquet", interactions())
    before = (folder / "interactions.parquet").read_bytes()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "here").symlink_to(tmp_path)
    names = {
        "other spelling": f"{folder}/../data #1",
        "link": str(tmp_path / "link"),
        "link in the path": str(tmp_path / "here" / "data #1"),
        "file URI": folder.as_uri(),
    }
    for name, out in ((str(folder), names[way]), (names[way], str(folder))):
        with pytest.raises(UsageError, match="would replace"):
            prepare(name, out)
    assert [p.name for p in folder.iterdir()] == ["interactions.parquet"]
    assert (folder / "interactions.parquet").read_bytes() == before


@pytest.mark.parametrize("name", ["items.parquet", "items", "items/1.parquet"])
def test_link_to_nothing_is_not_an_absent_table(tmp_path: Path, name: str) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "absent")
    error = refused(tmp_path)
    assert error.where == f"{tmp_path}/{name}"
    assert error.what == "this is a link to nothing, not a file"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_table_that_is_no_file_is_not_an_absent_table(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    make(tmp_path / "items.parquet")
    error = refused(tmp_path)
    assert error.where == f"{tmp_path}/items.parquet"
    assert "parts of a table lie in items/" in str(error.remedy)


def test_folder_of_parts_may_bear_the_name_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, "interactions/day.parquet/0.parquet", interactions())
    assert open_source(str(tmp_path)).rows["interactions"] == ROWS


def test_linked_folder_of_parts_is_read_once_though_it_leads_back(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "0.parquet", interactions())
    (tmp_path / "data" / "interactions").mkdir(parents=True)
    (tmp_path / "data" / "interactions" / "day").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "interactions")
    assert open_source(str(tmp_path / "data")).rows["interactions"] == ROWS


@pytest.mark.parametrize(
    "text", ["{", '{"split": {"protocol": "random"}}', '{"split": {"test_from": "soon"}}', "[1]"]
)
def test_broken_description_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, "interactions.parquet", interactions())
    (tmp_path / "source.json").write_text(text)
    assert refused(tmp_path).where == f"{tmp_path}/source.json"


def test_description_of_a_source_is_json(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path, "interactions.parquet", interactions())))
    facts = json.loads(json.dumps(source.describe()))
    assert facts["split"] == {"protocol": "leave_one_out", "valid_from": None, "test_from": None}
    assert facts["format"] == "tables"
