"""MovieLens: ``ratings.dat``, ``movies.dat`` and ``users.dat`` as published with ML-1M.

Cells are parted by ``::`` and text is Latin-1. Titles keep their year, genres become tags. The age
bracket and the occupation are codes and stay text.

Source of fields: Harper and Konstan, doi 10.1145/2827872, and the README of ML-1M.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from components.data.contracts import INTERACTIONS, ITEMS, TIMESTAMP, USERS
from components.data.readers.conform import (
    CORRECT,
    Column,
    Missing,
    absent,
    conformed,
    epoch_seconds,
    plan_column,
    raw_schema,
)
from components.data.readers.derive import derived_table
from components.data.readers.files import INTERACTION_ROWS, TEXT_ROWS, SourceFolder, rebatch
from components.data.readers.text import delimited_batches, estimated_rows
from components.data.source import Source, Stream
from components.pipeline.errors import DataContractError

NAME = "movielens"
NEEDS = "ratings.dat and movies.dat with users.dat if there is one, parted by '::' (ML-1M)"
CITATION = (
    "Harper and Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015, "
    "doi 10.1145/2827872"
)
LICENCE = "GroupLens terms of use: research, no redistribution without permission"
SPLIT = {"protocol": "leave_one_out", "valid_from": None, "test_from": None}

RATINGS = {
    "user_id": pa.int64(),
    "item_id": pa.int64(),
    "rating": pa.float32(),
    "timestamp": pa.int64(),
}
MOVIES = {"item_id": pa.int64(), "title": pa.string(), "genres": pa.string()}
PEOPLE = {
    "user_id": pa.int64(),
    "gender": pa.string(),
    "age": pa.string(),
    "occupation": pa.string(),
    "zip_code": pa.string(),
}
NO_GENRE = "(no genres listed)"


def recognise(folder: SourceFolder) -> bool:
    return folder.has("ratings.dat")


def read(folder: SourceFolder) -> Source:
    """Open the folder; see ``open_source`` for what is raised."""
    for name in ("ratings.dat", "movies.dat"):
        if not folder.has(name):
            raise DataContractError(
                f"{name} is missing", where=folder.uri, remedy=f"needed: {NEEDS}"
            )
    missing = Missing("interactions")
    tables: dict[str, Stream] = {
        "interactions": lambda: rebatch(
            missing.watch(lambda: _interactions(folder, missing)), INTERACTION_ROWS
        ),
        "items": lambda: rebatch(_items(folder), TEXT_ROWS),
    }
    rows = {
        "interactions": estimated_rows(folder, "ratings.dat"),
        "items": estimated_rows(folder, "movies.dat"),
    }
    notes: tuple[str, ...] = ()
    if folder.has("users.dat"):
        tables["users"] = lambda: rebatch(_cells(folder, "users.dat", PEOPLE), TEXT_ROWS)
        rows["users"] = estimated_rows(folder, "users.dat")
    else:
        tables["users"] = derived_table(USERS, lambda: _user_ids(folder))
        notes = ("users: no users.dat, ids are taken from the ratings",)
    return Source(
        format=NAME,
        uri=folder.uri,
        citation=CITATION,
        licence=LICENCE,
        split=SPLIT,
        tables=tables,
        rows=rows,
        notes=notes,
        findings=missing.notes,
    )


def _cells(
    folder: SourceFolder, name: str, types: dict[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    return delimited_batches(folder, name, types, separator=b"::", encoding="latin-1")


def _interactions(folder: SourceFolder, missing: Missing | None = None) -> Iterator[pa.RecordBatch]:
    schema = raw_schema(INTERACTIONS)
    columns = [_plan(field) for field in schema]
    batches = _cells(folder, "ratings.dat", RATINGS)
    where = folder.where("ratings.dat")
    return conformed(batches, columns, schema, where=where, missing=missing)


def _plan(field: pa.Field) -> Column:
    if field.name == "timestamp":
        return Column("timestamp", "timestamp", TIMESTAMP, epoch_seconds, CORRECT)
    if field.name in RATINGS:
        return plan_column(field.name, field.name, RATINGS[field.name], field.type)
    return absent(field.name, field.type)


def _items(folder: SourceFolder) -> Iterator[pa.RecordBatch]:
    schema = raw_schema(ITEMS)
    for batch in _cells(folder, "movies.dat", MOVIES):
        genres = batch["genres"]
        named = pc.if_else(pc.equal(genres, NO_GENRE), pa.scalar(None, pa.string()), genres)
        values = {name: batch[name] for name in ("item_id", "title")}
        values["tags"] = pc.split_pattern(named, "|")
        yield pa.RecordBatch.from_arrays(
            [values.get(f.name, pa.nulls(len(batch), f.type)) for f in schema], schema=schema
        )


def _user_ids(folder: SourceFolder) -> Iterator[pa.Array]:
    for batch in _interactions(folder):
        yield batch["user_id"]
