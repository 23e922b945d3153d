"""Published Amazon reviews and product data (2014, 2018): JSON lines with text ids.

Reviews are read by Arrow, twice: once for the ids, once for the events. Memory grows with the
numbers of users and products, not with the reviews.
"""

from __future__ import annotations

import ast
import html
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

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
from components.data.readers.files import INTERACTION_ROWS, TEXT_ROWS, SourceFolder, rebatch
from components.data.readers.text import json_batches, json_lines
from components.pipeline.errors import DataContractError

KEYS = {
    "reviewerID": pa.string(),
    "asin": pa.string(),
    "overall": pa.float64(),
    "unixReviewTime": pa.int64(),
}
#: What writers put where there is no id, in lower case.
NO_ID = ("", "nan", "null", "none")
#: Ids kept before they are merged.
MERGE_AT = 1_000_000


class Reviews:
    """Tables of review files.

    Args:
        reviews: names of files with ``reviewerID, asin, overall, unixReviewTime`` in each line.
        metas: names of files with ``asin`` and any of ``title, description, brand`` and
            ``category`` (2018) or ``categories`` (2014).

    Raises:
        DataContractError: the first review lacks one of its keys.
    """

    def __init__(self, folder: SourceFolder, reviews: list[str], metas: list[str]) -> None:
        self._folder = folder
        self._reviews = reviews
        self._metas = metas
        self.missing = Missing("interactions")
        for name in reviews:
            number, line = next(json_lines(folder, name), (1, "{}"))
            record = _parse(folder, name, number, line)
            for key in KEYS:
                if key not in record:
                    raise DataContractError(
                        f"the key '{key}' is missing",
                        where=f"{folder.where(name)} line {number}",
                        remedy=f"a review has {', '.join(KEYS)}; keys present: "
                        + (", ".join(record) or "none"),
                    )

    def interactions(self) -> Iterator[pa.RecordBatch]:
        return self.missing.watch(self._events)

    def _events(self) -> Iterator[pa.RecordBatch]:
        names = ("reviewerID", "asin")
        columns = [_COLUMNS.get(f.name, absent(f.name, f.type)) for f in raw_schema(INTERACTIONS)]
        for name in self._reviews:
            batches = json_batches(self._folder, name, KEYS)
            row = 0
            # Numbering a batch costs a look at all ids: few large batches make it cheap.
            for batch in rebatch(batches, INTERACTION_ROWS):
                for column in names:
                    what = "blank or stand for nothing (nan, null, None)"
                    where = self._folder.where(name)
                    self.missing.count(column, _is_no_id(batch[column]), where, row, what)
                numbers = [
                    pc.cast(pc.index_in(batch[c], value_set=ids), pa.int64())
                    for c, ids in zip(names, self._ids, strict=True)
                ]
                numbered = pa.RecordBatch.from_arrays(
                    [*numbers, batch["overall"], batch["unixReviewTime"]], names=list(KEYS)
                )
                yield from conformed(
                    iter([numbered]),
                    columns,
                    raw_schema(INTERACTIONS),
                    where=self._folder.where(name),
                    first_row=row,
                    missing=self.missing,
                )
                row += len(batch)

    def users(self) -> Iterator[pa.RecordBatch]:
        count = len(self._ids[0])
        for start in range(0, count, INTERACTION_ROWS):
            ids = pa.array(range(start, min(start + INTERACTION_ROWS, count)), pa.int64())
            yield pa.RecordBatch.from_arrays([ids], schema=raw_schema(USERS))

    def items(self) -> Iterator[pa.RecordBatch]:
        return _batches(self._products())

    @cached_property
    def _ids(self) -> tuple[pa.Array, pa.Array]:
        """Ids of users and of products, each sorted; the position is the number."""
        users, products = _Distinct(), _Distinct()
        for name in self._reviews:
            for batch in json_batches(self._folder, name, KEYS):
                users.add(batch["reviewerID"])
                products.add(batch["asin"])
        return users.sorted(), products.sorted()

    def _products(self) -> Iterator[dict[str, Any]]:
        """One record for each reviewed product, those with a title in the order of the files."""
        number = {asin: i for i, asin in enumerate(self._ids[1].to_pylist())}
        untitled: dict[int, dict[str, Any]] = {}
        done = bytearray(len(number))
        for name in self._metas:
            for line_number, line in json_lines(self._folder, name):
                record = _parse(self._folder, name, line_number, line)
                asin = record.get("asin")
                if not isinstance(asin, str | None):
                    raise DataContractError(
                        f"the key 'asin' is {str(asin)[:80]}, not text",
                        where=f"{self._folder.where(name)} line {line_number}",
                        remedy="correct or remove the line",
                    )
                item_id = number.get(asin)
                if item_id is None or done[item_id]:
                    continue
                product = _product(item_id, record)
                _require_text(product, f"{self._folder.where(name)} line {line_number}")
                if product["title"] is None:
                    untitled.setdefault(item_id, product)
                    continue
                done[item_id] = True
                yield product
        for item_id in range(len(number)):
            if not done[item_id]:
                yield untitled.get(item_id, {"item_id": item_id})


_COLUMNS = {
    "user_id": plan_column("user_id", "reviewerID", pa.int64(), pa.int64()),
    "item_id": plan_column("item_id", "asin", pa.int64(), pa.int64()),
    "timestamp": Column("timestamp", "unixReviewTime", TIMESTAMP, epoch_seconds, CORRECT),
    "rating": plan_column("rating", "overall", pa.float64(), pa.float32()),
}


class _Distinct:
    """Distinct texts of arrays; memory grows with them, not with the rows."""

    def __init__(self) -> None:
        self._known = pa.array([], pa.string())
        self._pending: list[pa.Array] = []
        self._count = 0

    def add(self, values: pa.Array) -> None:
        distinct = pc.drop_null(pc.unique(values))
        distinct = distinct.filter(pc.invert(_is_no_id(distinct)))
        self._pending.append(distinct)
        self._count += len(distinct)
        if self._count > max(MERGE_AT, len(self._known)):
            self._merge()

    def _merge(self) -> None:
        self._known = pc.unique(pa.concat_arrays([self._known, *self._pending]))
        self._pending, self._count = [], 0

    def sorted(self) -> pa.Array:
        self._merge()
        return self._known.take(pc.sort_indices(self._known))


def _is_no_id(values: pa.Array) -> pa.Array:
    plain = pc.utf8_lower(pc.utf8_trim_whitespace(values))
    return pc.is_in(plain, value_set=pa.array(NO_ID))


def _parse(folder: SourceFolder, name: str, number: int, line: str) -> dict[str, Any]:
    """One line: strict JSON, or the literal of a dictionary (product data of 2014)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            record = None
    if not isinstance(record, dict):
        raise DataContractError(
            f"the line is not a JSON object: {line[:80]}",
            where=f"{folder.where(name)} line {number}",
            remedy="correct or remove the line",
        )
    return record


def _product(item_id: int, record: dict[str, Any]) -> dict[str, Any]:
    path = record.get("category") or record.get("categories") or []
    tags = list(dict.fromkeys(_strings(path)))
    brand = _joined(record.get("brand"))
    if brand is not None:
        tags.append(f"brand:{brand}")
    return {
        "item_id": item_id,
        "title": _joined(record.get("title")),
        "caption": _joined(record.get("description")),
        "tags": tags or None,
    }


def _require_text(product: dict[str, Any], where: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can escape and no text can hold."""
    for key in ("title", "caption", "tags"):
        try:
            "".join(product[key] or "").encode()
        except UnicodeEncodeError as error:
            raise DataContractError(
                f"the text of '{key}' holds half a surrogate pair: {error.object!r:.60}",
                where=where,
                remedy="write the character whole, or remove it",
            ) from error


def _strings(value: Any) -> Iterator[str]:
    """Texts of a value that is one, a list, or a list of lists, without entities or blank ends."""
    if isinstance(value, str):
        if text := html.unescape(value).strip():
            yield text
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _joined(value: Any) -> str | None:
    return " ".join(_strings(value)) or None


def _batches(records: Iterator[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    schema = raw_schema(ITEMS)
    kept: list[dict[str, Any]] = []
    for record in records:
        kept.append(record)
        if len(kept) == TEXT_ROWS:
            yield pa.RecordBatch.from_pylist(kept, schema=schema)
            kept = []
    if kept:
        yield pa.RecordBatch.from_pylist(kept, schema=schema)
