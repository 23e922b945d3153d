"""MLflow behind one face: a run for a flow, a nested run for each stage that executed.

Only the driver process writes, in batches: the default back end is SQLite, which has one writer.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from components.pipeline.settings import Settings

if TYPE_CHECKING:
    from components.pipeline.artifacts import Manifest
    from components.pipeline.runner import Runner
    from components.pipeline.stage import Stage

FLUSH_EVERY_S = 2.0
MAX_PARAM_CHARS = 500


def connect(settings: Settings) -> Any:
    """Import MLflow and point it at the tracking server.

    Returns:
        The ``mlflow`` module.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    import mlflow

    settings.home.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(settings.tracking)
    return mlflow


def open_experiment(settings: Settings, experiment: str) -> Any:
    """Connect and make ``experiment`` the current one, creating it if it is new.

    Returns:
        The ``mlflow`` module.
    """
    mlflow = connect(settings)
    if mlflow.get_experiment_by_name(experiment) is None:
        # A server decides where artifacts go; the embedded database needs to be told.
        location = None
        if settings.tracking.startswith("sqlite:"):
            location = (settings.home / "mlflow-artifacts").as_uri()
        mlflow.create_experiment(experiment, artifact_location=location)
    mlflow.set_experiment(experiment)
    return mlflow


class FlowTracker:
    """Keeps one flow run in MLflow.

    Use as a context manager; it connects when the first stage executes, so that a run that finds
    everything cached does not pay for the import.
    """

    def __init__(self, settings: Settings, flow: str, tags: Mapping[str, str]) -> None:
        self._settings, self._flow, self._tags = settings, flow, dict(tags)
        self._mlflow: Any = None
        self.run_id: str | None = None

    def start(self) -> None:
        if self._mlflow is not None:
            return
        self._mlflow = open_experiment(self._settings, self._flow)
        self.run_id = self._mlflow.start_run(run_name=self._flow, tags=self._tags).info.run_id

    def __enter__(self) -> FlowTracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._mlflow is not None:
            self._mlflow.end_run("FINISHED" if kind is None else "FAILED")

    @contextmanager
    def stage(self, name: str, params: Mapping[str, Any]) -> Iterator[StageTracker]:
        """A nested run around the execution of a stage."""
        self.start()
        with self._mlflow.start_run(run_name=name, nested=True, tags={"stage": name}) as run:
            flat = {k: str(v)[:MAX_PARAM_CHARS] for k, v in _flatten(params).items()}
            if flat:
                self._mlflow.log_params(flat)
            tracker = StageTracker(self._mlflow, run.info.run_id)
            try:
                yield tracker
            finally:
                tracker.flush()

    def record(self, manifest: Manifest, cached: bool) -> None:
        """Note a finished stage on the flow's run: its metrics and the digests of its outputs."""
        if self._mlflow is None:
            return
        self._mlflow.set_tag(f"stage.{manifest.stage}", "cached" if cached else "executed")
        self._mlflow.set_tag(f"manifest.{manifest.stage}", manifest.key)
        if manifest.metrics:
            self._mlflow.log_metrics(
                {f"{manifest.stage}.{name}": value for name, value in manifest.metrics.items()}
            )

    def record_datasets(self, manifest: Manifest) -> None:
        """Log the tables a stage wrote as MLflow datasets, by digest (on the current run)."""
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset

        for name, record in manifest.body["outputs"].items():
            if "rows" not in record:
                continue
            with warnings.catch_warnings():
                # A folder is both "a local artifact" and "a local artifact" to MLflow.
                warnings.filterwarnings("ignore", "The specified dataset source", UserWarning)
                source = resolve_dataset_source(f"{self._settings.store}/{record['path']}")
            dataset = MetaDataset(source=source, name=name, digest=record["digest"][:32])
            self._mlflow.log_input(dataset, context=manifest.stage)


class StageTracker:
    """Sink of one stage: metrics by step, batched; figures; final metrics."""

    def __init__(self, mlflow: Any, run_id: str) -> None:
        self._mlflow, self.run_id = mlflow, run_id
        self._pending: list[Any] = []
        self._flushed = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._pending += [
            Metric(name, float(value), now_ms, step or 0) for name, value in metrics.items()
        ]
        if time.monotonic() - self._flushed > FLUSH_EVERY_S or len(self._pending) > 500:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._mlflow.MlflowClient().log_batch(self.run_id, metrics=self._pending[:1000])
            self._pending = self._pending[1000:]
            if self._pending:
                self.flush()
        self._flushed = time.monotonic()

    def figure(self, name: str, figure: Any) -> None:
        self._mlflow.log_figure(figure, f"figures/{name}.png")


def execute_tracked(
    runner: Runner, stage: Stage, tracker: FlowTracker, force: bool
) -> tuple[Manifest, bool]:
    """Execute one stage under a nested MLflow run; a cached one only leaves a note."""
    runner.resolve_upstream(stage)
    cached = None if force else runner.cached(stage)
    if cached is not None:
        tracker.record(cached, cached=True)
        return cached, True
    with tracker.stage(stage.name, runner.params[stage.name].model_dump(mode="json")) as sink:
        manifest, was_cached = runner.execute(stage, force=force, sinks=(sink,))
        tracker.record_datasets(manifest)
        sink.log(manifest.metrics, None)
    tracker.record(manifest, was_cached)
    return manifest, was_cached


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
