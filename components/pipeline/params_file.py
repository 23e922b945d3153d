"""``params.yaml`` from the stages' models: every parameter with its default and its meaning.

``python -m components.pipeline.params_file`` prints a fresh file; values that differ from the
defaults in the file at hand are kept, so that a new parameter joins without losing an edit.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from components.pipeline.flow import load_flows
from components.pipeline.params import ROOT, read_yaml
from components.pipeline.stage import Stage, load_registry

HEADER = """\
# Parameters of every stage, with their defaults: the embedded size.
# Overlay a size with --profile NAME, one value with --set stage.key=value.
"""
WIDTH = 99


def render(current: Mapping[str, Any]) -> str:
    """The text of params.yaml; ``current`` holds values to keep."""
    lines = [
        HEADER,
        "# reaches every stage that draws at random",
        f"seed: {current.get('seed', 0)}",
    ]
    for stage in _stages():
        lines += ["", f"# {stage.summary}", f"{stage.name}:"]
        body = list(_section(stage.params, stage.params(), current.get(stage.name) or {}, 1))
        lines += body
        if not any(not line.lstrip().startswith("#") for line in body):
            lines[-len(body) - 1] += " {}"
    return "\n".join(lines) + "\n"


def _stages() -> list[Stage]:
    """In the order of the flows; stages that no flow has come last."""
    seen = {stage.name: stage for flow in load_flows().values() for stage in flow.resolve()}
    return list((seen | load_registry()).values())


def _section(
    model: type[BaseModel], defaults: BaseModel, current: Mapping[str, Any], depth: int
) -> Iterator[str]:
    indent = "  " * depth
    for name, field in model.model_fields.items():
        if name == "seed":
            continue
        value = getattr(defaults, name)
        if field.description:
            comment = textwrap.wrap(field.description, WIDTH - len(indent) - 2)
            yield from (f"{indent}# {line}" for line in comment)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _section(type(value), value, current.get(name) or {}, depth + 1)
            continue
        plain = defaults.model_dump(mode="json")[name]
        yield f"{indent}{name}: {_scalar(current.get(name, plain))}"


def _scalar(value: Any) -> str:
    # JSON is YAML, except that YAML 1.1 reads an exponent without a dot as text.
    if isinstance(value, float):
        return format(value, "f").rstrip("0").rstrip(".") if value and abs(value) < 1e16 else "0"
    return json.dumps(value, ensure_ascii=False, default=str)


if __name__ == "__main__":
    path = ROOT / "params.yaml"
    path.write_text(render(read_yaml(path)))
