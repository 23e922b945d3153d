"""The quarantine: rows that break a rule, with the reason and the row itself as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.pipeline.rules import Suite, python_time

QUARANTINE = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("record", pa.string(), nullable=False),
    ]
)


def quarantine_lines(
    suite: Suite,
    chunk: pa.RecordBatch,
    masks: Sequence[np.ndarray],
    sent_off: np.ndarray,
    first_row: int,
) -> pa.RecordBatch:
    """One line of quarantine for each row that is sent off.

    Args:
        masks: bool [rows] of each row rule: which rows break it.
        sent_off: bool [rows]: which rows break a critical rule.
        first_row: number of the chunk's first row in the table.

    Returns:
        Schema :data:`QUARANTINE`: the row's number, the first critical rule it breaks, the
        reasons of all of them, and the row as JSON.
    """
    at = np.flatnonzero(sent_off)
    critical = [(r, m) for r, m in zip(suite.row_rules, masks) if r.severity == "critical"]
    # Few combinations of rules occur: texts are made once for each and then looked up.
    pattern = np.stack([mask[at] for _, mask in critical], axis=1)
    combinations, which = np.unique(pattern, axis=0, return_inverse=True)
    broken = [[r for (r, _), hit in zip(critical, row) if hit] for row in combinations]
    which = pa.array(which.reshape(-1))
    return pa.RecordBatch.from_arrays(
        [
            pa.repeat(suite.table, len(at)),
            pa.array(at + first_row),
            pa.array([rules[0].name for rules in broken]).take(which),
            pa.array(["; ".join(r.reason for r in rules) for rules in broken]).take(which),
            records(chunk.take(pa.array(at))),
        ],
        schema=QUARANTINE,
    )


def records(batch: pa.RecordBatch) -> pa.Array:
    """Each row as one JSON object (string [rows]).

    NaN and infinities are strings; a moment outside the years 1 to 9999 is the number it is
    stored as.
    """
    parts: list[Any] = []
    for name, column in zip(batch.schema.names, batch.columns):
        opening = ", " if parts else "{"
        parts += [opening + json.dumps(name, ensure_ascii=False) + ": ", _json_values(column)]
    return pc.binary_join_element_wise(*parts, pa.scalar("}"), "")


def _json_values(column: pa.Array) -> pa.Array:
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        texts = column.cast(pa.string())
    elif pa.types.is_floating(kind):
        texts = column.cast(pa.string())
        texts = pc.if_else(pc.is_finite(column), texts, _quoted(texts))
    elif pa.types.is_date(kind):
        texts = _quoted(column.cast(pa.string()))
    elif pa.types.is_timestamp(kind):
        texts = _quoted(pc.strftime(column, format="%Y-%m-%dT%H:%M:%SZ"))
        # Arrow counts years in 16 bits and would name another one.
        first, last = python_time(kind)
        named = pc.and_(pc.greater_equal(column, first), pc.less_equal(column, last))
        texts = pc.if_else(named, texts, column.cast(pa.int64()).cast(pa.string()))
    else:
        values = (json.dumps(v, ensure_ascii=False, default=str) for v in column.to_pylist())
        texts = pa.array(values, pa.string(), size=len(column))
    return texts.fill_null("null")


def _quoted(texts: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise('"', texts, '"', "")
