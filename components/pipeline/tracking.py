"""MLflow behind one face: a run for a flow, a nested run for each stage that executed.

Only the driver process writes, in batches: the default back end is SQLite, which has one writer.
Tracking follows the work and never stops it: once a flow has started, what MLflow refuses is said
once and left out; the manifests hold the results all the same.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.pipeline.console import Console
from components.pipeline.errors import ReelflowError, StorageError
from components.pipeline.refusals import reason
from components.pipeline.settings import SQLITE, Settings
from components.pipeline.storage import exclusive, parse_uri

if TYPE_CHECKING:
    from components.pipeline.artifacts import Input
    from components.pipeline.manifest import Manifest
    from components.pipeline.run import Sink
    from components.pipeline.runner import Runner
    from components.pipeline.stage import Stage

FLUSH_EVERY_S = 2.0
FLUSH_EVERY = 500
MAX_METRICS_PER_CALL = 1000
MAX_PARAMS_PER_CALL = 100
MAX_PARAM_CHARS = 500
MAX_DIGEST_CHARS = 36

#: A server that does not answer is reported within seconds, not after MLflow's own four minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


def connect(settings: Settings, experiment: str | None = None) -> Any:
    """Import MLflow, point it at the tracking server and make sure the experiment exists.

    Returns:
        The ``mlflow`` module.

    Raises:
        StorageError: the server does not answer, or its database cannot be used.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    for logger in ("alembic", "mlflow"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    # What fails there is raised as well, and told here without the page of its traceback.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    import mlflow

    from components.pipeline import mlflow_artifacts

    mlflow_artifacts.use()
    mlflow.set_tracking_uri(settings.tracking)
    embedded = settings.tracking_database is not None
    # Two processes that meet a new database would both create its tables.
    lock = exclusive(settings.home / "locks" / "mlflow") if embedded else nullcontext()
    try:
        with lock:
            make_database(settings)
            if experiment is None:
                mlflow.search_experiments(max_results=1)
            else:
                experiment = _made_experiment(mlflow, settings, experiment)
        if experiment is not None:
            mlflow.set_experiment(experiment)
    except ReelflowError:
        raise
    except Exception as error:
        # Prefect writes down what is chained, and that may bear the address of a database.
        raise _refused(settings, error) from None
    return mlflow


def make_database(settings: Settings) -> None:
    """Make the database of a file if there is none; call under its lock.

    It gets its tables under another name: a migration that is cut short, by a kill or a full
    disk, leaves half of them, and MLflow can then neither go on nor start anew.
    """
    file = settings.tracking_database
    if file is None or (file.is_file() and file.stat().st_size):
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = file.with_name(f"{file.name}.new")
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in new.parent.glob(f"{new.name}*"):
        left.unlink()
    made = SqlAlchemyStore(f"{SQLITE}{new}", artifact_location(settings))
    made.engine.dispose()
    new.replace(file)


def _refused(settings: Settings, error: Exception) -> StorageError:
    where, remedy = (
        "MLFLOW_TRACKING_URI",
        "start the tracking server, or unset the variable to use the embedded one; "
        "reelflow doctor shows the address",
    )
    if settings.tracking_database is not None:
        where, remedy = (
            settings.tracking,
            "check the rights and the free space there; REELFLOW_HOME or MLFLOW_TRACKING_URI "
            "give it another place",
        )
    what = f"MLflow does not work: {_first_line(error)}"
    return StorageError(what, where=where, remedy=remedy)


def artifact_location(settings: Settings) -> str | None:
    """Where models and figures go: beside the artifacts of an object store, else below ``home``.

    None where a tracking server decides.
    """
    if settings.tracking_database is None:
        return None
    if parse_uri(settings.store)[0] == "s3":
        return f"{settings.store.rstrip('/')}/mlflow"
    return (settings.home / "mlflow-artifacts").as_uri()


def _made_experiment(mlflow: Any, settings: Settings, name: str) -> str:
    """Make sure that an experiment is there for the store in force; its name.

    The location of an experiment is fixed when it is made. One of another object store, or of none,
    is left to its runs, and the store's own is named after it: ``recommend (s3://bucket/prefix)``.
    """
    wanted = artifact_location(settings)
    found = mlflow.get_experiment_by_name(name)
    if found is not None and wanted is not None:
        remote = [place for place in (found.artifact_location, wanted) if place.startswith("s3:")]
        if remote and found.artifact_location != wanted:
            name = f"{name} ({settings.store.rstrip('/')})"
            found = mlflow.get_experiment_by_name(name)
    if found is None:
        mlflow.create_experiment(name, artifact_location=wanted)
    return name


class FlowTracker:
    """Keeps one flow run in MLflow.

    Use as a context manager; it connects when the first stage executes, so that a run that finds
    everything cached does not pay for the import.

    Attributes:
        run_id: MLflow's id of the flow run; None before the first stage executes.
        experiment_id: of the experiment it is in.
        environment: variables by which another process finds the run of the stage that executes.
    """

    def __init__(self, settings: Settings, flow: str, tags: Mapping[str, str]) -> None:
        self._settings, self._flow, self._tags = settings, flow, dict(tags)
        self._mlflow: Any = None
        self._finished: list[tuple[Manifest, bool]] = []
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        """Connect and open the run of the flow, with what finished before.

        Raises:
            StorageError: the tracking server cannot be used.
        """
        if self._mlflow is not None:
            return
        self._mlflow = connect(self._settings, self._flow)
        info = self._open_run(run_name=self._flow, tags=self._tags)
        self.run_id, self.experiment_id = info.run_id, info.experiment_id
        for manifest, cached in self._finished:
            self._record(manifest, cached)

    def __enter__(self) -> FlowTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._mlflow is not None:
            with _going_on():
                self._mlflow.end_run(_status(kind))

    @contextmanager
    def stage(self, name: str, params: Mapping[str, Any]) -> Iterator[StageTracker]:
        """A nested run around the execution of a stage."""
        self.start()
        run_id = self._open_run(run_name=name, nested=True, tags={"stage": name}).run_id
        tracker = StageTracker(self._mlflow.MlflowClient(), run_id)
        self.environment["MLFLOW_RUN_ID"] = run_id
        tracker.params(params)
        status = "FINISHED"
        try:
            yield tracker
        except BaseException as error:
            status = _status(type(error))
            raise
        finally:
            tracker.flush()
            with _going_on():
                self._mlflow.end_run(status)

    def _open_run(self, **options: Any) -> Any:
        try:
            return self._mlflow.start_run(**options).info
        except Exception as error:
            raise _refused(self._settings, error) from None

    def record(self, manifest: Manifest, cached: bool) -> None:
        """Note a finished stage on the flow's run: its metrics and where its outputs are."""
        self._finished.append((manifest, cached))
        if self._mlflow is not None:
            self._record(manifest, cached)

    def _record(self, manifest: Manifest, cached: bool) -> None:
        tags = {
            f"stage.{manifest.stage}": "cached" if cached else "executed",
            f"manifest.{manifest.stage}": manifest.key,
        }
        metrics = {f"{manifest.stage}.{name}": value for name, value in manifest.metrics.items()}
        with _going_on():
            self._mlflow.set_tags(tags)
            self._mlflow.log_metrics(metrics)


class StageTracker:
    """Sink of one stage: parameters, metrics by step (in batches), figures, datasets.

    Metrics may come from any thread.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self.run_id = client, run_id
        self._pending: list[Any] = []
        self._newest_step: dict[str, int] = {}
        self._flushed = time.monotonic()
        self._lock = threading.Lock()

    def params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(name, str(v)[:MAX_PARAM_CHARS]) for name, v in _flatten(params).items()]
        with _going_on():
            for start in range(0, len(flat), MAX_PARAMS_PER_CALL):
                batch = flat[start : start + MAX_PARAMS_PER_CALL]
                self._client.log_batch(self.run_id, params=batch)

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with self._lock:
            for name, value in metrics.items():
                # MLflow shows the value of the greatest step: without a step, it is this one.
                at = self._newest_step.get(name, 0) if step is None else step
                self._newest_step[name] = max(at, self._newest_step.get(name, 0))
                self._pending.append(Metric(name, float(value), now_ms, at))
            due = time.monotonic() - self._flushed > FLUSH_EVERY_S
        if due or len(self._pending) > FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Send the metrics that wait."""
        with self._lock:
            pending, self._pending = self._pending, []
            self._flushed = time.monotonic()
        with _going_on():
            for start in range(0, len(pending), MAX_METRICS_PER_CALL):
                batch = pending[start : start + MAX_METRICS_PER_CALL]
                self._client.log_batch(self.run_id, metrics=batch)

    def figure(self, name: str, png: bytes) -> None:
        with _going_on(), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.png"
            file.write_bytes(png)
            self._client.log_artifact(self.run_id, str(file), "figures")

    def note(self, text: str) -> None:
        """Notes are for the person who waits."""

    def progress(self, label: str, done: float | None, total: float) -> None:
        """Progress is for the person who waits."""

    def datasets(self, artifacts: Mapping[str, Input], context: str) -> None:
        """Note tables that the stage read or wrote, by their digests."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tables = [
            DatasetInput(
                Dataset(
                    name=name,
                    digest=artifact.digest[:MAX_DIGEST_CHARS],
                    source_type="s3" if artifact.uri.startswith("s3://") else "local",
                    source=json.dumps({"uri": artifact.uri}),
                    profile=json.dumps({"num_rows": artifact.rows}),
                ),
                [InputTag("mlflow.data.context", context)],
            )
            for name, artifact in artifacts.items()
            if artifact.rows is not None
        ]
        with _going_on():
            if not tables:
                return
            try:
                self._client.log_inputs(self.run_id, tables)
            except Exception as error:
                if "unique" not in str(error).lower():
                    raise
                # Two runs that note a new table in the same moment collide; now it is there.
                self._client.log_inputs(self.run_id, tables)


class Execute(Protocol):
    """How a stage is executed: in this process (``Runner.execute``) or in one of its own."""

    def __call__(
        self, stage: Stage, *, force: bool, sinks: tuple[Sink, ...]
    ) -> tuple[Manifest, bool]: ...


def execute_tracked(
    runner: Runner,
    stage: Stage,
    tracker: FlowTracker,
    force: bool,
    execute: Execute | None = None,
    sinks: tuple[Sink, ...] = (),
) -> tuple[Manifest, bool]:
    """Execute one stage under a nested MLflow run; a cached one only leaves a note.

    Args:
        execute: how; in this process unless given.
        sinks: who is told beside the console and MLflow.
    """
    runner.resolve_upstream(stage)
    cached = None if force else runner.cached(stage)
    if cached is not None:
        tracker.record(cached, cached=True)
        return cached, True
    with tracker.stage(stage.name, runner.params[stage.name].model_dump(mode="json")) as sink:
        sink.datasets(runner.inputs_of(stage), "read")
        told: tuple[Sink, ...] = (Console(stage.name), sink, *sinks)
        manifest, was_cached = (execute or runner.execute)(stage, force=force, sinks=told)
        sink.datasets(runner.outputs_of(stage), "written")
        sink.log(manifest.metrics)
    tracker.record(manifest, was_cached)
    return manifest, was_cached


_told = threading.Event()


@contextmanager
def _going_on() -> Iterator[None]:
    """Nothing that MLflow raises in the block stops the work; the first failure is said."""
    try:
        yield
    except Exception as error:
        if not _told.is_set():
            _told.set()
            print(
                f"  tracking: MLflow refused something and the run goes on: "
                f"{reason(error) or _first_line(error)}",
                file=sys.stderr,
                flush=True,
            )


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return re.sub(r"//[^/@\s]+@", "//***@", line)


def _status(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    return "FAILED" if issubclass(kind, Exception) else "KILLED"


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
