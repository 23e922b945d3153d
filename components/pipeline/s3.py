"""What a store on S3 needs of S3: conditional puts, and operations that outlast its failures.

A request that fails is sent again by botocore, a few times within seconds. Where that is not
enough (an outage, a server that restarts, a body that broke off) the whole operation is tried
again, with growing pauses, until ``PATIENCE_S`` have passed since it first failed: an outage of
half a minute is survived, and a server that never comes back is reported after about one minute,
after one and a half if it takes connections and never answers. What waiting cannot mend (no such
bucket, no rights, no credentials) is reported at once.

Only tables that are written for other programs go through pyarrow.fs. Arrow has no patience for
reads, cannot put on condition, fails without a retry when the text of a refusal is longer than the
small object it asked for, needs three requests to write one, and leaves folder markers where it
deletes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse

from components.pipeline.console import say
from components.pipeline.errors import UsageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 20
#: Of one request, with pauses that double from one second.
MAX_ATTEMPTS = 4
#: How long after its first failure an operation is begun again.
PATIENCE_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 4.0
#: A person is told of an operation that has failed for so long.
TELL_AFTER_S = 5.0
#: Arrow's own retries of tables that it writes; its pauses add up to about PATIENCE_S.
ARROW_ATTEMPTS = 9
THREADS_PER_FILE = 4
KEYS_PER_DELETE = 1000
#: As many threads read objects at once, and more than those of one transfer.
CONNECTIONS = 32

#: What decides which S3 is spoken to, and as whom.
ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)

T = TypeVar("T")


class Unreachable(OSError):
    """S3 did not do it this time; it may the next time."""


class NoBucket(OSError):
    """There is no such bucket."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object of a listing; ``name`` is relative to the folder that was listed from."""

    name: str
    size: int
    written: datetime
    etag: str = ""


@dataclass(frozen=True)
class UnfinishedUpload:
    """Parts of an object that a dead process began to upload; they cost space and are not seen."""

    name: str
    id: str
    begun: datetime


def filesystem() -> FileSystem:
    """The Arrow file system for the S3 of the environment.

    Raises:
        UsageError: the endpoint is not an address.
    """
    return _filesystem(_environment())


def s3_client() -> Any:
    return _client_of(_environment(), MAX_ATTEMPTS, REQUEST_TIMEOUT_S)


def _client_for(once: bool) -> tuple[Any, float | None]:
    """A client and the patience with it; ``once``: one request, a short wait for its answer."""
    if not once:
        return s3_client(), None
    return _client_of(_environment(), 1, CONNECT_TIMEOUT_S), 0.0


def _environment() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in ENVIRONMENT)


# One connection for each environment, not one for ever: the address may change within a process.
@functools.cache
def _filesystem(environment: tuple[str | None, ...]) -> FileSystem:
    from pyarrow import fs

    address = endpoint()
    parsed = urlparse(address) if address else None
    return fs.S3FileSystem(
        region=_region(),
        endpoint_override=parsed.netloc if parsed else None,
        scheme=parsed.scheme if parsed else "https",
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ARROW_ATTEMPTS),
    )


@functools.cache
def _client_of(environment: tuple[str | None, ...], attempts: int, timeout_s: float) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=timeout_s,
        max_pool_connections=CONNECTIONS,
        # Other makes of S3 refuse the newer checksums; manifests hold a digest of every file.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return Session().client("s3", endpoint_url=endpoint(), region_name=_region(), config=config)


def endpoint() -> str | None:
    """The address of the S3 service; None for that of AWS.

    Raises:
        UsageError: it is not an address, or holds credentials.
    """
    name = "AWS_ENDPOINT_URL_S3" if os.environ.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL"
    address = os.environ.get(name)
    if address and "@" in address:
        raise UsageError(
            "an address of a service may not hold credentials",
            where=name,
            remedy="give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or as AWS_PROFILE",
        )
    if address and not address.startswith(("http://", "https://")):
        raise UsageError(
            f"'{address}' is not an address",
            where=name,
            remedy="begin it with http:// or https://",
        )
    return address or None


def _region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


class S3Folder:
    """Objects below ``bucket/prefix``.

    Every method raises FileNotFoundError for a missing object and OSError for any other failure,
    as a disk does.
    """

    def __init__(self, root: str) -> None:
        self._bucket, _, prefix = root.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def read(self, name: str) -> bytes:
        def get() -> bytes:
            answer = s3_client().get_object(**self._object(name))
            return bytes(answer["Body"].read())

        return persistently(get)

    def read_range(self, file: ObjectInfo, start: int, size: int) -> bytes:
        """At most ``size`` bytes from ``start`` on of an object as it was when it was listed."""
        last = min(start + size, file.size) - 1
        if last < start:
            return b""

        def get() -> bytes:
            answer = s3_client().get_object(
                **self._object(file.name), Range=f"bytes={start}-{last}", IfMatch=file.etag
            )
            return bytes(answer["Body"].read())

        return persistently(get)

    def exists(self, name: str) -> bool:
        try:
            persistently(lambda: s3_client().head_object(**self._object(name)))
        except FileNotFoundError:
            return False
        return True

    def age(self, name: str) -> float:
        """Seconds since an object was written, by the clock of the server alone."""
        answer = persistently(lambda: s3_client().head_object(**self._object(name)))
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - answer["LastModified"]).total_seconds())

    def put(
        self,
        name: str,
        data: bytes,
        *,
        replace: bool,
        before: Callable[[], None] | None = None,
        once: bool = False,
    ) -> bool:
        """Write an object; without ``replace`` only where there is none. Whether it was written.

        Args:
            before: called before every single request.
        """
        from botocore.exceptions import ClientError

        condition = {} if replace else {"IfNoneMatch": "*"}
        client, patience_s = _client_for(once)
        if before is not None:
            client = _client_of(_environment(), 1, REQUEST_TIMEOUT_S)

        def put() -> str:
            if before is not None:
                before()
            try:
                client.put_object(**self._object(name), Body=data, **condition)
                return "written"
            except ClientError as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    return "there"
                # Two conditional writes met: S3 tells the loser to try again.
                if _code(error) in ("ConditionalRequestConflict", "409"):
                    return "conflict"
                raise

        for _ in range(MAX_ATTEMPTS):
            outcome = persistently(put, patience_s=patience_s)
            if outcome != "conflict":
                return outcome == "written"
        raise OSError(f"another writer was in the way {MAX_ATTEMPTS} times")

    def upload(self, local: Path, name: str) -> None:
        key, how = self._prefix + name, _Transfer()
        persistently(
            lambda: s3_client().upload_file(str(local), self._bucket, key, **how.options), how
        )

    def download(self, name: str, local: Path) -> None:
        key, how = self._prefix + name, _Transfer()
        persistently(
            lambda: s3_client().download_file(self._bucket, key, str(local), **how.options), how
        )

    def entries(self, prefix: str) -> list[ObjectInfo]:
        """All objects whose name begins with ``prefix``, in the order of their names."""

        def walk() -> list[ObjectInfo]:
            pages = s3_client().get_paginator("list_objects_v2")
            return [
                ObjectInfo(
                    item["Key"][len(self._prefix) :],
                    item["Size"],
                    item["LastModified"],
                    item["ETag"],
                )
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
                for item in page.get("Contents", [])
            ]

        return persistently(walk)

    def delete(self, name: str, *, once: bool = False) -> None:
        client, patience_s = _client_for(once)
        persistently(lambda: client.delete_object(**self._object(name)), patience_s=patience_s)

    def delete_folder(self, name: str, *, once: bool = False) -> None:
        """Remove all objects below ``name``."""
        client, patience_s = _client_for(once)

        def delete() -> None:
            pages = client.get_paginator("list_objects_v2")
            keys: list[dict[str, str]] = []
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}{name}/"):
                keys += [{"Key": item["Key"]} for item in page.get("Contents", [])]
            for start in range(0, len(keys), KEYS_PER_DELETE):
                batch = {"Objects": keys[start : start + KEYS_PER_DELETE], "Quiet": True}
                answer = client.delete_objects(Bucket=self._bucket, Delete=batch)
                if answer.get("Errors"):
                    raise Unreachable(str(answer["Errors"][0]))

        persistently(delete, patience_s=patience_s)

    def unfinished_uploads(self, prefix: str) -> list[UnfinishedUpload]:
        """Uploads in parts of names that begin with ``prefix``, begun and not ended."""

        def walk() -> list[UnfinishedUpload]:
            pages = s3_client().get_paginator("list_multipart_uploads")
            start = self._prefix + prefix
            return [
                UnfinishedUpload(
                    item["Key"][len(self._prefix) :], item["UploadId"], item["Initiated"]
                )
                for page in pages.paginate(Bucket=self._bucket, Prefix=start)
                for item in page.get("Uploads", [])
                # Some makes of S3 do not heed the prefix.
                if item["Key"].startswith(start)
            ]

        return persistently(walk)

    def abort(self, upload: UnfinishedUpload) -> None:
        from botocore.exceptions import ClientError

        place = {**self._object(upload.name), "UploadId": upload.id}

        def abort() -> None:
            try:
                s3_client().abort_multipart_upload(**place)
            except ClientError as error:
                # It ended meanwhile, one way or the other.
                if _code(error) != "NoSuchUpload":
                    raise

        persistently(abort)

    def _object(self, name: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}


class _Transfer:
    """A file on its way, and when a byte of it moved last."""

    def __init__(self) -> None:
        from boto3.s3.transfer import TransferConfig

        self.moved = 0.0
        config = TransferConfig(max_concurrency=THREADS_PER_FILE)
        self.options = {"Config": config, "Callback": self._note}

    def _note(self, size: int) -> None:
        self.moved = time.monotonic()


def persistently(
    operation: Callable[[], T],
    transfer: _Transfer | None = None,
    *,
    patience_s: float | None = None,
) -> T:
    """Do it, and again while it fails in a way that may pass.

    Args:
        transfer: of a file; it fails since its last byte moved, not since it began.
        patience_s: how long, if not ``PATIENCE_S``.

    Raises:
        FileNotFoundError: there is no such object.
        Unreachable: it kept failing for ``patience_s`` (``PATIENCE_S``).
        OSError: it failed in a way that will not pass.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    first_failed, pause, told = 0.0, FIRST_PAUSE_S, False
    while True:
        begun = time.monotonic()
        try:
            with _as_os_error():
                return operation()
        except Unreachable as error:
            now = time.monotonic()
            first_failed = first_failed or max(begun, transfer.moved if transfer else 0.0)
            left = patience_s - (now - first_failed)
            if left <= 0:
                if not patience_s:
                    raise
                text = f"{error} (tried again for {now - first_failed:.0f} s)"
                raise Unreachable(text) from error
            if not told and now - first_failed > TELL_AFTER_S:
                told = True
                say(f"storage: {error}; trying again for up to {left:.0f} s")
            # Not all at the same instant: many transfers fail together.
            time.sleep(min(left, pause * random.uniform(0.5, 1)))
            pause = min(2 * pause, LONGEST_PAUSE_S)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        raise _of_refusal(error) from error
    except Boto3Error as error:
        # boto3 wraps what botocore said about an upload or a download.
        inner = getattr(error, "last_exception", None) or error.__cause__ or error.__context__
        if isinstance(inner, ClientError):
            raise _of_refusal(inner) from error
        raise Unreachable(str(inner or error)) from error
    except (
        HTTPClientError,
        IncompleteReadError,
        ResponseParserError,
        # botocore passes these on where the body of a small answer breaks off.
        HTTPError,
        ConnectionError,
        TimeoutError,
    ) as error:
        # The connection broke, before the answer or within it, or there was none.
        raise Unreachable(_one_line(error)) from error
    except BotoCoreError as error:
        from botocore.exceptions import ConnectionError as NoConnection

        kind = Unreachable if isinstance(error, NoConnection) else OSError
        raise kind(_one_line(error)) from error


def _of_refusal(error: Any) -> OSError:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = _code(error)
    if code in ("NoSuchKey", "404"):
        return FileNotFoundError(_one_line(error))
    if code == "NoSuchBucket":
        return NoBucket(_one_line(error))
    # An upload in parts that the server forgot when it restarted begins anew.
    may_pass = ("RequestTimeout", "SlowDown", "IncompleteBody", "BadDigest", "NoSuchUpload")
    if status in (0, 200, 408, 429) or status >= 500 or code in may_pass:
        return Unreachable(_one_line(error))
    return OSError(_one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code"))
