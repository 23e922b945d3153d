"""What stages ask of the machine, looked at before the first of them runs.

A missing GPU must not show after the data has been read for an hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel

from components.pipeline.errors import HardwareError
from components.pipeline.machine import visible_gpus
from components.pipeline.settings import Settings
from components.pipeline.stage import Stage


def require_gpus(
    stages: Iterable[Stage], params: Mapping[str, BaseModel], settings: Settings
) -> None:
    """Check that this machine has the GPUs that ``stages`` take; a cluster is asked by Ray.

    Args:
        stages: those that will run.
        params: validated parameters by stage name.

    Raises:
        HardwareError: there are too few; names the stage.
    """
    if settings.ray_address:
        return
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
