"""Where things live and which services are used: decided once, from the environment.

Every address has an embedded default, so that one command works on a fresh machine; giving an
address (``MLFLOW_TRACKING_URI=http://...``) moves that part out without another line of code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from components.pipeline import ray_sessions
from components.pipeline.credentials import withdraw_credentials
from components.pipeline.errors import UsageError

#: Telemetry of every dependency is off, and a busy machine gets time to start Prefect.
QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
    # MLflow asks git for the commit; without git its library would print a page about that.
    "GIT_PYTHON_REFRESH": "quiet",
}
#: How addresses of SQLite databases begin; the path follows as it is.
SQLITE = "sqlite:///"
#: The servers of this machine, which no proxy of the environment may stand in front of.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """The addresses in force.

    Attributes:
        home: folder of everything the platform writes locally (``REELFLOW_HOME``).
        store: URI of the artifact store (``ARTIFACT_ROOT``): a folder or ``s3://bucket/prefix``.
        tracking: MLflow tracking URI (``MLFLOW_TRACKING_URI``).
        prefect_api: Prefect server (``PREFECT_API_URL``); None starts one for each run.
        ray_address: Ray cluster (``RAY_ADDRESS``); None starts a local one when it is needed.
    """

    home: Path
    store: str
    tracking: str
    prefect_api: str | None
    ray_address: str | None

    @property
    def tracking_database(self) -> Path | None:
        """File of the SQLite database that MLflow keeps runs and models in; None elsewhere."""
        _, is_file, place = self.tracking.partition(SQLITE)
        # What follows are options of the connection, to MLflow too.
        return Path(place.partition("?")[0]) if is_file else None

    @property
    def scratch(self) -> Path:
        """Checkpoints and half-finished work of stages that have not been published yet."""
        return self.home / "scratch"

    @property
    def fetched(self) -> Path:
        """Local copies of artifacts that live in an object store."""
        return self.home / "fetched"


def load_settings(store: str | None = None) -> Settings:
    """Read the environment; ``store`` (the ``--store`` option) wins over ``ARTIFACT_ROOT``.

    Credentials are taken out of the addresses of servers, here and in the environment.

    Raises:
        UsageError: an address holds credentials that cannot be taken out, no address of a
            database could name ``home``, no folder can be there, or models are to be registered
            elsewhere.
    """
    withdraw_credentials()
    home = Path(os.environ.get("REELFLOW_HOME") or _default_home()).absolute()
    if "?" in str(home):
        raise UsageError(
            "a path with a question mark cannot hold the databases of MLflow and Prefect",
            where=str(home),
            remedy="give REELFLOW_HOME a path without one",
        )
    try:
        home.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # It may be made, or is told by whoever needs it.
        pass
    except OSError as error:
        raise UsageError(
            f"no folder can be there: {error.strerror}",
            where=str(home),
            remedy="give REELFLOW_HOME another path",
        ) from error
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{home / 'mlflow.db'}"
    if os.environ.get("MLFLOW_REGISTRY_URI", "") not in ("", tracking):
        # What gc may free is what no registered model needs; it must ask where models are kept.
        raise UsageError(
            "models are registered where runs are tracked, and this names another place",
            where="MLFLOW_REGISTRY_URI",
            remedy="unset it; MLFLOW_TRACKING_URI names the server of both",
        )
    # A child may reach the same place by another address.
    os.environ.pop("MLFLOW_REGISTRY_URI", None)
    return Settings(
        home=home,
        store=store or os.environ.get("ARTIFACT_ROOT") or str(home / "store"),
        tracking=tracking,
        prefect_api=os.environ.get("PREFECT_API_URL"),
        ray_address=os.environ.get("RAY_ADDRESS"),
    )


def _default_home() -> Path:
    """``.platform`` of the current folder.

    A worker of Prefect runs a flow in a folder that it removes; what the flow writes stays with the
    code. DVC runs an experiment of ``--temp`` or ``--queue`` in a copy of the project below
    ``.dvc/tmp/exps``, which it removes; what is published belongs to the project.
    """
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        return Path(__file__).resolve().parent.parent.parent / ".platform"
    here = Path.cwd()
    for folder in here.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2] / ".platform"
    return here / ".platform"


def prepare_environment(settings: Settings) -> None:
    """Switch telemetry off, keep Prefect inside ``home`` and proxies off this machine's servers.

    Call before any heavy import.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(settings.home / "prefect"))
    # A cluster of Ray is marked with it; see `ray_sessions`.
    os.environ["REELFLOW_SESSION_OWNER"] = str(settings.home)
    ray_sessions.choose_folder()
    # Its list of fonts would lie in the user's folder, which may not be there.
    os.environ.setdefault("MPLCONFIGDIR", str(settings.home / "matplotlib"))
    for name in ("NO_PROXY", "no_proxy"):
        exempt = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join([*exempt, *(h for h in LOOPBACK if h not in exempt)])
