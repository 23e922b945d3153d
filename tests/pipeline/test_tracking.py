"""What a run leaves in MLflow, read back through MLflow's own client from a real database."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from real_services import NewDatabase, S3Server
from tiny_stages import Tiny

from components.pipeline import s3 as s3_module
from components.pipeline import tracking
from components.pipeline.errors import StorageError
from components.pipeline.runner import Runner
from components.pipeline.settings import Settings
from components.pipeline.storage import Folder
from components.pipeline.tracking import FlowTracker, StageTracker, connect, execute_tracked

#: So many that some collide for sure.
TABLES = 10


@pytest.fixture
def runner(tiny: Tiny, tmp_path: Path, new_database: NewDatabase) -> Iterator[Runner]:
    """A runner of the tiny stages with a tracking database of its own."""
    import mlflow

    made = tiny.runner(tmp_path, "seed=3")
    (tmp_path / "home").mkdir()
    shutil.copy(new_database.file, tmp_path / "home" / "mlflow.db")
    made.settings = replace(made.settings, tracking=f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}")
    tracking._told.clear()
    yield made
    while mlflow.active_run():
        mlflow.end_run()


def run_flow(runner: Runner, tiny: Tiny, force: bool = False) -> FlowTracker:
    with FlowTracker(runner.settings, "tiny", {"store": runner.store.uri}) as tracker:
        for stage in tiny.stages:
            execute_tracked(runner, stage, tracker, force)
    return tracker


def client(runner: Runner) -> Any:
    import mlflow

    return mlflow.MlflowClient(runner.settings.tracking)


def stage_runs(runner: Runner, tracker: FlowTracker) -> dict[str, Any]:
    experiment = client(runner).get_experiment_by_name("tiny")
    runs = client(runner).search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'"
    )
    return {run.data.tags["stage"]: run for run in runs}


def test_a_flow_is_a_run_and_each_stage_a_nested_one(tiny: Tiny, runner: Runner) -> None:
    tracker = run_flow(runner, tiny)
    flow = client(runner).get_run(tracker.run_id)
    assert flow.info.run_name == "tiny"
    assert flow.info.status == "FINISHED"
    assert flow.data.tags["store"] == runner.store.uri
    assert flow.data.metrics == {"numbers.rows": 5, "doubled.largest": 14, "total.total": 50}
    for name, run in stage_runs(runner, tracker).items():
        assert run.info.run_name == name
        assert run.info.status == "FINISHED"
        assert flow.data.tags[f"stage.{name}"] == "executed"
        assert flow.data.tags[f"manifest.{name}"] == runner.done[name].key
    assert set(stage_runs(runner, tracker)) == {"numbers", "doubled", "total"}


def test_params_and_final_metrics_are_those_of_the_stage(tiny: Tiny, runner: Runner) -> None:
    runs = stage_runs(runner, run_flow(runner, tiny))
    assert runs["numbers"].data.params == {"count": "5", "attempt": "0", "seed": "3"}
    assert runs["doubled"].data.params == {"factor": "2.0", "rounding.digits": "2"}
    assert runs["total"].data.metrics == {"total": 50}


def test_metrics_keep_their_steps_in_order_and_none_is_lost(tiny: Tiny, runner: Runner) -> None:
    def curve(run: Any) -> None:
        for step in range(1, 1301):
            run.log({"loss": 1 / step}, step)

    tiny.during = curve
    run = stage_runs(runner, run_flow(runner, tiny))["numbers"]
    history = client(runner).get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(s, 1 / s) for s in range(1, 1301)]


def test_metrics_may_come_from_another_thread(tiny: Tiny, runner: Runner) -> None:
    def from_threads(run: Any) -> None:
        def log(start: int) -> None:
            for step in range(start, start + 400):
                run.log({"loss": float(step)}, step)

        threads = [threading.Thread(target=log, args=(n * 400,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    tiny.during = from_threads
    run = stage_runs(runner, run_flow(runner, tiny))["numbers"]
    history = client(runner).get_metric_history(run.info.run_id, "loss")
    assert sorted(m.step for m in history) == list(range(1200))


def test_metrics_show_before_the_stage_ends(
    tiny: Tiny, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_EVERY_S", 0.05)
    seen: list[int] = []

    def watch(run: Any) -> None:
        run.log({"loss": 1.0}, 1)
        time.sleep(0.1)
        run.log({"loss": 0.5}, 2)
        (found,) = client(runner).search_runs(
            [client(runner).get_experiment_by_name("tiny").experiment_id], "tags.stage = 'numbers'"
        )
        seen.append(len(client(runner).get_metric_history(found.info.run_id, "loss")))

    tiny.during = watch
    run_flow(runner, tiny)
    assert seen == [2]


def test_tables_are_datasets_by_digest_without_a_warning(tiny: Tiny, runner: Runner) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = run_flow(runner, tiny)
    runs = stage_runs(runner, tracker)

    def datasets(stage: str) -> dict[tuple[str, str], Any]:
        found = runs[stage].inputs.dataset_inputs
        return {(d.tags[0].value, d.dataset.name): d.dataset for d in found}

    assert set(datasets("numbers")) == {("written", "numbers")}
    assert set(datasets("doubled")) == {("read", "numbers"), ("written", "doubled")}
    assert set(datasets("total")) == {("read", "doubled")}
    record = runner.done["numbers"].body["outputs"]["numbers"]
    read = datasets("doubled")["read", "numbers"]
    assert read.digest == record["digest"][:36] == datasets("numbers")["written", "numbers"].digest
    assert json.loads(read.source) == {"uri": f"{runner.store.uri}/{record['path']}"}
    assert json.loads(read.profile) == {"num_rows": 5}


def test_runs_that_note_the_same_new_table_at_once_all_keep_it(
    tiny: Tiny, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in tiny.stages:
        runner.execute(stage)
    connect(runner.settings, "tiny")
    experiment = client(runner).get_experiment_by_name("tiny").experiment_id
    runs = [client(runner).create_run(experiment).info.run_id for _ in range(4)]
    together = threading.Barrier(len(runs))

    table = runner.outputs_of(tiny.stages[0])["numbers"]

    def note(run_id: str) -> None:
        tracker = StageTracker(client(runner), run_id)
        for number in range(TABLES):
            together.wait()
            tracker.datasets({f"table {number}": table}, "written")

    threads = [threading.Thread(target=note, args=(run_id,)) for run_id in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err == ""
    for run_id in runs:
        assert len(client(runner).get_run(run_id).inputs.dataset_inputs) == TABLES


def test_a_figure_is_kept_beside_the_run(tiny: Tiny, runner: Runner) -> None:
    def draw(run: Any) -> None:
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().plot([1, 2, 3])
        # From another thread, where no run is MLflow's active one.
        thread = threading.Thread(target=run.figure, args=("loss curve", figure))
        thread.start()
        thread.join()

    tiny.during = draw
    run = stage_runs(runner, run_flow(runner, tiny))["numbers"]
    (file,) = client(runner).list_artifacts(run.info.run_id, "figures")
    assert file.path == "figures/loss curve.png"
    local = Path(client(runner).download_artifacts(run.info.run_id, file.path))
    assert local.read_bytes().startswith(b"\x89PNG")


def test_cached_stages_leave_a_note_and_no_run_of_their_own(tiny: Tiny, runner: Runner) -> None:
    run_flow(runner, tiny)
    again = tiny.runner(runner.settings.home.parent, "seed=3", "total.label=t")
    again.settings = runner.settings
    tracker = run_flow(again, tiny)
    assert set(stage_runs(again, tracker)) == {"total"}
    flow = client(again).get_run(tracker.run_id)
    assert flow.data.tags["stage.numbers"] == "cached"
    assert flow.data.tags["stage.total"] == "executed"
    assert flow.data.metrics["numbers.rows"] == 5


def test_a_flow_that_is_all_cached_does_not_connect(tiny: Tiny, runner: Runner) -> None:
    run_flow(runner, tiny)
    tracker = run_flow(runner, tiny)
    assert tracker.run_id is None


@pytest.mark.parametrize(
    ("error", "status"), [(ZeroDivisionError(), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_stage_that_ends_early_is_marked_so(
    tiny: Tiny, runner: Runner, error: BaseException, status: str
) -> None:
    def fail(run: Any) -> None:
        run.log({"loss": 1.0}, 1)
        raise error

    tiny.during = fail
    tracker = FlowTracker(runner.settings, "tiny", {})
    with pytest.raises(BaseException), tracker:  # noqa: B017
        execute_tracked(runner, tiny.stages[0], tracker, force=False)
    run = stage_runs(runner, tracker)["numbers"]
    assert run.info.status == status
    assert run.data.metrics == {"loss": 1.0}
    assert client(runner).get_run(tracker.run_id).info.status == status


def test_a_tracking_failure_in_a_stage_is_said_once_and_stops_nothing(
    tiny: Tiny, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_the_database(run: Any) -> None:
        (runner.settings.home / "mlflow.db").write_bytes(b"not a database any more")
        for step in range(3):
            run.log({"loss": 1.0}, step)

    tiny.during = lose_the_database
    tracker = FlowTracker(runner.settings, "tiny", {})
    with tracker:
        execute_tracked(runner, tiny.stages[0], tracker, force=False)
    assert runner.done["numbers"].metrics == {"rows": 5}
    assert capsys.readouterr().err.count("tracking: MLflow refused something") == 1


def test_a_metric_name_that_mlflow_refuses_loses_no_other(tiny: Tiny, runner: Runner) -> None:
    connect(runner.settings, "tiny")
    experiment = client(runner).get_experiment_by_name("tiny").experiment_id
    run_id = client(runner).create_run(experiment).info.run_id
    sink = StageTracker(client(runner), run_id)
    sink.log({"recall@10": 0.5}, 1)
    sink.flush()
    sink.log({"recall_at_10": 0.5}, 1)
    sink.flush()
    assert client(runner).get_run(run_id).data.metrics == {"recall_at_10": 0.5}


def test_a_server_that_does_not_answer_is_a_storage_error_within_seconds(
    tiny: Tiny, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    settings = replace(runner.settings, tracking="http://someone:secret@127.0.0.1:9")
    tracker = FlowTracker(settings, "tiny", {})
    with pytest.raises(StorageError) as caught, tracker:
        execute_tracked(runner, tiny.stages[0], tracker, force=False)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert tiny.calls == []


def test_a_home_that_cannot_be_written_is_not_blamed_on_mlflow(runner: Runner) -> None:
    (runner.settings.home / "locks").write_text("a file where the folder should be")
    with pytest.raises(StorageError) as caught:
        connect(runner.settings, "tiny")
    assert "give REELFLOW_HOME another folder" in str(caught.value)
    assert "MLflow" not in str(caught.value)


def test_a_database_that_cannot_be_used_is_named_with_its_place(runner: Runner) -> None:
    (runner.settings.home / "file").write_text("")
    settings = replace(runner.settings, tracking=f"sqlite:///{runner.settings.home}/file/m.db")
    with pytest.raises(StorageError) as caught:
        connect(settings, "tiny")
    assert str(caught.value).startswith(f"{settings.tracking}: MLflow does not work")
    assert "check the rights" in str(caught.value)


def test_two_processes_may_meet_a_new_database(new_database: NewDatabase) -> None:
    assert new_database.exit_code == 0, new_database.said


SERVED = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
class Doubler(PythonModel):
    def predict(self, context, model_input):
        return model_input * 2
set_model(Doubler())
"""

LOAD = """
import sys, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/doubler@champion")
print(int(model.predict(pandas.DataFrame({"n": [21]}))["n"].iloc[0]))
"""


def test_models_and_figures_go_to_the_object_store_and_load_from_there(
    runner: Runner, tmp_path: Path, s3: S3Server
) -> None:
    runner.settings = replace(runner.settings, store=s3.uri)
    (tmp_path / "doubler.py").write_text(SERVED)
    mlflow = connect(runner.settings, "tiny in a store")
    with mlflow.start_run() as run:
        StageTracker(mlflow.MlflowClient(), run.info.run_id).figure("f", b"\x89PNG")
        made = mlflow.pyfunc.log_model(
            name="model", python_model=str(tmp_path / "doubler.py"), pip_requirements=["pandas"]
        )
        version = mlflow.register_model(made.model_uri, "doubler")
        client(runner).set_registered_model_alias("doubler", "champion", version.version)
    assert run.info.artifact_uri.startswith(f"{s3.uri}/mlflow/")
    assert [f for f in runner.store.folder.files("") if f.name.startswith("mlflow")] == []
    written = Folder(s3.uri).names("mlflow")
    assert any(name.endswith("figures/f.png") for name in written)
    assert any(name.endswith("MLmodel") for name in written)
    # Any program with the usual variables loads it, without a module of ours.
    done = subprocess.run(
        [sys.executable, "-c", LOAD, runner.settings.tracking],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.split() == ["42"], done.stderr


def test_an_experiment_belongs_to_the_store_it_was_made_for(runner: Runner, s3: S3Server) -> None:
    local, remote = runner.settings, replace(runner.settings, store=s3.uri)

    def place(settings: Settings, name: str) -> tuple[str, str]:
        mlflow = connect(settings, name)
        with mlflow.start_run() as run:
            experiment = client(runner).get_experiment(run.info.experiment_id)
        return experiment.name, experiment.artifact_location

    own = (local.home / "mlflow-artifacts").as_uri()
    assert place(local, "first local") == ("first local", own)
    other = place(remote, "first local")
    assert other == (f"first local ({s3.uri})", f"{s3.uri}/mlflow")
    assert place(remote, "first local") == other
    assert place(local, "first local") == ("first local", own)
    assert place(remote, "first remote") == ("first remote", f"{s3.uri}/mlflow")
    assert place(local, "first remote") == (f"first remote ({local.store})", own)


def test_a_model_that_the_store_does_not_take_is_a_storage_error(
    runner: Runner, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(s3_module, "MAX_ATTEMPTS", 1)
    runner.settings = replace(runner.settings, store=s3.uri)
    (tmp_path / "doubler.py").write_text(SERVED)
    mlflow = connect(runner.settings, "tiny in a store")
    with mlflow.start_run():
        s3.down = True
        with pytest.raises(StorageError, match=r"mlflow/models/.*: cannot upload"):
            mlflow.pyfunc.log_model(
                name="model", python_model=str(tmp_path / "doubler.py"), pip_requirements=["pandas"]
            )
