"""Kinds of corrupted input: each a small function that spoils a clean folder of data.

A kind returns what the platform must say of it: the place and the reason of the planted fault,
never merely that something failed. ``random`` decides where the fault is planted.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
from clean_data import (
    DAY_MS,
    EARLY,
    FIRST,
    ITEMS,
    LATE,
    LOG,
    METAS,
    REVIEWS,
    ROWS,
    USERS,
    clean_tables,
    write,
    write_lines,
)

from components.data.contracts import TIMESTAMP

Random = np.random.Generator
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Refused:
    """Reading stops: ``place`` is all of the error's place below the folder, a pattern."""

    place: str
    reason: str


@dataclass(frozen=True)
class Quarantined:
    """Exactly these rows of the table go to quarantine, each for this rule."""

    table: str
    rule: str
    rows: Sequence[int]


@dataclass(frozen=True)
class Stopped:
    """Validation stops at a rule on the whole table; ``by`` are the rows that broke row rules."""

    table: str
    rule: str
    by: tuple[Quarantined, ...] = ()


@dataclass(frozen=True)
class Warned:
    """A warning in data_health; of a row rule with exactly these rows."""

    table: str
    rule: str
    rows: Sequence[int] | None = None


@dataclass(frozen=True)
class Noted:
    """A note of the reader, kept with the source: a pattern."""

    text: str


@dataclass(frozen=True)
class RefusedOrHarmless:
    """A flipped bit: reading stops in this file, or every value is what it was."""

    place: str


Expected = Refused | list[Quarantined] | Quarantined | Stopped | Warned | Noted | RefusedOrHarmless


@dataclass(frozen=True)
class Kind:
    """One kind of corruption.

    Attributes:
        family: line of the table of results.
        format: the clean data that it spoils.
        great_expectations: whether the short version has Great Expectations judge it, too.
    """

    name: str
    family: str
    format: str
    plant: Callable[[Path, Random], Expected]
    great_expectations: bool = False


KINDS: dict[str, Kind] = {}


def kind(family: str, format: str = "tables", *, great_expectations: bool = False) -> Any:
    def add(plant: Callable[[Path, Random], Expected]) -> Callable[[Path, Random], Expected]:
        KINDS[plant.__name__] = Kind(plant.__name__, family, format, plant, great_expectations)
        return plant

    return add


def some(random: Random, rows: int, count: int = 12) -> list[int]:
    """Rows to spoil, ascending."""
    return sorted(random.choice(rows, count, replace=False).tolist())


def spoil(folder: Path, table: str, column: str, values: dict[int, Any] | pa.Array) -> None:
    """Replace single cells of a column, or all of it."""
    data = clean_tables()[table]
    at = data.schema.get_field_index(column)
    if isinstance(values, dict):
        cells = data[column].to_pylist()
        for row, value in values.items():
            cells[row] = value
        values = pa.array(cells, data.schema.field(at).type)
    rewrite(folder, table, data.set_column(at, column, values))


def rewrite(folder: Path, table: str, data: pa.Table, **options: Any) -> None:
    pq.write_table(data, folder / f"{table}.parquet", **options)


def edit_reviews(folder: Path, values: dict[int, dict[str, Any]]) -> None:
    """Replace values of reviews by their number."""
    path = folder / REVIEWS
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for row, new in values.items():
        lines[row] |= new
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def edit_cells(path: Path, separator: str, column: int, values: dict[int, str]) -> None:
    """Replace cells of one column of a text file, by the line's number from 0."""
    lines = [line.split(separator) for line in path.read_text().splitlines()]
    for line, value in values.items():
        lines[line][column] = value
    write_lines(path, [separator.join(line) for line in lines])


def interactions_of(column: str, ids: Sequence[int]) -> list[int]:
    """Rows of interactions with one of these ids."""
    return np.flatnonzero(np.isin(clean_tables()["interactions"][column].to_numpy(), ids)).tolist()


# Files cut off, emptied, replaced

FILES = "files cut off, emptied or replaced"


@kind(FILES)
def parquet_cut_anywhere(folder: Path, random: Random) -> Expected:
    path = folder / "interactions.parquet"
    size = int(random.integers(12, path.stat().st_size - 1))
    path.write_bytes(path.read_bytes()[:size])
    return Refused(f"interactions.parquet byte {size}", f"is cut off: its {size:,} bytes")


@kind(FILES)
def parquet_without_footer(folder: Path, random: Random) -> Expected:
    path = folder / "items.parquet"
    data = path.read_bytes()
    kept = data[: -8 - int.from_bytes(data[-8:-4], "little")]
    path.write_bytes(kept)
    return Refused(f"items.parquet byte {len(kept)}", "end without the footer")


@kind(FILES)
def parquet_without_its_last_byte(folder: Path, random: Random) -> Expected:
    path = folder / "users.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    return Refused(f"users.parquet byte {path.stat().st_size}", "is cut off")


@kind(FILES)
def parquet_with_lost_middle(folder: Path, random: Random) -> Expected:
    path = folder / "interactions.parquet"
    data = path.read_bytes()
    start = int(random.integers(4, 1000))
    path.write_bytes(data[:start] + data[start + 900 :])
    return Refused(r"interactions.parquet.*", "damaged|outside of the file|cannot be read")


@kind(FILES)
def parquet_with_a_block_of_zeros(folder: Path, random: Random) -> Expected:
    path = folder / "interactions.parquet"
    rewrite(folder, "interactions", clean_tables()["interactions"], write_page_checksum=True)
    data = bytearray(path.read_bytes())
    start = int(random.integers(100, 2000))
    data[start : start + 512] = bytes(512)
    path.write_bytes(bytes(data))
    return Refused(r"interactions.parquet row group 0 column '\w+'", "rows 0 to 1199 are damaged")


@kind(FILES)
def file_of_zero_bytes(folder: Path, random: Random) -> Expected:
    name = random.choice(["interactions.parquet", "items.parquet", "users.parquet"])
    (folder / name).write_bytes(b"")
    return Refused(str(name), "the file is empty")


@kind(FILES)
def file_of_zeros(folder: Path, random: Random) -> Expected:
    (folder / "items.parquet").write_bytes(bytes(4096))
    return Refused("items.parquet", "nothing but zero bytes")


@kind(FILES)
def csv_named_parquet(folder: Path, random: Random) -> Expected:
    (folder / "interactions.parquet").write_text("user_id,item_id,timestamp\n1,2,3\n")
    return Refused("interactions.parquet byte 0", "text, not parquet: 'user_id,item_id,timestamp'")


@kind(FILES)
def random_bytes_named_parquet(folder: Path, random: Random) -> Expected:
    (folder / "items.parquet").write_bytes(b"\x80" + random.bytes(5000))
    return Refused("items.parquet byte 0", "not a parquet file")


@kind(FILES)
def pointer_of_git_lfs(folder: Path, random: Random) -> Expected:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    (folder / "interactions.parquet").write_text(text)
    return Refused("interactions.parquet", "a Git LFS pointer.*git lfs pull")


@kind(FILES, "kuairand")
def error_page_named_csv(folder: Path, random: Random) -> Expected:
    (folder / LATE).write_text("<!DOCTYPE html>\n<html><title>404 Not Found</title></html>\n")
    return Refused(LATE, "a web page")


@kind(FILES, "kuairand")
def compressed_csv_with_a_plain_name(folder: Path, random: Random) -> Expected:
    (folder / EARLY).write_bytes(gzip.compress((folder / EARLY).read_bytes()))
    return Refused(EARLY, "compressed by gzip.*gunzip")


@kind(FILES, "movielens")
def text_in_utf16(folder: Path, random: Random) -> Expected:
    path = folder / "ratings.dat"
    path.write_bytes(path.read_text().encode("utf-16"))
    return Refused("ratings.dat", "text in UTF-16")


@kind(FILES)
def table_of_another_name(folder: Path, random: Random) -> Expected:
    (folder / "items.parquet").write_bytes((folder / "users.parquet").read_bytes())
    return Refused("items.parquet", "the column 'item_id' is missing.*user_id")


@kind(FILES)
def interactions_in_the_place_of_items(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"].select(["item_id", "duration_s"])
    rewrite(folder, "items", data)
    ids = data["item_id"].to_pylist()
    later = [row for row in range(ROWS) if ids[row] in ids[:row]]
    rows = Quarantined("items", "item_id_repeated", later)
    return Stopped("items", "quarantine_too_large", (rows,))


@kind(FILES)
def table_without_rows(folder: Path, random: Random) -> Expected:
    name = str(random.choice(["interactions", "items", "users"]))
    rewrite(folder, name, clean_tables()[name].slice(0, 0))
    return Refused(f"{name}.parquet", "the table has no rows")


@kind(FILES)
def folder_in_the_place_of_a_file(folder: Path, random: Random) -> Expected:
    (folder / "users.parquet").unlink()
    (folder / "users.parquet").mkdir()
    return Refused("users.parquet", "this is a folder, not a file")


@kind(FILES)
def link_to_itself(folder: Path, random: Random) -> Expected:
    (folder / "users.parquet").unlink()
    (folder / "users.parquet").symlink_to("users.parquet")
    return Refused("users.parquet", "a link to nothing")


@kind(FILES)
def file_that_may_not_be_read(folder: Path, random: Random) -> Expected:
    (folder / "items.parquet").chmod(0)
    return Refused("items.parquet", "Permission denied.*permissions")


@kind(FILES)
def folder_of_two_formats(folder: Path, random: Random) -> Expected:
    (folder / "ratings.dat").write_text("1::2::3::978300760\n")
    (folder / "movies.dat").write_text("2::A::B\n")
    return Refused("", "fits several formats: tables, movielens.*ingest.format=")


@kind(FILES)
def table_written_twice(folder: Path, random: Random) -> Expected:
    write(folder / "interactions", {"part": clean_tables()["interactions"]})
    return Refused("", "both interactions.parquet and 1 files below interactions/")


@kind(FILES, "kuairand")
def log_that_is_not_there(folder: Path, random: Random) -> Expected:
    # Without the later one the split would find no test period, and say so.
    (folder / EARLY).unlink()
    return Noted(f"there is no {EARLY}")


@kind(FILES, "kuairand")
def log_left_compressed(folder: Path, random: Random) -> Expected:
    (folder / f"{LATE}.gz").write_bytes(gzip.compress((folder / LATE).read_bytes()))
    (folder / LATE).unlink()
    return Refused(f"{LATE}.gz", "would not be read.*unpack it")


@kind(FILES, "kuairand")
def log_renamed_by_a_browser(folder: Path, random: Random) -> Expected:
    name = LATE.replace(".csv", " (1).csv")
    (folder / LATE).rename(folder / name)
    return Refused(re.escape(name), "would not be read.*published under")


@kind(FILES, "amazon")
def product_nested_without_end(folder: Path, random: Random) -> Expected:
    path = folder / METAS
    lines = gzip.decompress(path.read_bytes()).splitlines()
    row = int(random.integers(len(lines)))
    lines[row] = b'{"asin": "B0001", "related": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return Refused(f"{METAS} line {row + 1}", "not a JSON object|nested")


DESCRIPTIONS = {
    "facts_that_are_a_number": ('{"ground_truth": 5}', "'ground_truth' is 5, not an object"),
    "nested_without_end": ("[" * 100_000, "cannot be read"),
    "key_misspelt": ('{"split": {"valid_form": "2024-02-01"}}', "'valid_form'.*'valid_from'"),
    "split_by_time_without_days": ('{"split": {"protocol": "temporal"}}', "no day 'valid_from'"),
}


def describe(text: str, reason: str) -> Callable[[Path, Random], Expected]:
    def plant(folder: Path, random: Random) -> Expected:
        (folder / "source.json").write_text(text)
        return Refused("source.json", reason)

    return plant


for name, (text, reason) in DESCRIPTIONS.items():
    label = f"description_{name}"
    KINDS[label] = Kind(label, FILES, "tables", describe(text, reason))


# Bits flipped

BITS = "bits flipped"


def flip(path: Path, first: int, last: int, random: Random) -> int:
    data = bytearray(path.read_bytes())
    at = int(random.integers(first, last))
    data[at] ^= 1 << int(random.integers(8))
    path.write_bytes(bytes(data))
    return at


def footer_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data)


@kind(BITS)
def bit_in_the_footer(folder: Path, random: Random) -> Expected:
    path = folder / "interactions.parquet"
    rewrite(folder, "interactions", clean_tables()["interactions"], row_group_size=500)
    flip(path, *footer_of(path), random)
    return RefusedOrHarmless(r"interactions.parquet.*")


@kind(BITS)
def bit_in_a_page_with_checksum(folder: Path, random: Random) -> Expected:
    path = folder / "interactions.parquet"
    options = {"write_page_checksum": True, "compression": random.choice(["zstd", "snappy"])}
    rewrite(folder, "interactions", clean_tables()["interactions"], row_group_size=500, **options)
    flip(path, 4, footer_of(path)[0], random)
    return RefusedOrHarmless(r"interactions.parquet row group [012] column '\w+'")


@kind(BITS)
def bit_of_the_magic_bytes(folder: Path, random: Random) -> Expected:
    flip(folder / "users.parquet", 0, 4, random)
    return Refused("users.parquet byte 0", "not a parquet file|text, not parquet")


@kind(BITS)
def high_bit_of_a_value_in_a_page_without_checksum(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    column = str(random.choice(["user_id", "item_id", "timestamp"]))
    rewrite(folder, "interactions", data, compression="none", use_dictionary=False)
    path = folder / "interactions.parquet"
    content = bytearray(path.read_bytes())
    values = data[column].cast(pa.int64()).to_numpy().astype("<i8").tobytes()
    row = int(random.integers(ROWS))
    content[content.index(values) + 8 * row + 5] ^= 1 << int(random.integers(4, 7))
    path.write_bytes(bytes(content))
    return Refused(f"interactions.parquet row {row} column '{column}'", "the footer promises")


@kind(BITS, "amazon")
def bit_in_a_gzip_file(folder: Path, random: Random) -> Expected:
    size = (folder / REVIEWS).stat().st_size
    flip(folder / REVIEWS, 20, size, random)
    return Refused(REVIEWS + "( line 1)?", "damaged|cannot be read|is missing")


@kind(BITS, "amazon")
def gzip_file_cut_off(folder: Path, random: Random) -> Expected:
    name = str(random.choice([REVIEWS, METAS]))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(random.integers(30, len(data) - 1))])
    return Refused(name + "( line 1)?", "cut off|cannot be read|is missing")


# Columns

COLUMNS = "columns missing, renamed, exchanged"


@kind(COLUMNS)
def required_column_missing(folder: Path, random: Random) -> Expected:
    name = str(random.choice(["user_id", "item_id", "timestamp"]))
    rewrite(folder, "interactions", clean_tables()["interactions"].drop([name]))
    return Refused("interactions.parquet", f"the column '{name}' is missing.*columns present")


@kind(COLUMNS)
def required_column_renamed(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"].rename_columns({"item_id": "itemId"})
    rewrite(folder, "interactions", data)
    return Refused("interactions.parquet", "'item_id' is missing.*rename 'itemId' to 'item_id'")


@kind(COLUMNS)
def optional_column_renamed(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"].rename_columns({"watch_time_s": "watch_time"})
    rewrite(folder, "interactions", data)
    return Noted("there is no 'watch_time_s', but 'watch_time' is left out.*interactions.parquet")


@kind(COLUMNS, "kuairand")
def watch_times_and_durations_exchanged(folder: Path, random: Random) -> Expected:
    names = LOG.split(",")
    play, length = names.index("play_time_ms"), names.index("duration_ms")
    for name in (EARLY, LATE):
        lines = (folder / name).read_text().splitlines()[1:]
        cells = [line.split(",") for line in lines]
        for row in cells:
            # Nothing that a rule on rows would find.
            row[play] = str(max(1000, int(row[play])))
        names[play], names[length] = "duration_ms", "play_time_ms"
        write_lines(folder / name, [",".join(names), *map(",".join, cells)])
    return Warned("interactions", "watched_times_high")


@kind(COLUMNS)
def column_named_twice(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    rewrite(folder, "interactions", data.append_column("user_id", data["item_id"]))
    return Refused("interactions.parquet", "there are 2 columns named 'user_id'")


@kind(COLUMNS, great_expectations=True)
def users_and_items_exchanged(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    names = {"user_id": "item_id", "item_id": "user_id"}
    rewrite(folder, "interactions", data.rename_columns(names))
    rows = interactions_of("user_id", range(ITEMS, USERS))
    return Stopped(
        "interactions",
        "items_table_incomplete",
        (Quarantined("interactions", "item_unknown", rows),),
    )


@kind(COLUMNS)
def watch_time_and_duration_exchanged(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    names = {"watch_time_s": "duration_s", "duration_s": "watch_time_s"}
    rewrite(folder, "interactions", data.rename_columns(names))
    watch, duration = (data[c].to_numpy() for c in ("watch_time_s", "duration_s"))
    zero = watch == 0
    often = ~zero & (duration / np.where(zero, 1, watch) > 60)
    return Stopped(
        "interactions",
        "quarantine_too_large",
        (
            Quarantined("interactions", "duration_s_not_positive", np.flatnonzero(zero).tolist()),
            Quarantined("interactions", "watched_too_often", np.flatnonzero(often).tolist()),
        ),
    )


@kind(COLUMNS, "kuairand")
def header_permuted_against_the_data(folder: Path, random: Random) -> Expected:
    lines = (folder / EARLY).read_text().splitlines()
    head = lines[0].replace("user_id", "X").replace("time_ms", "user_id", 1).replace("X", "time_ms")
    write_lines(folder / EARLY, [head, *lines[1:]])
    # Times of 1970; 200 of the 400 rows.
    return Stopped(
        "interactions",
        "quarantine_too_large",
        (Quarantined("interactions", "timestamp_out_of_range", range(200)),),
    )


@kind(COLUMNS)
def part_lacks_a_column(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    (folder / "interactions.parquet").unlink()
    parts = {"0": data.slice(0, 600), "1": data.slice(600).drop(["like"])}
    write(folder / "interactions", parts)
    return Noted(
        "column 'like' is absent from 1 of 2 files and null there, the first is "
        ".*interactions/1.parquet"
    )


@kind(COLUMNS)
def part_has_another_type(folder: Path, random: Random) -> Expected:
    data = clean_tables()["users"]
    (folder / "users.parquet").unlink()
    text = data.slice(30).set_column(2, "age", data["age"].slice(30).cast(pa.string()))
    write(folder / "users", {"0": data.slice(0, 30), "1": text})
    return Refused(
        "users/1.parquet column 'age'", "the column is string here and int64 in another file"
    )


# Types

TYPES = "values of another type or encoding"


def retyped(column: str, values: Callable[[pa.ChunkedArray], pa.Array], reason: str) -> Any:
    """A column of interactions in a type that is not its own: the first row is told."""

    def plant(folder: Path, random: Random) -> Expected:
        spoil(folder, "interactions", column, values(clean_tables()["interactions"][column]))
        return Refused(f"interactions.parquet row 0 column '{column}'", reason)

    return plant


def _text_of_times(form: str) -> Callable[[pa.ChunkedArray], pa.Array]:
    return lambda times: pa.array([t.strftime(form) for t in times.to_pylist()])


for name, column, values, reason in (
    ("ids_as_text", "user_id", lambda c: c.cast(pa.string()), "type string.*number the ids"),
    ("ids_as_flags", "item_id", lambda c: pc.equal(c, 1), "type bool does not fit int64"),
    (
        "ids_in_a_struct",
        "user_id",
        lambda c: pa.StructArray.from_arrays([c.combine_chunks()], ["id"]),
        "struct.* does not fit int64",
    ),
    (
        "ids_in_lists",
        "item_id",
        lambda c: pa.array([[v] for v in c.to_pylist()]),
        "list.* does not fit int64",
    ),
    (
        "times_as_seconds",
        "timestamp",
        lambda c: pa.array(c.cast(pa.int64()).to_numpy() // 1000),
        "int64.*which unit",
    ),
    ("times_as_milliseconds", "timestamp", lambda c: c.cast(pa.int64()), "int64.*which unit"),
    ("times_as_iso_text", "timestamp", _text_of_times("%Y-%m-%dT%H:%M:%SZ"), "string.*time zone"),
    ("times_as_german_text", "timestamp", _text_of_times("%d.%m.%Y %H:%M"), "string.*time zone"),
    ("dates_as_text", "date", lambda c: c.cast(pa.string()), "type string does not fit date32"),
    ("flags_as_text", "like", lambda c: c.cast(pa.string()), "type string does not fit bool"),
    (
        "numbers_with_decimal_commas",
        "watch_time_s",
        lambda c: pa.array([f"{v:.2f}".replace(".", ",") for v in c.to_pylist()]),
        "type string does not fit float",
    ),
):
    KINDS[name] = Kind(name, TYPES, "tables", retyped(column, values, reason))


@kind(TYPES)
def ids_with_fractions(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ROWS))
    ids = clean_tables()["interactions"]["user_id"].to_numpy().astype(float)
    ids[row] += 0.5
    spoil(folder, "interactions", "user_id", pa.array(ids))
    return Refused(f"interactions.parquet row {row} column 'user_id'", f"value '{ids[row]}'")


@kind(TYPES)
def ids_beyond_exact_floats(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ITEMS))
    ids = np.arange(ITEMS, dtype=float)
    ids[row] = 2.0**53 + 2
    spoil(folder, "items", "item_id", pa.array(ids))
    return Refused(f"items.parquet row {row} column 'item_id'", "of type double does not fit int64")


@kind(TYPES)
def ids_beyond_64_bits(folder: Path, random: Random) -> Expected:
    row = int(random.integers(USERS))
    ids = np.arange(USERS, dtype=np.uint64)
    ids[row] = 2**63 + 1
    spoil(folder, "users", "user_id", pa.array(ids))
    return Refused(f"users.parquet row {row} column 'user_id'", "9223372036854775809")


@kind(TYPES)
def flag_that_is_neither_0_nor_1(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ROWS))
    likes = clean_tables()["interactions"]["like"].cast(pa.int8()).to_numpy().copy()
    likes[row] = 7
    spoil(folder, "interactions", "like", pa.array(likes))
    return Refused(f"interactions.parquet row {row} column 'like'", "value '7'.*0 and 1")


@kind(TYPES)
def times_finer_than_milliseconds(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ROWS))
    times = clean_tables()["interactions"]["timestamp"].cast(pa.int64()).to_numpy() * 1000
    times[row] += 7
    spoil(folder, "interactions", "timestamp", pa.array(times).cast(pa.timestamp("us", "UTC")))
    return Refused(f"interactions.parquet row {row} column 'timestamp'", "keeps milliseconds")


class _Keys(pe.KmsClient):
    """Wraps keys in nothing: what is tested is the encrypted file."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, name: str) -> bytes:
        return base64.b64decode(wrapped)


def encrypted(folder: Path, *, plain_footer: bool) -> None:
    keys = pe.CryptoFactory(_Keys).file_encryption_properties(
        pe.KmsConnectionConfig(),
        pe.EncryptionConfiguration(
            footer_key="f", column_keys={"c": ["item_id"]}, plaintext_footer=plain_footer
        ),
    )
    rewrite(folder, "interactions", clean_tables()["interactions"], encryption_properties=keys)


@kind(TYPES)
def encrypted_parquet(folder: Path, random: Random) -> Expected:
    encrypted(folder, plain_footer=False)
    return Refused("interactions.parquet", "an encrypted parquet file.*without encryption")


@kind(TYPES)
def encrypted_column(folder: Path, random: Random) -> Expected:
    encrypted(folder, plain_footer=True)
    return Refused("interactions.parquet row group 0 column 'item_id'", "the column is encrypted")


@kind(TYPES)
def codec_that_nobody_reads(folder: Path, random: Random) -> Expected:
    path = folder / "users.parquet"
    rewrite(folder, "users", clean_tables()["users"], compression="zstd")
    data = path.read_bytes()
    start = footer_of(path)[0]
    # Field 4 of a column's metadata is the codec; 6 is ZSTD, 3 is LZO; field 5 follows.
    path.write_bytes(data[:start] + data[start:].replace(b"\x15\x0c\x16", b"\x15\x06\x16", 1))
    return Refused("users.parquet row group 0 column 'user_id'", "compressed by LZO")


# Keys and references

KEYS = "keys and references"


@kind(KEYS)
def items_listed_twice(folder: Path, random: Random) -> Expected:
    data = clean_tables()["items"]
    rewrite(folder, "items", pa.concat_tables([data, data.slice(int(random.integers(ITEMS)), 1)]))
    return Quarantined("items", "item_id_repeated", [ITEMS])


@kind(KEYS)
def users_listed_twice(folder: Path, random: Random) -> Expected:
    data = clean_tables()["users"]
    again = data.take(some(random, USERS, 2))
    rewrite(folder, "users", pa.concat_tables([data, again]))
    return Quarantined("users", "user_id_repeated", [USERS, USERS + 1])


@kind(KEYS)
def interactions_logged_twice(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    again = data.take(some(random, ROWS))
    rewrite(folder, "interactions", pa.concat_tables([data, again]))
    return Quarantined("interactions", "exact_duplicate", range(ROWS, ROWS + 12))


@kind(KEYS)
def all_events_told_twice_and_otherwise(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    at = data.schema.get_field_index("like")
    other = data.set_column(at, "like", pc.invert(data["like"]))
    rewrite(folder, "interactions", pa.concat_tables([data, other]))
    return Stopped("interactions", "events_contradicted")


@kind(KEYS, great_expectations=True)
def some_events_told_twice_and_otherwise(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    again = data.take(some(random, ROWS))
    at = data.schema.get_field_index("like")
    again = again.set_column(at, "like", pc.invert(again["like"]))
    rewrite(folder, "interactions", pa.concat_tables([data, again]))
    return Warned("interactions", "event_contradicted", range(ROWS, ROWS + 12))


@kind(KEYS)
def unknown_items(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    spoil(folder, "interactions", "item_id", {row: ITEMS + row for row in rows})
    return Quarantined("interactions", "item_unknown", rows)


@kind(KEYS)
def unknown_users(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    spoil(folder, "interactions", "user_id", {row: USERS + row for row in rows})
    return Quarantined("interactions", "user_unknown", rows)


@kind(KEYS)
def users_table_of_another_day(folder: Path, random: Random) -> Expected:
    rewrite(folder, "users", clean_tables()["users"].slice(0, 40))
    rows = Quarantined("interactions", "user_unknown", interactions_of("user_id", range(40, 60)))
    return Stopped("interactions", "users_table_incomplete", (rows,))


@kind(KEYS)
def negative_ids(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    spoil(folder, "interactions", "user_id", dict.fromkeys(rows, -1))
    return Quarantined("interactions", "user_id_negative", rows)


# Numbers

NUMBERS = "missing and impossible numbers"


@kind(NUMBERS)
def storm_of_nan(folder: Path, random: Random) -> Expected:
    first, count = int(random.integers(ROWS - 400)), 400
    spoil(folder, "interactions", "watch_time_s", dict.fromkeys(range(first, first + count), NAN))
    return Noted(
        f"'watch_time_s': 400 values are NaN and count as missing, the first in row {first} of "
    )


@kind(NUMBERS, "amazon")
def nan_in_half_of_the_json_lines(folder: Path, random: Random) -> Expected:
    rows = some(random, 300, 150)
    edit_reviews(folder, {row: {"overall": NAN} for row in rows})
    return Noted(f"'overall': 150 values are NaN .* in row {rows[0]} of .*{REVIEWS}")


@kind(NUMBERS, "amazon")
def nan_in_all_json_lines(folder: Path, random: Random) -> Expected:
    edit_reviews(folder, {row: {"overall": NAN} for row in range(300)})
    return Noted("'rating' is there and has no value in any row")


@kind(NUMBERS, "movielens")
def nan_in_ratings(folder: Path, random: Random) -> Expected:
    rows = some(random, 400, 200)
    edit_cells(folder / "ratings.dat", "::", 2, dict.fromkeys(rows, "nan"))
    return Noted(f"'rating': 200 values are NaN .* in row {rows[0]} of .*ratings.dat")


@kind(NUMBERS, "kuairand")
def nan_in_csv(folder: Path, random: Random) -> Expected:
    rows = some(random, 200, 150)
    at = LOG.split(",").index("play_time_ms")
    # Beside cells that are empty, as those of missing values are.
    cells = {row + 1: "NaN" if n % 3 else "" for n, row in enumerate(rows)}
    edit_cells(folder / LATE, ",", at, cells)
    return Noted(f"'play_time_ms': 100 values are NaN .* in row {rows[1]} of .*{LATE}")


@kind(NUMBERS)
def column_without_a_value(folder: Path, random: Random) -> Expected:
    name = str(random.choice(["watch_time_s", "click", "like"]))
    spoil(folder, "interactions", name, dict.fromkeys(range(ROWS)))
    return Noted(f"interactions: column '{name}' is there and has no value in any row")


@kind(NUMBERS, "kuairand")
def csv_column_without_a_value(folder: Path, random: Random) -> Expected:
    for name in (EARLY, LATE):
        at = LOG.split(",").index("is_like")
        edit_cells(folder / name, ",", at, dict.fromkeys(range(1, 201), ""))
    return Noted("interactions: column 'like' is there and has no value in any row")


@kind(NUMBERS)
def impossible_ages(folder: Path, random: Random) -> Expected:
    rows = some(random, USERS, 4)
    spoil(folder, "users", "age", {row: (-5, 10**15)[row % 2] for row in rows})
    return Warned("users", "age_impossible", rows)


@kind(NUMBERS, "amazon")
def texts_that_stand_for_no_id(folder: Path, random: Random) -> Expected:
    rows = some(random, 300, 5)
    ids = ("", " ", "nan", "null", "None")
    edit_reviews(folder, {r: {"reviewerID": i} for r, i in zip(rows, ids, strict=True)})
    return Quarantined("interactions", "user_id_missing", rows)


@kind(NUMBERS, "amazon")
def texts_that_stand_for_no_product(folder: Path, random: Random) -> Expected:
    rows = some(random, 300, 5)
    ids = ("", " ", "NaN", "NULL", "none")
    edit_reviews(folder, {r: {"asin": i} for r, i in zip(rows, ids, strict=True)})
    return Quarantined("interactions", "item_id_missing", rows)


@kind(NUMBERS, "kuairand")
def hexadecimal_id_in_csv(folder: Path, random: Random) -> Expected:
    row = int(random.integers(1, 201))
    edit_cells(folder / EARLY, ",", 1, {row: "0x1F"})
    return Refused(f"{EARLY} line {row + 1} column 'video_id'", "'0x1F' is hexadecimal")


@kind(NUMBERS, "movielens")
def hexadecimal_id_in_dat(folder: Path, random: Random) -> Expected:
    row = int(random.integers(400))
    edit_cells(folder / "ratings.dat", "::", 0, {row: "0X1f"})
    return Refused(f"ratings.dat line {row + 1} column 'user_id'", "'0X1f' is hexadecimal")


@kind(NUMBERS)
def ids_that_are_nan(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    ids = clean_tables()["interactions"]["user_id"].to_numpy().astype(float)
    ids[rows] = NAN
    spoil(folder, "interactions", "user_id", pa.array(ids))
    return Quarantined("interactions", "user_id_missing", rows)


@kind(NUMBERS, great_expectations=True)
def some_infinities(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    values = {row: INF if row % 2 else -INF for row in rows}
    spoil(folder, "interactions", "watch_time_s", values)
    return Quarantined("interactions", "watch_time_s_negative", rows)


@kind(NUMBERS)
def storm_of_infinities(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS, 300)
    spoil(folder, "interactions", "duration_s", dict.fromkeys(rows, INF))
    found = Quarantined("interactions", "duration_s_not_positive", rows)
    return Stopped("interactions", "quarantine_too_large", (found,))


@kind(NUMBERS)
def nulls_in_required_columns(folder: Path, random: Random) -> Expected:
    column = str(random.choice(["user_id", "item_id", "timestamp"]))
    rows = some(random, ROWS)
    spoil(folder, "interactions", column, dict.fromkeys(rows))
    return Quarantined("interactions", f"{column}_missing", rows)


@kind(NUMBERS)
def storm_of_nulls_in_a_required_column(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS, 500)
    spoil(folder, "interactions", "item_id", dict.fromkeys(rows))
    found = Quarantined("interactions", "item_id_missing", rows)
    return Stopped("interactions", "quarantine_too_large", (found,))


@kind(NUMBERS)
def storm_of_nulls_in_an_optional_column(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS, 1150)
    spoil(folder, "interactions", "watch_time_s", dict.fromkeys(rows))
    return Warned("interactions", "watch_time_s_mostly_missing")


@kind(NUMBERS)
def negative_durations(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    spoil(folder, "interactions", "duration_s", dict.fromkeys(rows, -5.0))
    return Quarantined("interactions", "duration_s_not_positive", rows)


@kind(NUMBERS)
def negative_watch_times(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    spoil(folder, "interactions", "watch_time_s", dict.fromkeys(rows, -0.5))
    return Quarantined("interactions", "watch_time_s_negative", rows)


@kind(NUMBERS)
def watched_a_hundred_times(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    lengths = clean_tables()["interactions"]["duration_s"].to_pylist()
    spoil(folder, "interactions", "watch_time_s", {row: 100 * lengths[row] for row in rows})
    return Quarantined("interactions", "watched_too_often", rows)


@kind(NUMBERS)
def watch_time_in_milliseconds(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    watch = pc.multiply(data["watch_time_s"], pa.scalar(1000, pa.float32()))
    spoil(folder, "interactions", "watch_time_s", watch)
    ratio = watch.to_numpy() / data["duration_s"].to_numpy()
    rows = Quarantined("interactions", "watched_too_often", np.flatnonzero(ratio > 60).tolist())
    return Stopped("interactions", "quarantine_too_large", (rows,))


@kind(NUMBERS)
def all_seconds_in_milliseconds(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    for name in ("watch_time_s", "duration_s"):
        at = data.schema.get_field_index(name)
        data = data.set_column(at, name, pc.multiply(data[name], pa.scalar(1000, pa.float32())))
    rewrite(folder, "interactions", data)
    return Warned("interactions", "duration_unit")


@kind(NUMBERS)
def ratings_out_of_scale(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    ratings = np.full(ROWS, 3, np.float32)
    ratings[rows] = 99
    data = clean_tables()["interactions"].append_column("rating", pa.array(ratings))
    rewrite(folder, "interactions", data)
    return Quarantined("interactions", "rating_out_of_range", rows)


@kind(NUMBERS)
def constant_watch_time(folder: Path, random: Random) -> Expected:
    spoil(folder, "interactions", "watch_time_s", pa.array(np.full(ROWS, 3, np.float32)))
    return Warned("interactions", "watch_time_constant")


@kind(NUMBERS)
def every_row_liked(folder: Path, random: Random) -> Expected:
    spoil(folder, "interactions", "like", pa.array([True] * ROWS))
    return Warned("interactions", "like_nearly_always")


# Times

TIMES = "times and time zones"


def moments(year: int) -> Callable[[Path, Random], Expected]:
    def plant(folder: Path, random: Random) -> Expected:
        rows = some(random, ROWS)
        moment = datetime.datetime(year, 1, 1, 12, tzinfo=datetime.UTC)
        spoil(folder, "interactions", "timestamp", dict.fromkeys(rows, moment))
        return Quarantined("interactions", "timestamp_out_of_range", rows)

    return plant


for name, year in (
    ("times_of_the_future", 2124),
    ("times_before_1970", 1955),
    ("times_of_the_year_1", 1),
    ("times_of_the_year_9999", 9999),
):
    KINDS[name] = Kind(name, TIMES, "tables", moments(year), year == 9999)


def times_in_another_unit(factor: float) -> Callable[[Path, Random], Expected]:
    def plant(folder: Path, random: Random) -> Expected:
        times = clean_tables()["interactions"]["timestamp"].cast(pa.int64()).to_numpy()
        values = pa.array((times * factor).astype(np.int64)).cast(TIMESTAMP)
        spoil(folder, "interactions", "timestamp", values)
        rows = Quarantined("interactions", "timestamp_out_of_range", range(ROWS))
        return Stopped("interactions", "nothing_passes", (rows,))

    return plant


for name, factor in (("seconds_read_as_milliseconds", 0.001), ("microseconds_read_so", 1000)):
    KINDS[name] = Kind(name, TIMES, "tables", times_in_another_unit(factor))


@kind(TIMES)
def one_moment_for_all(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"].drop(["date"])
    # No two rows are then alike but for their time.
    watched = pa.array(np.linspace(0, 4, ROWS), pa.float32())
    data = data.set_column(2, "timestamp", pa.array([FIRST] * ROWS, TIMESTAMP))
    rewrite(folder, "interactions", data.set_column(3, "watch_time_s", watched))
    return Stopped("interactions", "single_moment")


@kind(TIMES, great_expectations=True)
def part_in_local_time(folder: Path, random: Random) -> Expected:
    times = clean_tables()["interactions"]["timestamp"].cast(pa.int64()).to_numpy().copy()
    times[: ROWS // 2] += 8 * 3_600_000
    spoil(folder, "interactions", "timestamp", pa.array(times).cast(TIMESTAMP))
    return Warned("interactions", "two_time_zones")


@kind(TIMES)
def files_with_and_without_a_zone(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    (folder / "interactions.parquet").unlink()
    local = data.slice(600)
    naive = local["timestamp"].cast(pa.timestamp("ms", "Asia/Shanghai")).cast(pa.timestamp("ms"))
    write(
        folder / "interactions",
        {"0": data.slice(0, 600), "1": local.set_column(2, "timestamp", naive)},
    )
    return Refused(
        "interactions/1.parquet column 'timestamp'",
        "the times have no zone here, and the zone UTC in interactions/0.parquet",
    )


@kind(TIMES)
def times_without_a_zone(folder: Path, random: Random) -> Expected:
    times = clean_tables()["interactions"]["timestamp"].cast(pa.timestamp("ms"))
    spoil(folder, "interactions", "timestamp", times)
    return Noted("'timestamp' has no time zone and is taken as UTC")


@kind(TIMES)
def times_days_away_from_their_date(folder: Path, random: Random) -> Expected:
    rows = some(random, ROWS)
    times = clean_tables()["interactions"]["timestamp"].to_pylist()
    spoil(
        folder,
        "interactions",
        "timestamp",
        {row: times[row] - datetime.timedelta(days=5) for row in rows},
    )
    return Quarantined("interactions", "date_disagrees", rows)


@kind(TIMES)
def file_of_other_years(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"].drop(["date"])
    (folder / "interactions.parquet").unlink()
    old = data.slice(0, 100)
    times = old["timestamp"].cast(pa.int64()).to_numpy() - 20 * 365 * DAY_MS
    old = old.set_column(2, "timestamp", pa.array(times).cast(TIMESTAMP))
    write(folder / "interactions", {"0": old, "1": data.slice(100)})
    return Warned("interactions", "gap_in_time")


@kind(TIMES)
def folder_that_is_no_day(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"].drop(["date"])
    (folder / "interactions.parquet").unlink()
    write(folder / "interactions" / "date=2024-02-30", {"0": data})
    return Refused("interactions/date=2024-02-30/0.parquet", "the folder .* is not a day")


@kind(TIMES, "kuairand")
def day_that_is_none(folder: Path, random: Random) -> Expected:
    row = int(random.integers(200))
    change_line(folder / EARLY, row + 1, lambda cells: {**cells, "date": "20220431"})
    return Refused(f"{EARLY} row {row} column 'date'", "'20220431'")


@kind(TIMES, "amazon", great_expectations=True)
def review_times_in_milliseconds(folder: Path, random: Random) -> Expected:
    lines = gzip.decompress((folder / REVIEWS).read_bytes()).decode()
    lines = re.sub(r'"unixReviewTime": (\d+)', r'"unixReviewTime": \g<1>000', lines)
    (folder / REVIEWS).write_bytes(gzip.compress(lines.encode()))
    rows = Quarantined("interactions", "timestamp_out_of_range", range(300))
    return Stopped("interactions", "nothing_passes", (rows,))


# Texts

TEXTS = "texts"


@kind(TEXTS)
def title_that_is_not_utf8(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ITEMS))
    titles = [f"Video {n}".encode() for n in range(ITEMS)]
    titles[row] = "Fähre".encode("latin-1")
    spoil(folder, "items", "title", pa.array(titles, pa.binary()).view(pa.string()))
    return Refused(f"items.parquet row {row} column 'title'", "is not UTF-8")


@kind(TEXTS)
def title_with_half_a_surrogate_pair(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ITEMS))
    titles = [f"Video {n}".encode() for n in range(ITEMS)]
    titles[row] = b"cat \xed\xa0\xbd"
    spoil(folder, "items", "title", pa.array(titles, pa.binary()).view(pa.string()))
    return Refused(f"items.parquet row {row} column 'title'", "is not UTF-8")


@kind(TEXTS, great_expectations=True)
def title_with_a_nul(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ITEMS))
    spoil(folder, "items", "title", {row: "cat\x00dog"})
    return Warned("items", "text_unreadable", [row])


@kind(TEXTS)
def tag_with_a_replacement_character(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ITEMS))
    spoil(folder, "items", "tags", {row: ["cats", "na\ufffdve"]})
    return Warned("items", "text_unreadable", [row])


@kind(TEXTS)
def title_of_ten_megabytes(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ITEMS))
    spoil(folder, "items", "title", {row: "cat " * 2_500_000})
    return Warned("items", "text_too_long", [row])


@kind(TEXTS)
def blank_tags(folder: Path, random: Random) -> Expected:
    row = int(random.integers(ITEMS))
    spoil(folder, "items", "tags", {row: ["cats", " "]})
    return [
        Quarantined("items", "tag_blank", [row]),
        Quarantined("interactions", "item_unknown", interactions_of("item_id", [row])),
    ]


@kind(TEXTS)
def titles_lost(folder: Path, random: Random) -> Expected:
    rewrite(folder, "items", clean_tables()["items"].drop(["title", "tags"]))
    return Warned("items", "text_missing", range(ITEMS))


@kind(TEXTS, "amazon")
def product_with_half_a_surrogate_pair(folder: Path, random: Random) -> Expected:
    line = int(random.integers(30))
    change_json(folder / METAS, line, lambda text: text.replace("Tool ", "\\ud83d Tool "))
    return Refused(f"{METAS} line {line + 1}", "'title' holds half a surrogate pair")


@kind(TEXTS, "amazon")
def product_that_is_not_utf8(folder: Path, random: Random) -> Expected:
    line = int(random.integers(30))
    change_json(folder / METAS, line, lambda text: text.replace("Tool", "T\udcf6\udcf6l"))
    return Refused(f"{METAS} line {line + 1}", "is not UTF-8")


@kind(TEXTS, "amazon")
def reviewer_that_is_not_utf8(folder: Path, random: Random) -> Expected:
    line = int(random.integers(300))
    change_json(folder / REVIEWS, line, lambda text: text.replace('"A', '"\udcff'))
    return Refused(f"{REVIEWS} line {line + 1}", "UTF-?8")


# Delimited text and JSON lines

LINES = "lines of csv and JSON"


def change_line(path: Path, line: int, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Change the cells of one line of a csv file; line 0 is the header."""
    lines = path.read_text().splitlines()
    cells = dict(zip(lines[0].split(","), lines[line].split(","), strict=True))
    lines[line] = ",".join(change(cells).values())
    write_lines(path, lines)


def change_json(path: Path, line: int, change: Callable[[str], str]) -> None:
    """Change one line of a compressed file of JSON; ``\\udcXX`` stands for the byte XX."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines[line] = change(lines[line])
    text = "".join(f"{text}\n" for text in lines)
    path.write_bytes(gzip.compress(text.encode(errors="surrogateescape"), mtime=0))


def cell(column: str, value: str, reason: str) -> Callable[[Path, Random], Expected]:
    def plant(folder: Path, random: Random) -> Expected:
        line = int(random.integers(1, 200))
        change_line(folder / LATE, line, lambda cells: {**cells, column: value})
        return Refused(f"{LATE} line {line + 1}( column '{column}')?", reason)

    return plant


for name, column, value, reason in (
    ("csv_cell_of_text", "video_id", "abc", "invalid value 'abc'"),
    ("csv_number_beyond_64_bits", "user_id", "9" * 20, "invalid value '99999999999999999999'"),
    ("csv_decimal_comma", "play_time_ms", '"12,5"', "invalid value '12,5'"),
    ("csv_line_with_one_cell_more", "tab", "0,0", "Expected 19 columns, got 20"),
    ("csv_byte_order_mark_in_the_middle", "user_id", "\ufeff7", "invalid value '\ufeff7'"),
    ("csv_nul_in_a_number", "user_id", "7\x00", "invalid value|NUL|nul"),
):
    KINDS[name] = Kind(name, LINES, "kuairand", cell(column, value, reason))


@kind(LINES, "kuairand")
def csv_cut_off_in_a_line(folder: Path, random: Random) -> Expected:
    lines = (folder / LATE).read_text().splitlines()
    line = int(random.integers(2, 200))
    (folder / LATE).write_text("\n".join([*lines[:line], lines[line][:12]]))
    return Refused(f"{LATE} line {line + 1}", "Expected 19 columns, got")


@kind(LINES, "kuairand")
def csv_quote_that_never_ends(folder: Path, random: Random) -> Expected:
    line = int(random.integers(1, 200))
    change_line(folder / LATE, line, lambda cells: {**cells, "user_id": '"7'})
    return Refused(f"{LATE}( line {line + 1})?", "Expected 19 columns|quot|cannot be read")


@kind(LINES, "kuairand")
def csv_with_semicolons(folder: Path, random: Random) -> Expected:
    (folder / LATE).write_text((folder / LATE).read_text().replace(",", ";"))
    return Refused(f"{LATE} line 1", "'user_id' is missing.*by ',' and not by ';'")


@kind(LINES, "kuairand")
def csv_with_a_second_header(folder: Path, random: Random) -> Expected:
    lines = (folder / LATE).read_text().splitlines()
    line = int(random.integers(2, 200))
    write_lines(folder / LATE, [*lines[:line], lines[0], *lines[line:]])
    return Refused(f"{LATE} line {line + 1} column 'user_id'", "invalid value 'user_id'")


@kind(LINES, "kuairand")
def csv_column_named_twice(folder: Path, random: Random) -> Expected:
    text = (folder / EARLY).read_text().replace("hourmin", "video_id", 1)
    (folder / EARLY).write_text(text)
    return Refused(f"{EARLY} line 1", "there are 2 columns named 'video_id'")


@kind(LINES, "kuairand")
def csv_of_two_versions(folder: Path, random: Random) -> Expected:
    (folder / LATE).rename(folder / LATE.replace("pure", "1k"))
    return Refused("", "several versions are here: 1k, pure")


@kind(LINES, "amazon")
def json_line_cut_off(folder: Path, random: Random) -> Expected:
    line = int(random.integers(1, 300))
    change_json(folder / REVIEWS, line, lambda text: text[:-9])
    return Refused(f"{REVIEWS} line {line + 1}", "the line cannot be read")


@kind(LINES, "amazon")
def json_rating_of_text(folder: Path, random: Random) -> Expected:
    line = int(random.integers(300))
    change_json(
        folder / REVIEWS, line, lambda text: text.replace('"overall": ', '"overall": "5", "x": ')
    )
    return Refused(f"{REVIEWS} line {line + 1}", "the line cannot be read.*overall")


@kind(LINES, "amazon")
def json_review_without_a_product(folder: Path, random: Random) -> Expected:
    line = int(random.integers(1, 300))
    change_json(folder / REVIEWS, line, lambda text: text.replace("asin", "isbn"))
    return Quarantined("interactions", "item_id_missing", [line])


@kind(LINES, "movielens")
def rating_with_a_cell_less(folder: Path, random: Random) -> Expected:
    lines = (folder / "ratings.dat").read_text().splitlines()
    line = int(random.integers(400))
    lines[line] = lines[line].rpartition("::")[0]
    write_lines(folder / "ratings.dat", lines)
    return Refused(f"ratings.dat line {line + 1}", "Expected 4 columns, got 3")


@kind(LINES, "movielens")
def ratings_parted_by_tabs(folder: Path, random: Random) -> Expected:
    path = folder / "ratings.dat"
    path.write_text(path.read_text().replace("::", "\t"))
    return Refused("ratings.dat line 1", "Expected 4 columns, got 1.*a line is user_id::item_id")


@kind(LINES, "movielens")
def movie_rated_but_not_listed(folder: Path, random: Random) -> Expected:
    lines = (folder / "movies.dat").read_bytes().splitlines(keepends=True)
    (folder / "movies.dat").write_bytes(b"".join(lines[:-1]))
    ratings = [line.split("::")[1] for line in (folder / "ratings.dat").read_text().splitlines()]
    rows = [row for row, movie in enumerate(ratings) if movie == "29"]
    return Quarantined("interactions", "item_unknown", rows)


# Splits and lopsided tables

SPLITS = "splits, leaks and lopsided tables"


@kind(SPLITS)
def train_and_test_exchanged(folder: Path, random: Random) -> Expected:
    split = {"protocol": "temporal", "valid_from": "2024-02-20", "test_from": "2024-02-10"}
    (folder / "source.json").write_text(json.dumps({"split": split}))
    return Refused("source.json", "2024-02-10 does not come after .* 2024-02-20")


@kind(SPLITS)
def test_after_the_last_day(folder: Path, random: Random) -> Expected:
    split = {"protocol": "temporal", "valid_from": "2024-05-01", "test_from": "2024-06-01"}
    (folder / "source.json").write_text(json.dumps({"split": split}))
    return Refused("params.yaml split.*", "from 2024-01-01 to 2024-02-29; valid_from 2024-05-01")


@kind(SPLITS)
def test_rows_copied_into_train(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    (folder / "interactions.parquet").unlink()
    test = data.slice(1100)
    train = pa.concat_tables([data.slice(0, 1100), test.slice(0, 30)])
    write(folder / "interactions", {"test": test, "train": train})
    return Quarantined("interactions", "exact_duplicate", range(1200, 1230))


@kind(SPLITS)
def test_rows_dated_back_into_train(folder: Path, random: Random) -> Expected:
    data = clean_tables()["interactions"]
    leaked = data.slice(1180)
    leaked = leaked.set_column(3, "date", pa.array([FIRST.date()] * 20))
    rewrite(folder, "interactions", pa.concat_tables([data, leaked]))
    return Quarantined("interactions", "date_disagrees", range(1200, 1220))


@kind(SPLITS, "kuairand")
def logs_exchanged(folder: Path, random: Random) -> Expected:
    early, late = (folder / EARLY).read_bytes(), (folder / LATE).read_bytes()
    (folder / EARLY).write_bytes(late)
    (folder / LATE).write_bytes(early)
    return Noted(f"200 rows have a day .* the first is row 0 of .*{EARLY}")


def write_histories(folder: Path, late: int | None, early: int | None) -> None:
    """KuaiRand as histories and a log; one history too late, one row of the log too early."""
    end = int(datetime.datetime(2022, 4, 24, 16, tzinfo=datetime.UTC).timestamp() * 1000)
    for file in folder.iterdir():
        file.unlink()
    users = np.arange(50)
    last = end - 1 - 1000 * users
    if late is not None:
        last[late] = end
    items = pa.array([[int(n) % 30, (int(n) + 1) % 30] for n in users], pa.list_(pa.int32()))
    none = pa.array([[]] * 50, pa.list_(pa.int32()))
    names = ["user_id", "last_time_ms", "watch_seq", "like_seq", "long_watch_seq"]
    dates = np.full(50, 20220501)
    if early is not None:
        dates[early] = 20220424
    flags = ("is_click", "long_view", "is_like", "is_follow", "is_forward", "is_comment")
    log = {
        "user_id": users,
        "video_id": users % 30,
        "date": dates,
        "time_ms": end + 6 * DAY_MS + users,
        **dict.fromkeys((*flags, "is_hate", "is_profile_enter"), np.zeros(50, np.int8)),
        "play_time_ms": np.full(50, 900) + users,
        "duration_ms": np.full(50, 9000),
    }
    videos = {
        "video_id": np.arange(30),
        "author_id": np.arange(30),
        "video_duration": np.full(30, 9000),
        "tag": ["1,2"] * 30,
    }
    write(
        folder,
        {
            "user_histories": pa.table([pa.array(users), pa.array(last), items, none, none], names),
            "interactions": pa.table(log),
            "videos": pa.table(videos),
            "users": pa.table({"user_id": users}),
        },
    )


@kind(SPLITS, "kuairand")
def history_that_reaches_into_the_test(folder: Path, random: Random) -> Expected:
    row = int(random.integers(50))
    write_histories(folder, row, None)
    return Refused(
        f"user_histories.parquet row {row} column 'last_time_ms'", "before they are predicted"
    )


@kind(SPLITS, "kuairand")
def log_that_reaches_into_the_histories(folder: Path, random: Random) -> Expected:
    row = int(random.integers(50))
    write_histories(folder, None, row)
    return Refused(f"interactions.parquet row {row} column 'date'", "'20220424'.*user_histories")


def only(table: str, column: str, value: int, rule: str) -> Callable[[Path, Random], Expected]:
    def plant(folder: Path, random: Random) -> Expected:
        spoil(folder, table, column, pa.array(np.full(ROWS, value)))
        return Stopped(table, rule)

    return plant


KINDS["one_user_only"] = Kind(
    "one_user_only", SPLITS, "tables", only("interactions", "user_id", 3, "single_user")
)
KINDS["one_item_only"] = Kind(
    "one_item_only", SPLITS, "tables", only("interactions", "item_id", 3, "single_item")
)


@kind(SPLITS)
def one_row_only(folder: Path, random: Random) -> Expected:
    rewrite(folder, "interactions", clean_tables()["interactions"].slice(0, 1))
    return Stopped("interactions", "single_user")


@kind(SPLITS, great_expectations=True)
def bot_with_half_of_all_events(folder: Path, random: Random) -> Expected:
    users = clean_tables()["interactions"]["user_id"].to_numpy().copy()
    users[random.choice(ROWS, ROWS // 2, replace=False)] = int(random.integers(USERS))
    spoil(folder, "interactions", "user_id", pa.array(users))
    return Warned("interactions", "user_dominates")


@kind(SPLITS)
def placeholder_item_in_most_events(folder: Path, random: Random) -> Expected:
    items = clean_tables()["interactions"]["item_id"].to_numpy().copy()
    items[random.choice(ROWS, 800, replace=False)] = 0
    spoil(folder, "interactions", "item_id", pa.array(items))
    return Warned("interactions", "item_dominates")


def may_read_everything() -> bool:
    """Whether permissions do not bind this process: root, with its usual capabilities."""
    override = 1 << 1  # CAP_DAC_OVERRIDE
    status = Path("/proc/self/status")
    if os.geteuid() or not status.exists():
        return os.geteuid() == 0
    held = re.search(r"CapEff:\s*(\w+)", status.read_text())
    return held is None or bool(int(held[1], 16) & override)
