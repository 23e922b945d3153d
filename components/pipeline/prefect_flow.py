"""A Prefect flow from a list of stages: one task a stage, one form from the stages' own models.

No ``from __future__ import annotations`` here: Prefect reads the annotations of the flow to build
its form, and some of them are made at run time.
"""

import functools
import warnings
from typing import Annotated, Any, Literal

from prefect import Flow as PrefectFlow
from prefect import flow as prefect_flow
from prefect import task as prefect_task
from prefect.exceptions import ParameterTypeError
from prefect.runtime import flow_run
from prefect.states import Completed, State
from pydantic import BaseModel, ConfigDict, Field, create_model

from components.pipeline import prefect_page
from components.pipeline.console import say, working
from components.pipeline.errors import (
    ReelflowError,
    StageDied,
    StageError,
    StorageError,
    UsageError,
)
from components.pipeline.flow import Flow
from components.pipeline.hardware import require_hardware
from components.pipeline.presence import announced
from components.pipeline.runner import Runner, open_store, slice_flow
from components.pipeline.settings import load_settings, prepare_environment
from components.pipeline.stage import Stage
from components.pipeline.stage_process import StageProcesses
from components.pipeline.tracking import FlowTracker, execute_tracked

STAGE_TIMEOUT_MINUTES = 24 * 60.0
RETRIES = 2
RETRY_AFTER_S = (1.0, 10.0, 60.0)
#: As the form and the server check it: no other scheme, and no credentials that pages would show.
STORE = r"^(?:s3://[^@/]+(?:/.*)?|file:///.*|(?![A-Za-z][A-Za-z0-9+.-]*://).*)$"
#: A run that crashes with its process is started again by an automation, but not for ever.
MAX_STARTS = 5


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
    first, last = flow.stages[0], flow.stages[-1]
    stage_name: Any = Literal[flow.stages]

    def run(
        params: model = model(),  # type: ignore[valid-type]  # noqa: B008
        store: Annotated[str | None, Field(json_schema_extra={"pattern": STORE})] = None,
        start: stage_name = first,
        until: stage_name = last,
        force: bool = False,
        stage_timeout_minutes: Annotated[float, Field(gt=0, le=60 * 24 * 30)] = (
            STAGE_TIMEOUT_MINUTES
        ),
        retries: Annotated[int, Field(ge=0, le=10)] = RETRIES,
    ) -> dict[str, dict[str, float]]:
        settings = load_settings(store)
        prepare_environment(settings)
        _require_few_starts()
        sections = {name: getattr(params, name) for name in model.model_fields}
        runner = Runner(settings, open_store(settings), sections)
        # From before it looks up what is there, and until it is through, gc leaves that alone.
        with announced(settings, runner.store, flow.name):
            stages = slice_flow(flow, start, until)
            forced = frozenset(stage.name for stage in stages) if force else frozenset()
            due = [s.stage for s in runner.plan(stages, forced) if s.status != "cached"]
            require_hardware(due, runner.params, settings)
            with (
                StageProcesses() as processes,
                FlowTracker(settings, flow.name, tags={"store": settings.store}) as tracker,
            ):
                if due:
                    processes.get_ready()
                    tracker.start()
                    prefect_page.link_to_tracking(flow.name, settings, tracker)
                for stage in stages:
                    _Task(
                        flow, runner, stage, tracker, processes, force, stage_timeout_minutes
                    ).run(retries)
        metrics = {s.name: runner.done[s.name].metrics for s in stages}
        prefect_page.show_metrics(flow.name, metrics)
        prefect_page.link_to_report(flow.name, runner)
        return metrics

    run.__doc__ = f"""{flow.summary}

    Args:
        params: what each stage does; a stage whose parameters, code and inputs are unchanged is
            taken from the store.
        store: folder or s3://bucket/prefix of the artifacts; the one of the server unless given.
        start: first stage to run; those above it must be there.
        until: last stage to run.
        force: run the stages even if they are cached.
        stage_timeout_minutes: a stage that takes longer is ended; the next try goes on from its
            last checkpoint.
        retries: how often a stage whose process died or took too long is tried again.
    """
    return prefect_flow(run, name=flow.name, description=flow.summary, validate_parameters=True)


def run_flow(flow: Flow, runner: Runner, **options: Any) -> None:
    """Run ``flow`` through Prefect in this process and take over what it published.

    Args:
        options: of the flow: ``start``, ``until``, ``force``, ``stage_timeout_minutes``,
            ``retries``; None stands for the default.

    Raises:
        ReelflowError: as a stage raised it.
        StorageError: the Prefect server does not answer or refuses something.
    """
    model = params_model(flow)
    params = model(**{name: runner.params[name] for name in model.model_fields})
    given = {name: value for name, value in options.items() if value is not None}
    try:
        build(flow)(params=params, store=runner.store.uri, **given)
    except ReelflowError:
        raise
    except ParameterTypeError as error:
        raise UsageError(str(error), where=f"flow {flow.name}") from error
    except Exception as error:
        # Stages raise nothing else, so it is Prefect that failed.
        raise StorageError(
            f"Prefect does not work: {error}",
            where="PREFECT_API_URL",
            remedy="start the server, or unset the variable to use the embedded one; "
            "reelflow doctor shows the address. The same command resumes",
        ) from error
    runner.done.clear()
    runner.plan(slice_flow(flow, given.get("start"), given.get("until")))


class _Task:
    """One stage as a task of Prefect, without arguments: Prefect would walk through them."""

    def __init__(
        self,
        flow: Flow,
        runner: Runner,
        stage: Stage,
        tracker: FlowTracker,
        processes: StageProcesses,
        force: bool,
        timeout_minutes: float,
    ) -> None:
        self._flow, self._runner, self._stage, self._tracker = flow, runner, stage, tracker
        self._processes, self._force, self._limit_s = processes, force, 60 * timeout_minutes

    def run(self, retries: int) -> None:
        # Named as the stage: the page of a run reads as the pipeline does.
        prefect_task(
            self._once,
            name=self._stage.name,
            cache_policy=None,
            description=self._stage.summary,
            retries=retries,
            retry_delay_seconds=list(RETRY_AFTER_S[: max(1, retries)]),
            retry_condition_fn=_is_worth_a_retry,
        )()

    def _once(self) -> State:
        stage = self._stage
        page = prefect_page.Page(self._flow.name, stage.name)
        execute = functools.partial(
            self._processes.execute,
            self._runner,
            limit_s=self._limit_s,
            environment=self._tracker.environment,
        )
        with working(stage.name):
            manifest, cached = execute_tracked(
                self._runner, stage, self._tracker, self._force, execute, (page,)
            )
        said = "cached" if cached else f"{manifest.body['seconds']:.1f} s"
        print(f"  {stage.name:<22} {said}", flush=True)
        return Completed(
            name="Cached" if cached else "Completed", message=f"{said}, key {manifest.key}"
        )


# A plain function: of anything else Prefect does not ask, and never tries again.
def _is_worth_a_retry(task: Any, task_run: Any, state: State) -> bool:
    """What a stage says itself it would say again; a process that died may have had bad luck."""
    error = state.data
    if isinstance(error, StageDied):
        say(f"{task.name}: {error.what}")
        return True
    return False


def _require_few_starts() -> None:
    starts = flow_run.run_count or 1
    if starts > MAX_STARTS:
        raise StageError(
            f"the process of this run has died {starts - 1} times",
            remedy="look for the cause (memory, disk, the log of the worker), then run it again: "
            "it goes on from its last checkpoint",
        )
