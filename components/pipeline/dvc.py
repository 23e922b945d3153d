"""``dvc.yaml`` from the stage registry: files in, files out, exactly the parameters each reads.

DVC calls ``reelflow stage NAME``, the same code and the same cache as a flow. The stage's outputs
are linked to ``out/<stage>``, where DVC tracks them, with the manifest of the execution: what DVC
brings back from its own cache or a remote can so be published in a store that never saw it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components.pipeline.artifacts import Input, Manifest, Outputs, Store
from components.pipeline.code_digest import ROOT, closure_files
from components.pipeline.errors import CorruptArtifactError, StorageError
from components.pipeline.flow import Plot, headline_of, load_flows
from components.pipeline.manifest import digest_file, digest_json
from components.pipeline.runner import Runner
from components.pipeline.stage import Stage, producer_of
from components.pipeline.storage import exclusive

OUT = "out"
MANIFEST, METRICS = "manifest.json", "metrics.json"
HEADER = "# Made by `make dvc` from the stage registry; a test compares. Do not edit by hand.\n"
#: The module and not the script: the code beside dvc.yaml runs, also in the copy of the project in
#: which DVC runs an experiment with --temp or --queue.
COMMAND = "python -m components.pipeline.cli stage"


def render() -> str:
    """The text of dvc.yaml for the stages of all flows."""
    stages: dict[str, Any] = {}
    metrics: list[str] = []
    plots: list[Any] = []
    for flow in load_flows().values():
        for stage in flow.resolve():
            if stage.external:
                stages[_outside_name(stage)] = _outside(stage)
            stages[stage.name] = _entry(stage)
        metrics += [f"{OUT}/{stage}/{METRICS}" for stage in flow.headline]
        plots += [_plot(plot) for plot in flow.plots]
    document = {"stages": stages, "metrics": list(dict.fromkeys(metrics)), "plots": plots}
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=100)


def _entry(stage: Stage) -> dict[str, Any]:
    # Of an empty file DVC complains at every command; with its first line it joins the list.
    files = [file for file in closure_files(stage.module) if file.stat().st_size]
    code = [file.relative_to(ROOT).as_posix() for file in files]
    outside = [_outside_file(stage)] if stage.external else []
    told = [MANIFEST, *([METRICS] if headline_of(stage.name) else [])]
    return {
        "cmd": f"{COMMAND} {stage.name} --export {OUT}/{stage.name}",
        "deps": [*code, *_upstream(stage), *outside],
        "params": [stage.name, *(["seed"] if stage.seeded else [])],
        "outs": [f"{OUT}/{stage.name}/{name}" for name in (*stage.outputs, *told)],
    }


def _outside(stage: Stage) -> dict[str, Any]:
    """A stage of its own that looks, at every call, which data outside there is.

    So the stage that reads the data is one of files like the others: it is skipped, or restored
    from DVC's cache, as long as the data are the same.
    """
    file = _outside_file(stage)
    # After the stages above: what they leave outside (a new tracking database) counts.
    above = {"deps": _upstream(stage)} if stage.inputs else {}
    return {
        "cmd": f"{COMMAND} {stage.name} --outside {file}",
        **above,
        "outs": [file],
        "always_changed": True,
    }


def _outside_name(stage: Stage) -> str:
    return f"{stage.name}_outside"


def _outside_file(stage: Stage) -> str:
    return f"{OUT}/{_outside_name(stage)}.json"


def _upstream(stage: Stage) -> list[str]:
    return [f"{OUT}/{producer_of(name).name}/{name}" for name in stage.inputs]


def _plot(plot: Plot) -> dict[str, Any]:
    file = f"{OUT}/{producer_of(plot.artifact).name}/{plot.artifact}/{plot.file}"
    columns = plot.y[0] if len(plot.y) == 1 else list(plot.y)
    return {plot.title: {"template": plot.template, "x": plot.x, "y": {file: columns}}}


def write_outside(digest: str | None, file: Path) -> None:
    """Put the digest of a stage's outside data where DVC looks for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"outside": digest}) + "\n")


def export(store: Store, manifest: Manifest, destination: Path) -> None:
    """Put the outputs, manifest and metrics of one execution into ``destination``.

    They replace what is there. Files are hard links where the store is on the same disk, copies
    elsewhere.
    """
    staged = destination.with_name(f".{destination.name}.{os.getpid()}.new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        for name in manifest.body["outputs"]:
            artifact = Input(store, name, manifest)
            (staged / name).mkdir()
            for file in artifact.files:
                _link(Path(artifact.path(file)), staged / name / file)
        (staged / MANIFEST).write_bytes(manifest.to_bytes())
        wanted = headline_of(manifest.stage)
        if wanted:
            metrics = {name: manifest.metrics[name] for name in wanted if name in manifest.metrics}
            (staged / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
        # Two exports into one folder take turns; each leaves all of its own.
        with exclusive(destination.with_name(f".{destination.name}.lock")):
            shutil.rmtree(destination, ignore_errors=True)
            staged.rename(destination)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def adopt(runner: Runner, stage: Stage, exported: Path) -> None:
    """Publish in the store what DVC restored of the stages above ``stage``, where it lacks it.

    After ``dvc pull`` in a fresh clone the files of earlier executions lie below ``out`` and the
    store is empty. An execution is taken over if its key is the one in force and its files are
    those of its manifest; anything else is left, for the stage to be run.

    Args:
        exported: the folder ``out/<stage>``; those of the stages above lie beside it.
    """
    for artifact in stage.inputs:
        above = producer_of(artifact)
        if above.name in runner.done:
            continue
        adopt(runner, above, exported)
        if any(producer_of(name).name not in runner.done for name in above.inputs):
            continue
        key = runner.identify(above).key
        manifest = runner.store.manifest(above.name, key)
        if manifest is None:
            manifest = _published(runner, above, key, exported.with_name(above.name))
        if manifest is not None:
            runner.done[above.name] = manifest


def _published(runner: Runner, stage: Stage, key: str, folder: Path) -> Manifest | None:
    try:
        manifest = Manifest.from_bytes((folder / MANIFEST).read_bytes(), stage.name, str(folder))
    except (OSError, CorruptArtifactError):
        return None
    if (manifest.stage, manifest.key) != (stage.name, key):
        return None
    records = manifest.body["outputs"]
    if not all(_whole(folder / name, record) for name, record in records.items()):
        return None
    staging = runner.settings.scratch / stage.name / key / "adopted"
    outputs = Outputs(runner.store, stage.name, tuple(records), staging)
    try:
        for name, record in records.items():
            for file in record["files"]:
                _link(folder / name / file["name"], Path(outputs[name].path(file["name"])))
        sealed = outputs.seal()
        if any(sealed[name]["digest"] != record["digest"] for name, record in records.items()):
            raise StorageError("changed while it was read", where=str(folder))
    except BaseException:
        outputs.discard()
        raise
    winner = runner.store.publish(Manifest({**manifest.body, "outputs": sealed}), replace=False)
    if winner.body["outputs"] != sealed:
        outputs.discard()
    outputs.clean_staging()
    shutil.rmtree(staging.parent, ignore_errors=True)
    return winner


def _whole(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the files of an artifact in ``folder`` are exactly those of its record."""
    files = [
        {"name": file["name"], "size": path.stat().st_size, "sha256": digest_file(path)}
        for file in record["files"]
        if (path := folder / file["name"]).is_file()
    ]
    return digest_json(files) == record["digest"]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    (ROOT / "dvc.yaml").write_text(render())
