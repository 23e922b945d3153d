"""Files behind a URI: a local folder or an S3 bucket, with the writes that publishing needs.

Publishing needs a write that exactly one of several writers wins: a conditional put on S3, a hard
link on a local disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO
from urllib.parse import unquote

from components.pipeline.errors import StorageError, UsageError
from components.pipeline.s3 import S3Folder, filesystem

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def parse_uri(uri: str) -> tuple[Literal["file", "s3"], str]:
    """Where ``uri`` points: ``file`` and an absolute path, or ``s3`` and ``bucket/prefix``.

    Args:
        uri: a local path, ``file:///path`` (percent-encoded) or ``s3://bucket/prefix``.

    Raises:
        UsageError: the scheme is not one of these, or the URI names no folder.
    """
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the path {uri!r} is not UTF-8", remedy="rename the folder, or give another one"
        ) from None
    scheme, separator, rest = uri.partition("://")
    if not separator:
        try:
            return "file", str(Path(uri).expanduser().absolute())
        except RuntimeError:
            raise UsageError(
                f"cannot open '{uri}': no user of that name has a home folder here",
                remedy="give the folder by its full path",
            ) from None
    if scheme == "s3" and rest.strip("/") and not rest.startswith("/"):
        return "s3", rest.rstrip("/")
    if scheme == "file" and rest.startswith("/"):
        return "file", unquote(rest)
    raise UsageError(
        f"cannot open '{uri}'", remedy="give a folder, file:///folder or s3://bucket/prefix"
    )


def open_uri(uri: str) -> tuple[FileSystem, str]:
    """The file system of ``uri`` and the path inside it; see ``parse_uri``.

    Credentials, region and endpoint of S3 come from the usual AWS variables and files, never from
    the URI.
    """
    from pyarrow import fs

    scheme, path = parse_uri(uri)
    return (filesystem() if scheme == "s3" else fs.LocalFileSystem()), path


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; processes of one machine take turns.

    The kernel frees the lock of a killed process. The file is removed by its holder, so that
    locks do not pile up; whoever waited for a removed file starts anew with the next one.

    Args:
        on_wait: called once if another process holds the lock.

    Raises:
        StorageError: the lock file cannot be made.
    """
    told = False
    while True:
        with _opened(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    on_wait()
                    told = True
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_open_file(path, file.fileno()):
                continue
            try:
                yield
                return
            finally:
                path.unlink(missing_ok=True)


def is_held(lock: Path) -> bool:
    """Whether a process of this machine holds the lock file."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _opened(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise StorageError(
            f"cannot make a lock file: {error.strerror}",
            where=str(path),
            remedy="check the rights and the free space, or give REELFLOW_HOME another folder",
        ) from error


def _is_open_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Folder:
    """A folder behind a URI, with small-file reads and atomic small-file writes.

    Attributes:
        uri: as given.
        fs, root: pyarrow file system and the path of the folder in it.
        is_local: whether files have local paths.
    """

    def __init__(self, uri: str) -> None:
        from pyarrow.fs import LocalFileSystem

        self.uri = uri
        self.fs, self.root = open_uri(uri)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._s3 = S3Folder(self.root)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def address(self, name: str) -> str:
        """Where file ``name`` is, as a person would give it to another program."""
        return f"{self.uri.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes | None:
        """The bytes of file ``name``; None if there is no such file."""
        try:
            return Path(self.path(name)).read_bytes() if self.is_local else self._s3.read(name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed("read", name, error) from error

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """Names (relative to the folder) of all files below ``prefix``, sorted."""
        return [name for name in self.times(prefix) if name.endswith(suffix)]

    def times(self, prefix: str) -> dict[str, float]:
        """Name → time of the last change (Unix time, of the store's clock), sorted by name."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self.path(prefix), allow_not_found=True, recursive=True)
        try:
            infos = self.fs.get_file_info(selector)
        except OSError as error:
            raise self._failed("list", prefix, error) from error
        cut = len(self.root) + 1
        return {
            info.path[cut:]: info.mtime.timestamp() if info.mtime else 0.0
            for info in sorted(infos, key=lambda info: info.path)
            if info.type == FileType.File
        }

    def put(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Write file ``name`` in one atomic step.

        Args:
            replace: overwrite an existing file; otherwise an existing file is left alone.

        Returns:
            Whether this call wrote the file (False: it was there and ``replace`` is False).
        """
        try:
            if self.is_local:
                return self._put_local(name, data, replace)
            return self._s3.put(name, data, replace=replace)
        except OSError as error:
            raise self._failed("write", name, error) from error

    def _put_local(self, name: str, data: bytes, replace: bool) -> bool:
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(data)
            sync(temporary)
            if replace:
                temporary.replace(target)
            else:
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
        finally:
            temporary.unlink(missing_ok=True)
        self.sync_names(name)
        return True

    def sync_names(self, name: str) -> None:
        """Flush the folders that lead to local file or folder ``name`` to the disk."""
        for folder in Path(self.path(name)).parents:
            sync(folder)
            if folder == Path(self.root):
                return

    def upload(self, local: Path, name: str) -> None:
        """Copy the local file to ``name`` (object stores; a local folder is written in place)."""
        try:
            self._s3.upload(local, name)
        except OSError as error:
            raise self._failed("upload", name, error) from error

    def download(self, name: str, local: Path, partial: Path) -> None:
        """Copy file ``name`` of an object store to ``local``, which appears whole or not at all.

        A missing file is no error here: it is for the reader to say what is missing.

        Args:
            partial: folder on the disk of ``local`` for the copy while it is not whole.
        """
        temporary = partial / uuid.uuid4().hex
        try:
            partial.mkdir(parents=True, exist_ok=True)
            local.parent.mkdir(parents=True, exist_ok=True)
            self._s3.download(name, temporary)
            temporary.replace(local)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed("download", name, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Remove one file; a missing file is fine."""
        try:
            Path(self.path(name)).unlink() if self.is_local else self._s3.delete(name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed("delete", name, error) from error

    def delete_folder(self, name: str) -> None:
        """Remove a folder and what is in it; a missing folder is fine."""
        try:
            shutil.rmtree(self.path(name)) if self.is_local else self._s3.delete_folder(name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed("delete", name, error) from error

    def _failed(self, operation: str, name: str, error: Exception) -> StorageError:
        return StorageError(
            f"cannot {operation}: {error}",
            where=self.address(name),
            remedy="check the address, the credentials and the free space, then give the same "
            "command again: it continues from the last published stage",
        )
