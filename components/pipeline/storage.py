"""Files behind a URI: a local folder or an S3 bucket, with the two writes that publishing needs.

Reading and bulk writing go through pyarrow.fs. What Arrow lacks, a conditional put, is boto3 on
S3 and a hard link on a local disk; both make exactly one of several writers win.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from components.pipeline.errors import StorageError, UsageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 30
MAX_ATTEMPTS = 5


def open_uri(uri: str) -> tuple[FileSystem, str]:
    """The file system of ``uri`` and the path inside it.

    Args:
        uri: a local path, ``file:///path`` or ``s3://bucket/prefix``. Credentials, region and
            endpoint of S3 come from the usual AWS variables and files, never from the URI.

    Raises:
        UsageError: the scheme is not one of these.
    """
    from pyarrow import fs

    parsed = urlparse(uri)
    if parsed.scheme == "s3":
        return _s3_filesystem(), f"{parsed.netloc}{parsed.path}".rstrip("/")
    if parsed.scheme == "file":
        return fs.LocalFileSystem(), parsed.path
    if parsed.scheme and "://" in uri:
        raise UsageError(
            f"cannot open '{uri}': unknown scheme '{parsed.scheme}'",
            remedy="give a folder, file:///folder or s3://bucket/prefix",
        )
    return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


@functools.cache
def _s3_filesystem() -> FileSystem:
    from pyarrow import fs

    endpoint = _s3_endpoint()
    parsed = urlparse(endpoint) if endpoint else None
    return fs.S3FileSystem(
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        endpoint_override=parsed.netloc if parsed else None,
        scheme=parsed.scheme if parsed else "https",
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@functools.cache
def _s3_client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=_s3_endpoint(),
        config=Config(
            retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=REQUEST_TIMEOUT_S,
        ),
    )


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
            return (
                self._put_local(name, data, replace)
                if self.is_local
                else self._put_s3(name, data, replace)
            )
        except OSError as error:
            raise self._failed("write", name, error) from error

    def _put_local(self, name: str, data: bytes, replace: bool) -> bool:
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                Path(temporary).replace(target)
                return True
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            return True
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _put_s3(self, name: str, data: bytes, replace: bool) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, prefix = self.root.partition("/")
        key = f"{prefix}/{name}" if prefix else name
        condition = {} if replace else {"IfNoneMatch": "*"}
        try:
            _s3_client().put_object(Bucket=bucket, Key=key, Body=data, **condition)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
                return False
            raise self._failed("write", name, error) from error
        except BotoCoreError as error:
            raise self._failed("write", name, error) from error
        return True

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

    def download(self, name: str, local: Path) -> None:
        """Copy file ``name`` to ``local``, which appears whole or not at all."""
        from pyarrow.fs import LocalFileSystem, copy_files

        local.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=local.parent, prefix=".", suffix=".tmp")
        os.close(handle)
        try:
            copy_files(
                self.path(name),
                temporary,
                source_filesystem=self.fs,
                destination_filesystem=LocalFileSystem(),
            )
            Path(temporary).replace(local)
        except OSError as error:
            raise self._failed("download", name, error) from error
        finally:
            Path(temporary).unlink(missing_ok=True)

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
