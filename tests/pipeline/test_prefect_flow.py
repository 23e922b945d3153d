"""A flow runs under real Prefect as its stages say: names, states, errors and the form."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_services import NewDatabase
from tiny_stages import Tiny

from components.pipeline.errors import DataContractError, StageError, StorageError, UsageError
from components.pipeline.flow import Flow
from components.pipeline.runner import Runner

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
FLOW = Flow("tiny_flow", "Count, double and add up.", ("numbers", "doubled", "total"))


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
def runner(
    prefect: None,
    tiny: Tiny,
    tmp_path: Path,
    new_database: NewDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> Runner:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(new_database.file, home / "mlflow.db")
    monkeypatch.setenv("REELFLOW_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    return tiny.runner(tmp_path, "numbers.count=3")


def run(runner: Runner, **options: Any) -> None:
    from components.pipeline.prefect_flow import run_flow

    run_flow(FLOW, runner, **{"start": None, "until": None, "force": False, **options})


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
    tiny: Tiny, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    run(runner)
    assert list(runner.done) == ["numbers", "doubled", "total"]
    first = History(3)
    assert first.flow.state.name == "Completed"
    assert first.states() == [(name, "Completed") for name in FLOW.stages]
    assert runner.done["total"].metrics == {"total": 6}
    capsys.readouterr()

    changed = tiny.runner(runner.settings.home.parent, "numbers.count=3", "total.label=t")
    run(changed)
    second = History(3)
    assert second.states() == [("numbers", "Cached"), ("doubled", "Cached"), ("total", "Completed")]
    assert f"cached, key {changed.done['numbers'].key}" in second.tasks[0].state.message
    assert capsys.readouterr().out.split() == ["numbers", "cached", "doubled", "cached", "total",
                                               "0.0", "s"]  # fmt: skip
    assert tiny.calls == ["numbers", "doubled", "total", "total"]


def test_params_start_until_and_force_reach_the_stages(tiny: Tiny, runner: Runner) -> None:
    run(runner, until="doubled")
    assert tiny.calls == ["numbers", "doubled"]
    assert runner.done["numbers"].body["params"]["count"] == 3
    run(runner, start="doubled", until="doubled", force=True)
    assert tiny.calls == ["numbers", "doubled", "doubled"]
    assert History(1).states() == [("doubled", "Completed")]


def test_metrics_are_a_table_on_the_page_of_the_run(runner: Runner) -> None:
    from prefect.client.orchestration import get_client

    run(runner)
    with get_client(sync_client=True) as client:
        artifact = client.request("GET", "/artifacts/tiny-flow-metrics/latest").json()
    assert artifact["flow_run_id"] == str(History(3).flow.id)
    assert json.loads(artifact["data"]) == [
        {"stage": "numbers", "metric": "rows", "value": 3.0},
        {"stage": "doubled", "metric": "largest", "value": 4.0},
        {"stage": "total", "metric": "total", "value": 6.0},
    ]


def test_a_metric_that_is_not_a_number_does_not_stop_the_flow(tiny: Tiny, runner: Runner) -> None:
    from components.pipeline.prefect_flow import _publish_metrics

    _publish_metrics("tiny_flow", {"s": {"loss": float("nan"), "best": float("inf")}})


@pytest.mark.parametrize(
    ("raised", "kind", "exit_code"),
    [
        (DataContractError("column 'a' is missing", where="f.parquet"), DataContractError, 3),
        (ZeroDivisionError("division by zero"), StageError, 4),
    ],
)
def test_an_error_keeps_its_type_and_exit_code_through_prefect(
    tiny: Tiny, runner: Runner, raised: Exception, kind: type, exit_code: int
) -> None:
    def fail(_: Any) -> None:
        raise raised

    tiny.during = fail
    with pytest.raises(kind) as caught:
        run(runner)
    assert caught.value.exit_code == exit_code
    assert raised in (caught.value, caught.value.__cause__)
    history = History(1)
    assert history.flow.state.name == "Failed"
    assert history.states() == [("numbers", "Failed")]
    assert str(raised).splitlines()[0] in history.flow.state.message


def test_an_interrupt_stays_an_interrupt(tiny: Tiny, runner: Runner) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    tiny.during = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(runner)


def test_a_wrong_name_is_a_usage_error(runner: Runner) -> None:
    with pytest.raises(UsageError, match="'nothing' is not a stage"):
        run(runner, start="nothing")


def test_a_server_that_does_not_answer_is_one_clear_error(tiny: Tiny, runner: Runner) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(StorageError) as caught,
    ):
        run(runner)
    assert "PREFECT_API_URL" in str(caught.value)
    assert "remedy:" in str(caught.value)
    assert tiny.calls == []


# The form


def schema_of(flow: Any) -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    return parameter_schema(flow.fn).model_dump()


def test_the_form_has_a_section_a_stage_with_meaning_and_bounds(runner: Runner) -> None:
    from components.pipeline.prefect_flow import build

    schema = schema_of(build(FLOW))
    sections = schema["definitions"]["TinyFlowParams"]["properties"]
    assert list(sections) == ["numbers", "doubled", "total"]
    count = schema["definitions"]["NumbersParams"]["properties"]["count"]
    assert count["description"] == "rows"
    assert (count["minimum"], count["maximum"], count["default"]) == (1, 1000, 5)
    rounding = schema["definitions"]["Rounding"]["properties"]["digits"]
    assert rounding["exclusiveMaximum"] == 10
    assert list(schema["properties"]) == ["params", "store", "start", "until", "force"]


def test_a_value_of_the_form_that_cannot_be_is_named(tiny: Tiny, runner: Runner) -> None:
    from prefect.exceptions import ParameterTypeError

    from components.pipeline.prefect_flow import build

    for params in ({"numbers": {"count": 0}}, {"numbers": {"cuont": 1}}):
        (key,) = params["numbers"]
        with pytest.raises(ParameterTypeError, match=rf"params\.numbers\.{key}"):
            build(FLOW)(params=params)
    assert tiny.calls == []


def test_what_the_form_sends_runs_the_stages(tiny: Tiny, runner: Runner) -> None:
    from components.pipeline.prefect_flow import build

    store = str(runner.settings.home / "other store")
    metrics = build(FLOW)(params={"numbers": {"count": 4}, "doubled": {"factor": 3}}, store=store)
    assert metrics == {"numbers": {"rows": 4}, "doubled": {"largest": 9}, "total": {"total": 18}}


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
