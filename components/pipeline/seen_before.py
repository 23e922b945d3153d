"""Which rows of a table repeat an earlier row, in constant memory.

Rows are hashed to 64 bits and the (hash, row number) pairs go to buckets on disk by the hash's
top bits; equal rows meet in one bucket, and buckets are looked at one at a time. The cost is
16 bytes of disk a row, and two bits of memory a row for the answer (25 MB at 1e8 rows).

The trade: rows are told apart by their hash alone, which spares keeping or re-reading them. The
chance that any two different rows of n share one is n²/2⁶⁵: 3e-6 at 1e7 rows, 3e-4 at 1e8. For a
single integer column the hash is one-to-one, so identifiers are compared exactly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

BUCKET_BITS = 6
_WIDTHS = {1: pa.uint8(), 8: pa.uint8(), 16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}
_PAIR = np.dtype([("hash", np.uint64), ("row", np.int64)])


class RowBits:
    """A set of row numbers, one bit a row.

    Args:
        rows: rows of the table.
    """

    def __init__(self, rows: int) -> None:
        self._bits = np.zeros((rows + 7) // 8, np.uint8)

    def add(self, rows: np.ndarray) -> None:
        """Put ``rows`` (int64) into the set."""
        np.bitwise_or.at(self._bits, rows >> 3, (1 << (rows & 7)).astype(np.uint8))

    def any(self) -> bool:
        """Whether the set has a row."""
        return bool(self._bits.any())

    def between(self, first: int, count: int) -> np.ndarray:
        """Membership (bool [count]) of the rows ``first … first + count - 1``."""
        held = self._bits[first >> 3 : (first + count + 7) >> 3]
        return np.unpackbits(held, bitorder="little")[first & 7 :][:count].astype(bool)


@dataclass(frozen=True)
class Repeats:
    """Rows that are not alone with their values.

    Attributes:
        later: those of which an earlier row has the same values.
        all: those and the first of each.
    """

    later: RowBits
    all: RowBits


def repeated_rows(
    batches: Iterable[pa.RecordBatch],
    columns: Sequence[str],
    scratch: Path,
    among: Repeats | None = None,
) -> Repeats:
    """Rows whose ``columns`` all equal those of another row; nulls equal each other.

    Args:
        batches: the table, in order.
        columns: columns of fixed width (numbers, booleans, dates, timestamps).
        scratch: folder for the buckets; they are removed before this returns.
        among: the same of fewer of these columns, if it is known: others cannot repeat.

    Raises:
        TypeError: a column has no fixed width.
    """
    count = 0
    with tempfile.TemporaryDirectory(dir=scratch, prefix="row_hashes_") as folder:
        paths = [Path(folder) / f"{bucket:03d}" for bucket in range(1 << BUCKET_BITS)]
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for batch in batches:
                first, rows = count, np.arange(count, count + batch.num_rows)
                count += batch.num_rows
                if among is not None:
                    candidates = among.all.between(first, batch.num_rows)
                    if not candidates.any():
                        continue
                    batch, rows = batch.filter(pa.array(candidates)), rows[candidates]
                hashes = row_hashes(batch, columns)
                bucket = (hashes >> np.uint64(64 - BUCKET_BITS)).astype(np.uint8)
                order = np.argsort(bucket, kind="stable")
                pairs = np.empty(len(hashes), _PAIR)
                pairs["hash"], pairs["row"] = hashes[order], rows[order]
                ends = np.cumsum(np.bincount(bucket, minlength=len(paths)))
                for file, low, high in zip(files, ends - np.diff(ends, prepend=0), ends):
                    file.write(pairs[low:high].tobytes())
        found = Repeats(RowBits(count), RowBits(count))
        for path in paths:
            shared, later = _shared(np.fromfile(path, _PAIR))
            found.all.add(shared)
            found.later.add(shared[later])
    return found


def _shared(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of all hashes that occur twice, and which are not the first of their hash.

    Args:
        pairs: in row order.
    """
    ordered = np.sort(pairs["hash"])
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(shared):
        return np.empty(0, np.int64), np.empty(0, bool)
    # Most tables hold few repeats: only those are sorted with their row numbers.
    pairs = pairs[np.isin(pairs["hash"], shared)]
    pairs = pairs[np.argsort(pairs["hash"], kind="stable")]
    later = np.concatenate([[False], pairs["hash"][1:] == pairs["hash"][:-1]])
    return np.ascontiguousarray(pairs["row"]), later


def row_hashes(batch: pa.RecordBatch, columns: Sequence[str]) -> np.ndarray:
    """A 64-bit hash of each row's ``columns`` (uint64 [rows]), equal for equal rows."""
    hashes = np.full(batch.num_rows, len(columns), np.uint64)
    for word in _words([(name, batch.column(name)) for name in columns], batch.num_rows):
        hashes ^= word
        _mix(hashes)
    return hashes


def _mix(hashes: np.ndarray) -> None:
    """Steele et al.'s SplitMix64 finaliser, in place: one-to-one, every input bit spreads."""
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)


def _words(columns: list[tuple[str, pa.Array]], rows: int) -> Iterator[np.ndarray]:
    """The columns' values and validity packed into as few 64-bit words as first-fit gives."""
    widths = [(_width(name, array), array) for name, array in columns]
    # Widest first, and the validity bits last: they fill what narrow columns leave free.
    fields = sorted(widths, key=lambda field: -field[0])
    word, used = np.zeros(rows, np.uint64), 0
    for width, array in [*fields, *((0, array) for _, array in widths)]:
        need = width or 1
        if used + need > 64:
            yield word
            word, used = np.zeros(rows, np.uint64), 0
        bits = _value_bits(array, width) if width else _validity_bits(array)
        if bits is not None:
            word |= bits << np.uint64(used)
        used += need
    yield word


def _width(name: str, array: pa.Array) -> int:
    try:
        width = array.type.bit_width
    except ValueError:
        width = 0
    if width not in _WIDTHS:
        raise TypeError(f"column '{name}' of type {array.type} cannot be compared by its bits")
    return width


def _value_bits(array: pa.Array, width: int) -> np.ndarray | None:
    if array.null_count == len(array):
        return None
    plain = array.cast(pa.uint8()) if width == 1 else array.view(_WIDTHS[width])
    if plain.null_count:
        plain = plain.fill_null(0)
    return plain.to_numpy(zero_copy_only=False).astype(np.uint64, copy=False)


def _validity_bits(array: pa.Array) -> np.ndarray | None:
    if array.null_count == len(array):
        return None
    return array.is_valid().to_numpy(zero_copy_only=False).astype(np.uint64)
