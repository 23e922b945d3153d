"""Settings: where the platform's own files may lie."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from command_line import reelflow

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
