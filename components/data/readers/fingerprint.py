"""Which content outside data has: the part of a stage's cache key that the store cannot know.

Runs at plan time, on every command: standard library only for local folders, and content digests
are remembered by (path, size, modification and change time), so that only new content is ever
hashed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from components.pipeline.errors import DataContractError
from components.pipeline.s3 import NoBucket, ObjectInfo, S3Folder
from components.pipeline.storage import parse_uri, storage_error

SIMULATOR = "simulator"

#: What readers may open: data files of the folder itself, and everything below these folders.
SUBFOLDERS = ("data", "interactions", "items", "users")
SUFFIXES = (".parquet", ".csv", ".dat", ".json", ".jsonl", ".json.gz", ".jsonl.gz")

#: A file touched this recently may change again without a new modification time.
RACY_NS = 2_000_000_000
REMEMBERED_FILES = 4096


class SourceParams(Protocol):
    """Params that name outside data."""

    @property
    def source(self) -> str: ...


def is_data_file(name: str) -> bool:
    """Whether readers look at the file of this path below the folder; hidden ones are not data."""
    parts = name.split("/")
    visible = not any(part.startswith((".", "_")) for part in parts)
    return visible and name.endswith(SUFFIXES) and (len(parts) == 1 or parts[0] in SUBFOLDERS)


def fingerprint(params: SourceParams) -> str:
    """Digest of the content of the outside data that ``params.source`` names.

    Local files count by their SHA-256, objects in S3 by ETag and size.

    Raises:
        UsageError: the source is not an address of a folder.
        DataContractError: no such folder, or what bears the name of a data file is none.
        StorageError: the object store does not answer.
    """
    if params.source == SIMULATOR:
        return SIMULATOR
    scheme, path = parse_uri(params.source)
    if scheme == "s3":
        lines = [
            f"{file.name}\0{file.size}\0{file.etag}"
            for file in objects(params.source, path)
            if is_data_file(file.name)
        ]
        if not lines:
            raise no_folder(params.source)
    else:
        lines = _local_lines(params.source, Path(path))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _local_lines(uri: str, folder: Path) -> list[str]:
    if not folder.is_dir():
        raise no_folder(uri)
    memory = _Memory()
    lines = []
    for name, file in data_files(uri, folder):
        try:
            lines.append(f"{name}\0{file.stat().st_size}\0{memory.digest(file)}")
        except OSError as error:
            raise DataContractError(
                f"the file cannot be read: {error.strerror}",
                where=f"{uri.rstrip('/')}/{name}",
                remedy="check its permissions and the disk that it lies on",
            ) from error
    memory.save()
    return lines


def data_files(uri: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Data files of a local folder by their path below it; linked folders are looked into.

    Args:
        uri: the folder as the user named it.

    Raises:
        DataContractError: what bears the name of a data file is none. Read past, a table would be
            taken as absent.
    """
    below = (entry for name in SUBFOLDERS for entry in _walk(folder / name))
    for entry in itertools.chain(folder.iterdir(), below):
        name = entry.relative_to(folder).as_posix()
        if entry.is_file():
            if is_data_file(name):
                yield name, entry
        elif entry.is_dir():
            # Writers may call a folder of parts ``x.parquet``, but nothing is looked for in it
            # unless it lies below one of the known folders.
            if is_data_file(name) and "/" not in name:
                raise _not_a_file(uri, name, "a folder")
        elif is_data_file(name) or name in SUBFOLDERS:
            raise _not_a_file(uri, name, "a link to nothing" if entry.is_symlink() else "a device")


def _walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    # A link may lead back to a folder above.
    if not folder.is_dir() or (real := folder.resolve()) in above:
        return
    for entry in folder.iterdir():
        yield entry
        yield from _walk(entry, above | {real})


def _not_a_file(uri: str, name: str, found: str) -> DataContractError:
    table = name.partition("/")[0].partition(".")[0]
    return DataContractError(
        f"this is {found}, not a file",
        where=f"{uri.rstrip('/')}/{name}",
        remedy="put the file there, or remove the entry"
        + (f"; parts of a table lie in {table}/" if table in SUBFOLDERS else ""),
    )


def objects(uri: str, root: str) -> list[ObjectInfo]:
    """All objects below ``bucket/prefix``, by name.

    Args:
        uri: the folder as the user named it.

    Raises:
        DataContractError: there is no such bucket.
        StorageError: the object store does not answer.
    """
    try:
        return S3Folder(root).entries("")
    except NoBucket as error:
        raise no_folder(uri) from error
    except OSError as error:
        raise storage_error("list", uri, error) from error


def no_folder(uri: str) -> DataContractError:
    """The error for a source that does not exist or holds nothing."""
    return DataContractError(
        "there is no such folder of data",
        where=uri,
        remedy=f"give a folder that exists, s3://bucket/prefix, or '{SIMULATOR}'",
    )


class _Memory:
    """SHA-256 of local files, remembered between commands in the user's cache folder.

    Losing the memory, or an update of it to another process, costs time and nothing else.
    """

    def __init__(self) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._file = Path(cache) / "reelflow" / "content-digests.json"
        self._changed = False
        try:
            self._known: dict[str, str] = dict(json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def digest(self, file: Path) -> str:
        status = file.stat()
        # The change time tells a replacement that kept size and modification time (cp -p).
        touched = (status.st_mtime_ns, status.st_ctime_ns)
        key = f"{file.resolve()}\0{status.st_size}\0{touched[0]}\0{touched[1]}"
        if key in self._known:
            return self._known[key]
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if time.time_ns() - max(touched) > RACY_NS:
            self._known[key] = digest
            self._changed = True
        return digest

    def save(self) -> None:
        if not self._changed:
            return
        newest = dict(list(self._known.items())[-REMEMBERED_FILES:])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=".", suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                json.dump(newest, file)
            Path(temporary).replace(self._file)
        except OSError:
            return
