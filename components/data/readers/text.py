"""Delimited text and JSON lines as streams of batches, each error naming file, line and column."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.types as pt

from components.data.readers.conform import Missing
from components.data.readers.content import foreign
from components.data.readers.files import BROKEN, UNREADABLE, SourceFolder
from components.pipeline.errors import DataContractError

BLOCK = 8 << 20
LINES_AT_ONCE = 4096
NAN = ["NaN", "nan"]
HEXADECIMAL = r"^\s*[-+]?0[xX]"
MISSING = ["", *NAN, "NULL", "null", "None"]

_BAD_ROW = re.compile(r"Row #(\d+): (.*)", re.DOTALL)
_BAD_COLUMN = re.compile(r"In CSV column #(\d+)")


def csv_header(folder: SourceFolder, name: str, required: tuple[str, ...]) -> list[str]:
    """Column names of a csv file.

    Raises:
        DataContractError: a required column is missing or there twice, the file is empty or no csv.
    """
    start = _start(folder, name)
    line = start.decode("utf-8-sig", errors="replace").partition("\n")[0]
    header = [cell.strip().strip('"') for cell in line.split(",")]
    for column in required:
        if header.count(column) > 1:
            raise DataContractError(
                f"there are {header.count(column)} columns named '{column}'",
                where=f"{folder.where(name)} line 1",
                remedy="keep one of them",
            )
        if column not in header:
            other = next((c for c in ";\t|" if column in re.split(re.escape(c), line)), None)
            raise DataContractError(
                f"the column '{column}' is missing",
                where=f"{folder.where(name)} line 1",
                remedy=f"part the cells by ',' and not by {other!r}"
                if other
                else f"add it; columns present: {_first_line(', '.join(header))}",
            )
    return header


def _start(folder: SourceFolder, name: str) -> bytes:
    """The first bytes of a text file.

    Raises:
        DataContractError: the file is empty or something else than text.
    """
    with folder.reading(name), folder.open_stream(name) as file:
        start = bytes(file.read(1 << 16))
    if known := foreign(start[:512]):
        raise DataContractError(f"this is {known[0]}", where=folder.where(name), remedy=known[1])
    return start


def csv_batches(
    folder: SourceFolder,
    name: str,
    types: Mapping[str, pa.DataType],
    missing: Missing | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches of the columns ``types`` of a csv file with a header; empty cells are null.

    Args:
        missing: is told of cells of numbers that are NaN: Arrow makes no difference between them
            and empty ones, so columns with missing numbers are read once more, as text.

    Raises:
        DataContractError: a cell does not fit its type or a line has too few or too many cells
            (names file, line, column and value), or the file has no rows.
    """
    rows = 0
    gaps: set[str] = set()
    hexadecimal = _Hexadecimal()
    for batch in _csv(folder, name, types, MISSING, hexadecimal):
        rows += batch.num_rows
        gaps |= {c for c, kind in types.items() if _is_number(kind) and batch[c].null_count}
        yield batch
    if rows == 0:
        raise DataContractError("the file has no rows", where=folder.where(name), remedy=UNREADABLE)
    numbers = [c for c, kind in types.items() if _is_number(kind)]
    again = numbers if hexadecimal.seen else sorted(gaps) if missing is not None else []
    rows = 0
    for batch in _csv(folder, name, dict.fromkeys(again, pa.string()), [""]) if again else ():
        for column in again:
            _refuse_hexadecimal(batch[column], f"{folder.where(name)} line", rows + 2, column)
            if missing is not None:
                nan = pc.is_in(batch[column], value_set=pa.array(NAN))
                missing.count(column, nan, folder.where(name), rows)
        rows += batch.num_rows


class _Hexadecimal:
    """Whether what may be a hexadecimal number passes by in a stream.

    Arrow takes ``0x1F`` for 31; in these files it is no number that anybody meant to write. What
    Arrow makes of a cell does not tell, so the bytes are looked at on their way.
    """

    def __init__(self) -> None:
        self.seen = self.closed = False
        self._last = b""
        self._file: pa.NativeFile | None = None

    def over(self, file: pa.NativeFile) -> pa.NativeFile:
        """``file``, looked at as it is read."""
        self._file = file
        return pa.PythonFile(self, mode="r")

    def read(self, size: int = -1) -> bytes:
        assert self._file is not None
        piece = bytes(self._file.read(size))
        self.look(self._last + piece[:1])
        self.look(piece)
        self._last = piece[-1:]
        return piece

    def look(self, piece: bytes) -> None:
        self.seen = self.seen or b"0x" in piece or b"0X" in piece

    def close(self) -> None:
        self.closed = True


def _refuse_hexadecimal(cells: pa.Array, place: str, first_line: int, column: str) -> None:
    found = pc.match_substring_regex(cells, HEXADECIMAL).fill_null(False)
    if not pc.any(found, min_count=0).as_py():
        return
    row = pc.index(found, True).as_py()
    raise DataContractError(
        f"the number {cells[row].as_py()[:60]!r} is hexadecimal",
        where=f"{place} {first_line + row} column '{column}'",
        remedy="write numbers in decimal digits",
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(pt.is_integer(kind) or pt.is_floating(kind))


def _csv(
    folder: SourceFolder,
    name: str,
    types: Mapping[str, pa.DataType],
    null: list[str],
    hexadecimal: _Hexadecimal | None = None,
) -> Iterator[pa.RecordBatch]:
    rows = 0
    with folder.reading(name), folder.open_stream(name) as file:
        try:
            reader = pa_csv.open_csv(
                file if hexadecimal is None else hexadecimal.over(file),
                read_options=pa_csv.ReadOptions(block_size=BLOCK),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict(types),
                    include_columns=list(types),
                    strings_can_be_null=True,
                    null_values=null,
                ),
            )
            for batch in reader:
                rows += batch.num_rows
                yield batch
        except BROKEN as error:
            raise _bad_cell(folder, name, rows, str(error)) from error


def _bad_cell(folder: SourceFolder, name: str, rows: int, text: str) -> DataContractError:
    place = folder.where(name)
    row, column = _BAD_ROW.search(text), _BAD_COLUMN.search(text)
    if row is None:
        return DataContractError(
            f"the file cannot be read after line {rows + 1}: {text}",
            where=place,
            remedy=UNREADABLE,
        )
    place += f" line {row[1]}"
    if column is not None:
        place += f" column '{csv_header(folder, name, ())[int(column[1])]}'"
    return DataContractError(_first_line(row[2]), where=place, remedy="correct or remove the line")


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 160 else f"{line[:160]}…"


def delimited_batches(
    folder: SourceFolder,
    name: str,
    types: Mapping[str, pa.DataType],
    *,
    separator: bytes,
    encoding: str,
) -> Iterator[pa.RecordBatch]:
    """Batches of a file without header whose cells are parted by ``separator``, a few bytes long.

    Arrow parts cells at one character only, so each block of whole lines is given one in its
    place: the unit separator U+001F, which text does not hold. A blank line is a row of nulls.

    Raises:
        DataContractError: as in ``csv_batches``.
    """
    first_line = 1
    _start(folder, name)
    for block in _whole_lines(folder, name):
        text = _as_utf8(block, encoding)
        parted = pa.BufferReader(text.replace(separator, b"\x1f"))
        try:
            table = _parted(parted, len(text) + 1, types)
        except pa.ArrowInvalid as error:
            row, column = _BAD_ROW.search(str(error)), _BAD_COLUMN.search(str(error))
            place = folder.where(name)
            if row is not None:
                place += f" line {first_line + int(row[1]) - 1}"
            if column is not None:
                place += f" column '{list(types)[int(column[1])]}'"
            what = _first_line(row[2] if row else str(error)).replace("\x1f", separator.decode())
            raise DataContractError(
                what,
                where=place,
                remedy=f"correct or remove the line; a line is {separator.decode().join(types)}",
            ) from error
        hexadecimal = _Hexadecimal()
        hexadecimal.look(text)
        if hexadecimal.seen:
            parted.seek(0)
            cells = _parted(parted, len(text) + 1, dict.fromkeys(types, pa.string()))
            for number in (c for c, kind in types.items() if _is_number(kind)):
                values = cells[number].combine_chunks()
                _refuse_hexadecimal(values, f"{folder.where(name)} line", first_line, number)
        yield from table.to_batches()
        first_line += block.count(b"\n")
    if first_line == 1:
        raise DataContractError("the file has no rows", where=folder.where(name), remedy=UNREADABLE)


def _parted(text: pa.BufferReader, size: int, types: Mapping[str, pa.DataType]) -> pa.Table:
    return pa_csv.read_csv(
        text,
        read_options=pa_csv.ReadOptions(
            column_names=list(types), block_size=size, use_threads=False
        ),
        parse_options=pa_csv.ParseOptions(
            delimiter="\x1f", quote_char=False, ignore_empty_lines=False
        ),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict(types), strings_can_be_null=True, null_values=[""]
        ),
    )


def _as_utf8(block: bytes, encoding: str) -> bytes:
    """``block`` in UTF-8; what is UTF-8 already stays: copies of old files often are.

    Text of another encoding with letters beyond ASCII is as good as never valid UTF-8.
    """
    try:
        block.decode()
    except UnicodeDecodeError:
        return block.decode(encoding).encode()
    return block


def _whole_lines(folder: SourceFolder, name: str) -> Iterator[bytes]:
    """The file in blocks that end with a line."""
    rest, lines = b"", 0
    with folder.reading(name), folder.open_stream(name) as file:
        while piece := _piece(folder, name, file, lines):
            head, newline, tail = piece.rpartition(b"\n")
            if newline:
                lines += piece.count(b"\n")
                yield rest + head + newline
                rest = tail
            else:
                rest += piece
    if rest:
        yield rest + b"\n"


def _piece(folder: SourceFolder, name: str, file: pa.NativeFile, lines: int) -> bytes:
    try:
        return bytes(file.read(BLOCK))
    except BROKEN as error:
        raise _cut_off(folder, name, lines, error) from error


def _cut_off(folder: SourceFolder, name: str, lines: int, error: Exception) -> DataContractError:
    """A file whose bytes end or break, told with the lines that can still be read."""
    text = " ".join(str(error).split())
    return DataContractError(
        f"the file is cut off or damaged after line {lines}: {text}",
        where=folder.where(name),
        remedy=UNREADABLE,
    )


def json_batches(
    folder: SourceFolder, name: str, types: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    """Batches of the keys ``types`` of a file of JSON lines; a missing key is null.

    Raises:
        DataContractError: a line is not JSON, not UTF-8 or a value has another type (names file and
            line).
    """
    _start(folder, name)
    rows = 0
    with folder.reading(name), folder.open_stream(name) as file:
        try:
            for batch in pa_json.open_json(
                file,
                read_options=pa_json.ReadOptions(block_size=BLOCK),
                parse_options=_json_options(types),
            ):
                # Arrow takes texts of JSON as they are.
                batch.validate(full=True)
                rows += batch.num_rows
                yield batch
        except pa.ArrowInvalid as error:
            raise _bad_json(folder, name, types, error) from error
        except BROKEN as error:
            raise _cut_off(folder, name, rows, error) from error


def _bad_json(
    folder: SourceFolder, name: str, types: Mapping[str, pa.DataType], error: pa.ArrowInvalid
) -> DataContractError:
    """Find the line: Arrow counts rows from the start of a block it does not name."""
    lines = _lines(folder, name)
    while piece := list(itertools.islice(lines, LINES_AT_ONCE)):
        if _json_error([line for _, line in piece], types) is None:
            continue
        for number, line in piece:
            if reason := _json_error([line], types):
                return DataContractError(
                    f"the line cannot be read: {_first_line(reason)}: {_first_line(_text(line))}",
                    where=f"{folder.where(name)} line {number}",
                    remedy=f"a line is one JSON object with {', '.join(types)}: correct it",
                )
    return DataContractError(
        f"the file cannot be read: {error}", where=folder.where(name), remedy=UNREADABLE
    )


def _json_error(lines: list[bytes], types: Mapping[str, pa.DataType]) -> str | None:
    text = b"\n".join(lines)
    try:
        pa_json.read_json(
            pa.BufferReader(text),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(text) + 1),
            parse_options=_json_options(types),
        ).validate(full=True)
    except pa.ArrowInvalid as error:
        return str(error)
    return None


def _json_options(types: Mapping[str, pa.DataType]) -> pa_json.ParseOptions:
    return pa_json.ParseOptions(
        explicit_schema=pa.schema(dict(types)), unexpected_field_behavior="ignore"
    )


def json_lines(folder: SourceFolder, name: str) -> Iterator[tuple[int, str]]:
    """Lines of a file with their numbers (from 1), without blank ones.

    Raises:
        DataContractError: a line is not UTF-8, or the file is cut off.
    """
    _start(folder, name)
    for number, line in _lines(folder, name):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise DataContractError(
                f"the text {line[max(0, error.start - 20) : error.end + 20]!r} is not UTF-8",
                where=f"{folder.where(name)} line {number}",
                remedy="write the text as UTF-8",
            ) from error


def _lines(folder: SourceFolder, name: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    for block in _whole_lines(folder, name):
        for line in block.split(b"\n")[:-1]:
            number += 1
            if line.strip():
                yield number, line


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")


def estimated_rows(folder: SourceFolder, name: str) -> int:
    """Lines of a text file, estimated from its first ones: enough for a progress bar."""
    with folder.reading(name), folder.open_stream(name) as file:
        start = bytes(file.read(1 << 16))
    lines = max(start.count(b"\n"), 1)
    # Text of this kind shrinks to about a third under gzip.
    size = folder.sizes[name] * (3 if name.endswith(".gz") else 1)
    return max(lines, round(size * lines / max(len(start), 1)))
