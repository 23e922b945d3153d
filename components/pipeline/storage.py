"""Files behind a URI: a local folder or an S3 bucket, with the writes that publishing needs.

Publishing needs a write that exactly one of several writers wins: a conditional put on S3, a hard
link on a local disk.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO
from urllib.parse import unquote

from components.pipeline.errors import StorageError, UsageError
from components.pipeline.s3 import ObjectInfo, S3Folder, UnfinishedUpload, filesystem

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def nearest_existing(folder: Path) -> Path:
    """``folder``, or the nearest above it that is there; links to nothing count as there."""
    for place in (folder.absolute(), *folder.absolute().parents):
        with contextlib.suppress(OSError):
            if place.exists() or place.is_symlink():
                return place
    return Path("/")


def parse_uri(uri: str) -> tuple[Literal["file", "s3"], str]:
    """Where ``uri`` points: ``file`` and an absolute path, or ``s3`` and ``bucket/prefix``.

    Args:
        uri: a local path, ``file:///path`` (percent-encoded) or ``s3://bucket/prefix``.

    Raises:
        UsageError: the scheme is not one of these, or the URI names no folder or holds
            credentials.
    """
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the path {uri!r} is not UTF-8", remedy="rename the folder, or give another one"
        ) from None
    if "\0" in unquote(uri):
        raise UsageError(
            f"the path {uri!r} holds a null byte, which no file system knows",
            remedy="give another one",
        )
    scheme, separator, rest = uri.partition("://")
    if separator and "@" in rest.partition("/")[0]:
        raise UsageError(
            f"the address {scheme}://***@{rest.partition('/')[0].rpartition('@')[2]} holds "
            "credentials, which logs and pages would show",
            remedy="leave them out; give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE or a role, as for any AWS program",
        )
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
        return [file.name for file in self.files(prefix) if file.name.endswith(suffix)]

    def times(self, prefix: str) -> dict[str, float]:
        """Name → time of the last change (Unix time, of the store's clock), sorted by name."""
        return {file.name: file.written.timestamp() for file in self.files(prefix)}

    def files(self, prefix: str) -> list[ObjectInfo]:
        """All files below ``prefix``, by name."""
        try:
            if not self.is_local:
                return self._s3.entries(f"{prefix}/" if prefix else "")
            return sorted(self._files_local(prefix), key=lambda file: file.name)
        except OSError as error:
            raise self._failed("list", prefix, error) from error

    def _files_local(self, prefix: str) -> Iterator[ObjectInfo]:
        for path in Path(self.path(prefix)).rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    status = path.stat()
                    written = dt.datetime.fromtimestamp(status.st_mtime, dt.UTC)
                    name = path.relative_to(self.root).as_posix()
                    yield ObjectInfo(name, status.st_size, written)

    def put(
        self,
        name: str,
        data: bytes,
        *,
        replace: bool,
        before: Callable[[], None] | None = None,
        once: bool = False,
    ) -> bool:
        """Write file ``name`` in one atomic step.

        Args:
            replace: overwrite an existing file; otherwise an existing file is left alone.
            once: do not try again where an object store does not do it at once.
            before: called right before each request to an object store, which may have been away
                since the last one; what it raises ends the attempts.

        Returns:
            Whether this call wrote the file (False: it was there and ``replace`` is False).
        """
        try:
            if self.is_local:
                return self._put_local(name, data, replace)
            return self._s3.put(name, data, replace=replace, before=before, once=once)
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

    def delete(self, name: str, *, once: bool = False) -> None:
        """Remove one file; a missing file is fine.

        Args:
            once: do not try again where an object store does not do it at once.
        """
        try:
            if self.is_local:
                Path(self.path(name)).unlink()
            else:
                self._s3.delete(name, once=once)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed("delete", name, error) from error

    def exists(self, name: str) -> bool:
        """Whether there is a file ``name`` (object stores)."""
        try:
            return self._s3.exists(name)
        except OSError as error:
            raise self._failed("look for", name, error) from error

    def age(self, name: str) -> float | None:
        """Seconds since file ``name`` was written, by the store's clock (object stores)."""
        try:
            return self._s3.age(name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed("look for", name, error) from error

    def unfinished_uploads(self, prefix: str) -> list[UnfinishedUpload]:
        """Files below ``prefix`` that a dead process began to upload; none in a local folder."""
        try:
            return [] if self.is_local else self._s3.unfinished_uploads(prefix)
        except OSError as error:
            raise self._failed("list uploads", prefix, error) from error

    def abort(self, upload: UnfinishedUpload) -> None:
        """Free the parts of an unfinished upload."""
        try:
            self._s3.abort(upload)
        except OSError as error:
            raise self._failed("abort the upload of", upload.name, error) from error

    def delete_folder(self, name: str, *, once: bool = False) -> None:
        """Remove a folder and what is in it; a missing folder is fine.

        Args:
            once: where an object store does not do it at once, leave it to ``reelflow gc``.
        """
        try:
            if self.is_local:
                shutil.rmtree(self.path(name))
            else:
                self._s3.delete_folder(name, once=once)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed("delete", name, error) from error

    def _failed(self, operation: str, name: str, error: Exception) -> StorageError:
        return storage_error(operation, self.address(name), error)


def storage_error(operation: str, address: str, error: Exception) -> StorageError:
    """What could not be done to which file, and how to go on."""
    return StorageError(
        f"cannot {operation}: {error}",
        where=address,
        remedy="check the address, the credentials and the free space (reelflow doctor), then "
        "give the same command again: it goes on after the last published stage, and an "
        "unfinished training from its last checkpoint",
    )
