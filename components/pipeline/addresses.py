"""Which addresses are in force, why, and whether what stands there answers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from components.pipeline import ray_sessions
from components.pipeline.credentials import without_credentials
from components.pipeline.errors import UsageError
from components.pipeline.finding import Finding
from components.pipeline.s3 import endpoint
from components.pipeline.servers import open_directly
from components.pipeline.settings import Settings
from components.pipeline.storage import nearest_existing, parse_uri

GIB = 1024**3
CONNECT_WITHIN_S = 1.5
DISK_WANTED = 5 * GIB
#: With less than this a run cannot even keep its records.
DISK_NEEDED = GIB // 16
#: S3 refuses requests whose time is fifteen minutes off; files of other machines look too new.
SKEW_S = 60.0


def home(settings: Settings) -> Finding:
    """Where the platform keeps its own files."""
    why = "REELFLOW_HOME" if os.environ.get("REELFLOW_HOME") else "default; REELFLOW_HOME moves it"
    return _folder("home", settings.home, why)


def _folder(subject: str, folder: Path, why: str, shown: str = "") -> Finding:
    existing = nearest_existing(folder)
    text = f"{shown or folder} ({why})"
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return Finding(subject, f"{text}: {error.strerror}", "name another folder", True)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(subject, f"{text}: cannot write to {existing}", "name another folder", True)
    free = shutil.disk_usage(existing).free
    text += f": {gib(free)} free"
    inodes = os.statvfs(existing)
    if inodes.f_files and not inodes.f_favail:
        remedy = "remove files; reelflow gc removes what nothing needs any more"
        return Finding(subject, f"{text}, but there can be no more files", remedy, True)
    if free < DISK_WANTED:
        remedy = "reelflow gc frees what nothing needs any more"
        return Finding(subject, text, remedy, broken=free < DISK_NEEDED)
    return Finding(subject, text)


def _links(found: Finding, folder: Path) -> Finding:
    """The finding on a store, or that its disk has no atomic writes; leaves nothing behind."""
    if found.broken or not folder.is_dir():
        return found
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as probe:
            file = Path(probe) / "first"
            file.write_bytes(b"x")
            os.link(file, Path(probe) / "second")
    except OSError as error:
        what = f"cannot be written atomically: {error.strerror}"
        remedy = "a disk with hard links (no FAT or exFAT), or s3://bucket/prefix"
        return Finding(found.subject, f"{found.text}: {what}", remedy, broken=True)
    return found


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
        if scheme == "s3":
            endpoint()
    except UsageError as error:
        said = f"{error.where}: {error.what}" if error.where else "cannot be"
        text = f"{hide_password(settings.store)} ({why}): {said}"
        return Finding("store", text, error.remedy or "", True)
    if scheme == "s3":
        return _bucket(settings.store, why)
    return _links(_folder("store", Path(path), why), Path(path))


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
        answer = client.head_bucket(Bucket=bucket)
        writable = _conditional_writes(client, urlsplit(uri))
    except ClientError as error:
        code = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        said, remedy = {
            404: (f"there is no bucket '{bucket}'", f"make it: aws s3 mb s3://{bucket}"),
            403: (
                "the credentials may not read or write it",
                "check AWS_ACCESS_KEY_ID or AWS_PROFILE, and the clock: date -u",
            ),
        }.get(code, (str(error), "check the address and the service"))
        return Finding("store", f"{text}: {said}", remedy, broken=True)
    except BotoCoreError as error:
        remedy = "check AWS_ENDPOINT_URL, AWS_REGION, the credentials and the network"
        return Finding("store", f"{text}: {error}", remedy, broken=True)
    if not writable:
        return Finding(
            "store",
            f"{text}: ignores conditions of writes, so two runs may publish over each other",
            "a service with conditional writes (If-None-Match), or a folder",
            broken=True,
        )
    found = Finding("store", f"{text}: answers, can be written")
    return _in_time(found, answer["ResponseMetadata"]["HTTPHeaders"].get("date"))


def _conditional_writes(client: Any, uri: SplitResult) -> bool:
    """Whether the second of two writes that ask for a new object is refused; leaves nothing."""
    from botocore.exceptions import ClientError

    key = f"{uri.path.strip('/')}/doctor-{uuid.uuid4().hex}".lstrip("/")
    where = {"Bucket": uri.netloc, "Key": key}
    client.put_object(**where, Body=b"", IfNoneMatch="*")
    try:
        client.put_object(**where, Body=b"", IfNoneMatch="*")
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") not in (409, 412):
            raise
        return True
    finally:
        client.delete_object(**where)
    return False


def _in_time(found: Finding, date: str | None) -> Finding:
    """The finding, or that the clocks of the service and of this machine differ."""
    try:
        skew = parsedate_to_datetime(date or "").timestamp() - time.time()
    except (TypeError, ValueError):
        return found
    if abs(skew) < SKEW_S:
        return found
    way = "ahead of" if skew > 0 else "behind"
    text = f"{found.text}; its clock is {abs(skew):.0f} s {way} this machine's"
    return Finding(found.subject, text, "set the clocks by NTP: timedatectl set-ntp true")


def tracking(settings: Settings) -> Finding:
    """Where MLflow keeps runs and models."""
    given = bool(os.environ.get("MLFLOW_TRACKING_URI"))
    why = "MLFLOW_TRACKING_URI" if given else "default; MLFLOW_TRACKING_URI names a server"
    uri = settings.tracking
    text = f"{hide_password(uri)} ({why})"
    if uri.startswith(("http://", "https://")):
        return _http("tracking", f"{uri.rstrip('/')}/health", text)
    if settings.tracking_database is not None:
        return _folder("tracking", settings.tracking_database.parent, why, shown=uri)
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
    text = f"{settings.prefect_api} (PREFECT_API_URL)"
    return _http("prefect", f"{settings.prefect_api.rstrip('/')}/health", text)


def schedules(settings: Settings) -> Finding | None:
    """What keeps the nightly runs from coming; None without a server that lasts."""
    api = settings.prefect_api
    if not api:
        return None
    request = urllib.request.Request(
        f"{api.rstrip('/')}/deployments/filter", b"{}", {"Content-Type": "application/json"}
    )
    try:
        with open_directly(request, CONNECT_WITHIN_S) as answer:
            deployments = json.load(answer)
    except (OSError, ValueError):
        # That it does not answer is said by the line on the server itself.
        return None
    ours = [d for d in deployments if "reelflow" in d.get("tags", [])]
    if not ours:
        return Finding("schedules", "no deployment on that server; `reelflow ui` makes them")
    paused = [d["name"] for d in ours if d["schedules"] and (d["paused"] or not _active(d))]
    unserved = [d["name"] for d in ours if d.get("status") == "NOT_READY"]
    if unserved:
        text = f"nobody serves {', '.join(sorted(set(unserved)))}: their runs wait for ever"
        return Finding("schedules", text, "python -m flows.deployments, or reelflow ui")
    if paused:
        text = f"paused: {', '.join(sorted(set(paused)))}"
        return Finding("schedules", text, "resume them on the page of the deployment")
    return Finding("schedules", f"{sum(bool(d['schedules']) for d in ours)} active")


def _active(deployment: dict[str, Any]) -> bool:
    return any(schedule["active"] for schedule in deployment["schedules"])


def ray(settings: Settings) -> Finding:
    """The cluster that trains."""
    if not settings.ray_address:
        text = "started when a stage needs it (default; RAY_ADDRESS names a cluster)"
        try:
            ray_sessions.require_short_folder()
        except UsageError as error:
            return Finding("ray", f"{error.where}: {error.what}", error.remedy or "", True)
        return Finding("ray", text)
    text = f"{settings.ray_address} (RAY_ADDRESS)"
    host, _, port = settings.ray_address.rpartition("//")[2].partition(":")
    if not port.isdigit():
        return Finding("ray", text)
    return _tcp("ray", host, int(port), text)


def _http(subject: str, url: str, text: str) -> Finding:
    variable = {"tracking": "MLFLOW_TRACKING_URI", "prefect": "PREFECT_API_URL"}[subject]
    try:
        request = urllib.request.Request(url)
        with open_directly(request, CONNECT_WITHIN_S) as answer:
            return _in_time(Finding(subject, f"{text}: answers"), answer.headers.get("Date"))
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
    plain = without_credentials(uri)
    return uri if plain == uri else plain.replace("//", "//***@", 1)


def gib(size: float) -> str:
    """A size in bytes for people."""
    return f"{size / GIB:.1f} GiB"
