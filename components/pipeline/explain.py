"""Why a stage would or would not run."""

from __future__ import annotations

from collections.abc import Iterator

from components.pipeline.errors import UsageError
from components.pipeline.runner import Runner, describe_changes, nearest_execution
from components.pipeline.stage import Stage


def explain(runner: Runner, stage: Stage) -> Iterator[str]:
    """Lines for a person: the state of ``stage`` and exactly what changed since earlier runs."""
    try:
        runner.resolve_upstream(stage)
    except UsageError as error:
        yield f"{stage.name} would run: a stage above it has to run first"
        yield f"  {error.what}"
        return
    identity = runner.identify(stage)
    manifest = runner.store.manifest(stage.name, identity.key)
    if manifest is not None:
        yield f"{stage.name} is cached (key {identity.key}, made {manifest.body['created_at']})"
        yield f"  code: {len(identity.code)} modules, digest {identity.code_digest[:12]}"
        for name, digest in identity.inputs.items():
            yield f"  input {name}: {digest[:12]}"
        return
    earlier = runner.store.manifests(stage.name)
    if not earlier:
        yield f"{stage.name} would run: it never ran in {runner.store.uri}"
        return
    nearest = nearest_execution(identity, earlier)
    yield f"{stage.name} would run; against the run of {nearest.body['created_at']}:"
    for change in describe_changes(identity, nearest):
        yield f"  {change}"
