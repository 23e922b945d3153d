"""Amazon reviews: a re-encoding as sequences (parquet), or the published JSON lines.

* ``sequences.parquet`` (a user's items, oldest first) with ``items.parquet``. A sequence has no
  times: its k-th item gets 2000-01-01 plus k days, an order and not a clock.
* Reviews of 2014 or 2018 (``reviews_*.json.gz``, ``*_5.json.gz``) with ``meta_*.json.gz``. Users
  and products have text ids: they are numbered 0, 1, … in the order of their text, so that the same
  reviews give the same numbers. Products without a review are left out; of a product that is
  listed twice the first entry with a title counts.

Nothing is known of clicks or likes: a review is the event, ``rating`` its stars. The description
becomes ``caption``; tags are the parts of the category path and ``brand:<name>``.

Source of fields: Ni, Li and McAuley, EMNLP 2019, and McAuley et al., arXiv 1506.04757.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from components.data.contracts import INTERACTIONS, ITEMS, TIMESTAMP, USERS
from components.data.readers.amazon_reviews import Reviews
from components.data.readers.conform import (
    CORRECT,
    Column,
    Missing,
    conformed,
    plan_column,
    raw_schema,
)
from components.data.readers.derive import derived_table
from components.data.readers.files import INTERACTION_ROWS, TEXT_ROWS, SourceFolder, rebatch
from components.data.readers.parquet import parquet_batches, parquet_footer
from components.data.readers.text import estimated_rows
from components.data.source import Source, Stream
from components.pipeline.errors import DataContractError

NAME = "amazon"
NEEDS = (
    "sequences.parquet and items.parquet; or reviews as JSON lines (reviews_*.json, *_5.json, "
    "also .gz) with meta_*.json if there is one"
)
CITATION = (
    "Ni, Li and McAuley, Justifying Recommendations using Distantly-Labeled Reviews and "
    "Fine-Grained Aspects, EMNLP 2019"
)
LICENCE = "no explicit licence: offered for research"
SPLIT = {"protocol": "leave_one_out", "valid_from": None, "test_from": None}

FIRST_DAY = np.datetime64("2000-01-01", "ms").astype(np.int64)
DAY_MS = 86_400_000

JSON_LINES = re.compile(r"(?P<stem>[^/]+)\.jsonl?(\.gz)?")


def recognise(folder: SourceFolder) -> bool:
    return folder.has("sequences.parquet", "items.parquet") or bool(_review_files(folder)[0])


def read(folder: SourceFolder) -> Source:
    """Open the folder; see ``open_source`` for what is raised."""
    notes: tuple[str, ...] = ()
    watched = [Missing("items")]
    if folder.has("sequences.parquet", "items.parquet"):
        tables, rows = _open_sequences(folder, watched[0])
        notes = ("interactions: times keep the order of a sequence only",)
    else:
        reviews, metas = _review_files(folder)
        if not reviews:
            raise DataContractError(
                f"there are no reviews here: {folder.listing()}",
                where=folder.uri,
                remedy=f"needed: {NEEDS}",
            )
        data = Reviews(folder, reviews, metas)
        watched = [data.missing]
        tables = {"interactions": data.interactions, "items": data.items, "users": data.users}
        rows = {"interactions": sum(estimated_rows(folder, name) for name in reviews)}
        if not metas:
            notes = ("items: no meta_*.json, items have neither title nor category",)
    return Source(
        format=NAME,
        uri=folder.uri,
        citation=CITATION,
        licence=LICENCE,
        split=SPLIT,
        tables=tables,
        rows=rows,
        notes=notes,
        findings=lambda: tuple(note for table in watched for note in table.notes()),
    )


def _review_files(folder: SourceFolder) -> tuple[list[str], list[str]]:
    """Names of review files and of product files."""
    stems = {name: match["stem"] for name in folder.sizes if (match := JSON_LINES.fullmatch(name))}
    metas = [name for name, stem in stems.items() if stem.startswith("meta_")]
    reviews = [
        name
        for name, stem in stems.items()
        if name not in metas and (stem.startswith("reviews_") or stem.endswith("_5"))
    ]
    return reviews, metas


def _open_sequences(
    folder: SourceFolder, missing: Missing
) -> tuple[dict[str, Stream], dict[str, int]]:
    sequences = parquet_footer(folder, "sequences.parquet", ("user_id", "item_ids"))
    items = parquet_footer(folder, "items.parquet", ("item_id", "title"))
    kind = sequences.schema.field("item_ids").type
    if not (pt.is_list(kind) and pt.is_integer(kind.value_type)):
        raise DataContractError(
            f"the column is {kind}",
            where=f"{folder.where(sequences.name)} column 'item_ids'",
            remedy="write it as lists of item ids (list<int32>), oldest first",
        )
    columns = [
        plan_column("user_id", "user_id", sequences.schema.field("user_id").type, pa.int64()),
        plan_column("item_ids", "item_ids", kind, kind),
    ]

    def interactions() -> Iterator[pa.RecordBatch]:
        return rebatch(_events(folder, sequences.name, columns), INTERACTION_ROWS)

    def user_ids() -> Iterator[pa.Array]:
        for batch in _sequences(folder, sequences.name, columns[:1]):
            yield batch["user_id"]

    tables: dict[str, Stream] = {
        "interactions": interactions,
        "items": lambda: rebatch(
            missing.watch(lambda: _items(folder, items.name, items.schema, missing)), TEXT_ROWS
        ),
        "users": derived_table(USERS, user_ids),
    }
    rows = {
        "interactions": sequences.values["item_ids"],
        "items": items.rows,
        "users": sequences.rows,
    }
    return tables, rows


def _sequences(folder: SourceFolder, name: str, columns: list[Column]) -> Iterator[pa.RecordBatch]:
    schema = pa.schema([(column.name, column.type) for column in columns])
    batches = parquet_batches(folder, name, schema.names, TEXT_ROWS)
    return conformed(batches, columns, schema, where=folder.where(name))


def _events(folder: SourceFolder, name: str, columns: list[Column]) -> Iterator[pa.RecordBatch]:
    schema = raw_schema(INTERACTIONS)
    for batch in _sequences(folder, name, columns):
        length = pc.list_value_length(batch["item_ids"]).fill_null(0).to_numpy()
        row = np.repeat(np.arange(batch.num_rows), length)
        position = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        values: dict[str, pa.Array] = {
            "user_id": batch["user_id"].take(pa.array(row)),
            "item_id": pc.cast(batch["item_ids"].flatten(), pa.int64()),
            "timestamp": pa.array(FIRST_DAY + DAY_MS * position).cast(TIMESTAMP),
        }
        yield pa.RecordBatch.from_arrays(
            [values.get(f.name, pa.nulls(len(row), f.type)) for f in schema], schema=schema
        )


def _items(
    folder: SourceFolder, name: str, kinds: pa.Schema, missing: Missing
) -> Iterator[pa.RecordBatch]:
    text = [c for c in ("title", "description", "brand", "categories") if c in kinds.names]
    columns = [
        plan_column("item_id", "item_id", kinds.field("item_id").type, pa.int64()),
        *(Column(c, c, pa.string(), _text, CORRECT) for c in text),
    ]
    schema = pa.schema([(column.name, column.type) for column in columns])
    batches = parquet_batches(folder, name, schema.names, TEXT_ROWS)
    target = raw_schema(ITEMS)
    for batch in conformed(batches, columns, schema, where=folder.where(name), missing=missing):
        known = dict(zip(schema.names, batch.columns, strict=True))
        nothing = pa.nulls(len(batch), pa.string())
        values = {
            "item_id": known["item_id"],
            "title": known["title"],
            "caption": known.get("description", nothing),
            "tags": _tags(known.get("categories", nothing), known.get("brand", nothing)),
        }
        yield pa.RecordBatch.from_arrays(
            [values.get(f.name, pa.nulls(len(batch), f.type)) for f in target], schema=target
        )


def _text(values: pa.Array) -> pa.Array:
    """Trimmed text, null where there is none."""
    trimmed = pc.utf8_trim_whitespace(pc.cast(values, pa.string()))
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)


def _tags(categories: pa.Array, brands: pa.Array) -> pa.Array:
    """Parts of the category path, then ``brand:<name>``; null where neither is known.

    A comma parts two categories, a comma with a space belongs to a name ("Tubing, Pipe & Hose").
    """
    kept = pc.replace_substring(categories, ", ", "\x1e ")
    parted = pc.replace_substring(pc.replace_substring(kept, ",", "\x1f"), "\x1e", ",")
    brand = pc.binary_join_element_wise("brand:", brands, "")
    # null_handling="skip" would be shorter, but Arrow 25 then drops rows where both are null.
    both = pc.binary_join_element_wise(
        parted, brand, "\x1f", null_handling="replace", null_replacement=""
    )
    joined = pc.utf8_trim(both, "\x1f")
    none = pc.equal(joined, "")
    return pc.split_pattern(pc.if_else(none, pa.scalar(None, pa.string()), joined), "\x1f")
