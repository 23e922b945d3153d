"""Casting of columns to the types of a contract: only where no value changes its meaning.

A reader may widen an integer, decode a dictionary, change the unit of a timestamp without loss and
read NaN as null (the way pandas writes a missing value). It never guesses: text is not parsed,
integers are not taken for times. What does not fit is told with its row and value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from components.data.contracts import CONTRACTS, TIMESTAMP, TableContract
from components.pipeline.errors import DataContractError

Caster = Callable[[pa.Array], pa.Array]

#: Integers that a float64 / float32 holds exactly; beyond, an id may have lost its last digits.
EXACT_FLOAT64 = 2**53
EXACT_FLOAT32 = 2**24

TAGS = pa.list_(pa.string())
CORRECT = "correct the value, or remove the row"


def raw_schema(contract: TableContract, extras: Collection[pa.Field] = ()) -> pa.Schema:
    """Schema of a raw stream: the contract with every field nullable, then ``extras``."""
    return pa.schema([*(f.with_nullable(True) for f in contract.schema), *extras])


@dataclass(frozen=True)
class Column:
    """How one column of a file becomes one column of a table.

    Attributes:
        name: in the table.
        source: in the file; None fills the column with ``constant``.
        type: in the table.
        cast: array of the file's type to array of ``type``; raises ``pa.ArrowInvalid`` where a
            value does not fit.
        remedy: what the owner of the file can do when it does not.
        possible: False if no value of the file's type fits (an all-null column still does).
    """

    name: str
    source: str | None
    type: pa.DataType
    cast: Caster
    remedy: str
    possible: bool = True
    constant: pa.Scalar | None = None


def absent(name: str, type: pa.DataType, constant: object = None) -> Column:
    """A column that the file lacks: ``constant`` (or null) in every row."""
    return Column(name, None, type, _unchanged, "", constant=pa.scalar(constant, type))


def plan_column(name: str, source: str, kind: pa.DataType, target: pa.DataType) -> Column:
    """Plan the cast of column ``source`` of type ``kind`` to ``target``."""
    plain = kind.value_type if pt.is_dictionary(kind) else kind
    cast = _caster(plain, target)
    remedy = _remedy(name, plain, target)
    if cast is None:
        return Column(name, source, target, _only_nulls(target), remedy, possible=False)
    if pt.is_dictionary(kind):
        return Column(name, source, target, _decoded(cast), remedy)
    return Column(name, source, target, cast, remedy)


@dataclass
class Missing:
    """What a reader saw of missing values in a table, from the start of its last reading.

    Writers that know nulls do not write NaN, so it may as well be a calculation that went wrong.
    A column that is in the files and never has a value may have been lost on its way.

    Attributes:
        table: name of the table.
        unused: columns that the writer of the files says to be without values.
        found: by (file, column, what they are) how many values count as missing, and the first row.
        filled: columns of the contract that are in the files, and whether a value was seen.
    """

    table: str
    unused: Collection[str] = ()
    found: dict[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)
    filled: dict[str, bool] = field(default_factory=dict)

    def watch(self, stream: Callable[[], Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
        """The batches of ``stream``, whose readers are given this object, counted anew."""
        self.found.clear()
        self.filled.clear()
        yield from stream()

    def look(self, column: str, values: pa.Array, where: str, first_row: int) -> None:
        kind = values.type
        if pt.is_dictionary(kind) or not pt.is_floating(kind):
            return
        self.count(column, pc.is_nan(values), where, first_row)

    def count(
        self, column: str, missing: pa.Array, where: str, first_row: int, what: str = "NaN"
    ) -> None:
        """Count values of a batch.

        Args:
            missing: whether each value counts as missing.
            what: those are.
        """
        count = pc.sum(missing).as_py() or 0
        if count:
            key = (where, column, what)
            first = first_row + pc.index(missing.fill_null(False), True).as_py()
            before, row = self.found.get(key, (0, first))
            self.found[key] = (before + count, row)

    def fill(self, column: Column, values: pa.Array) -> None:
        """Note whether ``values`` of a column of a file, as cast, say anything."""
        if column.name in CONTRACTS[self.table].schema.names:
            held = values.null_count < len(values)
            self.filled[column.name] = held or self.filled.get(column.name, False)

    def notes(self) -> tuple[str, ...]:
        return (
            *(
                f"{self.table}: column '{column}': {count:,} values are {what} and count as "
                f"missing, the first in row {row} of {where}"
                for (where, column, what), (count, row) in self.found.items()
            ),
            *(
                f"{self.table}: column '{column}' is there and has no value in any row: if it had "
                "some, it was lost on its way; else leave it out"
                for column, held in self.filled.items()
                if not held and column not in self.unused
            ),
        )


def conform(
    batch: pa.RecordBatch,
    columns: Collection[Column],
    schema: pa.Schema,
    *,
    where: str,
    first_row: int,
    missing: Missing | None = None,
) -> pa.RecordBatch:
    """Cast ``batch`` to ``schema``.

    Args:
        where: the file, for messages.
        first_row: row of the file (from 0) that ``batch`` begins with.
        missing: is told of what is null or becomes it.

    Raises:
        DataContractError: a value does not fit; names file, row, column and value.
    """
    arrays = []
    for column in columns:
        if column.source is None:
            arrays.append(pa.repeat(column.constant, batch.num_rows))
            continue
        values = batch.column(column.source)
        if missing is not None:
            missing.look(column.source, values, where, first_row)
        cast = _with_text_checked(column)
        try:
            arrays.append(cast(values))
        except pa.ArrowInvalid:
            row = _first_misfit(values, cast)
            place = f"{where} row {first_row + row} column '{column.source}'"
            try:
                value = str(values[row].as_py())
            except UnicodeDecodeError as error:
                raise DataContractError(
                    f"the text {_shown(repr(error.object))} is not UTF-8",
                    where=place,
                    remedy="write the text as UTF-8",
                ) from None
            raise DataContractError(
                f"value {_shown(value)!r} of type {values.type} does not fit {column.type}",
                where=place,
                remedy=column.remedy,
            ) from None
        if missing is not None:
            missing.fill(column, arrays[-1])
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _shown(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:60]}…"


def _with_text_checked(column: Column) -> Caster:
    """The cast of ``column``, which refuses text that is not UTF-8: files may hold any bytes."""
    if not (pt.is_string(column.type) or column.type == TAGS):
        return column.cast

    def cast(values: pa.Array) -> pa.Array:
        result = column.cast(values)
        # A slice of lists would be validated with the texts of all of them.
        (result if pt.is_string(result.type) else result.flatten()).validate(full=True)
        return result

    return cast


def conformed(
    batches: Iterator[pa.RecordBatch],
    columns: Collection[Column],
    schema: pa.Schema,
    *,
    where: str,
    first_row: int = 0,
    missing: Missing | None = None,
) -> Iterator[pa.RecordBatch]:
    """``conform`` over all batches of a file."""
    for batch in batches:
        yield conform(batch, columns, schema, where=where, first_row=first_row, missing=missing)
        first_row += batch.num_rows


def schema_of(columns: Collection[Column]) -> pa.Schema:
    return pa.schema([(column.name, column.type) for column in columns])


def _first_misfit(values: pa.Array, cast: Caster) -> int:
    """Index of the first value that ``cast`` refuses, by bisection over prefixes."""
    fits, fails = 0, len(values)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        try:
            cast(values.slice(fits, middle - fits))
            fits = middle
        except pa.ArrowInvalid:
            fails = middle
    return fits


def _caster(kind: pa.DataType, target: pa.DataType) -> Caster | None:
    """The lossless cast from ``kind`` to ``target``; None if there is none."""
    if kind == target:
        return _nan_to_null if pt.is_floating(kind) else _unchanged
    if pt.is_null(kind):
        return lambda values: pa.nulls(len(values), target)
    if pt.is_int64(target):
        if pt.is_floating(kind):
            return _float_to_int
        return _plain(target) if pt.is_integer(kind) or _is_whole_decimal(kind) else None
    if pt.is_float32(target):
        if pt.is_floating(kind) or pt.is_integer(kind) or pt.is_decimal(kind):
            return to_float32
        return None
    if pt.is_boolean(target):
        return _to_bool if pt.is_integer(kind) or pt.is_floating(kind) else None
    if target == TIMESTAMP:
        # A naive timestamp is taken as UTC; another zone names the same instant.
        return _plain(target) if pt.is_timestamp(kind) else None
    if pt.is_date32(target):
        return _plain(target) if pt.is_date64(kind) else None
    if pt.is_string(target):
        return _plain(target) if _is_text(kind) else None
    if target == TAGS:
        # List views are left out: Arrow 25 casts them to wrong lists.
        lists = pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
        if not lists:
            return None
        inner = kind.value_type
        inner = inner.value_type if pt.is_dictionary(inner) else inner
        return _plain(target) if _is_text(inner) or pt.is_null(inner) else None
    raise TypeError(f"no reader makes columns of type {target}")


def _is_text(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def _is_whole_decimal(kind: pa.DataType) -> bool:
    # Databases export unsigned and big integers as decimals without a fraction.
    return pt.is_decimal(kind) and kind.scale == 0


def _plain(target: pa.DataType) -> Caster:
    return lambda values: pc.cast(values, target)


def _decoded(cast: Caster) -> Caster:
    return lambda values: cast(values.dictionary_decode())


def _only_nulls(target: pa.DataType) -> Caster:
    def cast(values: pa.Array) -> pa.Array:
        if values.null_count < len(values):
            raise pa.ArrowInvalid("wrong type")
        return pa.nulls(len(values), target)

    return cast


def _unchanged(values: pa.Array) -> pa.Array:
    return values


def _nan_to_null(values: pa.Array) -> pa.Array:
    nan = pc.is_nan(values)
    if not pc.any(nan, min_count=0).as_py():
        return values
    return pc.if_else(nan, pa.scalar(None, values.type), values)


def to_int64(values: pa.Array) -> pa.Array:
    """Integers, or floats that are exact integers, as int64."""
    return _float_to_int(values) if pt.is_floating(values.type) else pc.cast(values, pa.int64())


def _float_to_int(values: pa.Array) -> pa.Array:
    values = _nan_to_null(values)
    limit = EXACT_FLOAT64 if pt.is_float64(values.type) else EXACT_FLOAT32
    largest = pc.max(pc.abs(values)).as_py()
    if largest is not None and largest > limit:
        raise pa.ArrowInvalid("the number is too large for its digits to be exact")
    return pc.cast(values, pa.int64())


def integral(values: pa.Array) -> bool:
    """Whether a float array (or dictionary of floats) holds exact integers and missing values."""
    try:
        _float_to_int(values.dictionary_decode() if pt.is_dictionary(values.type) else values)
    except pa.ArrowInvalid:
        return False
    return True


def to_float32(values: pa.Array) -> pa.Array:
    """Numbers as float32: rounded, but never turned infinite."""
    if not pt.is_floating(values.type):
        return pc.cast(pc.cast(values, pa.float64(), safe=False), pa.float32())
    narrow = pc.cast(_nan_to_null(values), pa.float32())
    if pt.is_float64(values.type):
        became_infinite = pc.and_not(pc.is_inf(narrow), pc.is_inf(values))
        if pc.any(became_infinite, min_count=0).as_py():
            raise pa.ArrowInvalid("the number is too large")
    return narrow


def epoch_ms(values: pa.Array) -> pa.Array:
    """Times from milliseconds since 1970."""
    return pc.cast(to_int64(values), TIMESTAMP)


def epoch_seconds(values: pa.Array) -> pa.Array:
    """Times from seconds since 1970."""
    return pc.cast(pc.cast(to_int64(values), pa.timestamp("s", "UTC")), TIMESTAMP)


def milliseconds(values: pa.Array) -> pa.Array:
    """Seconds (float32) from milliseconds."""
    return to_float32(pc.divide(pc.cast(values, pa.float64()), 1000.0))


def _to_bool(values: pa.Array) -> pa.Array:
    if pt.is_floating(values.type):
        values = _nan_to_null(values)
    zero, one = pa.scalar(0, values.type), pa.scalar(1, values.type)
    flag = pc.equal(values, one)
    if not pc.all(pc.or_(flag, pc.equal(values, zero)), min_count=0).as_py():
        raise pa.ArrowInvalid("neither 0 nor 1")
    return flag


def _remedy(name: str, kind: pa.DataType, target: pa.DataType) -> str:
    if target == TIMESTAMP:
        if pt.is_integer(kind):
            return (
                f"say which unit the integers are in: for epoch milliseconds write the column as "
                f"values.cast(pyarrow.timestamp('ms', 'UTC')); '{name}' wants {target}"
            )
        if pt.is_timestamp(kind):
            return f"'{name}' keeps milliseconds: round or correct the values before writing them"
        return f"write '{name}' as {target}; text must be parsed by whoever knows its time zone"
    if target == TAGS:
        return f"write '{name}' as a list of strings; split joined text first"
    if pt.is_int64(target):
        if _is_text(kind):
            return f"number the ids: '{name}' wants integers (int64), one for each distinct text"
        return f"correct the value, or write '{name}' as int64"
    if pt.is_boolean(target):
        return f"write '{name}' as bool, or as 0 and 1"
    return f"correct the value, or write '{name}' as {target}"
