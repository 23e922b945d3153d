"""Visual features of items, as a visual stage writes them: a table of items and their vectors.

Columns: ``item_id`` (int64) and ``embedding``, either one vector an item (list of floats) or some,
one a frame or patch (list of lists of floats). All vectors have one width.

Shapes: V vectors, v their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.pipeline.errors import DataContractError, ParamsError

REMEDY = "write a parquet file with the columns item_id (int64) and embedding (lists of floats)"


@dataclass(frozen=True)
class VisualFeatures:
    """Vectors of items.

    Attributes:
        where: the file.
        item_id_V: int64, the item of each vector; vectors of an item follow each other.
        place_V: int64, the how-manieth vector of its item each is.
        vector_Vv: float32.
    """

    where: str
    item_id_V: npt.NDArray[np.int64]
    place_V: npt.NDArray[np.int64]
    vector_Vv: npt.NDArray[np.float32]

    def require_width(self, width: int) -> None:
        """Refuse vectors that are not those an encoder was fitted on.

        Raises:
            DataContractError: they have another width.
        """
        if len(self.vector_Vv) and self.vector_Vv.shape[1] != width:
            raise DataContractError(
                f"vectors of width {self.vector_Vv.shape[1]}, but the item encoder knows {width}",
                where=f"{self.where} column 'embedding'",
                remedy="use the visual model that item_features was run with, or run it again",
            )

    def of_items(
        self, item_id: pa.ChunkedArray, vectors: int
    ) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray[np.float32]]:
        """Row in ``item_id``, place and vector of the first ``vectors`` vectors of these items."""
        row = pc.fill_null(pc.index_in(pa.array(self.item_id_V), item_id.combine_chunks()), -1)
        row_V = row.to_numpy()
        kept = (row_V >= 0) & (self.place_V < vectors)
        return row_V[kept], self.place_V[kept], self.vector_Vv[kept]


def digest(path: str) -> str:
    """Digest of the file.

    Raises:
        ParamsError: there is no such file.
    """
    from components.pipeline.manifest import digest_file

    return digest_file(_file(path))


def read(path: str) -> VisualFeatures:
    """Read and check a table of visual features.

    Raises:
        ParamsError: there is no such file.
        DataContractError: it is no such table; the message names the row and the column.
    """
    import pyarrow.parquet as pq

    file = _file(path)
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataContractError("no readable parquet file", where=path, remedy=REMEDY) from error
    return features(table, path)


def features(table: pa.Table, where: str) -> VisualFeatures:
    """Visual features of a table in memory; ``where`` names it in errors."""
    for name in ("item_id", "embedding"):
        if name not in table.schema.names:
            raise DataContractError(
                f"the table of visual features has no column '{name}'", where=where, remedy=REMEDY
            )
    ids = table["item_id"].combine_chunks()
    if not pa.types.is_integer(ids.type):
        raise _refused(f"item ids are {ids.type}, not int64", where, "item_id")
    try:
        ids = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        large = pc.index(pc.greater(ids, pa.scalar(2**63 - 1, ids.type)), True).as_py()
        raise _refused(f"item id {ids[large]} is no int64", where, "item_id", large) from None
    column = table["embedding"].combine_chunks()
    for name, values in (("item_id", ids), ("embedding", column)):
        if values.null_count:
            raise _refused("a null", where, name, pc.index(pc.is_null(values), True).as_py())
    id_N = ids.to_numpy()
    _, first, count = np.unique(id_N, return_index=True, return_counts=True)
    if (count > 1).any():
        twice = int(id_N[first[count > 1].min()])
        row = int(np.flatnonzero(id_N == twice)[1])
        raise _refused(f"item {twice} is there twice", where, "item_id", row)
    if not _is_list(column.type):
        raise _refused(f"{column.type} is no list of floats", where, "embedding")
    per_item = np.ones(len(column), np.int64)
    vectors = column
    if _is_list(column.type.value_type):
        per_item = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
        vectors = column.flatten()
    if not pa.types.is_floating(vectors.type.value_type):
        raise _refused(f"{column.type} is no list of floats", where, "embedding")
    row_V = np.repeat(np.arange(len(column)), per_item)
    if vectors.null_count:
        broken = int(row_V[pc.index(pc.is_null(vectors), True).as_py()])
        raise _refused("a vector is null", where, "embedding", broken)
    length_V = pc.list_value_length(vectors).to_numpy(zero_copy_only=False).astype(np.int64)
    width = int(length_V[0]) if len(length_V) else 0
    if (length_V != width).any() or (len(length_V) and width == 0):
        odd = int(np.argmax((length_V != width) | (length_V == 0)))
        raise _refused(
            f"a vector of {length_V[odd]} numbers, where the first has {width}",
            where,
            "embedding",
            int(row_V[odd]),
        )
    flat = vectors.flatten()
    vector_Vv = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, max(1, width))
    if not np.isfinite(vector_Vv).all():
        odd = int(np.argmin(np.isfinite(vector_Vv).all(1)))
        raise _refused("a number is not finite", where, "embedding", int(row_V[odd]))
    start_N = np.cumsum(per_item) - per_item
    return VisualFeatures(where, id_N[row_V], np.arange(len(row_V)) - start_N[row_V], vector_Vv)


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _refused(what: str, where: str, column: str, row: int | None = None) -> DataContractError:
    at = "" if row is None else f" row {row}"
    return DataContractError(what, where=f"{where}{at} column '{column}'", remedy=REMEDY)


def _file(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ParamsError(
            f"there is no file '{path}'",
            where="params.yaml item_features.visual",
            remedy="give the parquet file of a visual stage, or null for none",
        )
    return file
