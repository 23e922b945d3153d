"""MLflow's own tracking server on a port of this machine, for those alone who know the password.

``python mlflow_behind_password.py PORT DATABASE`` with the login in ``LOGIN`` (``user:password``).
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def main() -> None:
    port, database = int(sys.argv[1]), Path(sys.argv[2])
    from mlflow.server import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR

    os.environ[BACKEND_STORE_URI_ENV_VAR] = f"sqlite:///{database}"
    os.environ[ARTIFACT_ROOT_ENV_VAR] = (database.parent / "artifacts").as_uri()
    from mlflow.server import app
    from werkzeug.serving import run_simple

    expected = "Basic " + base64.b64encode(os.environ["LOGIN"].encode()).decode()

    def guarded(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ.get("HTTP_AUTHORIZATION") == expected:
            return app(environ, start)
        start("401 Unauthorized", [("WWW-Authenticate", "Basic"), ("Content-Length", "0")])
        return []

    run_simple("127.0.0.1", port, guarded, threaded=True)


if __name__ == "__main__":
    main()
