"""The project's own files: parameters, pins, lock, README, and words that have no place in them."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from components.pipeline.cli import cli
from components.pipeline.flow import load_flows
from components.pipeline.params import load_params, parameter_paths, profile_names
from components.pipeline.stage import load_registry

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_params_yaml_has_every_parameter_and_no_other() -> None:
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    # One seed at the top reaches every stage.
    known = {path for path in parameter_paths(load_registry()) if not path.endswith(".seed")}
    assert set(leaves(given)) == known | {"seed"}, (
        "remedy: python -m components.pipeline.params_file"
    )


def test_params_yaml_says_the_defaults() -> None:
    registry = load_registry()
    in_force = load_params(registry, file=ROOT / "params.yaml")
    assert in_force == {name: stage.params() for name, stage in registry.items()}


@pytest.mark.parametrize("profile", profile_names())
def test_every_profile_fits_the_parameters(profile: str) -> None:
    load_params(load_registry(), file=ROOT / "params.yaml", profile=profile)


@pytest.mark.parametrize(
    ("package", "broken", "reason"),
    [("fastapi", "0.151.0", "prefect"), ("sqlalchemy", "2.1.0", "schedule")],
)
def test_a_pin_that_keeps_a_broken_version_out_says_why(
    package: str, broken: str, reason: str
) -> None:
    (pin,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == package]
    assert broken not in pin.specifier
    text = (ROOT / "pyproject.toml").read_text()
    comment = text.partition(f'"{package}')[0].rpartition('",\n')[2].rpartition("[\n")[2]
    assert all(line.lstrip().startswith("#") for line in comment.strip().splitlines())
    assert reason in comment


def locked() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins)
    found = {canonicalize_name(name): Version(version) for name, version in pins}
    assert len(found) == len(pins)
    return found


def test_the_lock_satisfies_the_project_file() -> None:
    pins = locked()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert requirement.specifier.contains(version), f"{requirement}, locked is {version}"


def test_the_lock_holds_all_that_the_locked_packages_need() -> None:
    pins = locked()
    checked = 0
    for name, version in pins.items():
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(package.version).public != version.public:
            continue
        checked += 1
        for requirement in map(Requirement, package.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed = pins.get(canonicalize_name(requirement.name))
            # CPU builds of torch ask for less than the public ones, never for more.
            assert needed is not None, f"{name} needs {requirement}"
            assert requirement.specifier.contains(needed), f"{name} needs {requirement}, {needed}"
    assert checked > len(pins) / 2


def test_image_model_libraries_are_left_out() -> None:
    assert not {"torchvision", "timm"} & locked().keys()


def tracked_files() -> list[Path]:
    """Files of the repository, or of the folder where there is none, without what tools make."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        folders = ("components", "flows", "tests", "docs", "infra", "benchmarks")
        found = [f for folder in folders for f in (ROOT / folder).rglob("*")]
        found += [f for f in ROOT.iterdir() if f.is_file()]
        return [f for f in found if f.is_file() and "__pycache__" not in f.parts]
    return [f for f in (ROOT / line for line in listed.stdout.splitlines()) if f.is_file()]


#: In pieces, so that this file does not hold them.
NO_PLACE_HERE = {
    "a path of one machine": r"(?<![\w.])/(wo" r"rk|ro" r"ot)/\w",
    "a package registry": r"py" r"pi\.org|python" r"hosted|npm" r"js\.org|\bartifact" r"ory\b",
    "an index option": r"--(extra-)?index" r"-url|find" r"-links",
    "how it was written": r"(this|earlier|next|previous) work" r"ing session|\bkick" r"-off\b",
}


@pytest.mark.parametrize("what", list(NO_PLACE_HERE))
def test_the_repository_speaks_of_the_product_alone(what: str) -> None:
    pattern = re.compile(NO_PLACE_HERE[what], re.IGNORECASE)
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in tracked_files()
        if (text := read(file)) and (match := pattern.search(text))
    ]
    assert found == []


def read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def commands(program: str) -> list[list[str]]:
    """Calls of ``program`` in README and docs, as words."""
    found = set()
    for document in DOCUMENTS:
        text = document.read_text()
        code = re.findall(r"`([^`\n]+)`", text)
        for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL):
            code += block.splitlines()
        found |= {line.strip() for line in code if line.strip().split(" ")[0] == program}
    return [shlex.split(line, comments=True) for line in sorted(found)]


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands("make")}
    assert {"run", "test"} <= named
    assert named <= targets


def test_commands_of_the_documents_can_be_called() -> None:
    called = commands("reelflow")
    assert called
    for words in called:
        command, rest = resolve(words[1:])
        if any(word.isupper() or word == "…" for word in rest) or not rest:
            continue
        context = command.make_context(words[1], list(rest))
        given = context.params
        if "flow" in given:
            assert given["flow"] in load_flows(), words
        stage = given.get("stage") or (given.get("name") if command.name == "stage" else None)
        if stage:
            assert stage in load_registry(), words
        if given.get("overrides"):
            load_params(load_registry(), overrides=given["overrides"])
        if given.get("profile"):
            assert given["profile"] in profile_names(), words
        if command.name == "bench":
            assert (ROOT / "benchmarks" / f"{given['name']}.py").is_file(), words


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that ``words`` name, and the words after its name."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"reelflow {words[0]} of a document is no command"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_links_of_the_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [
        target
        for target in targets
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert missing == []
