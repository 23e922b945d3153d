"""Corrupted input

The real stages read, validate and split each corrupted folder; what they say must be of the fault
that was planted. Then clean data, written in every way that means the same, must raise no alarm.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clean_data import (
    EARLY,
    LATE,
    METAS,
    PEOPLE,
    REVIEWS,
    WRITERS,
    clean_tables,
    write,
    write_amazon,
    write_kuairand,
    write_movielens,
)
from command_line import reelflow
from corruptions import (
    KINDS,
    Noted,
    Quarantined,
    Refused,
    RefusedOrHarmless,
    Stopped,
    Warned,
    flip,
    footer_of,
    may_read_everything,
)
from fault_suite import LONG, Record

from components.data.source import open_source, prepare
from components.pipeline.artifacts import Input
from components.pipeline.errors import DataContractError, ParamsError, ReelflowError
from components.pipeline.params import load_params
from components.pipeline.runner import Runner, open_store
from components.pipeline.settings import Settings
from components.pipeline.stage import load_registry

STAGES = ("ingest", "validate", "split")
SPLIT = ("catalogue", "train_sequences", "valid_examples", "test_examples")
REFUSED = "refused with place and remedy"
#: Notes of readers that tell of a fault.
ALARMING = "count as missing|has no value|is missing|exchanged|is absent from"
HARMLESS = "harmless: every value as before"
UNNOTICED = "unnoticed: nothing in the file can tell"
SEEDS = 4 if LONG else 1
FLIPS = 400 if LONG else 25


@dataclass
class Attempt:
    """What came of ingest → validate → split on one folder."""

    error: ReelflowError | None
    notes: list[str]
    health: dict[str, Any]
    quarantine: pa.Table
    outputs: dict[str, Input]

    def broken(self, severity: str) -> dict[tuple[str, str], dict[str, Any]]:
        return {
            (table, rule["rule"]): rule
            for table, found in self.health["tables"].items()
            for rule in found["rules"]
            if rule["broken"] and rule["severity"] == severity
        }

    def lines(self) -> dict[tuple[str, str], list[int]]:
        rows: dict[tuple[str, str], list[int]] = defaultdict(list)
        for line in self.quarantine.to_pylist():
            assert line["reason"]
            assert json.loads(line["record"])
            rows[line["table"], line["rule"]].append(line["row"])
        return dict(rows)


def attempt(folder: Path, home: Path, *, great_expectations: bool) -> Attempt:
    registry = load_registry()
    home.mkdir(parents=True, exist_ok=True)
    (home / "params.yaml").write_text("")
    settings = Settings(home, str(home / "store"), "", None, None)
    overrides = [
        f"ingest.source={folder}",
        f"validate.great_expectations={str(great_expectations).lower()}",
    ]
    params = load_params(registry, file=home / "params.yaml", overrides=overrides)
    runner = Runner(settings, open_store(settings), params)
    error = None
    outputs: dict[str, Input] = {}
    try:
        for name in STAGES:
            runner.execute(registry[name])
            outputs |= runner.outputs_of(registry[name])
    except ReelflowError as caught:
        error = caught
    notes = outputs["source"].read_json()["notes"] if "source" in outputs else []
    if "quarantine" in outputs:
        health = outputs["data_health"].read_json()
        quarantine = outputs["quarantine"].read_table()
    else:
        rejected = next(iter(home.rglob("rejected")), None)
        files = [] if rejected is None else sorted((rejected / "quarantine").glob("*.parquet"))
        quarantine = pa.concat_tables(map(pq.read_table, files)) if files else pa.table({})
        health = {"tables": {}}
        if rejected is not None:
            health = json.loads(next((rejected / "data_health").glob("*.json")).read_text())
    return Attempt(error, notes, health, quarantine, outputs)


def require_told(folder: Path, error: ReelflowError | None, place: str, reason: str) -> None:
    """The error stands at ``place`` in ``folder``, gives the reason and a remedy."""
    assert isinstance(error, DataContractError | ParamsError), error
    where = str(error.where)
    below = where.removeprefix(str(folder)).lstrip("/")
    assert re.fullmatch(place, below), where
    assert re.search(reason, f"{error.what} {error.remedy}", re.DOTALL), str(error)
    assert error.remedy


def require_found(expected: Any, folder: Path, found: Attempt) -> str:
    """What was planted is what was found; the outcome in words."""
    match expected:
        case Refused(place, reason):
            require_told(folder, found.error, place, reason)
            return REFUSED
        case Quarantined():
            return require_found([expected], folder, found)
        case list():
            assert found.error is None, found.error
            assert found.lines() == {(q.table, q.rule): list(q.rows) for q in expected}
            return "quarantined by row and reason"
        case Stopped(table, rule, by):
            assert isinstance(found.error, DataContractError), found.error
            assert found.error.where == f"table '{table}'"
            assert f"rule '{rule}' is broken" in found.error.what
            assert found.error.remedy
            assert ((table, rule)) in found.broken("critical")
            lines = {key: rows for key, rows in found.lines().items() if key[0] == table}
            assert lines == {(q.table, q.rule): list(q.rows) for q in by}
            return "stopped with rule, rows and remedy"
        case Warned(table, rule, rows):
            assert found.error is None, found.error
            assert found.lines() == {}
            verdict = found.broken("warning")[table, rule]
            assert verdict["reason"]
            if rows is not None:
                assert verdict["broken"] == len(rows)
                assert [e["row"] for e in verdict["examples"]] == list(rows)[:5]
            return "warned with rule" if rows is None else "warned with rule and rows"
        case Noted(text):
            assert found.error is None, found.error
            assert found.lines() == {}
            assert any(re.search(text, note) for note in found.notes), found.notes
            return "noted with file and column"
        case RefusedOrHarmless(place):
            if found.error is None:
                return HARMLESS
            require_told(
                folder, found.error, place, "damaged|cannot be read|is missing|not fit|cut"
            )
            return REFUSED
    raise AssertionError(expected)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", KINDS)
def test_what_is_planted_is_found(name: str, seed: int, tmp_path: Path, record: Record) -> None:
    kind = KINDS[name]
    if name == "file_that_may_not_be_read" and may_read_everything():
        pytest.skip("this user may read everything")
    folder = WRITERS[kind.format](tmp_path / "data")
    random = np.random.default_rng([seed, *name.encode()])
    expected = kind.plant(folder, random)
    judge = LONG or kind.great_expectations
    found = attempt(folder, tmp_path / "home", great_expectations=judge)
    outcome = require_found(expected, folder, found)
    if outcome == HARMLESS:
        clean = attempt(
            WRITERS[kind.format](tmp_path / "clean"), tmp_path / "other", great_expectations=False
        )
        assert contents(found) == contents(clean)
    record(kind.family, outcome)


def contents(found: Attempt) -> dict[str, pa.Table]:
    return {name: found.outputs[f"raw_{name}"].read_table() for name in clean_tables()}


def test_there_are_kinds_enough() -> None:
    assert len(KINDS) >= 50
    assert len({kind.family for kind in KINDS.values()}) <= 10


# Bits


def readings(folder: Path) -> dict[str, pa.Table]:
    source = open_source(str(folder))
    return {name: pa.Table.from_batches(list(make())) for name, make in source.tables.items()}


def outcomes_of_flips(
    folder: Path, part: str, random: np.random.Generator, flips: int
) -> Counter[str]:
    """Flip single bits of the interactions, each in a fresh copy, and read."""
    path = folder / "interactions.parquet"
    content, clean = path.read_bytes(), readings(folder)
    start, end = footer_of(path)
    outcomes: Counter[str] = Counter()
    for _ in range(flips):
        path.write_bytes(content)
        flip(path, *((start, end) if part == "footer" else (4, start)), random)
        try:
            outcomes[HARMLESS if readings(folder) == clean else UNNOTICED] += 1
        except DataContractError as error:
            outcomes[REFUSED if str(error.where).startswith(str(path)) else str(error)] += 1
    return outcomes


@pytest.mark.parametrize("part", ["footer", "page with checksum"])
def test_no_flipped_bit_of_a_footer_or_a_page_with_checksum_changes_a_value(
    part: str, tmp_path: Path, record: Record
) -> None:
    table = {"interactions": clean_tables()["interactions"]}
    write(tmp_path, table, row_group_size=500, write_page_checksum=True)
    outcomes = outcomes_of_flips(tmp_path, part, np.random.default_rng(1), FLIPS)
    assert outcomes.keys() <= {REFUSED, HARMLESS}
    assert outcomes[REFUSED] > FLIPS / 4
    for outcome, cases in outcomes.items():
        record(f"single bit of a {part}", outcome, cases)


def test_bits_of_pages_without_checksum_are_found_where_the_file_can_tell(
    tmp_path: Path, record: Record
) -> None:
    """Not a promise but a count: a value that stays in its column's range looks like any other."""
    write(tmp_path, {"interactions": clean_tables()["interactions"]})
    outcomes = outcomes_of_flips(tmp_path, "page", np.random.default_rng(2), FLIPS)
    assert outcomes.keys() <= {REFUSED, HARMLESS, UNNOTICED}
    assert outcomes[REFUSED] > 0
    for outcome, cases in outcomes.items():
        record("single bit of a page without checksum", outcome, cases)


def test_exports_of_the_platform_carry_checksums(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(WRITERS["tables"](tmp_path / "in")), str(out))
    outcomes = outcomes_of_flips(out, "page", np.random.default_rng(3), FLIPS)
    assert outcomes.keys() <= {REFUSED, HARMLESS}


# Through the command line


THROUGH_COMMANDS = ["parquet_cut_anywhere", "users_and_items_exchanged", "csv_cell_of_text"]


@pytest.mark.parametrize("name", THROUGH_COMMANDS if LONG else THROUGH_COMMANDS[:1])
def test_command_line_says_it_without_a_traceback(
    name: str, tmp_path: Path, record: Record
) -> None:
    kind = KINDS[name]
    folder = WRITERS[kind.format](tmp_path / "data")
    expected = kind.plant(folder, np.random.default_rng(0))
    options = ["--data", str(folder), "--set", "validate.great_expectations=false"]
    for stage in ("ingest", "validate"):
        done = reelflow(tmp_path / "home", "stage", stage, *options)
        if done.returncode:
            break
    assert done.returncode == 3, done.stderr
    assert "remedy: " in done.stderr
    says = expected.reason if isinstance(expected, Refused) else expected.rule
    assert re.search(says, done.stderr), done.stderr
    record(kind.family, REFUSED)


# Clean variants

Variant = Callable[[Path], Path]
VARIANTS: dict[str, tuple[str, Variant]] = {}


def variant(format: str = "tables") -> Callable[[Variant], Variant]:
    def add(make: Variant) -> Variant:
        VARIANTS[make.__name__] = (format, make)
        return make

    return add


def cast(**kinds: pa.DataType) -> Variant:
    """Columns of all tables in other types."""

    def make(folder: Path) -> Path:
        tables = clean_tables()
        for name, table in tables.items():
            for column, kind in kinds.items():
                if column in table.column_names:
                    at = table.schema.get_field_index(column)
                    table = table.set_column(at, column, table[column].cast(kind))
            tables[name] = table
        return write(folder, tables)

    return make


def options(**given: Any) -> Variant:
    return lambda folder: write(folder, clean_tables(), **given)


ID = ("user_id", "item_id")
for label, made in {
    "ids_int32": cast(**dict.fromkeys(ID, pa.int32())),
    "ids_uint8": cast(**dict.fromkeys(ID, pa.uint8())),
    "ids_uint64": cast(**dict.fromkeys(ID, pa.uint64())),
    "ids_whole_floats": cast(**dict.fromkeys(ID, pa.float64())),
    "ids_whole_decimals": cast(**dict.fromkeys(ID, pa.decimal128(20, 0))),
    "times_in_microseconds": cast(timestamp=pa.timestamp("us", "UTC")),
    "times_in_nanoseconds": cast(timestamp=pa.timestamp("ns", "UTC")),
    "times_of_another_zone": cast(timestamp=pa.timestamp("ms", "Asia/Shanghai")),
    "dates_with_64_bits": cast(date=pa.date64()),
    "flags_0_and_1": cast(like=pa.int8(), click=pa.int64()),
    "seconds_with_64_bits": cast(watch_time_s=pa.float64(), duration_s=pa.float64()),
    "large_texts": cast(title=pa.large_string(), tags=pa.large_list(pa.large_string())),
    "several_row_groups": options(row_group_size=97),
    "no_compression": options(compression="none"),
    "compression_gzip": options(compression="gzip"),
    "compression_zstd": options(compression="zstd"),
    "compression_brotli": options(compression="brotli"),
    "compression_lz4": options(compression="lz4"),
    "data_pages_of_version_2": options(data_page_version="2.0"),
    "format_version_1": options(version="1.0"),
    "no_statistics": options(write_statistics=False),
    "no_dictionaries": options(use_dictionary=False),
    "page_checksums": options(write_page_checksum=True),
    "page_indexes": options(write_page_index=True),
    "small_pages": options(data_page_size=512),
    "no_arrow_schema": options(store_schema=False),
    "times_as_int96": options(use_deprecated_int96_timestamps=True),
}.items():
    VARIANTS[label] = ("tables", made)


@variant()
def ids_as_dictionaries(folder: Path) -> Path:
    tables = clean_tables()
    data = tables["interactions"]
    for at, name in enumerate(ID):
        data = data.set_column(at, name, data[name].dictionary_encode())
    return write(folder, {**tables, "interactions": data})


@variant()
def columns_in_another_order(folder: Path) -> Path:
    tables = clean_tables()
    return write(folder, {name: t.select(t.column_names[::-1]) for name, t in tables.items()})


@variant()
def extra_columns(folder: Path) -> Path:
    tables = clean_tables()
    rows = tables["interactions"].num_rows
    extra = tables["interactions"].append_column("session", pa.array(["s"] * rows))
    return write(folder, {**tables, "interactions": extra})


@variant()
def rows_in_another_order(folder: Path) -> Path:
    random = np.random.default_rng(9)
    tables = clean_tables()
    return write(
        folder, {name: t.take(random.permutation(t.num_rows)) for name, t in tables.items()}
    )


@variant()
def written_by_pandas(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, table in clean_tables().items():
        table.to_pandas().to_parquet(folder / f"{name}.parquet")
    return folder


@variant()
def parts_in_a_folder(folder: Path) -> Path:
    tables = clean_tables()
    data = tables.pop("interactions")
    write(folder / "interactions", {f"part-{n}": data.slice(n * 300, 300) for n in range(4)})
    return write(folder, tables)


@variant()
def folders_of_days(folder: Path) -> Path:
    tables = clean_tables()
    data = tables.pop("interactions")
    for day in data["date"].unique().to_pylist():
        of_day = data.filter(pa.compute.equal(data["date"], day)).drop(["date"])
        write(folder / "interactions" / f"date={day}", {"0": of_day})
    (folder / "interactions" / "_SUCCESS").touch()
    return write(folder, tables)


@variant()
def linked_files_and_litter(folder: Path) -> Path:
    real = write(folder.parent / "elsewhere", clean_tables())
    folder.mkdir()
    for name in clean_tables():
        (folder / f"{name}.parquet").symlink_to(real / f"{name}.parquet")
    (folder / "README.md").write_text("notes")
    (folder / ".interactions.parquet.crc").write_bytes(b"crc")
    return folder


@variant()
def without_users_and_items(folder: Path) -> Path:
    return write(folder, {"interactions": clean_tables()["interactions"]})


@variant()
def without_optional_columns(folder: Path) -> Path:
    # What the split reads of the columns left out is null in both.
    tables = clean_tables()
    return write(folder, {**tables, "items": tables["items"].drop(["author_id", "duration_s"])})


@variant("kuairand")
def csv_with_windows_line_ends(folder: Path) -> Path:
    for path in write_kuairand(folder).iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return folder


@variant("kuairand")
def csv_with_mixed_line_ends(folder: Path) -> Path:
    path = write_kuairand(folder) / LATE
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"".join(x + (b"\r\n" if n % 3 else b"\n") for n, x in enumerate(lines[:-1])))
    return folder


@variant("kuairand")
def csv_with_a_byte_order_mark(folder: Path) -> Path:
    for path in write_kuairand(folder).iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return folder


@variant("kuairand")
def csv_without_a_last_line_end(folder: Path) -> Path:
    path = write_kuairand(folder) / EARLY
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    return folder


@variant("kuairand")
def csv_columns_in_another_order(folder: Path) -> Path:
    path = write_kuairand(folder) / LATE
    lines = [",".join(reversed(line.split(","))) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    return folder


@variant("kuairand")
def csv_without_features_of_users(folder: Path) -> Path:
    (write_kuairand(folder) / PEOPLE).unlink()
    return folder


@variant("amazon")
def reviews_not_compressed(folder: Path) -> Path:
    for name in (REVIEWS, METAS):
        path = write_amazon(folder) / name
        (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
    for name in (REVIEWS, METAS):
        (folder / name).unlink()
    return folder


@variant("amazon")
def products_in_another_order_with_blank_lines(folder: Path) -> Path:
    path = write_amazon(folder) / METAS
    lines = gzip.decompress(path.read_bytes()).splitlines()[::-1]
    path.write_bytes(gzip.compress(b"\n\n".join(lines) + b"\n"))
    return folder


@variant("movielens")
def movies_in_utf8(folder: Path) -> Path:
    path = write_movielens(folder) / "movies.dat"
    path.write_text(path.read_bytes().decode("latin-1"), encoding="utf-8")
    return folder


@variant("movielens")
def ratings_with_windows_line_ends(folder: Path) -> Path:
    path = write_movielens(folder) / "ratings.dat"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return folder


@variant("movielens")
def ratings_prepared_by_the_platform(folder: Path) -> Path:
    prepare(str(write_movielens(folder.with_name("published"))), str(folder))
    return folder


@variant("kuairand")
def log_beside_its_compressed_copy(folder: Path) -> Path:
    write_kuairand(folder)
    (folder / f"{LATE}.gz").write_bytes(gzip.compress((folder / LATE).read_bytes()))
    return folder


@variant("kuairand")
def log_of_random_exposure_beside_it(folder: Path) -> Path:
    write_kuairand(folder)
    name = "log_random_4_22_to_5_08_pure.csv"
    (folder / name).write_bytes((folder / LATE).read_bytes())
    return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Digests of the split of each format's clean data."""
    found = {}
    for format, make in WRITERS.items():
        place = tmp_path_factory.mktemp(format)
        found[format] = require_clean(make(place / "data"), place / "home", judge=LONG)
    return found


def require_clean(folder: Path, home: Path, *, judge: bool) -> list[str]:
    found = attempt(folder, home, great_expectations=judge)
    assert found.error is None, found.error
    assert found.lines() == {}
    assert found.broken("critical") == {}
    # What lists no items, or none with a title, is told so and is no alarm of a corruption.
    harmless = {("items", "text_missing"), ("items", "mostly_without_text")}
    assert not [note for note in found.notes if re.search(ALARMING, note)]
    derived = any("items: no" in note for note in found.notes)
    assert found.broken("warning").keys() <= (harmless if derived else set())
    return [found.outputs[name].digest for name in SPLIT]


@pytest.mark.parametrize("name", VARIANTS)
def test_clean_data_written_otherwise_raises_no_alarm(
    name: str, references: dict[str, list[str]], tmp_path: Path, record: Record
) -> None:
    format, make = VARIANTS[name]
    folder = make(tmp_path / "data")
    assert require_clean(folder, tmp_path / "home", judge=LONG) == references[format]
    record("clean variants", "no alarm, equal split")


def test_there_are_variants_enough() -> None:
    assert len(VARIANTS) >= 24
