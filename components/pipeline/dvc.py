"""``dvc.yaml`` from the stage registry: files in, files out, exactly the parameters each reads.

DVC calls ``reelflow stage NAME``, the same code and the same cache as a flow. The stage's outputs
are linked to ``out/<stage>``, where DVC tracks them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from components.pipeline.artifacts import Manifest, Store
from components.pipeline.code_digest import ROOT, closure_files
from components.pipeline.flow import load_flows
from components.pipeline.stage import Stage, producer_of

OUT = "out"
HEADER = "# Made by `make dvc` from the stage registry; a test compares. Do not edit by hand.\n"


def render() -> str:
    """The text of dvc.yaml for the stages of all flows."""
    stages: dict[str, Any] = {}
    plots: list[Any] = []
    for flow in load_flows().values():
        for stage in flow.resolve():
            stages[stage.name] = _entry(stage)
            if "training_curve" in stage.outputs:
                file = f"{OUT}/{stage.name}/training_curve/curve.csv"
                plots.append({file: {"x": "step", "y": {file: ["loss"]}, "title": "Training loss"}})
    document = {"stages": stages, "plots": plots}
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=100)


def _entry(stage: Stage) -> dict[str, Any]:
    # Of an empty file DVC complains at every command; with its first line it joins the list.
    files = [file for file in closure_files(stage.module) if file.stat().st_size]
    code = [file.relative_to(ROOT).as_posix() for file in files]
    upstream = [f"{OUT}/{producer_of(name).name}/{name}" for name in stage.inputs]
    # What lies outside is no file of this list: the stage itself looks whether it is the same.
    outside = {"always_changed": True} if stage.external and not stage.inputs else {}
    return {
        **outside,
        "cmd": f"reelflow stage {stage.name} --export {OUT}/{stage.name}",
        "deps": [*code, *upstream],
        "params": [stage.name, *(["seed"] if stage.seeded else [])],
        "outs": [f"{OUT}/{stage.name}/{name}" for name in stage.outputs],
        "metrics": [f"{OUT}/{stage.name}/metrics.json"],
    }


def export(store: Store, manifest: Manifest, destination: Path) -> None:
    """Put the outputs and metrics of one execution into ``destination``, replacing what is there.

    Files are hard links where the store is on the same disk, copies elsewhere.
    """
    from components.pipeline.artifacts import Input

    staged = destination.with_name(f".{destination.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for name in manifest.body["outputs"]:
        artifact = Input(store, name, manifest)
        (staged / name).mkdir()
        for file in artifact.files:
            target = staged / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(Path(artifact.path(file)), target)
    metrics = json.dumps(manifest.metrics, indent=1, sort_keys=True)
    (staged / "metrics.json").write_text(metrics + "\n")
    shutil.rmtree(destination, ignore_errors=True)
    staged.rename(destination)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    (ROOT / "dvc.yaml").write_text(render())
