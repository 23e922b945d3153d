"""Runs of a flow for benchmarks that need its artifacts: as a user calls it, then read by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.pipeline.artifacts import Input

ROOT = Path(__file__).resolve().parent.parent


def shared_data(name: str) -> Path | None:
    """The folder of a public data set, None where it is not at hand."""
    folder = Path(os.environ.get("REELFLOW_SHARED_DATA", ROOT.parent / "shared" / "data")) / name
    return folder if folder.is_dir() else None


def run_flow(
    home: Path, until: str, settings: Iterable[str], data: Path | None = None
) -> dict[str, Input]:
    """Run the recommend flow up to a stage; all artifacts of it and of its upstream by name.

    A later call finds what an earlier one in the same ``home`` published.

    Args:
        settings: parameters, each ``stage.name=value``.
        data: folder of the data; None: the simulator.
    """
    from components.pipeline.options import Choices
    from components.pipeline.runner import slice_flow
    from components.pipeline.stage import REGISTRY
    from flows.recommend import FLOW

    settings = tuple(settings)
    command = [sys.executable, "-P", "-m", "components.pipeline.cli", "run", "recommend"]
    command += ["--until", until, *(["--data", str(data)] if data else [])]
    command += [word for setting in settings for word in ("--set", setting)]
    # What this process found of its own home must not reach the run.
    moved = ("ARTIFACT_ROOT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in moved}
    environment = {**kept, "REELFLOW_HOME": str(home), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    place = None if data is None else str(data)
    choices = Choices(place, str(home / "store"), None, settings, ROOT / "params.yaml")
    runner = choices.runner()
    runner.plan(slice_flow(FLOW, None, until))
    return {
        artifact: handle
        for stage in runner.done
        for artifact, handle in runner.outputs_of(REGISTRY[stage]).items()
    }
