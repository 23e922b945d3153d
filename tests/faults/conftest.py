"""The fault suite: what is done to the platform, and a table of how it took it.

``make test`` runs a short version, ``make faults`` the long one (``REELFLOW_FAULTS=long``) and
prints the table of docs/results.md.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from fault_suite import Record


@pytest.fixture
def record(
    record_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> Record:
    """Note the outcome of a fault for the table; a test that fails is counted as `failed`."""
    suite = request.node.module.__doc__.strip().splitlines()[0]

    def note(fault: str, outcome: str, cases: int = 1) -> None:
        record_property("fault", (suite, fault, outcome, cases))

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for status in ("passed", "failed"):
        for report in terminalreporter.stats.get(status, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "fault":
                    suite, fault, outcome, cases = value
                    found[suite, fault][outcome if status == "passed" else "failed"] += cases
    if not found:
        return
    terminalreporter.write_line("\n| suite | fault | cases | outcome |\n|---|---|---|---|")
    for (suite, fault), outcomes in sorted(found.items()):
        said = ", ".join(f"{number}× {outcome}" for outcome, number in outcomes.most_common())
        terminalreporter.write_line(f"| {suite} | {fault} | {outcomes.total()} | {said} |")
