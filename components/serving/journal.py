"""Items that came after the model: a small table in the home of the service, one row an item.

It is written whole, beside the old one, and put in its place in one step, so a reader or a killed
writer never sees half of it. Replicas and restarts read the same file; who changes it holds a lock.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.pipeline.errors import CorruptArtifactError
from components.pipeline.storage import exclusive

#: ``version`` is that of the semantic ids' quantiser: codes of others have nothing in common.
SCHEMA = pa.schema(
    [
        ("item_id", pa.int64()),
        ("withdrawn", pa.bool_()),
        ("semantic_id", pa.list_(pa.int32())),
        ("version", pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("title", pa.string()),
        ("caption", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("author_id", pa.int64()),
        ("duration_s", pa.float32()),
    ]
)
#: What an encoder of new items reads: columns of the contract ``items``.
CONTENT = ("title", "caption", "tags", "author_id", "duration_s")

Rows = dict[int, dict[str, object]]


class Journal:
    """The table at ``folder/items.parquet``."""

    def __init__(self, folder: Path) -> None:
        self.file, self._lock = folder / "items.parquet", folder / "items.lock"
        folder.mkdir(parents=True, exist_ok=True)

    def stamp(self) -> tuple[int, int, int] | None:
        """Changes whenever the table does; None while there is none."""
        try:
            found = self.file.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def read(self) -> Rows:
        """Its rows by item id; embeddings are arrays of float32.

        Raises:
            CorruptArtifactError: it is no such table.
        """
        try:
            # Of one opened file: by its path, the reader would open it twice, and between the two
            # another process may put a new one in its place.
            table = pq.read_table(pa.BufferReader(self.file.read_bytes()))
        except FileNotFoundError:
            return {}
        except (OSError, pa.ArrowException) as error:
            raise self.corrupt(str(error)) from error
        if not table.schema.equals(SCHEMA):
            raise self.corrupt("it has other columns")
        return _rows(table)

    def change(self, edit: Callable[[Rows], None]) -> Rows:
        """Apply ``edit`` to the rows; other processes that change them take turns."""
        with exclusive(self._lock):
            rows = self.read()
            edit(rows)
            new = self.file.with_suffix(".new")
            pq.write_table(pa.Table.from_pylist(list(rows.values()), schema=SCHEMA), new)
            new.replace(self.file)
            return rows

    def corrupt(self, what: str) -> CorruptArtifactError:
        """The error that says what is wrong with the table."""
        return CorruptArtifactError(
            f"the table of new items cannot be read: {what}",
            where=str(self.file),
            remedy="move it away and post the items again",
        )


def _rows(table: pa.Table) -> Rows:
    # Made into numbers of Python, embeddings would hold up the requests of the same process.
    column = table["embedding"].combine_chunks()
    length_M = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    values, told_M = column.flatten().to_numpy(zero_copy_only=False), column.is_valid()
    rows = table.drop_columns(["embedding"]).to_pylist()
    places = zip(length_M, np.cumsum(length_M), told_M.to_pylist(), strict=True)
    for row, (length, end, is_told) in zip(rows, places, strict=True):
        row["embedding"] = values[end - length : end] if is_told else None
    return {row["item_id"]: row for row in rows}
