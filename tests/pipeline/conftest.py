"""What tests of the pipeline share: tiny stages, an S3 server, a database for MLflow."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from real_services import NewDatabase, S3Server, migrated_database
from tiny_stages import Tiny, tiny_registry

LOCAL = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    """Three tiny stages and nothing else in the registry."""
    with tiny_registry() as stages:
        yield stages


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3(_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The S3 server, addressed by the environment, with a new bucket at `s3.uri`."""
    import boto3

    _s3_server.reset()
    for name, value in {**LOCAL, "AWS_ENDPOINT_URL": _s3_server.endpoint}.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=_s3_server.endpoint).create_bucket(Bucket=bucket)
    _s3_server.uri = f"s3://{bucket}/a store"
    yield _s3_server
    _s3_server.reset()


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> NewDatabase:
    """Made once: the migrations of MLflow take seconds."""
    return migrated_database(tmp_path_factory.mktemp("mlflow"))
