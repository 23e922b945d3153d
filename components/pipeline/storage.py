"""Files behind a URI: a local folder or an S3 bucket, with the two writes that publishing needs.

Reading and bulk writing go through pyarrow.fs. What Arrow lacks, a conditional put, is boto3 on
S3 and a hard link on a local disk; both make exactly one of several writers win.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from components.pipeline.errors import StorageError, UsageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 30
MAX_ATTEMPTS = 5

#: What decides which S3 is spoken to, and as whom.
S3_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


def open_uri(uri: str) -> tuple[FileSystem, str]:
    """The file system of ``uri`` and the path inside it.

    Args:
        uri: a local path, ``file:///path`` or ``s3://bucket/prefix``. Credentials, region and
            endpoint of S3 come from the usual AWS variables and files, never from the URI.

    Raises:
        UsageError: the scheme is not one of these, or the URI names no folder.
    """
    from pyarrow import fs

    scheme, separator, rest = uri.partition("://")
    if not separator:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    if scheme == "s3" and rest.strip("/") and not rest.startswith("/"):
        return _s3_filesystem(_s3_environment()), rest.rstrip("/")
    if scheme == "file" and rest.startswith("/"):
        return fs.LocalFileSystem(), unquote(rest)
    raise UsageError(
        f"cannot open '{uri}'", remedy="give a folder, file:///folder or s3://bucket/prefix"
    )


def _s3_environment() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in S3_ENVIRONMENT)


# One connection for each environment, not one for ever: the address may change within a process.
@functools.cache
def _s3_filesystem(environment: tuple[str | None, ...]) -> FileSystem:
    from pyarrow import fs

    endpoint = _s3_endpoint()
    parsed = urlparse(endpoint) if endpoint else None
    return fs.S3FileSystem(
        region=_s3_region(),
        endpoint_override=parsed.netloc if parsed else None,
        scheme=parsed.scheme if parsed else "https",
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )


def _s3_endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UsageError(
            f"'{endpoint}' is not an address",
            where="AWS_ENDPOINT_URL",
            remedy="begin it with http:// or https://",
        )
    return endpoint or None


def _s3_region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


@functools.cache
def _s3_client(environment: tuple[str | None, ...]) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        endpoint_url=_s3_endpoint(),
        region_name=_s3_region(),
        config=Config(
            retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=REQUEST_TIMEOUT_S,
        ),
    )


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; processes of one machine take turns.

    The kernel frees the lock of a killed process. The file is removed by its holder, so that
    locks do not pile up; whoever waited for a removed file starts anew with the next one.

    Args:
        on_wait: called once if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        with path.open("a") as file:
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

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def read(self, name: str) -> bytes | None:
        """The bytes of file ``name``; None if there is no such file."""
        try:
            with self.fs.open_input_file(self.path(name)) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed("read", name, error) from error

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """Names (relative to the folder) of all files below ``prefix``, sorted."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self.path(prefix), allow_not_found=True, recursive=True)
        try:
            infos = self.fs.get_file_info(selector)
        except OSError as error:
            raise self._failed("list", prefix, error) from error
        cut = len(self.root) + 1
        return sorted(
            info.path[cut:]
            for info in infos
            if info.type == FileType.File and info.path.endswith(suffix)
        )

    def put(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Write file ``name`` in one atomic step.

        Args:
            replace: overwrite an existing file; otherwise an existing file is left alone.

        Returns:
            Whether this call wrote the file (False: it was there and ``replace`` is False).
        """
        try:
            put = self._put_local if self.is_local else self._put_s3
            return put(name, data, replace)
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

    def _put_s3(self, name: str, data: bytes, replace: bool) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, prefix = self.root.partition("/")
        key = f"{prefix}/{name}" if prefix else name
        condition = {} if replace else {"IfNoneMatch": "*"}
        failure: Exception | None = None
        for _ in range(MAX_ATTEMPTS):
            try:
                client = _s3_client(_s3_environment())
                client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
                return True
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code")
                if code in ("PreconditionFailed", "412"):
                    return False
                failure = error
                # Two conditional writes met: S3 tells the loser to try again.
                if code not in ("ConditionalRequestConflict", "409"):
                    break
            except BotoCoreError as error:
                failure = error
                break
        assert failure is not None
        raise self._failed("write", name, failure) from failure

    def upload(self, local: Path, name: str) -> None:
        """Copy the local file to ``name`` (object stores; a local folder is written in place)."""
        from pyarrow.fs import LocalFileSystem, copy_files

        try:
            copy_files(
                str(local),
                self.path(name),
                source_filesystem=LocalFileSystem(),
                destination_filesystem=self.fs,
            )
        except OSError as error:
            raise self._failed("upload", name, error) from error

    def download(self, name: str, local: Path, partial: Path) -> None:
        """Copy file ``name`` to ``local``, which appears whole or not at all.

        A missing file is no error here: it is for the reader to say what is missing.

        Args:
            partial: folder on the disk of ``local`` for the copy while it is not whole.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        temporary = partial / uuid.uuid4().hex
        try:
            partial.mkdir(parents=True, exist_ok=True)
            local.parent.mkdir(parents=True, exist_ok=True)
            copy_files(
                self.path(name),
                str(temporary),
                source_filesystem=self.fs,
                destination_filesystem=LocalFileSystem(),
            )
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
            self.fs.delete_file(self.path(name))
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed("delete", name, error) from error

    def delete_folder(self, name: str) -> None:
        """Remove a folder and what is in it; a missing folder is fine."""
        try:
            self.fs.delete_dir(self.path(name))
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failed("delete", name, error) from error

    def _failed(self, operation: str, name: str, error: Exception) -> StorageError:
        return StorageError(
            f"cannot {operation}: {error}",
            where=f"{self.uri.rstrip('/')}/{name}",
            remedy="check the address, the credentials and the free space, then give the same "
            "command again: it continues from the last published stage",
        )
