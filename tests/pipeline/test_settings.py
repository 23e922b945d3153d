"""Settings: where the platform's own files may lie."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from command_line import REELFLOW, ROOT, environment, reelflow

from components.pipeline import settings
from components.pipeline.settings import load_settings
from components.pipeline.tracking import connect


def test_a_home_that_no_address_of_a_database_can_name_is_refused_at_once(tmp_path: Path) -> None:
    home = tmp_path / "h?x"
    for command in (["doctor"], ["stage", "ingest"], ["gc"]):
        done = reelflow(home, *command)
        assert done.returncode == 2
        assert f"error: {home}: a path with a question mark" in done.stderr
        assert "remedy: give REELFLOW_HOME a path without one" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["a loop of links", "a name that is too long"])
def test_a_home_that_no_folder_can_be_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    if kind == "a loop of links":
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        home = tmp_path / "loop" / "home"
    else:
        home = tmp_path / ("x" * 300) / "home"
    for words in (["doctor"], ["lineage", "split"], ["gc"], ["stage", "ingest"]):
        done = reelflow(home, *words)
        assert done.returncode == 2
        assert f"error: {home}: no folder can be there: " in done.stderr


def test_a_home_below_a_folder_that_may_not_be_entered_is_one_message(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    # Root may enter it by two rights that it can give away.
    bound = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may enter every folder")
    for words in (["run", "recommend", "--until", "ingest"], ["lineage", "split"], ["doctor"]):
        done = subprocess.run(
            [*(bound if os.geteuid() == 0 else []), *REELFLOW, *words],
            env=environment(locked / "x" / "home"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (2, 4), done.stderr
        assert "Traceback" not in done.stderr
        assert str(locked) in done.stdout + done.stderr
        assert "remedy: " in done.stdout + done.stderr or "name another folder" in done.stdout


def test_models_are_registered_where_runs_are_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What gc frees would be asked of another registry than the one that needs it.
    other = f"sqlite:///{tmp_path / 'other.db'}"
    for command in (["gc", "--yes"], ["stage", "ingest"], ["lineage", "split"]):
        done = reelflow(tmp_path / "home", *command, MLFLOW_REGISTRY_URI=other)
        assert done.returncode == 2
        assert "error: MLFLOW_REGISTRY_URI: models are registered where" in done.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", other)
    assert load_settings().tracking == other


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a#b%41 c&d=e", "äö日\n'x'"])
def test_other_signs_in_a_home_mean_themselves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REELFLOW_HOME", str(tmp_path / name))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = load_settings()
    mlflow = connect(settings, "signs")
    with mlflow.start_run():
        mlflow.log_text("said", "note.txt")
    assert [folder.name for folder in tmp_path.iterdir()] == [name]
    assert [f.read_text() for f in (tmp_path / name).rglob("note.txt")] == ["said"]


@pytest.mark.slow
def test_options_of_a_connection_are_no_part_of_the_name_of_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.db"
    monkeypatch.setenv("REELFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}?timeout=20")
    settings = load_settings()
    assert settings.tracking_database == file
    connect(settings, "options")
    with closing(sqlite3.connect(file)) as database:
        names = [row[0] for row in database.execute("SELECT name FROM experiments")]
    assert "options" in names
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == [file.name]


def test_what_a_worker_of_prefect_runs_is_at_home_beside_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder in which the worker runs it is removed with all that lies there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REELFLOW_HOME", raising=False)
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    assert load_settings().home == tmp_path / ".platform"
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "ab")
    assert load_settings().home == Path(settings.__file__).parents[2] / ".platform"
