"""The command line as others script against it: exit codes, messages, completion, speed."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import publish, settings_in

from components.pipeline.cli import cli, main
from components.pipeline.flow import load_flows
from components.pipeline.params import load_params
from components.pipeline.reports import find_report
from components.pipeline.runner import open_store
from components.pipeline.stage import load_registry

REELFLOW = [sys.executable, "-m", "components.pipeline.cli"]
SCRIPT = Path(sys.executable).with_name("reelflow")
COMMANDS = ["run", "stage", "data", "bench", "ui", "serve"]
COMMANDS += ["report", "explain", "lineage", "doctor", "gc"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ARTIFACT_ROOT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS")
    }
    return {**kept, "REELFLOW_HOME": str(home), **more}


def reelflow(home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*REELFLOW, *words],
        capture_output=True,
        text=True,
        env=environment(home, **more),
        cwd=home.parent,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def call(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The same program without a new process for each call: exit code, output and errors."""

    def called(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reelflow", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ.update(environment(home))
    monkeypatch.chdir(home.parent)
    yield called
    os.environ.clear()
    os.environ.update(before)
    signal.signal(signal.SIGTERM, handler)


def test_help_is_quick(home: Path) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert reelflow(home, "--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    # The promise is 0.5 s on a machine of its own; the tests share two cores, two at a time.
    assert min(seconds) < 1.0


def test_help_names_every_command_and_cuts_no_sentence(home: Path) -> None:
    said = reelflow(home, "--help").stdout
    assert "..." not in said.partition("Commands:")[2]
    listed = re.findall(r"^  (\w+)  +\w", said, re.MULTILINE)
    assert listed[: len(COMMANDS)] == COMMANDS
    assert "Exit codes: 0 done, 2 usage" in said


@pytest.mark.parametrize("command", [*COMMANDS, "data list", "data prepare"])
def test_every_command_explains_itself(command: str, home: Path) -> None:
    said = reelflow(home, *command.split(), "--help")
    assert said.returncode == 0
    assert "Usage: reelflow" in said.stdout


def test_parameters_named_in_help_exist() -> None:
    texts = [cli.epilog or "", *(c.help or "" for c in cli.commands.values())]
    named = [name for text in texts for name in re.findall(r"--set (\S+=\S+)", text)]
    assert named
    load_params(load_registry(), overrides=named)


def test_the_installed_command_is_the_same_program(home: Path) -> None:
    done = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == reelflow(home, "--version").stdout


@pytest.mark.parametrize(
    ("words", "thing", "remedy"),
    [
        (("run", "recomend"), "'recomend'", "recommend"),
        (("stage", "splitt"), "'splitt'", "did you mean 'split'"),
        (("explain", "splitt"), "'splitt'", "did you mean 'split'"),
        (("stage", "split", "--set", "split.max_histori=3"), "split.max_histori", "max_history"),
        (("stage", "split", "--set", "split.max_history=-3"), "split.max_history", "greater"),
        (("stage", "split", "--set", "split.max_history=x"), "split.max_history", "integer"),
        (("stage", "split", "--set", "nonsense"), "'nonsense'", "stage.key=value"),
        (("stage", "split", "--set", "splitt.a=1"), "'splitt'", "did you mean 'split'"),
        (("stage", "split", "--profile", "huge"), "'huge'", "YAML file"),
        (("stage", "split", "--params", "none.yaml"), "none.yaml", "no such file"),
        (("run", "recommend", "--data", "nowhere"), "nowhere", "give a folder"),
        (("run", "recommend", "--data", ""), '--data ""', "simulator"),
        (("run", "recommend", "--data", "~nobody9/x"), "~nobody9/x", "full path"),
        (("run", "recommend", "--data", "s3://"), "s3://", "s3://bucket/prefix"),
        (("stage", "ingest", "--data", " "), '--data ""', "simulator"),
        (("explain", "ingest", "--store", ""), '--store ""', "give a folder"),
        (
            (
                *("run", "recommend", "--set", "train_recommender.workers=8192"),
                *("--set", "train_recommender.batch_size=8192"),
            ),
            "train_recommender.workers: 8192 workers",
            "RAY_ADDRESS",
        ),
        (("run", "recommend", "--from", "nope"), "'nope'", "stages: ingest"),
        (("run", "recommend", "--until", "nope"), "'nope'", "stages: ingest"),
        (("run", "recommend", "--from", "report", "--until", "split"), "'report'", "'split'"),
        (("run", "recommend", "--store", "ftp://host/x", "--plan"), "ftp", "s3://bucket/prefix"),
        (("report", "nope"), "no report", "reelflow run recommend"),
        (("gc", "--older-than", "soon"), "'soon'", "12h, 7d, 4w"),
        (("bench", "nope"), "'nope'", "benchmarks: "),
        (("run",), "FLOW", "--help"),
        (("fly",), "fly", "--help"),
        (("run", "recommend", "--quickly"), "--quickly", "--help"),
    ],
)
def test_a_wrong_call_exits_2_and_names_the_thing_and_the_remedy(
    words: tuple[str, ...],
    thing: str,
    remedy: str,
    home: Path,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, error = call(*words)
    assert code == 2
    assert thing in error
    assert remedy in error
    assert out == ""
    # A call that cannot be is refused before anything is made.
    assert not home.exists()


def test_the_process_exits_2_as_well(home: Path) -> None:
    done = reelflow(home, "run", "recomend")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no flow 'recomend'\n  remedy: flows: ")


def broken_tables(folder: Path) -> Path:
    """Interactions without the column that says which item it was."""
    folder.mkdir()
    table = pa.table({"user_id": [1], "timestamp": pa.array([0], pa.timestamp("ms", "UTC"))})
    pq.write_table(table, folder / "interactions.parquet")
    return folder


def test_a_broken_data_contract_exits_3_and_names_file_and_column(
    home: Path, tmp_path: Path
) -> None:
    done = reelflow(home, "data", "prepare", str(broken_tables(tmp_path / "data")), "out")
    assert done.returncode == 3
    assert "interactions.parquet" in done.stderr
    assert "item_id" in done.stderr


def test_a_result_that_was_altered_exits_4_and_says_how_to_make_it_again(
    home: Path, tmp_path: Path
) -> None:
    store = open_store(settings_in(tmp_path))
    publish(store, "report", "abcdef", file="report.html")
    page = find_report(store, "latest")
    assert reelflow(home, "report").stdout == f"{page}\n"
    page.chmod(0o644)
    page.write_text("altered")
    done = reelflow(home, "report", "abc")
    assert done.returncode == 4
    assert "report.html" in done.stderr
    assert "--force" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_exits_130_and_says_that_it_resumes(
    number: int, home: Path, tmp_path: Path
) -> None:
    # Reading the parameters from a pipe waits until somebody writes: surely in the middle.
    pipe = tmp_path / "params.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*REELFLOW, "run", "recommend", "--params", str(pipe)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home),
    )
    writer = open_when_read(pipe)
    try:
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    finally:
        os.close(writer)
    assert process.returncode == 130
    assert "the same command resumes" in error
    assert "Traceback" not in error


def open_when_read(pipe: Path) -> int:
    deadline = time.monotonic() + 30
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def test_output_that_nobody_reads_any_more_is_no_error(home: Path) -> None:
    command = f"{' '.join(REELFLOW)} data list | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment(home), check=True
    )
    assert done.stderr == ""


def test_a_plan_writes_nothing_and_names_every_stage(home: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    start = time.perf_counter()
    done = reelflow(home, "run", "recommend", "--plan", "--store", str(store))
    seconds = time.perf_counter() - start
    assert done.returncode == 0
    stages = [line.split()[0] for line in done.stdout.splitlines()]
    assert tuple(stages) == load_flows()["recommend"].stages
    assert "never ran in this store" in done.stdout.splitlines()[0]
    assert not store.exists()
    assert not home.exists()
    # The promise is 2 s on a machine of its own; the tests share two cores, two at a time.
    assert seconds < 4


def test_a_plan_of_a_part_names_the_stage_that_must_run_before(home: Path) -> None:
    done = reelflow(home, "run", "recommend", "--plan", "--from", "split")
    assert done.returncode == 2
    assert "run it first: reelflow stage" in done.stderr


def test_data_can_be_listed_and_prepared(home: Path, tmp_path: Path) -> None:
    listed = reelflow(home, "data", "list").stdout
    assert {"simulator", "tables", "kuairand", "amazon", "movielens"} <= {
        line.split()[0] for line in listed.splitlines()
    }
    source = tmp_path / "mine"
    source.mkdir()
    table = pa.table(
        {
            "user_id": [1, 2],
            "item_id": [3, 4],
            "timestamp": pa.array([0, 1], pa.timestamp("ms", "UTC")),
        }
    )
    pq.write_table(table, source / "interactions.parquet")
    done = reelflow(home, "data", "prepare", str(source))
    assert done.returncode == 0
    assert "2 rows" in done.stdout
    assert pq.read_table(tmp_path / "mine-tables" / "interactions.parquet").num_rows == 2


def complete(home: Path, *words: str, kinds: bool = False) -> list[str]:
    done = reelflow(
        home,
        _REELFLOW_COMPLETE="bash_complete",
        COMP_WORDS=" ".join(["reelflow", *words]),
        COMP_CWORD=str(len(words)),
    )
    return [line.partition(",")[0 if kinds else 2] for line in done.stdout.splitlines()]


def test_the_shell_completes_commands_flows_stages_and_parameters(home: Path) -> None:
    assert complete(home, "ru") == ["run"]
    assert complete(home, "run", "rec") == ["recommend"]
    assert complete(home, "explain", "spl") == ["split"]
    assert "split.max_history=" in complete(home, "run", "recommend", "--set", "split.m")
    assert complete(home, "run", "recommend", "--from", "inge") == ["ingest"]


def test_the_shell_completes_benchmarks_reports_and_folders(home: Path, tmp_path: Path) -> None:
    assert complete(home, "bench", "constr") == ["constrained_beam"]
    assert complete(home, "report", "") == ["latest"]
    publish(open_store(settings_in(tmp_path)), "report", "abcdef", file="report.html")
    assert complete(home, "report", "ab") == ["abcdef"]
    assert complete(home, "data", "prepare", "simu") == ["simu", "simulator"]
    for words in (("run", "recommend", "--data"), ("stage", "split", "--store")):
        assert complete(home, *words, "/t", kinds=True) == ["dir"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_each_shell_can_be_made(shell: str, home: Path) -> None:
    done = reelflow(home, _REELFLOW_COMPLETE=f"{shell}_source")
    assert done.returncode == 0
    assert "_REELFLOW_COMPLETE" in done.stdout


def test_bash_takes_the_completion_script(home: Path) -> None:
    script = (
        f'reelflow() {{ {" ".join(REELFLOW)} "$@"; }}; '
        'eval "$(_REELFLOW_COMPLETE=bash_source reelflow)"; complete -p reelflow'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment(home), check=False
    )
    assert "_reelflow_completion" in done.stdout, done.stderr


def test_commands_of_the_design_are_all_there() -> None:
    assert list(cli.commands) == COMMANDS
    data = cli.commands["data"]
    assert isinstance(data, click.Group)
    assert list(data.commands) == ["list", "prepare"]
    options = {
        "run": "--data --store --profile --set --from --until --force --plan",
        "stage": "--data --store --profile --set --force",
        "explain": "--data --store --profile --set",
        "bench": "--json",
        "serve": "--model --version --host --port --replicas",
    }
    for name, wanted in options.items():
        there = {text for option in cli.commands[name].params for text in option.opts}
        assert set(wanted.split()) <= there


def test_a_current_folder_that_is_gone_is_said_by_every_command(home: Path, tmp_path: Path) -> None:
    for words in (["doctor"], ["stage", "ingest"], ["run", "recommend", "--plan"], ["gc"]):
        gone = tmp_path / "gone"
        gone.mkdir()
        script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, "sh", str(gone), *REELFLOW, *words],
            capture_output=True,
            text=True,
            env=environment(home),
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {gone}: the current folder was removed\n"
            "  remedy: change to a folder that is there: cd\n"
        )


def test_params_that_are_a_folder_or_lead_nowhere_are_not_the_defaults(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").mkdir()
    done = reelflow(home, "run", "recommend", "--plan")
    assert done.returncode == 2
    assert "params.yaml: cannot be read: Is a directory" in done.stderr
    Path("params.yaml").rmdir()
    Path("params.yaml").symlink_to("elsewhere.yaml")
    done = reelflow(home, "run", "recommend", "--plan")
    assert done.returncode == 2
    assert "params.yaml: no such file" in done.stderr
