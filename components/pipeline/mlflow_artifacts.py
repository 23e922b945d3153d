"""MLflow's files in an object store: reached as the store is, with the same patience and errors.

Left to itself MLflow asks another endpoint, gives up within seconds, waits for minutes where no
answer comes, and says what failed in a traceback. It stays free to read the same files without this
module: ``models:/…`` loads in any process with the usual AWS variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

from components.pipeline.s3 import endpoint, persistently, s3_client
from components.pipeline.storage import storage_error

T = TypeVar("T")


class StoreArtifacts(S3ArtifactRepository):
    """What MLflow keeps below one ``s3://`` address."""

    def _get_s3_client(self) -> Any:
        return s3_client()

    def _upload_file(self, s3_client: Any, local_file: str, bucket: str, key: str) -> None:
        work = super()._upload_file
        self._do("upload", f"s3://{bucket}/{key}", lambda: work(s3_client, local_file, bucket, key))

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        work, address = super()._download_file, f"{self.artifact_uri}/{remote_file_path}"
        self._do("download", address, lambda: work(remote_file_path, local_path))

    def _iterate_s3_paginated_results(self, bucket: str, prefix: str) -> Iterator[Any]:
        def walk() -> list[Any]:
            pages = s3_client().get_paginator("list_objects_v2")
            return list(pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"))

        yield from self._do("list", f"s3://{bucket}/{prefix}", walk)

    def _do(self, operation: str, address: str, work: Callable[[], T]) -> T:
        try:
            return persistently(work)
        except OSError as error:
            raise storage_error(operation, address, error) from error


def use() -> None:
    """From now on MLflow of this process reaches ``s3://`` addresses this way."""
    address = endpoint()
    if address:
        # For processes that MLflow or a stage starts: they have MLflow's own way only.
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", address)
    # MLflow's other way to register one, an entry point, would bind every program of the
    # environment to this one.
    artifact_repository_registry._artifact_repository_registry.register("s3", StoreArtifacts)
