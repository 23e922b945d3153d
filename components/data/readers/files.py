"""The folder of a source, its files as byte streams, and contract tables written to a folder.

A local folder and a bucket are read alike. What cannot be read is told with the file's name, which
Arrow's errors lack. A store that does not answer (``objects.py``) is no fault of the data, and is
told as any fault of a store is.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from components.data.readers.fingerprint import (
    SUBFOLDERS,
    data_files,
    is_data_file,
    no_folder,
    objects,
)
from components.data.readers.objects import ObjectFile
from components.pipeline.errors import DataContractError, StorageError
from components.pipeline.s3 import ObjectInfo, S3Folder
from components.pipeline.storage import open_uri, parse_uri, storage_error

#: Rows of a batch: interactions are narrow, items carry texts that must not overflow a column.
INTERACTION_ROWS = 262_144
TEXT_ROWS = 65_536

LISTED_FILES = 20
UNREADABLE = "copy the file again from its source, or write it again"
#: What Arrow raises on content that it cannot read.
BROKEN = (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError)


class SourceFolder:
    """A folder of data files.

    Attributes:
        uri: as the user named it.
        root: the local path, or ``bucket/prefix``.
        is_local: whether the files lie on this machine.

    Raises:
        DataContractError: the folder does not exist, or is a file.
        StorageError: the object store does not answer.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") or uri
        scheme, self.root = parse_uri(uri)
        self.is_local = scheme == "file"
        path = Path(self.root)
        if path.is_file() if self.is_local else not self._objects and self._is_object():
            raise DataContractError(
                "this is a file, not a folder", where=uri, remedy="give the folder that holds it"
            )
        if not (path.is_dir() if self.is_local else self._objects):
            raise no_folder(uri)

    @cached_property
    def _objects(self) -> dict[str, ObjectInfo]:
        return {file.name: file for file in objects(self.uri, self.root)}

    def _is_object(self) -> bool:
        bucket, _, key = self.root.partition("/")
        try:
            return bool(key) and S3Folder(bucket).exists(key)
        except OSError as error:
            raise storage_error("look for", self.uri, error) from error

    def where(self, name: str) -> str:
        """The place of file ``name`` for messages."""
        return f"{self.uri}/{name}"

    def has(self, *names: str) -> bool:
        """Whether all these files lie in the folder."""
        return set(names) <= self.sizes.keys()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes by name of the data files directly in the folder and below its known subfolders.

        Names are relative to the folder, with ``/``, sorted.

        Raises:
            DataContractError: what bears the name of a data file is none.
        """
        if not self.is_local:
            return {n: file.size for n, file in self._objects.items() if is_data_file(n)}
        try:
            files = {
                name: file.stat().st_size for name, file in data_files(self.uri, Path(self.root))
            }
        except OSError as error:
            raise self._unlisted(error) from error
        return dict(sorted(files.items()))

    @cached_property
    def names(self) -> list[str]:
        """All files in the folder and directly in its known subfolders, data or not, sorted."""
        if not self.is_local:
            known = [name.split("/") for name in self._objects]
            return [
                "/".join(p) for p in known if len(p) == 1 or (len(p) == 2 and p[0] in SUBFOLDERS)
            ]
        root = Path(self.root)
        folders = [root, *(root / name for name in SUBFOLDERS if (root / name).is_dir())]
        try:
            entries = [entry for folder in folders for entry in folder.iterdir()]
        except OSError as error:
            raise self._unlisted(error) from error
        return sorted(e.relative_to(root).as_posix() for e in entries if e.is_file())

    def _unlisted(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot list the folder: {error}",
            where=self.uri,
            remedy="check that it exists, and its permissions",
        )

    def listing(self) -> str:
        """The files found, shortened, for messages."""
        found = (
            [entry.name for entry in Path(self.root).iterdir()]
            if self.is_local
            else [name.partition("/")[0] for name in self._objects]
        )
        names = sorted(set(found))
        shown = names[:LISTED_FILES]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        return ", ".join(shown) + more if shown else "(the folder is empty)"

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn Arrow's errors about the content of file ``name`` into errors that name it."""
        try:
            yield
        except BROKEN as error:
            text = " ".join(str(error).split())
            raise DataContractError(
                f"the file cannot be read: {text}", where=self.where(name), remedy=UNREADABLE
            ) from error

    def open_file(self, name: str) -> pa.NativeFile:
        """File ``name`` for random access."""
        self._refuse_empty(name)
        if self.is_local:
            return pa.OSFile(f"{self.root}/{name}")
        return pa.PythonFile(self._object(name, per_thread=True), mode="r")

    def open_stream(self, name: str) -> pa.NativeFile:
        """The bytes of file ``name`` in order, decompressed where its name ends in ``.gz``."""
        self._refuse_empty(name)
        if self.is_local:
            return pa.input_stream(f"{self.root}/{name}", compression="detect")
        file = pa.PythonFile(self._object(name, per_thread=False), mode="r")
        return pa.CompressedInputStream(file, "gzip") if name.endswith(".gz") else file

    def _object(self, name: str, *, per_thread: bool) -> ObjectFile:
        return ObjectFile(
            S3Folder(self.root), self._objects[name], self.where(name), per_thread=per_thread
        )

    def _refuse_empty(self, name: str) -> None:
        if self.sizes[name] == 0:
            raise DataContractError("the file is empty", where=self.where(name), remedy=UNREADABLE)


def rebatch(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Merge small batches and cut large ones: ``rows / 2`` to ``rows`` rows each, but for the last.

    Files written in small pieces otherwise give batches whose fixed cost outweighs their rows.
    """
    kept: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        if batch.num_rows == 0:
            continue
        kept.append(batch)
        count += batch.num_rows
        if 2 * count < rows:
            continue
        if len(kept) == 1 and count <= rows:
            yield batch
        else:
            yield from _merge(kept, rows)
        kept, count = [], 0
    if kept:
        yield from _merge(kept, rows)


def _merge(batches: list[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    merged = pa.concat_batches(batches)
    for start in range(0, merged.num_rows, rows):
        yield merged.slice(start, rows)


def first_batch(
    batches: Iterator[pa.RecordBatch], table: str, uri: str
) -> tuple[pa.RecordBatch, Iterator[pa.RecordBatch]]:
    """The first batch, for its schema, and all batches, the first among them.

    Raises:
        DataContractError: there is none.
    """
    first = next(batches, None)
    if first is None:
        raise DataContractError(
            f"the table '{table}' has no rows", where=uri, remedy="give data with at least one row"
        )
    return first, itertools.chain([first], batches)


def write_tables(
    tables: Mapping[str, Callable[[], Iterator[pa.RecordBatch]]],
    describe: Callable[[], Mapping[str, Any]],
    uri: str,
) -> dict[str, int]:
    """Write streams as ``<name>.parquet`` and what they are as ``source.json`` into a folder.

    The description also tells which columns have no value, so that nobody thinks them lost.

    Args:
        describe: called once the tables are written.

    A file appears whole or not at all: on a local disk it is renamed when complete, in an object
    store it is visible only once closed, and removed if the stream broke.

    Returns:
        Rows by table.

    Raises:
        StorageError: the folder cannot be written.
    """
    target, root = open_uri(uri)
    local = isinstance(target, fs.LocalFileSystem)
    rows: dict[str, int] = {}
    without_values: dict[str, list[str]] = {}
    for name, stream in tables.items():
        final = f"{root}/{name}.parquet"
        path = f"{root}/.{name}-{uuid.uuid4().hex}.partial" if local else final
        try:
            if local:
                target.create_dir(root, recursive=True)
            first, batches = first_batch(stream(), name, uri)
            rows[name], without_values[name] = _write(first.schema, batches, target, path)
            if local:
                target.move(path, final)
        except BaseException as error:
            with suppress(OSError):
                target.delete_file(path)
            if isinstance(error, OSError):
                raise StorageError(
                    f"cannot write: {error}",
                    where=f"{uri}/{name}.parquet",
                    remedy="check the address, the permissions and the free space",
                ) from error
            raise
    description = {**describe(), "without_values": without_values}
    with target.open_output_stream(f"{root}/source.json") as file:
        file.write(json.dumps(description, indent=1, ensure_ascii=False, default=str).encode())
    return rows


def _write(
    schema: pa.Schema, batches: Iterator[pa.RecordBatch], target: fs.FileSystem, path: str
) -> tuple[int, list[str]]:
    """Rows, and the columns of which no row has a value."""
    rows, values = 0, dict.fromkeys(schema.names, 0)
    # Checksums let a reader tell a flipped bit from a value.
    options = {"compression": "zstd", "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, filesystem=target, **options) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
            for column, array in zip(schema.names, batch.columns, strict=True):
                values[column] += len(array) - array.null_count
    return rows, [column for column, count in values.items() if not count]
