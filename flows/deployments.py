"""Deployments of every flow: one to run by hand, one that runs every night.

``python -m flows.deployments`` serves them to the Prefect server of ``PREFECT_API_URL`` until it
is interrupted; ``reelflow ui`` does that for the server it starts. Prefect takes seconds to
import, so nothing here imports it before it is needed.
"""

from __future__ import annotations

from typing import Any

from components.pipeline.flow import load_flows
from components.pipeline.ui import NIGHTLY, ON_DEMAND

EVERY_NIGHT = "0 3 * * *"
TIMEZONE = "UTC"


def deployments() -> list[Any]:
    """Two deployments for each flow, ``on-demand`` and ``nightly``.

    Both run the flow with its default parameters unless the form says otherwise. A night's run
    waits while the last one is still running.

    Returns:
        Prefect ``RunnerDeployment`` objects.
    """
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron

    made = []
    for flow in load_flows().values():
        # By module path: it holds in whatever folder a run is started.
        entrypoint = f"flows.{flow.name}.{flow.name}"
        common: dict[str, Any] = {"description": flow.summary, "tags": ["reelflow"]}
        made += [
            RunnerDeployment.from_entrypoint(entrypoint, name=ON_DEMAND, **common),
            RunnerDeployment.from_entrypoint(
                entrypoint,
                name=NIGHTLY,
                schedule=Cron(EVERY_NIGHT, timezone=TIMEZONE),
                concurrency_limit=1,
                **common,
            ),
        ]
    return made


def main() -> None:
    """Serve all deployments until interrupted."""
    from components.pipeline.settings import load_settings, prepare_environment

    prepare_environment(load_settings())
    from prefect import serve

    serve(*deployments(), print_starting_message=False)


if __name__ == "__main__":
    main()
