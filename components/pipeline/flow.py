"""A flow is a list of stages; its graph follows from the artifacts they read and write."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from components.pipeline.errors import UsageError
from components.pipeline.stage import Stage, find_stage

FLOWS = Path(__file__).resolve().parent.parent.parent / "flows"


@dataclass(frozen=True)
class Plot:
    """Columns of a CSV file of an artifact against each other.

    Attributes:
        template: how DVC draws it: ``linear``, ``bar_horizontal``.
    """

    title: str
    artifact: str
    file: str
    x: str
    y: tuple[str, ...]
    template: str = "linear"


@dataclass(frozen=True)
class Flow:
    """Stages in the order in which they run.

    Attributes:
        name: name on the command line and in Prefect.
        summary: one line for ``reelflow --help``.
        stages: names of registered stages.
        headline: by stage, the metrics that a run is judged by: the columns in which experiments
            are compared.
        plots: what is drawn of a run, and of several above each other.
    """

    name: str
    summary: str
    stages: tuple[str, ...]
    headline: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    plots: tuple[Plot, ...] = ()

    def resolve(self) -> list[Stage]:
        """The stages, checked: each input must be an output of an earlier stage of the flow.

        Raises:
            UsageError: an unknown stage, or an input that nothing before it writes.
        """
        stages = [find_stage(name) for name in self.stages]
        written: dict[str, str] = {}
        for stage in stages:
            for artifact in stage.inputs:
                if artifact not in written:
                    raise UsageError(
                        f"stage '{stage.name}' reads '{artifact}', which no earlier stage writes",
                        where=f"flow {self.name}",
                    )
            written.update(dict.fromkeys(stage.outputs, stage.name))
        return stages

    def dependencies(self) -> dict[str, tuple[str, ...]]:
        """For each stage the stages whose outputs it reads, in flow order."""
        stages = self.resolve()
        writer = {artifact: s.name for s in stages for artifact in s.outputs}
        return {
            s.name: tuple(dict.fromkeys(writer[artifact] for artifact in s.inputs)) for s in stages
        }


def load_flows() -> dict[str, Flow]:
    """All flows by name: one in each module of ``flows`` that defines ``FLOW``."""
    found: dict[str, Flow] = {}
    for file in sorted(FLOWS.glob("*.py")):
        if file.stem.startswith("_"):
            continue
        flow = getattr(importlib.import_module(f"flows.{file.stem}"), "FLOW", None)
        if isinstance(flow, Flow):
            found[flow.name] = flow
    return found


def find_flow(name: str, flows: Mapping[str, Flow] | None = None) -> Flow:
    """The flow of that name.

    Raises:
        UsageError: there is none; the message lists what there is.
    """
    known = flows if flows is not None else load_flows()
    if name not in known:
        raise UsageError(f"there is no flow '{name}'", remedy="flows: " + ", ".join(sorted(known)))
    return known[name]


def headline_of(stage: str) -> tuple[str, ...]:
    """The headline metrics of ``stage`` in all flows that have it, most telling first."""
    named = [name for flow in load_flows().values() for name in flow.headline.get(stage, ())]
    return tuple(dict.fromkeys(named))
