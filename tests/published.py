"""Publishes results of made-up stages: real files, real manifests, any age."""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path

from components.pipeline.artifacts import Outputs
from components.pipeline.manifest import Manifest, Store
from components.pipeline.settings import Settings

DAY_S = 86400.0


def settings_in(folder: Path, store: str | None = None, tracking: str | None = None) -> Settings:
    home = folder / "home"
    return Settings(
        home=home,
        store=store or str(home / "store"),
        tracking=tracking or f"sqlite:///{home / 'mlflow.db'}",
        prefect_api=None,
        ray_address=None,
    )


def publish(
    store: Store,
    stage: str,
    key: str,
    *,
    content: str = "",
    days_old: float = 0,
    inputs: dict[str, str] | None = None,
    artifact: str | None = None,
    file: str = "data.txt",
) -> Manifest:
    """One execution of ``stage`` whose single artifact (named as the stage) holds ``content``."""
    name = artifact or stage
    outputs = Outputs(store, stage, (name,), store.fetched.parent / "staging" / key)
    Path(outputs[name].path(file)).write_text(content or key)
    made = dt.datetime.now(dt.UTC) - dt.timedelta(days=days_old)
    body = {
        "stage": stage,
        "key": key,
        "inputs": inputs or {},
        "outputs": outputs.seal(),
        "created_at": made.isoformat(timespec="milliseconds"),
        "metrics": {},
    }
    outputs.clean_staging()
    manifest = store.publish(Manifest(body), replace=False)
    if store.folder.is_local:
        age(Path(store.folder.path("data")) / stage, days_old)
    return manifest


def age(folder: Path, days: float) -> None:
    """Let a folder and all in it look ``days`` old."""
    when = time.time() - days * DAY_S
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (when, when))
