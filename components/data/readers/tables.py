"""A folder of contract tables: ``interactions``, ``items`` and ``users`` as parquet.

A table is ``<name>.parquet`` or all parquet files below ``<name>/``, with ``date=YYYY-MM-DD``
folders filling the column ``date`` where the files leave it out. Only interactions are required:
items and users that are absent are derived from them. ``source.json``, as ``reelflow data prepare``
writes it, restores citation, licence and split.
"""

from __future__ import annotations

import datetime
import difflib
import json
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from components.data.contracts import CONTRACTS, INTERACTIONS, TIMESTAMP, TableContract
from components.data.readers import kuairand
from components.data.readers.conform import (
    Column,
    Missing,
    absent,
    conformed,
    integral,
    plan_column,
    raw_schema,
    schema_of,
)
from components.data.readers.derive import derived_table
from components.data.readers.files import INTERACTION_ROWS, TEXT_ROWS, SourceFolder, rebatch
from components.data.readers.parquet import ParquetFile, parquet_batches, parquet_footers
from components.data.source import Source
from components.pipeline.errors import DataContractError

NAME = "tables"
NEEDS = (
    "interactions.parquet or interactions/*.parquet with user_id, item_id, timestamp; "
    "items and users likewise, if there are any"
)
CITATION = ""
LICENCE = ""

DESCRIPTION = "source.json"
#: The folder in which Hive and Spark put rows without a value.
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
#: Keys of the description, as ``Source.describe`` and ``write_tables`` give them.
DESCRIBED = (
    "format",
    "uri",
    "citation",
    "licence",
    "split",
    "notes",
    "ground_truth",
    "without_values",
)
DEFAULT_SPLIT = {"protocol": "leave_one_out", "valid_from": None, "test_from": None}


def recognise(folder: SourceFolder) -> bool:
    return bool(_files(folder, INTERACTIONS.name)) and not kuairand.is_reencoded(folder)


def read(folder: SourceFolder) -> Source:
    """Open the folder; see ``open_source`` for what is raised."""
    about = _description(folder)
    found = {
        name: _open(folder, contract, about["without_values"].get(name, ()))
        for name, contract in CONTRACTS.items()
    }
    interactions = found["interactions"]
    if interactions is None:
        raise DataContractError(
            f"there are no interactions here: {folder.listing()}",
            where=folder.uri,
            remedy=f"needed: {NEEDS}",
        )
    tables: dict[str, Callable[[], Iterator[pa.RecordBatch]]] = {}
    rows: dict[str, int] = {}
    notes: list[str] = []
    present = [table for table in found.values() if table is not None]
    for name, contract in CONTRACTS.items():
        table = found[name]
        if table is None:
            tables[name] = derived_table(contract, interactions.column(contract.key[0]))
            notes.append(f"{name}: no such table, ids are taken from the interactions")
            continue
        tables[name] = table.stream
        rows[name] = sum(part.file.rows for part in table.parts)
        notes += table.notes
    return Source(
        format=NAME,
        uri=folder.uri,
        citation=about["citation"],
        licence=about["licence"],
        split=about["split"],
        tables=tables,
        rows=rows,
        notes=tuple(notes),
        ground_truth=about["ground_truth"],
        findings=lambda: tuple(note for table in present for note in table.missing.notes()),
    )


@dataclass(frozen=True)
class _Part:
    """One file and how its columns become those of the table."""

    file: ParquetFile
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class _Table:
    folder: SourceFolder
    schema: pa.Schema
    parts: tuple[_Part, ...]
    batch_rows: int
    notes: tuple[str, ...]
    missing: Missing

    def stream(self) -> Iterator[pa.RecordBatch]:
        batches = self.missing.watch(lambda: self._batches(self.schema, self.missing))
        return rebatch(batches, self.batch_rows)

    def column(self, name: str) -> Callable[[], Iterator[pa.Array]]:
        """The column ``name`` alone, so that no other is read."""
        schema = pa.schema([self.schema.field(name)])

        def stream() -> Iterator[pa.Array]:
            for batch in self._batches(schema):
                yield batch.column(0)

        return stream

    def _batches(
        self, schema: pa.Schema, missing: Missing | None = None
    ) -> Iterator[pa.RecordBatch]:
        for part in self.parts:
            columns = [column for column in part.columns if column.name in schema.names]
            yield from _read(self.folder, part.file.name, columns, schema, self.batch_rows, missing)

    def check_types(self) -> None:
        """Read the columns whose type no value fits: all-null ones pass, others raise now."""
        for part in self.parts:
            for column in part.columns:
                if not column.possible:
                    schema = schema_of([column])
                    deque(_read(self.folder, part.file.name, [column], schema, TEXT_ROWS), 0)


def _read(
    folder: SourceFolder,
    name: str,
    columns: list[Column],
    schema: pa.Schema,
    rows: int,
    missing: Missing | None = None,
) -> Iterator[pa.RecordBatch]:
    sources = [column.source for column in columns if column.source is not None]
    batches = parquet_batches(folder, name, sources, rows)
    return conformed(batches, columns, schema, where=folder.where(name), missing=missing)


def _files(folder: SourceFolder, table: str) -> list[str]:
    whole = f"{table}.parquet"
    parts = [n for n in folder.sizes if n.startswith(f"{table}/") and n.endswith(".parquet")]
    if whole in folder.sizes and parts:
        raise DataContractError(
            f"there are both {whole} and {len(parts)} files below {table}/",
            where=folder.uri,
            remedy="keep one of them",
        )
    return [whole] if whole in folder.sizes else parts


def _open(folder: SourceFolder, contract: TableContract, unused: Collection[str]) -> _Table | None:
    names = _files(folder, contract.name)
    if not names:
        return None
    files = parquet_footers(folder, names)
    if not any(file.rows for file in files):
        raise DataContractError(
            "the table has no rows",
            where=folder.where(names[0]),
            remedy=f"write {contract.name} with at least one row"
            + ("" if contract is INTERACTIONS else ", or remove the file: ids are then derived"),
        )
    for file in files:
        _require_columns(folder, contract, file)
    _require_one_clock(folder, contract, files)
    extras, dropped = _extras(folder, contract, files)
    schema = raw_schema(contract, extras)
    table = _Table(
        folder,
        schema,
        tuple(
            _Part(file, tuple(_column(folder, file, field) for field in schema)) for file in files
        ),
        INTERACTION_ROWS if contract is INTERACTIONS else TEXT_ROWS,
        tuple(_notes(folder, contract, files, dropped)),
        Missing(contract.name, unused),
    )
    table.check_types()
    return table


def _column(folder: SourceFolder, file: ParquetFile, field: pa.Field) -> Column:
    index = file.schema.get_field_index(field.name)
    if index >= 0:
        return plan_column(field.name, field.name, file.schema.field(index).type, field.type)
    day = _partition_day(folder, file) if field.name == "date" else None
    return absent(field.name, field.type, day)


def _partition_day(folder: SourceFolder, file: ParquetFile) -> datetime.date | None:
    """The day of the folder ``date=YYYY-MM-DD`` that the file lies in."""
    for part in file.name.split("/")[:-1]:
        key, _, value = part.partition("=")
        if key != "date" or value == NULL_PARTITION:
            continue
        try:
            return datetime.date.fromisoformat(value)
        except ValueError:
            raise DataContractError(
                f"the folder '{part}' is not a day",
                where=folder.where(file.name),
                remedy="name it date=YYYY-MM-DD",
            ) from None
    return None


def _require_columns(folder: SourceFolder, contract: TableContract, file: ParquetFile) -> None:
    present = file.schema.names
    where = folder.where(file.name)
    for name in dict.fromkeys(present):
        if present.count(name) > 1 and not name.startswith("__"):
            raise DataContractError(
                f"there are {present.count(name)} columns named '{name}'",
                where=where,
                remedy="keep one of them",
            )
    for name in contract.required:
        if name not in present:
            near = difflib.get_close_matches(name, present, 1)
            raise DataContractError(
                f"the column '{name}' is missing",
                where=where,
                remedy=(f"rename '{near[0]}' to '{name}'" if near else f"add '{name}'")
                + f" ({contract.schema.field(name).type}); columns present: {', '.join(present)}",
            )


def _require_one_clock(
    folder: SourceFolder, contract: TableContract, files: list[ParquetFile]
) -> None:
    """Refuse a table whose files mix times with and without a zone: the latter may be local."""
    for name in contract.schema.names:
        if contract.schema.field(name).type != TIMESTAMP:
            continue
        kinds = {f.name: f.schema.field(name).type for f in files if name in f.schema.names}
        naive = [n for n, kind in kinds.items() if pt.is_timestamp(kind) and kind.tz is None]
        zoned = [n for n, kind in kinds.items() if pt.is_timestamp(kind) and kind.tz is not None]
        if naive and zoned:
            raise DataContractError(
                f"the times have no zone here, and the zone {kinds[zoned[0]].tz} in {zoned[0]}",
                where=f"{folder.where(naive[0])} column '{name}'",
                remedy="write the times of all files with their zone",
            )


def _notes(
    folder: SourceFolder, contract: TableContract, files: list[ParquetFile], dropped: list[str]
) -> Iterator[str]:
    """What a person should know of columns that are left out, absent or assumed."""
    if dropped:
        yield f"{contract.name}: columns left out: {', '.join(dropped)}"
    for field in contract.schema:
        lacking = [file.name for file in files if field.name not in file.schema.names]
        if len(lacking) == len(files):
            if near := difflib.get_close_matches(field.name, dropped, 1, 0.8):
                yield (
                    f"{contract.name}: there is no '{field.name}', but '{near[0]}' is left out: if "
                    f"that is what it holds, rename it in {folder.where(files[0].name)}"
                )
        elif lacking and not (field.name == "date" and _dated(lacking)):
            yield (
                f"{contract.name}: column '{field.name}' is absent from {len(lacking)} of "
                f"{len(files)} files and null there, the first is {folder.where(lacking[0])}"
            )
        elif field.type == TIMESTAMP and any(
            pt.is_timestamp(kind := file.schema.field(field.name).type) and kind.tz is None
            for file in files
        ):
            yield f"{contract.name}: column '{field.name}' has no time zone and is taken as UTC"


def _dated(names: list[str]) -> bool:
    return all("/date=" in name for name in names)


def _extras(
    folder: SourceFolder, contract: TableContract, files: list[ParquetFile]
) -> tuple[list[pa.Field], list[str]]:
    """Categorical columns beyond the contract (users only), and the names of what is left out."""
    kinds: dict[str, pa.DataType | None] = {}
    floats: set[str] = set()
    for file in files:
        for field in file.schema:
            # Names with two underscores are bookkeeping of the writer (the index of pandas).
            if field.name in contract.schema.names or field.name.startswith("__"):
                continue
            kind = _categorical(field.type) if contract.name == "users" else None
            if kinds.setdefault(field.name, kind) != kind:
                raise DataContractError(
                    f"the column is {kind} here and {kinds[field.name]} in another file",
                    where=f"{folder.where(file.name)} column '{field.name}'",
                    remedy="write all files of a table with one schema",
                )
            if kind is not None and pt.is_floating(_plain_type(field.type)):
                floats.add(field.name)
    for name in floats:
        # The usual cause of a float category is an integer column with missing values in pandas.
        holding = [file.name for file in files if name in file.schema.names]
        batches = (b for n in holding for b in parquet_batches(folder, n, [name]))
        if not all(integral(batch.column(0)) for batch in batches):
            kinds[name] = None
    kept = [pa.field(name, kind) for name, kind in kinds.items() if kind is not None]
    return kept, [name for name, kind in kinds.items() if kind is None]


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pt.is_dictionary(kind) else kind


def _categorical(kind: pa.DataType) -> pa.DataType | None:
    kind = _plain_type(kind)
    if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind):
        return pa.string()
    if pt.is_boolean(kind):
        return pa.bool_()
    if pt.is_integer(kind) or pt.is_floating(kind):
        return pa.int64()
    return None


def _description(folder: SourceFolder) -> dict[str, Any]:
    """The content of ``source.json``, or of what stands for it where there is none."""
    if not folder.has(DESCRIPTION):
        return _checked({})
    with folder.reading(DESCRIPTION), folder.open_stream(DESCRIPTION) as file:
        text = bytes(file.read())
    try:
        return _checked(json.loads(text))
    # RecursionError: of brackets nested without end.
    except (ValueError, TypeError, RecursionError) as error:
        raise DataContractError(
            f"the description cannot be read: {error}",
            where=folder.where(DESCRIPTION),
            remedy="correct it, write it again with `reelflow data prepare`, or remove it",
        ) from error


def _checked(about: Any) -> dict[str, Any]:
    """The description with every key present.

    Raises:
        ValueError: a key is unknown, or a value is not what it should be.
    """
    about = _object("the description", about, DESCRIBED)
    split = _object("'split'", about.get("split", DEFAULT_SPLIT), DEFAULT_SPLIT)
    protocol = split.get("protocol")
    if protocol not in ("leave_one_out", "temporal"):
        raise ValueError(f"unknown split protocol {protocol!r}: leave_one_out or temporal")
    days = {key: split.get(key) for key in ("valid_from", "test_from")}
    for key, day in days.items():
        if day is None and protocol == "temporal":
            raise ValueError(f"a temporal split has no day '{key}'")
        datetime.date.fromisoformat(day or "1970-01-01")
    valid, test = days["valid_from"], days["test_from"]
    if valid and test and valid >= test:
        raise ValueError(
            f"the test period from {test} does not come after the validation period from {valid}"
        )
    unused = _object("'without_values'", about.get("without_values", {}), CONTRACTS)
    return {
        "citation": str(about.get("citation", CITATION)),
        "licence": str(about.get("licence", LICENCE)),
        "split": {"protocol": protocol, **days},
        "ground_truth": _object("'ground_truth'", about.get("ground_truth", {})),
        "without_values": {name: [str(c) for c in columns] for name, columns in unused.items()},
    }


def _object(what: str, value: Any, keys: Collection[str] = ()) -> dict[str, Any]:
    """``value``, which must be an object of these keys (of any, if there are none)."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!s:.60}, not an object")
    for key in value if keys else ():
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            raise ValueError(
                f"{what} has an unknown key {key!r:.60}"
                + (f": did you mean '{near[0]}'?" if near else f"; known are {', '.join(keys)}")
            )
    return value
