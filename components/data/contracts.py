"""Table contracts: the Arrow schema of every table that crosses a border of the platform.

A contract says names, types and nullability. Rules on *values* (ranges, uniqueness,
references) live in ``components.data.expectations``.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

TIMESTAMP = pa.timestamp("ms", tz="UTC")


@dataclass(frozen=True)
class TableContract:
    """The contract of one table.

    Attributes:
        name: table name; a folder of tables has ``<name>.parquet`` or ``<name>/*.parquet``.
        schema: Arrow schema; a field with ``nullable=False`` must be present and hold no null,
            a nullable field may be missing and is then filled with nulls.
        key: columns that identify a row (empty: rows have no key).
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.schema if not f.nullable)


def _schema(*fields: tuple[str, pa.DataType, bool]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=nullable) for name, kind, nullable in fields])


INTERACTIONS = TableContract(
    "interactions",
    _schema(
        ("user_id", pa.int64(), False),
        ("item_id", pa.int64(), False),
        ("timestamp", TIMESTAMP, False),
        # The source's business day. Logs may file an event near midnight under another day than
        # its timestamp says; a split by day must then follow the log (KuaiRand does so).
        ("date", pa.date32(), True),
        ("watch_time_s", pa.float32(), True),
        ("duration_s", pa.float32(), True),
        ("click", pa.bool_(), True),
        ("long_view", pa.bool_(), True),
        ("like", pa.bool_(), True),
        ("follow", pa.bool_(), True),
        ("forward", pa.bool_(), True),
        ("comment", pa.bool_(), True),
        ("profile_enter", pa.bool_(), True),
        ("dislike", pa.bool_(), True),
        ("rating", pa.float32(), True),
    ),
)

ITEMS = TableContract(
    "items",
    _schema(
        ("item_id", pa.int64(), False),
        ("title", pa.string(), True),
        ("caption", pa.string(), True),
        ("tags", pa.list_(pa.string()), True),
        ("author_id", pa.int64(), True),
        ("duration_s", pa.float32(), True),
        ("video", pa.string(), True),
        ("image", pa.string(), True),
    ),
    key=("item_id",),
)

#: ``users`` carries any further column as a categorical feature (string, integer or bool).
USERS = TableContract("users", _schema(("user_id", pa.int64(), False)), key=("user_id",))

CONTRACTS: dict[str, TableContract] = {c.name: c for c in (INTERACTIONS, ITEMS, USERS)}

#: Feedback columns in the order of the bits of ``feedback`` in sequence tables.
FEEDBACK = (
    "click",
    "long_view",
    "like",
    "follow",
    "forward",
    "comment",
    "profile_enter",
    "dislike",
)
