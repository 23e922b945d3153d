"""A flow runs under real Prefect as its stages say: names, states, errors and the form."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from process_stages import FLOW, executions, only_these_stages
from process_stages import runner as make_runner
from real_services import NewDatabase

from components.pipeline import prefect_flow, prefect_page
from components.pipeline.errors import (
    DataContractError,
    ReelflowError,
    StageDied,
    StageError,
    StageTimeout,
    StorageError,
    UsageError,
)
from components.pipeline.prefect_flow import build, run_flow
from components.pipeline.runner import Runner
from components.pipeline.settings import Settings, load_settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server with a database of its own, for the whole file: it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness():
            yield


@pytest.fixture
def registered() -> Iterator[None]:
    with only_these_stages():
        yield


@dataclass
class World:
    """A home with a tracking database, and the traces of what executed in it."""

    folder: Path

    @property
    def settings(self) -> Settings:
        home = self.folder / "home"
        return Settings(home, str(self.folder / "store"), f"sqlite:///{home}/mlflow.db", None, None)

    def runner(self, *overrides: str) -> Runner:
        return make_runner(self.settings, self.folder / "traces", *overrides)

    @property
    def executed(self) -> list[str]:
        return executions(self.folder / "traces")


@pytest.fixture
def world(
    prefect: None,
    registered: None,
    tmp_path: Path,
    new_database: NewDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(new_database.file, home / "mlflow.db")
    monkeypatch.setenv("REELFLOW_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    monkeypatch.setattr(prefect_flow, "RETRY_AFTER_S", (0.1,))
    return World(tmp_path)


def run(runner: Runner, **options: Any) -> None:
    run_flow(FLOW, runner, **options)


class History:
    """What the server knows of the newest flow run, once it knows of `tasks` finished tasks."""

    def __init__(self, tasks: int) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
        from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort

        with get_client(sync_client=True) as client:
            newest = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1, offset=0)
            (self.flow,) = newest
            this_run = FlowRunFilter(id=FlowRunFilterId(any_=[self.flow.id]))
            # Task runs reach the server as events, some time after they end.
            end = time.monotonic() + 60
            while True:
                self.tasks = client.read_task_runs(
                    flow_run_filter=this_run,
                    sort=TaskRunSort.EXPECTED_START_TIME_ASC,
                    limit=20,
                    offset=0,
                )
                final = [task for task in self.tasks if task.state and task.state.is_final()]
                if len(final) >= tasks:
                    return
                assert time.monotonic() < end
                time.sleep(0.3)

    def states(self) -> list[tuple[str, str]]:
        return [(t.name.rpartition("-")[0], t.state.name) for t in self.tasks]


def test_each_stage_is_a_task_of_its_name_and_a_cached_one_says_so(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = world.runner()
    run(runner)
    assert list(runner.done) == ["numbers", "doubled", "total"]
    first = History(3)
    assert first.flow.state.name == "Completed"
    assert first.states() == [(name, "Completed") for name in FLOW.stages]
    assert runner.done["total"].metrics == {"total": 20}
    capsys.readouterr()

    changed = world.runner("total.label=t")
    run(changed)
    second = History(3)
    assert second.states() == [("numbers", "Cached"), ("doubled", "Cached"), ("total", "Completed")]
    assert f"cached, key {changed.done['numbers'].key}" in second.tasks[0].state.message
    said = capsys.readouterr().out.split()
    assert said[:5] == ["numbers", "cached", "doubled", "cached", "total"]
    assert world.executed == ["numbers", "doubled", "total", "total"]


def test_params_start_until_and_force_reach_the_stages(world: World) -> None:
    runner = world.runner("numbers.count=3")
    run(runner, until="doubled")
    assert world.executed == ["numbers", "doubled"]
    assert runner.done["numbers"].body["params"]["count"] == 3
    run(runner, start="doubled", until="doubled", force=True)
    assert world.executed == ["numbers", "doubled", "doubled"]
    assert History(1).states() == [("doubled", "Completed")]


# The page of a run


def artifacts(flow_run_id: Any) -> dict[str, dict[str, Any]]:
    """Everything on the page of a run, by key."""
    from prefect.client.orchestration import get_client

    wanted = {"artifacts": {"flow_run_id": {"any_": [str(flow_run_id)]}}}
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json=wanted).json()
    return {artifact["key"]: artifact for artifact in found}


def test_the_page_has_progress_figures_and_the_table_of_metrics(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefect_page, "UPDATED_EVERY_S", 0.2)
    run(world.runner("numbers.rounds=12"))
    page = artifacts(History(3).flow.id)
    table = json.loads(page["tiny-flow-metrics"]["data"])
    assert {"stage": "total", "metric": "total", "value": 20.0} in table
    assert [row["stage"] for row in table] == ["numbers", "numbers", "doubled", "total"]
    progress = page["tiny-flow-numbers-counting"]
    assert (progress["type"], progress["data"]) == ("progress", 100.0)
    figure = page["tiny-flow-total-a-line"]
    assert figure["type"] == "image"
    assert figure["data"].startswith("data:image/png;base64,iVBOR")


def test_progress_is_there_while_the_stage_works(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import artifacts as prefect_artifacts

    seen: list[float] = []
    told = prefect_artifacts.update_progress_artifact

    def remember(bar: Any, progress: float) -> Any:
        answer = told(bar, progress=progress)
        seen.append(progress)
        return answer

    monkeypatch.setattr(prefect_page, "UPDATED_EVERY_S", 0.2)
    monkeypatch.setattr(prefect_page, "update_progress_artifact", remember)
    run(world.runner("numbers.rounds=15"), until="numbers")
    assert len([share for share in seen if 0 < share < 100]) >= 2
    assert seen == sorted(seen)
    assert seen[-1] == 100


def test_the_page_leads_to_the_run_in_mlflow_without_a_password(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(
        prefect_page, "create_link_artifact", lambda link, **more: made.append({"link": link})
    )
    tracker = SimpleNamespace(run_id="r", experiment_id="7")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    for address in ("sqlite:///mlflow.db", "https://me:secret@tracking:5000/"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        settings = load_settings()
        prefect_page.link_to_tracking("tiny_flow", settings, tracker)  # type: ignore[arg-type]
    assert made == [{"link": "https://tracking:5000/#/experiments/7/runs/r"}]


def test_a_metric_that_is_not_a_number_does_not_stop_the_flow(world: World) -> None:
    prefect_page.show_metrics("tiny_flow", {"s": {"loss": float("nan"), "best": float("inf")}})


# What goes wrong


@pytest.mark.parametrize(
    ("trouble", "kind", "exit_code", "said"),
    [
        ("contract", DataContractError, 3, "column 'a' is missing"),
        ("bug", StageError, 4, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_keeps_its_type_and_exit_code_through_prefect_and_is_not_retried(
    world: World, trouble: str, kind: type[ReelflowError], exit_code: int, said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        run(world.runner(f"numbers.trouble={trouble}"))
    assert caught.value.exit_code == exit_code
    history = History(1)
    assert history.flow.state.name == "Failed"
    assert history.states() == [("numbers", "Failed")]
    assert said in history.flow.state.message
    assert world.executed == ["numbers"]


def test_a_stage_whose_process_dies_is_tried_again(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run(world.runner("numbers.trouble=killed once", "numbers.rounds=2"))
    assert world.executed == ["numbers", "numbers", "doubled", "total"]
    assert History(3).tasks[0].run_count == 2
    assert "numbers: its process was killed by SIGKILL" in capsys.readouterr().err


def test_retries_end(world: World) -> None:
    with pytest.raises(StageDied, match="SIGKILL"):
        run(world.runner("numbers.trouble=killed"), retries=1)
    assert world.executed == ["numbers", "numbers"]
    assert History(1).states() == [("numbers", "Failed")]


def test_a_stage_that_hangs_in_native_code_is_ended_and_called_timed_out(world: World) -> None:
    with pytest.raises(StageTimeout, match=r"took longer than 1\.2 s"):
        run(
            world.runner("numbers.trouble=hangs in C"),
            retries=0,
            stage_timeout_minutes=0.02,
        )
    history = History(1)
    assert history.states() == [("numbers", "TimedOut")]
    # As on its page: for a person, not as Python writes objects.
    (task,) = history.tasks
    for message in (history.flow.state.message, task.state.message):
        assert "stage 'numbers': took longer than 1.2 s and was ended" in message
        assert "StageTimeout(" not in message
    pids = [int(file.name.split("-")[1]) for file in (world.folder / "traces").iterdir()]
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_run_that_died_again_and_again_is_not_started_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Prefect tells it in the process of a run that is started for the sixth time.
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", "6")
    with pytest.raises(StageError, match="has died 5 times"):
        run(world.runner())
    assert not (world.folder / "store").exists()


def test_a_wrong_name_is_a_usage_error(world: World) -> None:
    with pytest.raises(UsageError, match="start: Input should be 'numbers', 'doubled' or 'total'"):
        run(world.runner(), start="nothing")


def test_a_server_that_does_not_answer_is_one_clear_error(world: World) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(StorageError) as caught,
    ):
        run(world.runner())
    assert "PREFECT_API_URL" in str(caught.value)
    assert "remedy:" in str(caught.value)
    assert world.executed == []


# The form


def schema_of(flow: Any) -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    return parameter_schema(flow.fn).model_dump()


def test_the_form_has_a_section_a_stage_with_meaning_and_bounds(registered: None) -> None:
    schema = schema_of(build(FLOW))
    sections = schema["definitions"]["TinyFlowParams"]["properties"]
    assert list(sections) == ["numbers", "doubled", "total"]
    numbers = schema["definitions"]["NumbersParams"]["properties"]
    assert numbers["count"]["description"] == "rows"
    assert [numbers["count"][bound] for bound in ("minimum", "maximum", "default")] == [1, 1000, 5]
    assert numbers["trouble"]["enum"][:2] == ["none", "contract"]


def test_the_form_says_what_the_other_fields_mean(registered: None) -> None:
    fields = schema_of(build(FLOW))["properties"]
    assert list(fields) == [
        "params", "store", "start", "until", "force", "stage_timeout_minutes", "retries",
    ]  # fmt: skip
    assert fields["start"]["enum"] == fields["until"]["enum"] == list(FLOW.stages)
    assert (fields["start"]["default"], fields["until"]["default"]) == ("numbers", "total")
    assert (fields["retries"]["minimum"], fields["retries"]["maximum"]) == (0, 10)
    assert all(field.get("description") for field in fields.values())


def test_a_value_of_the_form_that_cannot_be_is_named(world: World) -> None:
    from prefect.exceptions import ParameterTypeError

    for params in ({"numbers": {"count": 0}}, {"numbers": {"cuont": 1}}):
        (key,) = params["numbers"]
        with pytest.raises(ParameterTypeError, match=rf"params\.numbers\.{key}"):
            build(FLOW)(params=params)


def test_what_the_form_sends_runs_the_stages(world: World) -> None:
    store = str(world.folder / "other store")
    metrics = build(FLOW)(params={"numbers": {"count": 4}, "doubled": {"factor": 3}}, store=store)
    assert metrics["doubled"] == {"largest": 9}
    assert metrics["total"] == {"total": 18}


# The flows of the project


@pytest.mark.parametrize(
    "entrypoint", ["flows/recommend.py:recommend", "flows.recommend.recommend"]
)
def test_prefect_loads_the_recommend_flow(
    entrypoint: str, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.flows import load_flow_from_entrypoint

    from flows.recommend import FLOW as recommend

    monkeypatch.chdir(ROOT)
    loaded = load_flow_from_entrypoint(entrypoint)
    assert loaded.name == "recommend"
    assert loaded.description == recommend.summary
    sections = schema_of(loaded)["definitions"]["RecommendParams"]["properties"]
    assert tuple(sections) == recommend.stages


def test_a_list_of_flows_does_not_wait_for_prefect() -> None:
    script = (
        "import sys\nfrom components.pipeline.flow import load_flows\n"
        "assert 'recommend' in load_flows()\n"
        "heavy = {'prefect', 'ray', 'mlflow', 'torch', 'pandas', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
