"""Items and users that a source does not list: the distinct ids of its interactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.data.contracts import TableContract
from components.data.readers.conform import raw_schema
from components.data.readers.files import INTERACTION_ROWS

#: Ids kept before they are merged: few sorts, 32 MiB.
MERGE_AT = 4_000_000


def derived_table(
    contract: TableContract, ids: Callable[[], Iterator[pa.Array]]
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """A stream of one row for each distinct id, ascending, all other columns null.

    Args:
        ids: the id column of the interactions, read from its start; nulls are passed over.
    """
    key = contract.key[0]
    schema = raw_schema(contract)

    def stream() -> Iterator[pa.RecordBatch]:
        known = distinct(ids())
        for start in range(0, len(known), INTERACTION_ROWS):
            values = pa.array(known[start : start + INTERACTION_ROWS])
            yield pa.RecordBatch.from_arrays(
                [values if f.name == key else pa.nulls(len(values), f.type) for f in schema],
                schema=schema,
            )

    return stream


def distinct(arrays: Iterator[pa.Array]) -> np.ndarray:
    """Distinct values of int64 arrays, ascending; memory grows with them, not with the rows."""
    known = np.empty(0, np.int64)
    pending: list[np.ndarray] = []
    count = 0
    for array in arrays:
        # Hashing a batch first leaves little to sort: ids repeat.
        values = pc.drop_null(pc.unique(array)).to_numpy()
        pending.append(values)
        count += len(values)
        if count > max(MERGE_AT, len(known)):
            known, pending, count = np.unique(np.concatenate([known, *pending])), [], 0
    return np.unique(np.concatenate([known, *pending]))
