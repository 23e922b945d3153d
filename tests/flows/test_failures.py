"""How a user's mistake looks: one message with place and remedy, an exit code, nothing published.

Every case goes through the command line, on a folder of tables that is right but for one thing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import (
    REELFLOW,
    environment,
    manifests,
    processes_of,
    reelflow,
    settings,
    wait_until_nothing_runs_in,
)

USERS, ITEMS, ROWS = 50, 40, 2000
FIRST_MS = 1_735_689_600_000  # 2025-01-01
HOUR_MS = 3_600_000

Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all cases: making the tracking database takes longer than any of them."""
    return tmp_path_factory.mktemp("failures") / "home"


def write(folder: Path) -> Path:
    """A folder of tables without a fault."""
    rng = np.random.default_rng(0)
    hours = FIRST_MS + HOUR_MS * np.arange(ROWS)
    interactions = {
        "user_id": rng.integers(0, USERS, ROWS),
        "item_id": rng.integers(0, ITEMS, ROWS),
        "timestamp": pa.array(hours, pa.timestamp("ms", "UTC")),
        "watch_time_s": watch_times(negative=0),
    }
    items = {"item_id": np.arange(ITEMS), "title": [f"video {n}" for n in range(ITEMS)]}
    folder.mkdir()
    pq.write_table(pa.table(interactions), folder / "interactions.parquet")
    pq.write_table(pa.table(items), folder / "items.parquet")
    pq.write_table(pa.table({"user_id": np.arange(USERS)}), folder / "users.parquet")
    return folder


def watch_times(*, negative: int) -> np.ndarray:
    seconds = np.full(ROWS, 3.0, np.float32)
    seconds[:negative] = -1.0
    return seconds


def replace(table: str, column: str, values: list[str] | np.ndarray) -> Break:
    """Give one column other values, and therefore maybe another type."""

    def replaced(folder: Path) -> None:
        file = folder / f"{table}.parquet"
        found = pq.read_table(file)
        found = found.set_column(found.schema.get_field_index(column), column, pa.array(values))
        pq.write_table(found, file)

    return replaced


def without_item_id(folder: Path) -> None:
    file = folder / "interactions.parquet"
    pq.write_table(pq.read_table(file).drop_columns("item_id"), file)


def without_a_byte(folder: Path) -> None:
    (folder / "interactions.parquet").write_bytes(b"")


def without_a_row(folder: Path) -> None:
    file = folder / "interactions.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)


def cut_in_half(folder: Path) -> None:
    file = folder / "interactions.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("spoil", "place", "what", "remedy"),
    [
        pytest.param(
            without_item_id,
            "column 'item_id'",
            "is missing",
            "add 'item_id' (int64)",
            id="missing column",
        ),
        pytest.param(
            replace("interactions", "item_id", ["ab"] * ROWS),
            "row 0 column 'item_id'",
            "'ab' of type string does not fit int64",
            "number the ids",
            id="wrong type",
        ),
        pytest.param(without_a_byte, "", "the file is empty", "copy the file again", id="empty"),
        pytest.param(without_a_row, "", "the table has no rows", "at least one row", id="no rows"),
        pytest.param(
            cut_in_half, "byte", "the file is cut off", "copy the file again", id="cut in half"
        ),
    ],
)
def test_a_file_that_cannot_be_read_stops_ingest(
    spoil: Break, place: str, what: str, remedy: str, home: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data")
    spoil(data)
    before = manifests(home)
    done = reelflow(home, "stage", "ingest", *settings(ingest__source=data))
    assert done.returncode == 3
    first, _, rest = done.stderr.partition("\n  remedy: ")
    assert first.startswith(f"error: {data}/interactions.parquet")
    assert place in first
    assert what in first
    assert remedy in rest
    assert manifests(home) == before


@pytest.mark.parametrize(
    ("spoil", "table", "what", "remedy"),
    [
        pytest.param(
            replace("interactions", "watch_time_s", watch_times(negative=ROWS // 10)),
            "interactions",
            "'watch_time_s_negative' 200 times",
            "--set validate.max_quarantine_share=SHARE",
            id="a tenth of the watch times negative",
        ),
        pytest.param(
            replace("items", "item_id", np.arange(ITEMS) // 2),
            "items",
            "'item_id_repeated' 20 times",
            "correct the source",
            id="duplicate ids",
        ),
    ],
)
def test_a_table_with_too_many_broken_rows_stops_validation(
    spoil: Break, table: str, what: str, remedy: str, home: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data")
    spoil(data)
    chosen = settings(ingest__source=data, validate__great_expectations="false")
    assert reelflow(home, "stage", "ingest", *chosen).returncode == 0
    before = manifests(home)
    done = reelflow(home, "stage", "validate", *chosen)
    assert done.returncode == 3
    first, _, rest = done.stderr.partition("\n  remedy: ")
    assert f"error: table '{table}'" in first
    assert what in first
    assert remedy in rest
    assert manifests(home) == before


def test_rows_with_negative_watch_time_go_to_quarantine_with_the_reason(
    home: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data")
    replace("interactions", "watch_time_s", watch_times(negative=3))(data)
    chosen = settings(ingest__source=data, validate__great_expectations="false")
    assert reelflow(home, "stage", "ingest", *chosen).returncode == 0
    before = manifests(home)
    done = reelflow(home, "stage", "validate", *chosen, "--export", str(tmp_path / "out"))
    assert done.returncode == 0
    assert "3 of 2,000 rows quarantined" in done.stderr
    assert manifests(home).keys() > before.keys()
    lines = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert {(line["table"], line["rule"]) for line in lines} == {
        ("interactions", "watch_time_s_negative")
    }
    assert all("negative" in line["reason"] for line in lines)
    assert [json.loads(line["record"])["watch_time_s"] for line in lines] == [-1.0] * 3
    kept = pq.read_table(tmp_path / "out" / "interactions", columns=["watch_time_s"])
    assert kept["watch_time_s"].to_pylist() == [3.0] * (ROWS - 3)


@pytest.mark.parametrize(
    ("wrong", "place", "remedy"),
    [
        pytest.param(
            "split.max_histori=3", "--set split.max_histori: unknown", "'max_history'", id="unknown"
        ),
        pytest.param(
            "validate.max_quarantine_share=1.5",
            "--set validate.max_quarantine_share: got 1.5",
            "allowed: ≥ 0 and ≤ 1",
            id="out of range",
        ),
        pytest.param(
            "train_recommender.model.heads=3",
            "train_recommender.model: ",
            "",
            id="two that do not fit",
        ),
    ],
)
def test_a_wrong_parameter_stops_a_run_before_anything_is_made(
    wrong: str, place: str, remedy: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    done = reelflow(home, "run", "recommend", "--set", wrong)
    assert done.returncode == 2
    assert place in done.stderr
    assert remedy in done.stderr
    assert done.stdout == ""
    assert not home.exists()


def test_a_gpu_profile_on_a_machine_without_one_is_refused_at_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    start = time.perf_counter()
    done = reelflow(home, "run", "recommend", "--profile", "h200")
    seconds = time.perf_counter() - start
    assert done.returncode == 2
    assert done.stderr.startswith("error: stage 'train_recommender': takes 1 GPU, this machine")
    assert "--profile laptop" in done.stderr
    assert not home.exists()
    # Alone it takes about a second; reading the data of that profile would take minutes.
    assert seconds < 10


def test_a_plan_for_another_machine_needs_no_gpu(tmp_path: Path) -> None:
    done = reelflow(tmp_path / "home", "run", "recommend", "--profile", "h200", "--plan")
    assert done.returncode == 0
    assert "train_recommender" in done.stdout


def test_the_remedy_of_a_harmed_result_can_be_followed_with_data_of_ones_own(
    home: Path, tmp_path: Path
) -> None:
    own = ("--data", str(write(tmp_path / "data")))
    assert reelflow(home, "stage", "ingest", *own).returncode == 0
    newest = max((home / "store" / "manifests" / "ingest").iterdir(), key=os.path.getmtime)
    newest.write_text("harmed")
    refused = reelflow(home, "explain", "validate", *own)
    assert refused.returncode == 4
    assert "with the same options as before: reelflow stage ingest --force" in refused.stderr
    assert reelflow(home, "stage", "ingest", "--force", *own).returncode == 0
    said = reelflow(home, "explain", "validate", *own).stdout
    assert "validate would run" in said
    assert "a stage above" not in said


def test_a_whole_run_ends_in_the_message_of_its_stage_alone(home: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    without_item_id(data)
    before = manifests(home)
    done = reelflow(home, "run", "recommend", "--data", str(data))
    assert done.returncode == 3
    assert done.stderr == (
        f"error: {data}/interactions.parquet: the column 'item_id' is missing\n"
        "  remedy: add 'item_id' (int64); columns present: user_id, timestamp, watch_time_s\n"
    )
    assert manifests(home) == before


def test_a_prefect_server_that_cannot_start_is_told_with_its_last_lines(tmp_path: Path) -> None:
    home = tmp_path / "home"
    database = home / "prefect" / "prefect.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"no database " * 1000)
    done = reelflow(home, "run", "recommend", "--until", "ingest")
    assert done.returncode == 4
    first, _, rest = done.stderr.partition("\n")
    assert first.startswith(f"error: {database.parent}: the Prefect server ended with code")
    assert "file is not a database" in rest
    assert "remedy: check the rights" in rest
    assert processes_of(home) == []


def test_a_home_that_cannot_be_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    home, store = tmp_path / "file" / "home", str(tmp_path / "store")
    done = reelflow(home, "run", "recommend", "--until", "ingest", "--store", store)
    assert done.returncode == 4
    assert done.stderr.startswith(f"error: {home}: cannot make the folder")
    assert "REELFLOW_HOME" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_from_outside_leaves_no_server(
    number: signal.Signals, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    run = subprocess.Popen(
        [*REELFLOW, "run", "recommend", "--until", "ingest"],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Its database is there: the server is up, or nearly so.
    deadline = time.monotonic() + 60
    while not (home / "prefect" / "prefect.db").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(processes_of(home)) >= 2
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    assert error.startswith("  recommend ...\n")
    wait_until_nothing_runs_in(home)
    if number == signal.SIGTERM:
        assert run.returncode == 130
        assert "the same command resumes" in error
