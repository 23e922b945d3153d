"""What a Prefect server does by itself about runs of deployments whose process died.

A run whose machine or worker is gone says nothing any more: without a heartbeat it is marked
crashed, where Prefect alone would show it as running for ever, in the way of the next one. A
crashed run is scheduled again, as the same run with the same parameters, and goes on from its last
checkpoint; ``prefect_flow`` ends that after a few times. One that never began is left alone, for it
would never begin.

``python -m components.pipeline.automations`` sets both up on the server of ``PREFECT_API_URL``;
``reelflow ui`` does so by itself.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

#: The least that Prefect accepts. Three in a row may be missed: a busy machine is not a dead one.
HEARTBEAT_S = 30
DEAD_AFTER_S = 100
HEARTBEATS = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S)}

MARK, AGAIN = "reelflow: a run without heartbeat has crashed", "reelflow: a crashed run goes on"


def automations() -> list[Any]:
    """Both, as ``prefect.automations.Automation`` objects."""
    from prefect.automations import Automation
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture
    from prefect.states import StateType

    any_run: dict[str, Any] = {"prefect.resource.id": ["prefect.flow-run.*"]}
    # Only a deployment says how its runs are started.
    of_a_deployment: dict[str, Any] = {"prefect.resource.role": "deployment"}
    ended = ("Completed", "Failed", "Cancelled", "Crashed")
    return [
        Automation(
            name=MARK,
            description="Its process or its machine is gone.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={f"prefect.flow-run.{sign}" for sign in ("heartbeat", *ended)},
                match=any_run,
                match_related=of_a_deployment,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=DEAD_AFTER_S),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED,
                    message=f"no heartbeat for {DEAD_AFTER_S} s: its process is gone",
                )
            ],
        ),
        Automation(
            name=AGAIN,
            description="From its last checkpoint, with the same parameters.",
            trigger=EventTrigger(
                after={"prefect.flow-run.Running"},
                expect={"prefect.flow-run.Crashed"},
                match=any_run,
                match_related=of_a_deployment,
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
                threshold=1,
                within=timedelta(seconds=0),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED,
                    name="AwaitingRetry",
                    message="its process died; it goes on from its last checkpoint",
                )
            ],
        ),
    ]


def set_up() -> None:
    """Make both automations on the server, or bring them up to date; others are left alone."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        answer = client.request("POST", "/automations/filter", json={})
        known = {automation["name"]: automation["id"] for automation in answer.json()}
        for automation in automations():
            if automation.name in known:
                automation.id = known[automation.name]
                automation.update()
            else:
                automation.create()


if __name__ == "__main__":
    set_up()
