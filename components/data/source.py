"""Outside data behind one face: streams of tables from a folder in a public format.

``open_source`` recognises the format of a folder and returns a ``Source``: its tables as streams
of Arrow batches in contract columns. Readers never hold a whole table and never assume a local
path. They judge *shape* only: a column that is missing or of the wrong type stops the reading,
while a null or an odd value passes through, for validation to quarantine with its row number.

This module is imported to plan a run and therefore imports nothing heavy at the top.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from components.data.readers.fingerprint import SIMULATOR, fingerprint
from components.pipeline.errors import DataContractError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "SIMULATOR",
    "FormatInfo",
    "Source",
    "Stream",
    "fingerprint",
    "list_formats",
    "open_source",
    "prepare",
]

#: Call it to read the table from its start; every call gives a fresh iterator.
Stream = Callable[[], "Iterator[pa.RecordBatch]"]


@dataclass(frozen=True)
class Source:
    """Tables of one outside data set.

    Attributes:
        format: name of the format, ``simulator`` for the simulator.
        uri: the folder as the user named it.
        citation, licence: of the data, for the report; empty if unknown.
        split: ``protocol`` (``leave_one_out`` or ``temporal``) and, as ISO days or None,
            ``valid_from`` and ``test_from``: the split this data set is commonly used with.
        tables: ``interactions``, ``items`` and ``users`` as streams. Columns and types are those
            of the contract, but every field is nullable: rows that break a rule pass through.
            ``users`` has further categorical columns (string, integer or bool).
        rows: how many rows a table has, exactly or estimated; for progress bars only.
        notes: what a reader left out or derived, one line each, for the person who runs it.
        ground_truth: facts that only a simulator can know.
        findings: further notes, known once the streams were read to their ends.
    """

    format: str
    uri: str
    citation: str
    licence: str
    split: Mapping[str, str | None]
    tables: Mapping[str, Stream]
    rows: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ground_truth: Mapping[str, Any] = field(default_factory=dict)
    findings: Callable[[], tuple[str, ...]] = tuple

    def describe(self) -> dict[str, Any]:
        """JSON content of the artifact ``source``."""
        facts: dict[str, Any] = {
            "format": self.format,
            "uri": self.uri,
            "citation": self.citation,
            "licence": self.licence,
            "split": dict(self.split),
            "notes": [*self.notes, *self.findings()],
        }
        if self.ground_truth:
            facts["ground_truth"] = dict(self.ground_truth)
        return facts


@dataclass(frozen=True)
class FormatInfo:
    """A format that ``open_source`` reads: its name, the files it needs, whom to cite."""

    name: str
    files: str
    citation: str


def _formats() -> dict[str, ModuleType]:
    from components.data.readers import amazon, kuairand, movielens, tables

    return {module.NAME: module for module in (tables, kuairand, amazon, movielens)}


def list_formats() -> list[FormatInfo]:
    """All sources that can be read, the simulator first."""
    simulator = FormatInfo(SIMULATOR, "nothing: a small platform with known ground truth", "")
    return [
        simulator,
        *(FormatInfo(name, m.NEEDS, m.CITATION) for name, m in _formats().items()),
    ]


def open_source(uri: str, format: str = "auto") -> Source:
    """Open a folder of outside data.

    Args:
        uri: local folder, ``file:///folder`` or ``s3://bucket/prefix``.
        format: a name of ``list_formats``, or ``auto`` to recognise it by the files present.

    Raises:
        UsageError: unknown format.
        DataContractError: no such folder, a format that is not recognised, a missing or unreadable
            file, a missing column, a column of the wrong type. Streams raise it too, for what
            shows only in later rows.
    """
    from components.data.readers.files import SourceFolder

    formats = _formats()
    if format != "auto" and format not in formats:
        near = difflib.get_close_matches(format, formats, 1)
        raise UsageError(
            f"there is no format '{format}'",
            where="ingest.format",
            remedy=(f"did you mean '{near[0]}'? " if near else "")
            + f"formats: auto, {', '.join(formats)}",
        )
    folder = SourceFolder(uri)
    if format == "auto":
        format = _recognise(folder, formats)
    source: Source = formats[format].read(folder)
    return source


def _recognise(folder: Any, formats: Mapping[str, ModuleType]) -> str:
    found = [name for name, module in formats.items() if module.recognise(folder)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataContractError(
            f"the folder fits several formats: {', '.join(found)}",
            where=folder.uri,
            remedy=f"say which: --set ingest.format={found[0]}",
        )
    needs = "".join(f"\n    {name}: {module.NEEDS}" for name, module in formats.items())
    raise DataContractError(
        f"no known format has these files: {folder.listing()}",
        where=folder.uri,
        remedy=f"give a folder that holds the files of one format:{needs}",
    )


def prepare(
    name_or_uri: str, out_uri: str, *, format: str = "auto", seed: int = 0
) -> dict[str, int]:
    """Write outside data as a folder of contract tables, which ``open_source`` reads again.

    Args:
        name_or_uri: ``simulator``, or a folder in any format.
        out_uri: folder for ``interactions.parquet``, ``items.parquet``, ``users.parquet`` and
            ``source.json`` (citation, licence and split); existing ones are replaced.
        format, seed: as in ``open_source``; seed of the simulator.

    Returns:
        Rows by table.
    """
    from components.data.readers.files import write_tables

    if name_or_uri == SIMULATOR:
        from components.data.simulator.config import SimulatorConfig
        from components.data.simulator.stream import simulate

        source = simulate(SimulatorConfig(render_videos=False), seed, None)
    elif "/" not in name_or_uri and name_or_uri in _formats() and not _exists(name_or_uri):
        raise UsageError(
            f"'{name_or_uri}' is a format, not data",
            remedy="give the folder that holds it: reelflow data prepare FOLDER",
        )
    else:
        if _real_place(name_or_uri) == _real_place(out_uri):
            raise UsageError(
                "the tables would replace the data they are read from",
                where=out_uri,
                remedy="give another folder to write to",
            )
        source = open_source(name_or_uri, format)
    return write_tables(source.tables, source.describe, out_uri)


def _real_place(uri: str) -> tuple[str, str]:
    """The folder that ``uri`` names, the same for all spellings of it."""
    from components.pipeline.storage import parse_uri

    scheme, path = parse_uri(uri)
    return scheme, str(Path(path).resolve()) if scheme == "file" else path


def _exists(name: str) -> bool:
    return Path(name).exists()
