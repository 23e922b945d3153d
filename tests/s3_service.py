"""An S3 service inside the test process, with the environment that leads to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def s3_service() -> Iterator[str]:
    """Yield its address; ``AWS_*`` point to it meanwhile."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        # Set by the platform for MLflow, in this process for good.
        patch.setenv("MLFLOW_S3_ENDPOINT_URL", "")
        patch.delenv("MLFLOW_S3_ENDPOINT_URL")
        try:
            yield address
        finally:
            server.stop()
