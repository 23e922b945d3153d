"""What stages ask of the machine, looked at before the first of them runs.

A missing GPU must not show after the data has been read for an hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel

from components.pipeline.errors import HardwareError
from components.pipeline.machine import cores, visible_gpus
from components.pipeline.settings import Settings
from components.pipeline.stage import Stage

#: Two workers a core: with one core the default of two still runs, only slowly.
WORKERS_PER_CORE = 2


def require_hardware(
    stages: Iterable[Stage], params: Mapping[str, BaseModel], settings: Settings
) -> None:
    """Check that this machine has what ``stages`` take; a cluster is asked by Ray.

    Args:
        stages: those that will run.
        params: validated parameters by stage name.

    Raises:
        HardwareError: there are too few GPUs or far too few cores; names the stage.
    """
    if settings.ray_address:
        return
    stages = list(stages)
    _require_cores(stages, params)
    _require_gpus(stages, params)


def _require_cores(stages: list[Stage], params: Mapping[str, BaseModel]) -> None:
    have = cores()
    for stage in stages:
        workers = int(getattr(params[stage.name], "workers", 1))
        if workers > WORKERS_PER_CORE * have:
            raise HardwareError(
                f"{workers} workers would share {have} core{'s' if have > 1 else ''}",
                where=f"{stage.name}.workers",
                remedy=f"take at most {WORKERS_PER_CORE * have} here "
                f"(--set {stage.name}.workers={have}), or set RAY_ADDRESS to a cluster with more",
            )


def _require_gpus(stages: list[Stage], params: Mapping[str, BaseModel]) -> None:
    needed = {s.name: s.gpus(params[s.name]) for s in stages if s.gpus is not None}
    if not any(needed.values()):
        return
    have = visible_gpus()
    for name, count in needed.items():
        if count > have:
            raise HardwareError(
                f"takes {count} GPU{'s' if count > 1 else ''}, this machine has {have or 'none'}",
                where=f"stage '{name}'",
                remedy=f"take a smaller profile (--profile laptop), fewer workers "
                f"(--set {name}.workers=N) or the processor (--set {name}.gpu=false), or set "
                "RAY_ADDRESS to a cluster that has them; reelflow doctor shows what is here",
            )
