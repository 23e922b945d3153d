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
#: The server forgets after that time that a run had begun: longer than any run takes.
BEGAN_WITHIN_DAYS = 60
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
                within=timedelta(days=BEGAN_WITHIN_DAYS),
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
    """Make both automations on the server, or bring them up to date; others are left alone.

    One that is as it should be is not touched: to the server an updated one is new, which knows
    nothing of the runs that go on.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        answer = client.request("POST", "/automations/filter", json={})
        known = {automation["name"]: automation for automation in answer.json()}
        for automation in automations():
            found = known.get(automation.name)
            if found is None:
                automation.create()
            elif not _is_part(automation.model_dump(mode="json", exclude_unset=True), found):
                automation.id = found["id"]
                automation.update()


def _is_part(wanted: Any, found: Any) -> bool:
    """Whether ``found`` has all that ``wanted`` says; the server adds ids and defaults."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            name in found and _is_part(value, found[name]) for name, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(wanted) == len(found)
            and all(map(_is_part, _in_order(wanted), _in_order(found)))
        )
    return bool(wanted == found)


def _in_order(values: list[Any]) -> list[Any]:
    """Sets arrive in any order."""
    return sorted(values) if all(isinstance(value, str) for value in values) else values


if __name__ == "__main__":
    set_up()
