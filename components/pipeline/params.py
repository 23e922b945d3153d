"""Parameters: ``params.yaml``, a profile over it, ``--set`` over both; validated by the stages.

One section a stage, named as the stage, validated by the stage's own model; a top-level ``seed``
reaches every stage that has one. Precedence: params.yaml < profile < ``--set stage.key=value``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from components.pipeline.errors import ParamsError
from components.pipeline.params_base import LARGEST
from components.pipeline.stage import Stage

ROOT = Path(__file__).resolve().parent.parent.parent
PROFILES = ROOT / "infra" / "profiles"


def load_params(
    registry: Mapping[str, Stage],
    *,
    file: Path | None = None,
    profile: str | None = None,
    overrides: Iterable[str] = (),
) -> dict[str, BaseModel]:
    """Validated parameters of every stage.

    Args:
        registry: the stages by name.
        file: params.yaml; None reads the one in the current folder, else the project's own.
        profile: name of a file in ``infra/profiles`` or path of a YAML file.
        overrides: ``stage.key=value`` texts (the value is YAML), nested keys with more dots.

    Raises:
        ParamsError: unknown section or key, wrong type, out of range; names the path, the value
            and what is allowed.
    """
    if file is None:
        here = Path("params.yaml")
        # Whatever bears the name is read, so that a folder is refused and not passed over.
        file = here if os.path.lexists(here) else ROOT / "params.yaml"
    # Each layer carries the name of its source, so that an error can say where a value stands.
    layers = [(file.name, read_yaml(file))]
    if profile:
        path = _profile_file(profile)
        layers.append((f"profile {path.stem}", read_yaml(path)))
    layers.append(("--set", _parse_overrides(overrides)))
    for origin, layer in layers:
        _check_sections(origin, layer, registry)

    merged: dict[str, Any] = {}
    for _, layer in layers:
        merged = _overlay(merged, layer)
    seed = merged.pop("seed", 0)
    result: dict[str, BaseModel] = {}
    for name, stage in registry.items():
        section = merged.get(name, {})
        if stage.seeded:
            section = {"seed": seed, **section}
        result[name] = _validate(stage, section, layers)
    return result


def _check_sections(origin: str, layer: dict[str, Any], registry: Mapping[str, Stage]) -> None:
    for name, section in list(layer.items()):
        where = f"{origin} {name}"
        if name == "seed":
            if type(section) is not int or not 0 <= section <= LARGEST:
                remedy = f"give an integer from 0 to {LARGEST}"
                raise ParamsError(f"got {section!r}", where=where, remedy=remedy)
        elif name not in registry:
            remedy = _suggest(str(name), [*registry, "seed"])
            raise ParamsError(f"unknown section '{name}'", where=where, remedy=remedy)
        elif section is None:
            # All lines of the section are commented out: nothing is said, nothing is taken back.
            layer[name] = {}
        elif not isinstance(section, dict):
            remedy = "give a section of key: value lines"
            raise ParamsError(f"got {section!r}", where=where, remedy=remedy)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ParamsError: missing, unreadable, or not a mapping; names the line.
    """
    try:
        content = _parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError("no such file", where=str(file)) from None
    except OSError as error:
        raise ParamsError(f"cannot be read: {error.strerror}", where=str(file)) from None
    except UnicodeDecodeError as error:
        remedy = "save it as UTF-8"
        raise ParamsError(f"is not text: {error}", where=str(file), remedy=remedy) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        remedy = "correct it; params.yaml of the project shows the form"
        raise ParamsError(
            f"not readable as YAML: {problem}", where=f"{file}{line}", remedy=remedy
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ParamsError("expected sections of key: value lines", where=str(file))
    return content


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: 1e-3 is a number, ``yes`` and 2024-05-01 are text.

    A key that is given twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:
        # An integer of thousands of digits.
        raise yaml.YAMLError(str(error)) from None


def parameter_paths(registry: Mapping[str, Stage]) -> list[str]:
    """Every parameter as ``stage.key`` (nested ones with more dots), for completion and docs."""

    def walk(model: type[BaseModel], prefix: str) -> list[str]:
        paths: list[str] = []
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                paths += walk(kind, f"{prefix}{name}.")
            else:
                paths.append(prefix + name)
        return paths

    return [path for stage in registry.values() for path in walk(stage.params, f"{stage.name}.")]


def profile_names() -> list[str]:
    """Profiles that come with the project."""
    return sorted(p.stem for p in PROFILES.glob("*.yaml"))


def _profile_file(profile: str) -> Path:
    path = PROFILES / f"{profile}.yaml"
    if path.is_file():
        return path
    if Path(profile).suffix in (".yaml", ".yml") and Path(profile).is_file():
        return Path(profile)
    raise ParamsError(
        f"there is no profile '{profile}'",
        where="--profile",
        remedy=_suggest(profile, profile_names()) + "; or give the path of a YAML file",
    )


def _parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ParamsError(
                f"cannot read '{text}'", where="--set", remedy="write stage.key=value"
            )
        node = tree
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ParamsError(f"'{text}' sets a part of a value set before", where="--set")
            node = child
        said, now = node.get(keys[-1]), _override_value(value)
        if isinstance(said, dict) and not isinstance(now, dict):
            raise ParamsError(f"'{text}' sets a value over its parts set before", where="--set")
        node[keys[-1]] = _overlay(said, now)
    return tree


def _override_value(text: str) -> Any:
    """Numbers, booleans, null, quoted text, ``[…]`` and ``{…}`` as in YAML; the rest is text."""
    try:
        parsed = _parse(text)
    except yaml.YAMLError:
        return text
    is_plain = text.lstrip()[:1] not in ("[", "{", "'", '"')
    # `/data/set #2` and `a: b` are names here, not a comment and a mapping.
    return text if is_plain and (not text or isinstance(parsed, str | list | dict)) else parsed


def _overlay(base: Any, top: Any) -> Any:
    """``top`` over ``base``: mappings are merged key by key, anything else is replaced."""
    if not isinstance(base, dict) or not isinstance(top, dict):
        return top
    return base | {key: _overlay(base.get(key), value) for key, value in top.items()}


def _validate(
    stage: Stage, section: dict[str, Any], layers: list[tuple[str, dict[str, Any]]]
) -> BaseModel:
    try:
        return stage.params.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    where = f"{_source_of([stage.name, *keys], layers)} {'.'.join([stage.name, *keys])}"
    if first["type"] == "extra_forbidden":
        raise ParamsError(
            f"unknown parameter (value {first['input']!r})",
            where=where,
            remedy=_elsewhere(stage, keys[-1])
            or _suggest(keys[-1], _fields_at(stage.params, keys[:-1])),
        )
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    section_of = _model_at(stage.params, keys)
    if section_of and first["type"] == "value_error":
        # A rule between parameters: its message says their values.
        named = [name for name in section_of.model_fields if re.search(rf"\b{name}\b", message)]
        remedy = " | ".join(filter(None, (_describe(section_of, [name]) for name in named)))
        raise ParamsError(message, where=where, remedy=remedy or None)
    raise ParamsError(
        f"got {first['input']!r}: {message}", where=where, remedy=_describe(stage.params, keys)
    )


def _source_of(keys: list[str], layers: list[tuple[str, dict[str, Any]]]) -> str:
    """The layer that says the value at ``keys``, or else the nearest section around it."""
    for depth in range(len(keys), 0, -1):
        for source, layer in reversed(layers):
            node: Any = layer
            for key in keys[:depth]:
                node = node.get(key, _MISSING) if isinstance(node, dict) else _MISSING
            if node is not _MISSING:
                return source
    return layers[0][0]


_MISSING: Any = object()


def _model_at(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    current: Any = model
    for key in keys:
        field = current.model_fields.get(key) if hasattr(current, "model_fields") else None
        current = field.annotation if field else None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _fields_at(model: type[BaseModel], keys: list[str]) -> list[str]:
    found = _model_at(model, keys)
    return list(found.model_fields) if found else []


def _describe(model: type[BaseModel], keys: list[str]) -> str | None:
    owner = _model_at(model, keys[:-1])
    field = owner.model_fields.get(keys[-1]) if owner and keys else None
    if field is None:
        return None
    bounds = [
        f"{sign} {getattr(constraint, bound)}"
        for constraint in field.metadata
        for bound, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(constraint, bound, None) is not None
    ]
    parts = [f"{keys[-1]} is: {field.description}"] if field.description else []
    if bounds:
        parts.append("allowed: " + " and ".join(bounds))
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        last = "give a section of key: value lines: " + ", ".join(type(default).model_fields)
    else:
        last = f"default {default!r}"
    return "; ".join([*parts, last])


def _elsewhere(stage: Stage, name: str) -> str:
    """Where the stage has a parameter of that name; empty if nowhere."""
    paths = parameter_paths({stage.name: stage})
    found = [path for path in paths if path.rpartition(".")[2] == name]
    return f"did you mean {' or '.join(repr(path) for path in found)}?" if found else ""


def _suggest(name: str, allowed: Iterable[str]) -> str:
    names = list(allowed)
    near = difflib.get_close_matches(name, names, 1)
    return (f"did you mean '{near[0]}'? " if near else "") + "allowed: " + ", ".join(sorted(names))
