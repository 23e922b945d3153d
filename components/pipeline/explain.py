"""Why a stage would or would not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from components.pipeline.errors import UsageError
from components.pipeline.manifest import Manifest

if TYPE_CHECKING:
    from components.pipeline.runner import Identity, Runner
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


def nearest_execution(identity: Identity, earlier: list[Manifest]) -> Manifest:
    """The published execution that differs in the fewest ways; the newest wins a tie."""
    return min(earlier, key=lambda manifest: len(describe_changes(identity, manifest)))


def describe_changes(identity: Identity, manifest: Manifest) -> list[str]:
    """What differs between an identity and a published execution, most telling first."""
    body = manifest.body
    changes: list[str] = []
    old_params, new_params = flat(body["params"]), flat(identity.params)
    for name in sorted(old_params.keys() | new_params.keys()):
        before, now = old_params.get(name, "absent"), new_params.get(name, "absent")
        if before != now:
            changes.append(f"param {name}: {before!r} → {now!r}")
    old_code, new_code = body["code"], identity.code
    for name in sorted(old_code.keys() | new_code.keys()):
        if old_code.get(name) != new_code.get(name):
            verb = (
                "changed"
                if name in old_code and name in new_code
                else ("is new" if name in new_code else "is gone")
            )
            changes.append(f"code {name} {verb}")
    changes += [
        f"input {name} changed"
        for name in sorted(body["inputs"].keys() | identity.inputs.keys())
        if body["inputs"].get(name) != identity.inputs.get(name)
    ]
    if body["external"] != identity.external:
        changes.append("the outside data changed")
    return changes


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one: ``model.d_model``."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[prefix + key] = item
    return found
