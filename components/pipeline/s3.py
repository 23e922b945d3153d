"""What a store on S3 needs of S3: conditional puts, and transfers that survive refusals.

Objects go through boto3 and only listings and tables read in place through pyarrow.fs. Arrow
cannot put on condition, fails without a retry when the text of a refusal is longer than the small
object it asked for, needs three requests to write one, and leaves folder markers where it deletes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from components.pipeline.errors import UsageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 30
MAX_ATTEMPTS = 5
THREADS_PER_FILE = 4
KEYS_PER_DELETE = 1000

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


def filesystem() -> FileSystem:
    """The Arrow file system for the S3 of the environment.

    Raises:
        UsageError: the endpoint is not an address.
    """
    return _filesystem(_environment())


def s3_client() -> Any:
    return _client_of(_environment())


def _environment() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in ENVIRONMENT)


# One connection for each environment, not one for ever: the address may change within a process.
@functools.cache
def _filesystem(environment: tuple[str | None, ...]) -> FileSystem:
    from pyarrow import fs

    endpoint = _endpoint()
    parsed = urlparse(endpoint) if endpoint else None
    return fs.S3FileSystem(
        region=_region(),
        endpoint_override=parsed.netloc if parsed else None,
        scheme=parsed.scheme if parsed else "https",
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )


@functools.cache
def _client_of(environment: tuple[str | None, ...]) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=REQUEST_TIMEOUT_S,
        # Other makes of S3 refuse the newer checksums; manifests hold a digest of every file.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return Session().client("s3", endpoint_url=_endpoint(), region_name=_region(), config=config)


def _endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UsageError(
            f"'{endpoint}' is not an address",
            where="AWS_ENDPOINT_URL",
            remedy="begin it with http:// or https://",
        )
    return endpoint or None


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
        with _as_os_error():
            answer = s3_client().get_object(Bucket=self._bucket, Key=self._prefix + name)
            return bytes(answer["Body"].read())

    def put(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Write an object; without ``replace`` only where there is none. Whether it was written."""
        from botocore.exceptions import ClientError

        condition = {} if replace else {"IfNoneMatch": "*"}
        for _ in range(MAX_ATTEMPTS):
            with _as_os_error():
                try:
                    s3_client().put_object(
                        Bucket=self._bucket, Key=self._prefix + name, Body=data, **condition
                    )
                    return True
                except ClientError as error:
                    if _code(error) in ("PreconditionFailed", "412"):
                        return False
                    # Two conditional writes met: S3 tells the loser to try again.
                    if _code(error) not in ("ConditionalRequestConflict", "409"):
                        raise
        raise OSError(f"another writer was in the way {MAX_ATTEMPTS} times")

    def upload(self, local: Path, name: str) -> None:
        with _as_os_error():
            s3_client().upload_file(
                str(local), self._bucket, self._prefix + name, Config=_transfer_config()
            )

    def download(self, name: str, local: Path) -> None:
        with _as_os_error():
            s3_client().download_file(
                self._bucket, self._prefix + name, str(local), Config=_transfer_config()
            )

    def delete(self, name: str) -> None:
        with _as_os_error():
            s3_client().delete_object(Bucket=self._bucket, Key=self._prefix + name)

    def delete_folder(self, name: str) -> None:
        with _as_os_error():
            pages = s3_client().get_paginator("list_objects_v2")
            keys: list[dict[str, str]] = []
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}{name}/"):
                keys += [{"Key": item["Key"]} for item in page.get("Contents", [])]
            for start in range(0, len(keys), KEYS_PER_DELETE):
                batch = {"Objects": keys[start : start + KEYS_PER_DELETE], "Quiet": True}
                answer = s3_client().delete_objects(Bucket=self._bucket, Delete=batch)
                if answer.get("Errors"):
                    raise OSError(str(answer["Errors"][0]))


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(max_concurrency=THREADS_PER_FILE)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        kind = FileNotFoundError if _code(error) in ("NoSuchKey", "404") else OSError
        raise kind(str(error)) from error
    except (BotoCoreError, Boto3Error) as error:
        raise OSError(str(error)) from error


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code"))
