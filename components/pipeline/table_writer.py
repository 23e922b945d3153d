"""A streaming parquet writer whose row groups do not depend on the sizes of the pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROW_GROUP = 256 * 1024
ROW_GROUP_BYTES = 64 * 1024**2


def encoding(schema: pa.Schema) -> dict[str, Any]:
    """How every table is written: zstd, and dictionaries where values repeat.

    Numbers with fractions and moments hardly do: a dictionary of them is built, found too large and
    thrown away again, in half of the time that writing takes.
    """
    return {"compression": "zstd", "use_dictionary": [*_repeating(schema)]}


def _repeating(schema: pa.Schema) -> Iterator[str]:
    """Paths of the leaf columns that a dictionary suits."""
    import pyarrow.types as types

    def leaves(path: str, kind: pa.DataType) -> Iterator[str]:
        if types.is_list(kind) or types.is_large_list(kind):
            yield from leaves(f"{path}.list.element", kind.value_type)
        elif types.is_struct(kind):
            for field in kind:
                yield from leaves(f"{path}.{field.name}", field.type)
        elif not (types.is_floating(kind) or types.is_timestamp(kind) or types.is_boolean(kind)):
            yield path

    for field in schema:
        yield from leaves(field.name, field.type)


class TableWriter:
    """Gathers what is written into full row groups, however small the pieces."""

    def __init__(self, file: pq.ParquetWriter) -> None:
        self._file = file
        self._waiting: list[pa.Table] = []
        self._rows = self._bytes = 0

    def write_batch(self, batch: pa.RecordBatch) -> None:
        import pyarrow as pa

        self.write_table(pa.Table.from_batches([batch]))

    def write_table(self, table: pa.Table) -> None:
        if not table.schema.equals(self._file.schema):
            raise ValueError(
                f"the table has the columns\n{table.schema.to_string()}\n"
                f"the file was opened for\n{self._file.schema.to_string()}"
            )
        self._keep(table)
        if self._rows >= ROW_GROUP or self._bytes >= ROW_GROUP_BYTES:
            gathered = self._gathered()
            # Rows of many bytes are written before they fill a row group or the memory.
            whole = gathered.num_rows - gathered.num_rows % ROW_GROUP or gathered.num_rows
            self._file.write_table(gathered.slice(0, whole), row_group_size=ROW_GROUP)
            self._keep(gathered.slice(whole))

    def flush(self) -> None:
        """Write what is left."""
        if self._rows:
            self._file.write_table(self._gathered())

    def _keep(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes

    def _gathered(self) -> pa.Table:
        import pyarrow as pa

        gathered = pa.concat_tables(self._waiting)
        self._waiting, self._rows, self._bytes = [], 0, 0
        return gathered
