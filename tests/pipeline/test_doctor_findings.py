"""Every fault that the doctor looks for is made for real, and found with its remedy."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from published import settings_in
from real_services import NewDatabase

from components.pipeline import addresses, checkout, doctor, leftovers, limits
from components.pipeline.embedded_databases import databases
from components.pipeline.finding import Finding
from components.pipeline.settings import Settings
from components.pipeline.storage import exclusive


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


# The embedded databases.


@pytest.fixture
def tracked(settings: Settings, new_database: NewDatabase) -> Path:
    """The database of MLflow in the home."""
    file = settings.home / "mlflow.db"
    settings.home.mkdir()
    shutil.copy(new_database.file, file)
    return file


def only(found: list[Finding]) -> Finding:
    (one,) = found
    return one


def test_a_whole_database_is_fine_and_left_as_it_is(settings: Settings, tracked: Path) -> None:
    before = tracked.read_bytes(), sorted(p.name for p in settings.home.iterdir())
    assert only(databases(settings)).mark == "✓"
    assert (tracked.read_bytes(), sorted(p.name for p in settings.home.iterdir())) == before


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        pytest.param(lambda f: f.write_bytes(b"no database " * 500), "not a database", id="text"),
        pytest.param(
            lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]), "", id="cut in half"
        ),
        pytest.param(
            lambda f: execute(f, "UPDATE alembic_version SET version_num = 'ffffffffffff'"),
            "made by a newer mlflow (revision ffffffffffff)",
            id="newer",
        ),
        pytest.param(
            lambda f: execute(f, "DROP TABLE alembic_version"), "not complete", id="half made"
        ),
    ],
)
def test_a_harmed_database_is_broken_and_may_be_moved_away(
    harm: Callable[[Path], object], said: str, settings: Settings, tracked: Path
) -> None:
    harm(tracked)
    found = only(databases(settings))
    assert found.broken
    assert said in found.text
    assert f"move {tracked} away" in found.remedy


def execute(file: Path, statement: str) -> None:
    with sqlite3.connect(file) as database:
        database.execute(statement)
    database.close()


# What the system allows.


def test_a_container_with_less_than_the_machine_is_told(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/batch/job\n")
    group = tmp_path / "batch" / "job"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("50000 100000\n")
    # The limit of a group above counts as well.
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text(f"{2 * addresses.GIB}\n")
    assert "may use 0.5" in limits.processor(tmp_path, own).text
    found = limits.memory(tmp_path, own)
    assert found.mark == "!"
    assert found.text.startswith("2.0 GiB for this container")


def test_a_container_of_the_older_kind_too(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    for controller, name, value in (
        ("cpu,cpuacct", "cpu.cfs_quota_us", 25000),
        ("cpu,cpuacct", "cpu.cfs_period_us", 100000),
        ("memory", "memory.limit_in_bytes", addresses.GIB),
    ):
        (tmp_path / controller / "job").mkdir(parents=True, exist_ok=True)
        (tmp_path / controller / "job" / name).write_text(f"{value}\n")
    assert "may use 0.25" in limits.processor(tmp_path, own).text
    assert limits.memory(tmp_path, own).text.startswith("1.0 GiB for this container")


def in_a_child(code: str, **environment: str) -> dict[str, Any]:
    """What a finding is in a process with other limits or another environment."""
    script = f"import json; from components.pipeline import limits; found = {code};"
    script += "print(json.dumps(found.as_json()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=True,
        env={k: v for k, v in {**os.environ, **environment}.items() if v != "absent"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
    )
    return dict(json.loads(done.stdout))


def test_few_open_files_are_told() -> None:
    found = in_a_child("limits.open_files()")
    assert (found["state"], "200" in found["text"]) == ("look", True)
    assert "ulimit -n" in found["remedy"]


def test_a_locale_without_utf8_is_told() -> None:
    bare = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = in_a_child("limits.encoding()", **bare)
    assert found["state"] == "look"
    assert "LC_ALL=C.UTF-8" in found["remedy"]
    assert in_a_child("limits.encoding()", LC_ALL="C.UTF-8")["state"] == "fine"


def test_a_missing_user_folder_is_told() -> None:
    assert "not set" in in_a_child("limits.home_folder()", HOME="absent")["text"]
    assert "is not there" in in_a_child("limits.home_folder()", HOME="/proc/none")["text"]


def test_ports_in_use_are_told() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"in use: {port} (Prefect)" in limits.ports({"Prefect": port}).text


def test_a_disk_with_no_room_for_records_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "DISK_WANTED", 2**62)
    monkeypatch.setattr(addresses, "DISK_NEEDED", 2**61)
    assert addresses.home(settings_in(tmp_path)).broken


# Stores and services.


def test_a_store_without_hard_links_is_broken(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(settings.store)
    store.mkdir(parents=True)
    assert addresses.store(settings).mark in "✓!"
    assert list(store.iterdir()) == []

    def refused(*ignored: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    # As FAT answers; no such disk can be made without a device.
    monkeypatch.setattr(os, "link", refused)
    found = addresses.store(settings)
    assert found.broken
    assert "hard links" in found.remedy
    assert list(store.iterdir()) == []


@contextmanager
def s3_with(before: Callable[[dict[str, Any]], None], clock_s: float = 0.0) -> Iterator[str]:
    """A real S3 protocol server that alters requests and whose clock differs."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    inner = DomainDispatcherApplication(create_backend_app)

    class Handler(WSGIRequestHandler):
        def log(self, *ignored: object) -> None: ...

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate((timestamp or time.time()) + clock_s, usegmt=True)

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        before(environ)
        return list(inner(environ, start))

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        import boto3

        boto3.client("s3").create_bucket(Bucket="doctored")
        yield "s3://doctored/prefix"
    server.shutdown()
    server.server_close()


def objects(bucket: str) -> int:
    import boto3

    return int(boto3.client("s3").list_objects_v2(Bucket=bucket)["KeyCount"])


def test_an_object_store_that_ignores_conditions_is_broken(tmp_path: Path) -> None:
    def forget(environ: dict[str, Any]) -> None:
        environ.pop("HTTP_IF_NONE_MATCH", None)

    with s3_with(forget) as uri:
        found = addresses.store(settings_in(tmp_path, store=uri))
        assert objects("doctored") == 0
    assert found.broken
    assert "ignores conditions" in found.text


def test_a_clock_that_differs_is_told(tmp_path: Path) -> None:
    with s3_with(lambda environ: None, clock_s=-600) as uri:
        found = addresses.store(settings_in(tmp_path, store=uri))
        assert objects("doctored") == 0
    assert found.mark == "!"
    assert re.search("60[0-9] s behind", found.text)


@pytest.mark.parametrize(
    ("deployment", "said"),
    [
        ({"paused": True, "status": "READY"}, "paused: nightly"),
        ({"paused": False, "status": "NOT_READY"}, "nobody serves nightly"),
        ({"paused": False, "status": "READY"}, "1 active"),
    ],
)
def test_schedules_that_cannot_fire_are_told(
    deployment: dict[str, Any], said: str, tmp_path: Path
) -> None:
    from werkzeug.serving import make_server
    from werkzeug.wrappers import Request, Response

    nightly = {"name": "nightly", "tags": ["reelflow"], "schedules": [{"active": True}]}

    @Request.application
    def app(request: Request) -> Response:
        assert (request.method, request.path) == ("POST", "/api/deployments/filter")
        return Response(json.dumps([nightly | deployment]), content_type="application/json")

    server = make_server("127.0.0.1", 0, app, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    api = f"http://127.0.0.1:{server.server_port}/api"
    given = Settings(tmp_path, str(tmp_path), f"sqlite:///{tmp_path}/m.db", api, None)
    found = addresses.schedules(given)
    server.shutdown()
    server.server_close()
    assert found is not None
    assert said in found.text
    assert found.mark == ("✓" if "active" in said else "!")


# What runs, what is left, where one stands.


def test_what_runs_is_named(settings: Settings) -> None:
    assert leftovers.running(settings).text == "nothing"
    locks = settings.home / "locks"
    with exclusive(locks / "runs" / "recommend.1.abc"), exclusive(locks / "split-0123"):
        assert leftovers.running(settings).text == "recommend, split"


def test_a_process_that_outlived_its_command_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "ENDS_WITHIN_S", 0.1)
    nap = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', "
    nap += "'import time; time.sleep(60)', 'components.'], stdout=subprocess.DEVNULL, "
    nap += "stderr=subprocess.DEVNULL).pid)"
    done = subprocess.run(
        [sys.executable, "-c", nap],
        env={**os.environ, "REELFLOW_HOME": str(settings.home)},
        capture_output=True,
        check=True,
    )
    pid = int(done.stdout)
    time.sleep(0.3)
    found = leftovers.orphans(settings)
    os.kill(pid, 9)
    assert found.mark == "!"
    assert found.remedy == f"kill {pid}"


def test_a_folder_without_commits_is_told(tmp_path: Path) -> None:
    assert "is not a repository" in checkout.git(tmp_path).text
    assert "no dvc.yaml" in checkout.dvc(tmp_path).text
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert "no commit yet" in checkout.git(tmp_path).text
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    assert "dvc init" in checkout.dvc(tmp_path).remedy
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / ".dvc" / "tmp" / "rwlock").write_text('{"x": {}}')
    assert "at work" in checkout.dvc(tmp_path).text


def test_scripts_get_the_same_as_json(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-m", "components.pipeline.cli", "doctor", "--json"]
    environment = {**os.environ, "REELFLOW_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    found = json.loads(done.stdout)
    assert {"subject", "state", "text", "remedy"} == set(found[0])
    subjects = [one["subject"] for one in found]
    assert len(subjects) == len(set(subjects))
    assert (done.returncode == 4) == any(one["state"] == "broken" for one in found)
    assert doctor.UI_PORTS.keys() == {"Prefect", "MLflow"}
    assert not home.exists()
