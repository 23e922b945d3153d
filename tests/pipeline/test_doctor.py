"""The doctor says what was chosen, what is wrong and how to mend it, and is quick about it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import reelflow
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from s3_service import s3_service

from components.pipeline import addresses, doctor
from components.pipeline.settings import Settings, load_settings

ADDRESSES = (
    "ARTIFACT_ROOT",
    "MLFLOW_TRACKING_URI",
    "PREFECT_API_URL",
    "RAY_ADDRESS",
    "AWS_ENDPOINT_URL",
)


@pytest.fixture(autouse=True)
def _embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REELFLOW_HOME", str(tmp_path / "home"))


@pytest.fixture
def s3_server() -> Iterator[str]:
    with s3_service() as address:
        yield address


def run_doctor(*options: str, **environment: str) -> tuple[int, str, float]:
    command = [sys.executable, "-m", "components.pipeline.cli", "doctor", *options]
    start = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, time.monotonic() - start


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def line_of(output: str, subject: str) -> str:
    return next(line for line in output.splitlines() if line[4:].startswith(subject))


def test_a_sound_installation_has_nothing_broken_and_is_not_touched(tmp_path: Path) -> None:
    code, output, seconds = run_doctor()
    assert code == 0
    assert "✗" not in output
    # The promise is 3 s; the tests run two at a time, so the machine is busy.
    assert seconds < 6
    assert not (tmp_path / "home").exists()
    for subject in ("python", "fastapi", "sqlalchemy", "cores", "shared memory", "gpu", "git"):
        assert line_of(output, subject)


def test_no_heavy_library_is_imported() -> None:
    script = (
        "import sys; from components.pipeline.doctor import examine;"
        "from components.pipeline.settings import load_settings; examine(load_settings());"
        "names = {'torch', 'pandas', 'ray', 'mlflow', 'prefect', 'pyarrow', 'numpy'};"
        "heavy = names & sys.modules.keys();"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_each_address_tells_whether_it_is_the_default_or_given(tmp_path: Path) -> None:
    _, output, _ = run_doctor()
    assert "default" in line_of(output, "store")
    assert str(tmp_path / "home" / "store") in line_of(output, "store")
    _, output, _ = run_doctor(ARTIFACT_ROOT=str(tmp_path / "elsewhere"))
    assert "(ARTIFACT_ROOT)" in line_of(output, "store")
    _, output, _ = run_doctor("--store", str(tmp_path / "third"))
    assert "(--store)" in line_of(output, "store")


def test_services_that_do_not_answer_are_broken_and_name_their_variable() -> None:
    port = closed_port()
    code, output, seconds = run_doctor(
        PREFECT_API_URL=f"http://127.0.0.1:{port}/api",
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}",
        RAY_ADDRESS=f"127.0.0.1:{port}",
    )
    assert code == 4
    assert line_of(output, "prefect").startswith("  ✗")
    assert line_of(output, "tracking").startswith("  ✗")
    assert line_of(output, "ray").startswith("  ✗")
    assert "unset PREFECT_API_URL" in output
    assert "unset MLFLOW_TRACKING_URI" in output
    assert seconds < 6


def test_a_service_that_accepts_and_is_silent_does_not_hold_the_doctor_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        found = doctor.examine(load_settings_with(MLFLOW_TRACKING_URI=address))
        assert time.monotonic() - start < 5
    tracking = next(f for f in found if f.subject == "tracking")
    assert tracking.broken


def load_settings_with(**environment: str) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return load_settings()


def test_passwords_in_addresses_are_not_shown() -> None:
    port = closed_port()
    _, output, _ = run_doctor(
        MLFLOW_TRACKING_URI=f"postgresql://me:secret@127.0.0.1:{port}/mlflow",
        PREFECT_API_URL=f"http://me:secret@127.0.0.1:{port}/api",
    )
    assert "secret" not in output
    assert f"***@127.0.0.1:{port}" in output
    code, output, _ = run_doctor(
        "--store", "s3://bucket/x", AWS_ENDPOINT_URL=f"http://me:secret@127.0.0.1:{port}"
    )
    assert code == 4
    assert "AWS_ENDPOINT_URL: an address of a service may not hold" in line_of(output, "store")
    assert "secret" not in output


def test_an_address_that_is_none_is_named() -> None:
    code, output, _ = run_doctor(MLFLOW_TRACKING_URI="postgresql://host:port/mlflow")
    assert code == 4
    assert "not an address" in line_of(output, "tracking")
    code, output, _ = run_doctor("--store", "gopher://somewhere/x")
    assert code == 4
    assert "s3://bucket/prefix" in output


def test_a_store_is_looked_for_where_it_will_lie(tmp_path: Path) -> None:
    odd = tmp_path / "we#ird é"
    assert f" {odd} (" in line_of(run_doctor("--store", odd.as_uri())[1], "store")
    code, output, _ = run_doctor("--store", "~no-such-user/x")
    assert (code, "by its full path" in output) == (4, True)


def test_a_bucket_is_asked_for(s3_server: str) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket="present")
    code, output, _ = run_doctor("--store", "s3://present/prefix")
    assert (code, "answers" in line_of(output, "store")) == (0, True)
    code, output, _ = run_doctor("--store", "s3://absent/prefix")
    assert code == 4
    assert "there is no bucket 'absent'" in output


def test_an_object_store_that_is_down_is_said_clearly() -> None:
    endpoint = f"http://127.0.0.1:{closed_port()}"
    code, output, seconds = run_doctor(
        "--store",
        "s3://bucket/x",
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
    )
    assert code == 4
    assert endpoint in line_of(output, "store")
    assert "AWS_ENDPOINT_URL" in output
    assert seconds < 6


def test_a_home_that_cannot_be_a_folder_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output, _ = run_doctor(REELFLOW_HOME=str(tmp_path / "file" / "home"))
    assert code == 4
    assert line_of(output, "home").startswith("  ✗")


def test_what_is_no_server_of_the_web_is_broken_and_no_command_breaks(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=greet, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        code, output, _ = run_doctor(PREFECT_API_URL=address, MLFLOW_TRACKING_URI=address)
        assert code == 4
        assert line_of(output, "prefect").startswith("  ✗")
        assert line_of(output, "tracking").startswith("  ✗")
        done = reelflow(tmp_path / "home", "lineage", "split", MLFLOW_TRACKING_URI=address)
        assert "remedy: " in done.stderr
        server.close()


def test_a_folder_that_is_too_long_for_sockets_is_broken() -> None:
    code, output, _ = run_doctor(RAY_TMPDIR="/tmp/" + "x" * 60)
    assert code == 4
    assert line_of(output, "ray").startswith("  ✗")
    # Of the system's own, another one is taken.
    _, output, _ = run_doctor(TMPDIR="/tmp/" + "x" * 60)
    assert line_of(output, "ray").startswith("  ✓")


def test_a_version_that_differs_from_the_lock_is_named_with_both_versions() -> None:
    finding = doctor._packages({"click": "0.0.1"}, ["click>=8"])
    assert finding.mark == "!"
    assert "(locked 0.0.1)" in finding.text
    assert "make setup" in finding.remedy


def test_a_missing_package_is_broken_only_if_the_project_itself_asks_for_it() -> None:
    pins = {"no-such-package": "1.0"}
    assert doctor._packages(pins, ["no-such-package>=1"]).mark == "✗"
    assert doctor._packages(pins, ["click>=8"]).mark == "!"


def test_a_local_build_satisfies_its_public_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: "2.13.0+cpu")
    assert doctor._packages({"torch": "2.13.0"}, []).mark == "✓"


@pytest.mark.parametrize("name", sorted(doctor.FRAGILE))
def test_the_fragile_packages_are_bounded_in_the_project_and_their_breach_is_told(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((doctor.ROOT / "pyproject.toml").read_text())["project"]
    assert doctor._fragile(name, project["dependencies"]).mark == "✓"
    monkeypatch.setattr(doctor, "_installed", lambda name: "99.1")
    finding = doctor._fragile(name, project["dependencies"])
    assert finding.broken
    assert doctor.FRAGILE[name] in finding.text


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
    st.sampled_from([">=", "<", "=="]),
)
def test_ranges_mean_what_the_packaging_standard_says(
    version: list[int], bound: list[int], sign: str
) -> None:
    text, clause = ".".join(map(str, version)), sign + ".".join(map(str, bound))
    assert doctor._fits(text, clause) == SpecifierSet(clause).contains(text)


def test_shared_memory_that_is_too_small_for_ray_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor._shared_memory(tmp_path).mark == "✓"
    monkeypatch.setattr(doctor, "OBJECT_STORE_BYTES", 2**62)
    assert "--shm-size" in doctor._shared_memory(tmp_path).remedy


def test_a_gpu_beside_a_cpu_build_of_torch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: ["NVIDIA H200, 143771 MiB"])
    monkeypatch.setattr(doctor, "_installed", lambda name: "2.13.0+cpu")
    assert doctor._gpu().mark == "!"
    monkeypatch.setattr(doctor, "_installed", lambda name: "2.13.0")
    assert doctor._gpu().mark == "✓"


def test_telemetry_that_the_user_switched_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    finding = doctor._telemetry()
    assert finding.mark == "!"
    assert "MLFLOW_DISABLE_TELEMETRY=false" in finding.text


def test_little_free_disk_points_to_gc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "DISK_WANTED", 2**62)
    finding = addresses.home(load_settings())
    assert finding.mark == "!"
    assert "reelflow gc" in finding.remedy


def test_a_project_without_git_is_told_what_dvc_needs(tmp_path: Path) -> None:
    project = tmp_path / "unpacked"
    (project / ".dvc").mkdir(parents=True)
    found = doctor._experiments(project)
    assert "is no git repository: dvc refuses to work" in found.text
    assert "git init" in found.remedy
    assert "dvc config --local core.no_scm true" in found.remedy
    (project / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    found = doctor._experiments(project)
    assert "dvc repro works, experiments cannot be compared" in found.text
    (project / ".git").mkdir()
    assert doctor._experiments(project).mark == "✓"
