"""Whether the fault suite runs in its long version: ``make faults``."""

from __future__ import annotations

import os

LONG = os.environ.get("REELFLOW_FAULTS") == "long"
