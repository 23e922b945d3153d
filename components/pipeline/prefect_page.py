"""What the page of a run shows in Prefect: live progress, figures, metrics, and where to look on.

The page follows the work and never stops it: what the server refuses is left out.
"""

from __future__ import annotations

import base64
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from components.pipeline.runner import Runner
from components.pipeline.settings import Settings
from components.pipeline.tracking import FlowTracker

UPDATED_EVERY_S = 2.0
LOG = logging.getLogger(__name__)


class Page:
    """A sink: progress and figures of one stage, and its newest metrics as a table."""

    def __init__(self, flow: str, stage: str) -> None:
        self._flow, self._stage = flow, stage
        self._bars: dict[str, tuple[Any, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Metrics by step are MLflow's; the table at the end has the results."""

    def figure(self, name: str, png: bytes) -> None:
        # As a part of the page itself: it needs no server of files, nor the network.
        address = "data:image/png;base64," + base64.b64encode(png).decode()
        key = _key(self._flow, self._stage, name)
        _try(lambda: create_image_artifact(address, key=key, description=f"{self._stage}: {name}"))

    def note(self, text: str) -> None:
        """Notes are for the person at the console, and for the log of the run."""
        from prefect.exceptions import MissingContextError
        from prefect.logging import get_run_logger

        try:
            get_run_logger().info(text)
        except MissingContextError:
            return

    def progress(self, label: str, done: float | None, total: float) -> None:
        bar, shown = self._bars.get(label, (None, 0.0))
        if done is None:
            self._bars.pop(label, None)
            if bar is not None:
                _try(lambda: update_progress_artifact(bar, progress=100.0))
            return
        if not total or time.monotonic() - shown < UPDATED_EVERY_S:
            return
        share = 100 * min(1.0, done / total)
        if bar is None:
            key = _key(self._flow, self._stage, label)
            text = f"{self._stage}: {label}"
            bar = _try(lambda: create_progress_artifact(share, key=key, description=text))
        else:
            _try(lambda: update_progress_artifact(bar, progress=share))
        self._bars[label] = bar, time.monotonic()


def show_metrics(flow: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """The table of what every stage measured."""
    rows = [
        {"stage": stage, "metric": name, "value": value}
        for stage, values in metrics.items()
        for name, value in values.items()
    ]
    _try(lambda: create_table_artifact(key=_key(flow, "metrics"), table=rows))


def link_to_tracking(flow: str, settings: Settings, tracker: FlowTracker) -> None:
    """The way to the MLflow run, where MLflow has pages of its own."""
    address = settings.tracking.rstrip("/")
    if address.startswith(("http://", "https://")) and tracker.run_id is not None:
        link = f"{address}/#/experiments/{tracker.experiment_id}/runs/{tracker.run_id}"
        key = _key(flow, "mlflow")
        _try(lambda: create_link_artifact(link, link_text="The run in MLflow", key=key))


def link_to_report(flow: str, runner: Runner) -> None:
    """Where the report lies; a browser does not follow a link from a server to a file."""
    if "report" in runner.done:
        key = runner.done["report"].key
        text = f"`reelflow report {key[:12]}` prints the path of the report and opens it: `--open`."
        _try(lambda: create_markdown_artifact(text, key=_key(flow, "report")))


def _key(*parts: str) -> str:
    """Lower-case letters, digits and dashes: Prefect refuses other keys."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _try(tell: Callable[[], Any]) -> Any:
    try:
        return tell()
    except Exception as error:
        LOG.warning("the page of the run lacks something: %s", error)
        return None
