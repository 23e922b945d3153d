"""Deployments of every flow: one to run by hand, one that runs every night.

``python -m flows.deployments`` serves them to the Prefect server of ``PREFECT_API_URL`` until it
is interrupted; ``reelflow ui`` does that for the server it starts. ``infra/prefect.yaml`` says the
same for a work pool, whose workers may be on other machines; it is made from here by
``make deployments``. A new flow in this folder joins by itself.

Prefect takes seconds to import, so nothing here imports it before it is needed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.pipeline.flow import Flow, load_flows
from components.pipeline.ui import NIGHTLY, ON_DEMAND, UI_PROCESS

EVERY_NIGHT = "0 3 * * *"
TIMEZONE = "UTC"
TAGS = ["reelflow"]
#: Runs at once of what a person starts: a second one may be a small trial.
ON_DEMAND_LIMIT = 2
POOL = "reelflow"
#: What stages say is part of the page of a run, where nobody sees a console.
NOTES = ("PREFECT_LOGGING_LEVEL", "INFO")
#: A server may have both: the deployments of `reelflow ui` are run by it, these by the pool.
OF_POOL = "{}-pool"
POOL_FILE = Path(__file__).resolve().parent.parent / "infra" / "prefect.yaml"
HEADER = "# Made by `make deployments` from the flows; a test compares. See docs/operations.md.\n"


def entrypoint(flow: Flow) -> str:
    """Where Prefect finds the flow: by module path, which holds in whatever folder it runs."""
    return f"flows.{flow.name}.{flow.name}"


def deployments(params: Mapping[str, Any] | None = None) -> list[Any]:
    """Two deployments for each flow, ``on-demand`` and ``nightly``.

    A night's run waits while the last one is still running; more runs than the limit wait in line.

    Args:
        params: parameters by stage, where they are not the defaults of the models: what the form
            of the Prefect UI begins with, and what a night's run takes.

    Returns:
        Prefect ``RunnerDeployment`` objects.
    """
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron

    made = []
    for flow in load_flows().values():
        own = {name: value for name, value in (params or {}).items() if name in flow.stages}
        common: dict[str, Any] = {
            "description": flow.summary,
            "tags": TAGS,
            "parameters": {"params": own} if own else {},
        }
        made += [
            RunnerDeployment.from_entrypoint(
                entrypoint(flow), name=ON_DEMAND, concurrency_limit=ON_DEMAND_LIMIT, **common
            ),
            RunnerDeployment.from_entrypoint(
                entrypoint(flow),
                name=NIGHTLY,
                schedule=Cron(EVERY_NIGHT, timezone=TIMEZONE, slug=NIGHTLY),
                concurrency_limit=1,
                **common,
            ),
        ]
    for deployment in made:
        _refuse_unknown_names(deployment)
    return made


def _refuse_unknown_names(deployment: Any) -> None:
    """Have the server refuse a parameter that the flow does not have, before a run is made."""
    schema = deployment._parameter_openapi_schema

    class Closed(type(schema)):  # type: ignore[misc]
        additionalProperties: bool

    closed = Closed(**schema.model_dump(), additionalProperties=False)
    deployment._parameter_openapi_schema = closed


def pool_file() -> str:
    """The text of ``infra/prefect.yaml``: the same deployments for a work pool."""
    import yaml

    from components.pipeline.automations import HEARTBEATS

    entries = []
    for flow in load_flows().values():
        common = {
            "description": flow.summary,
            "tags": TAGS,
            "entrypoint": entrypoint(flow),
            "work_pool": {
                "name": POOL,
                "job_variables": {"env": dict([*HEARTBEATS.items(), NOTES])},
            },
            # The code is part of each worker's environment, as its packages are.
            "pull": [],
        }
        entries += [
            {
                "name": OF_POOL.format(ON_DEMAND),
                **common,
                "concurrency_limit": {"limit": ON_DEMAND_LIMIT, "collision_strategy": "ENQUEUE"},
            },
            {
                "name": OF_POOL.format(NIGHTLY),
                **common,
                "schedules": [{"cron": EVERY_NIGHT, "timezone": TIMEZONE, "slug": NIGHTLY}],
                "concurrency_limit": {"limit": 1, "collision_strategy": "ENQUEUE"},
            },
        ]
    document = {"name": "reelflow", "deployments": json.loads(json.dumps(entries))}
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=100)


def main(params: Mapping[str, Any] | None = None, limit: int | None = None) -> None:
    """Serve all deployments until interrupted.

    Args:
        params: see ``deployments``.
        limit: runs at once on this machine, of all deployments together.
    """
    from components.pipeline.automations import set_up
    from components.pipeline.servers import end_soon_after
    from components.pipeline.settings import load_settings, prepare_environment

    if ui := os.environ.pop(UI_PROCESS, None):
        # Prefect's runner would wait for the server that died with it, and meet the next one.
        end_soon_after(int(ui))
    prepare_environment(load_settings())
    set_up()
    from prefect import serve

    serve(*deployments(params), print_starting_message=False, limit=limit)


if __name__ == "__main__":
    main(*(json.loads(word) for word in sys.argv[1:]))
