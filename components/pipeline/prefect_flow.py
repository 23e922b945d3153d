"""A Prefect flow from a list of stages: one task a stage, one form from the stages' own models.

No ``from __future__ import annotations`` here: Prefect reads the annotation of ``params`` to build
its form, and that model is made at run time.
"""

import functools
import warnings
from typing import Any

from prefect import Flow as PrefectFlow
from prefect import flow as prefect_flow
from prefect import task as prefect_task
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, State
from pydantic import BaseModel, ConfigDict, Field, create_model

from components.pipeline.console import working
from components.pipeline.errors import ReelflowError, StorageError
from components.pipeline.flow import Flow
from components.pipeline.hardware import require_hardware
from components.pipeline.runner import Runner, open_store, slice_flow
from components.pipeline.settings import load_settings, prepare_environment
from components.pipeline.stage import Stage
from components.pipeline.tracking import FlowTracker, execute_tracked


@functools.cache
def params_model(flow: Flow) -> type[BaseModel]:
    """One model with a section for each stage of the flow: the form of the Prefect UI."""
    sections: dict[str, Any] = {
        stage.name: (stage.params, Field(default_factory=stage.params, title=stage.name))
        for stage in flow.resolve()
    }
    name = "".join(part.title() for part in flow.name.split("_")) + "Params"
    with warnings.catch_warnings():
        # A stage may be called as a method of every model is (`validate`); nothing calls those.
        warnings.filterwarnings("ignore", "Field name .* shadows an attribute", UserWarning)
        return create_model(
            name, __config__=ConfigDict(extra="forbid"), __doc__="Parameters by stage.", **sections
        )


def build(flow: Flow) -> PrefectFlow[Any, Any]:
    """The Prefect flow of ``flow``; calling it runs the stages that are not published yet."""
    model = params_model(flow)

    def run(
        params: model = model(),  # type: ignore[valid-type]  # noqa: B008
        store: str | None = None,
        start: str | None = None,
        until: str | None = None,
        force: bool = False,
    ) -> dict[str, dict[str, float]]:
        settings = load_settings(store)
        prepare_environment(settings)
        sections = {name: getattr(params, name) for name in model.model_fields}
        runner = Runner(settings, open_store(settings), sections)
        stages = slice_flow(flow, start, until)
        forced = frozenset(stage.name for stage in stages) if force else frozenset()
        due = [s.stage for s in runner.plan(stages, forced) if s.status != "cached"]
        require_hardware(due, sections, settings)
        with FlowTracker(settings, flow.name, tags={"store": settings.store}) as tracker:
            for stage in stages:
                _stage_task(runner, stage, tracker, force)()
        metrics = {s.name: runner.done[s.name].metrics for s in stages}
        _publish_metrics(flow.name, metrics)
        return metrics

    run.__doc__ = flow.summary
    return prefect_flow(run, name=flow.name, validate_parameters=True)


def run_flow(flow: Flow, runner: Runner, start: str | None, until: str | None, force: bool) -> None:
    """Run ``flow`` through Prefect in this process and take over what it published.

    Raises:
        ReelflowError: as a stage raised it.
        StorageError: the Prefect server does not answer or refuses something.
    """
    model = params_model(flow)
    params = model(**{name: runner.params[name] for name in model.model_fields})
    try:
        build(flow)(params=params, store=runner.store.uri, start=start, until=until, force=force)
    except ReelflowError:
        raise
    except Exception as error:
        # Stages raise nothing else, so it is Prefect that failed.
        raise StorageError(
            f"Prefect does not work: {error}",
            where="PREFECT_API_URL",
            remedy="start the server, or unset the variable to use the embedded one; "
            "reelflow doctor shows the address",
        ) from error
    runner.done.clear()
    runner.plan(slice_flow(flow, start, until))


def _stage_task(runner: Runner, stage: Stage, tracker: FlowTracker, force: bool) -> Any:
    """A task without arguments: Prefect would walk through whatever it is handed."""

    def execute() -> State:
        with working(stage.name):
            manifest, cached = execute_tracked(runner, stage, tracker, force)
        said = "cached" if cached else f"{manifest.body['seconds']:.1f} s"
        print(f"  {stage.name:<22} {said}", flush=True)
        return Completed(
            name="Cached" if cached else "Completed", message=f"{said}, key {manifest.key}"
        )

    # Named as the stage: the page of a run reads as the pipeline does.
    return prefect_task(execute, name=stage.name, cache_policy=None, description=stage.summary)


def _publish_metrics(flow: str, metrics: dict[str, dict[str, float]]) -> None:
    rows = [
        {"stage": stage, "metric": name, "value": value}
        for stage, values in metrics.items()
        for name, value in values.items()
    ]
    create_table_artifact(key=f"{flow.replace('_', '-')}-metrics", table=rows)
