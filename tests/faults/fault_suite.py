"""What the tests of the fault suite share."""

from __future__ import annotations

import os
from collections.abc import Callable

#: Whether the long version runs: ``make faults``.
LONG = os.environ.get("REELFLOW_FAULTS") == "long"

#: Notes the outcome of a fault: ``record(fault, outcome, cases=1)``.
Record = Callable[..., None]
