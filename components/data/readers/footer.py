"""The footer of a parquet file, decoded without Arrow.

Arrow's Python face aborts the process when it is asked for the chunks of a footer whose numbers
contradict each other, and one flipped bit is enough for that. So they are decoded and compared
here first. Format: parquet-format's ``parquet.thrift`` in Thrift's compact protocol.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TYPES = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED")
#: Codecs by number; Arrow reads all but LZO.
CODECS = ("none", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
LZO = 3
#: How ``TYPES`` are packed in statistics.
_PACKED = {0: "<?", 1: "<i", 2: "<q", 4: "<f", 5: "<d"}

_OPTIONAL, _REPEATED = 1, 2


class FooterError(Exception):
    """What is wrong with a footer.

    Attributes:
        what: one sentence.
        place: row group and column, or nothing.
    """

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(what)
        self.what, self.place = what, place


@dataclass(frozen=True)
class Leaf:
    """A column of the schema: its path, physical type and largest levels."""

    path: tuple[str, ...]
    type: int
    definition: int
    repetition: int


@dataclass(frozen=True)
class Chunk:
    """The pages of one column in one row group; ``low`` and ``high`` are None where not told."""

    values: int
    start: int
    size: int
    low: Any
    high: Any
    nulls: int | None


@dataclass(frozen=True)
class Group:
    rows: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Footer:
    """What a footer says; ``chunks`` of each group are in the order of ``leaves``."""

    rows: int
    leaves: tuple[Leaf, ...]
    groups: tuple[Group, ...]


def decode_footer(data: bytes, end: int) -> Footer:
    """Decode a footer and require that its numbers agree.

    Args:
        data: the footer, without its length and the magic bytes behind it.
        end: where in the file it begins; all pages lie before.

    Raises:
        FooterError: it cannot be decoded, contradicts itself, or tells of pages that cannot be
            read: encrypted ones, or of an unknown codec.
    """
    try:
        meta = _Compact(data).struct()
        leaves = tuple(_leaves(meta[2]))
        rows = meta[3]
        groups = tuple(
            _group(number, group, leaves, end) for number, group in enumerate(meta.get(4, []))
        )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        raise FooterError(f"it cannot be decoded ({type(error).__name__}: {error})") from error
    counted = sum(group.rows for group in groups)
    if counted != rows:
        raise FooterError(f"it tells of {rows:,} rows, and of {counted:,} in its row groups")
    return Footer(rows, leaves, groups)


def _leaves(elements: list[dict[int, Any]]) -> Iterator[Leaf]:
    waiting = iter(elements)

    def below(
        count: int, path: tuple[str, ...], definition: int, repetition: int
    ) -> Iterator[Leaf]:
        for _ in range(count):
            element = next(waiting, None)
            if element is None:
                raise FooterError("its schema is cut short")
            kind = element.get(3, 0)
            here = (*path, element[4].decode())
            levels = (
                definition + (kind in (_OPTIONAL, _REPEATED)),
                repetition + (kind == _REPEATED),
            )
            if children := element.get(5):
                yield from below(children, here, *levels)
            else:
                yield Leaf(here, element[1], *levels)

    root = next(waiting)
    yield from below(root.get(5, 0), (), 0, 0)
    if next(waiting, None) is not None:
        raise FooterError("its schema has columns that belong nowhere")


def _group(number: int, group: dict[int, Any], leaves: tuple[Leaf, ...], end: int) -> Group:
    rows, columns = group[3], group[1]
    if len(columns) != len(leaves):
        raise FooterError(
            f"the schema has {len(leaves)} columns, the row group {len(columns)}",
            f" row group {number}",
        )
    return Group(
        rows,
        tuple(
            _chunk(column, leaf, rows, end, f" row group {number} column '{'.'.join(leaf.path)}'")
            for column, leaf in zip(columns, leaves, strict=True)
        ),
    )


def _chunk(column: dict[int, Any], leaf: Leaf, rows: int, end: int, place: str) -> Chunk:
    if 8 in column or 3 not in column:
        raise FooterError("the column is encrypted", place)
    meta = column[3]
    path = tuple(part.decode(errors="replace") for part in meta.get(3, ()))
    if path and path != leaf.path:
        raise FooterError(f"the column is named {'.'.join(path)!r} there", place)
    if meta[1] != leaf.type:
        raise FooterError(f"the column is {_named(TYPES, meta[1])} there", place)
    if not 0 <= meta[4] < len(CODECS) or meta[4] == LZO:
        raise FooterError(
            f"the column is compressed by {_named(CODECS, meta[4])}, which cannot be read", place
        )
    values, size = meta[5], meta[7]
    if values < rows or (not leaf.repetition and values != rows):
        raise FooterError(f"it tells of {rows:,} rows and {values:,} values", place)
    dictionary, start = meta.get(11, 0), meta[9]
    if 0 < dictionary < start:
        start = dictionary
    # A chunk without values has no page, and writers give it any place.
    if values and not 4 <= start <= start + size <= end:
        raise FooterError(f"the pages lie outside of the file: {size:,} bytes at {start}", place)
    sizes = meta.get(16, {})
    for field, level in ((2, leaf.repetition), (3, leaf.definition)):
        if (histogram := sizes.get(field)) and len(histogram) != level + 1:
            raise FooterError(f"a histogram has {len(histogram)} levels, not {level + 1}", place)
    statistics = meta.get(12, {})
    nulls = statistics.get(3)
    if nulls is not None and not 0 <= nulls <= values:
        nulls = None
    # The older fields (1 and 2) order signed numbers and times alike.
    low = _bound(statistics.get(6, statistics.get(2)), leaf.type)
    high = _bound(statistics.get(5, statistics.get(1)), leaf.type)
    return Chunk(values, start, size, low, high, nulls)


def _bound(packed: bytes | None, kind: int) -> Any:
    form = _PACKED.get(kind)
    if packed is None or form is None or len(packed) != struct.calcsize(form):
        return None
    return struct.unpack(form, packed)[0]


def _named(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else f"an unknown kind ({number})"


class _Compact:
    """Thrift's compact protocol: structs as dictionaries by field number, texts as bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._signed()
            # A flag in a struct is its type.
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            size = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15) for _ in range(self._fitting(size))]
        if kind == 12:
            return self.struct()
        if kind in (1, 2, 3):
            return self._byte()
        if kind == 7:
            return struct.unpack("<d", self._bytes(8))[0]
        if kind == 11:
            size = self._fitting(self._unsigned())
            kinds = self._byte() if size else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(size)]
        raise ValueError(f"type {kind} at byte {self._at}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, size: int) -> bytes:
        self._at += self._fitting(size)
        return self._data[self._at - size : self._at]

    def _fitting(self, size: int) -> int:
        if size > len(self._data) - self._at:
            raise ValueError(f"{size} elements at byte {self._at} of {len(self._data)}")
        return size

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError(f"a number without end at byte {self._at}")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
