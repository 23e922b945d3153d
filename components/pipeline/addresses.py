"""Which addresses are in force, why, and whether what stands there answers."""

from __future__ import annotations

import os
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from components.pipeline.errors import UsageError
from components.pipeline.finding import Finding
from components.pipeline.settings import Settings
from components.pipeline.storage import parse_uri

GIB = 1024**3
CONNECT_WITHIN_S = 1.5
DISK_WANTED = 5 * GIB


def home(settings: Settings) -> Finding:
    """Where the platform keeps its own files."""
    why = "REELFLOW_HOME" if os.environ.get("REELFLOW_HOME") else "default; REELFLOW_HOME moves it"
    return _folder("home", settings.home, why)


def _folder(subject: str, folder: Path, why: str, shown: str = "") -> Finding:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    text = f"{shown or folder} ({why})"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(subject, f"{text}: cannot write to {existing}", "name another folder", True)
    free = shutil.disk_usage(existing).free
    text += f": {gib(free)} free"
    if free < DISK_WANTED:
        return Finding(subject, text, "reelflow gc frees what nothing needs any more")
    return Finding(subject, text)


def store(settings: Settings) -> Finding:
    """Where artifacts are published."""
    given = os.environ.get("ARTIFACT_ROOT")
    if settings.store == given:
        why = "ARTIFACT_ROOT"
    elif settings.store == str(settings.home / "store"):
        why = "default; ARTIFACT_ROOT or --store moves it"
    else:
        why = "--store"
    try:
        scheme, path = parse_uri(settings.store)
    except UsageError as error:
        text = f"{hide_password(settings.store)} ({why}): cannot be"
        return Finding("store", text, error.remedy or "", True)
    if scheme == "s3":
        return _bucket(settings.store, why)
    return _folder("store", Path(path), why)


def _bucket(uri: str, why: str) -> Finding:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket = urlsplit(uri).netloc
    text = f"{uri} ({why})"
    once = Config(
        connect_timeout=CONNECT_WITHIN_S,
        read_timeout=CONNECT_WITHIN_S,
        retries={"mode": "standard", "total_max_attempts": 1},
    )
    try:
        client = boto3.client("s3", config=once)
        text += f" at {client.meta.endpoint_url}"
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        code = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        said, remedy = {
            404: (f"there is no bucket '{bucket}'", f"make it: aws s3 mb s3://{bucket}"),
            403: ("the credentials may not use it", "check AWS_ACCESS_KEY_ID or AWS_PROFILE"),
        }.get(code, (str(error), "check the address and the service"))
        return Finding("store", f"{text}: {said}", remedy, broken=True)
    except BotoCoreError as error:
        remedy = "check AWS_ENDPOINT_URL, AWS_REGION, the credentials and the network"
        return Finding("store", f"{text}: {error}", remedy, broken=True)
    return Finding("store", f"{text}: answers")


def tracking(settings: Settings) -> Finding:
    """Where MLflow keeps runs and models."""
    given = bool(os.environ.get("MLFLOW_TRACKING_URI"))
    why = "MLFLOW_TRACKING_URI" if given else "default; MLFLOW_TRACKING_URI names a server"
    uri = settings.tracking
    text = f"{hide_password(uri)} ({why})"
    if uri.startswith(("http://", "https://")):
        return _http("tracking", f"{uri.rstrip('/')}/health", text)
    if uri.startswith("sqlite:///"):
        return _folder("tracking", Path(uri.removeprefix("sqlite:///")).parent, why, shown=uri)
    database = urlsplit(uri)
    if database.hostname:
        port = database.port or {"postgresql": 5432, "mysql": 3306}.get(
            database.scheme.split("+")[0], 0
        )
        return _tcp("tracking", database.hostname, port, text)
    return Finding("tracking", text)


def prefect(settings: Settings) -> Finding:
    """The server that keeps flow runs."""
    if not settings.prefect_api:
        return Finding(
            "prefect", "started inside each run (default; PREFECT_API_URL names a server)"
        )
    text = f"{hide_password(settings.prefect_api)} (PREFECT_API_URL)"
    return _http("prefect", f"{settings.prefect_api.rstrip('/')}/health", text)


def ray(settings: Settings) -> Finding:
    """The cluster that trains."""
    if not settings.ray_address:
        return Finding(
            "ray", "started when a stage needs it (default; RAY_ADDRESS names a cluster)"
        )
    text = f"{settings.ray_address} (RAY_ADDRESS)"
    host, _, port = settings.ray_address.rpartition("//")[2].partition(":")
    if not port.isdigit():
        return Finding("ray", text)
    return _tcp("ray", host, int(port), text)


def _http(subject: str, url: str, text: str) -> Finding:
    variable = {"tracking": "MLFLOW_TRACKING_URI", "prefect": "PREFECT_API_URL"}[subject]
    parts = urlsplit(url)
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        with urllib.request.urlopen(plain, timeout=CONNECT_WITHIN_S):
            return Finding(subject, f"{text}: answers")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Finding(subject, f"{text}: answers and asks for credentials")
        said = f"answers {error.code} {error.reason}"
        hint = "; it ends in /api" if subject == "prefect" else ""
        remedy = f"check that {variable} is the right address{hint}"
    except (OSError, ValueError) as error:
        said = f"does not answer: {getattr(error, 'reason', error)}"
        remedy = f"start the server, or unset {variable} to use the embedded one"
    return Finding(subject, f"{text}: {said}", remedy, broken=True)


def _tcp(subject: str, host: str, port: int, text: str) -> Finding:
    try:
        socket.create_connection((host, port), CONNECT_WITHIN_S).close()
    except OSError as error:
        remedy = "check the address, or unset it to use the embedded one"
        return Finding(subject, f"{text}: does not answer: {error}", remedy, broken=True)
    return Finding(subject, f"{text}: answers")


def hide_password(uri: str) -> str:
    """The address without credentials, fit to be shown."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))


def gib(size: float) -> str:
    """A size in bytes for people."""
    return f"{size / GIB:.1f} GiB"
