"""Same seed, same inputs: bitwise equal artifacts, whoever runs the stages, and wherever.

The whole flow at the smallest size, in homes of their own: by ``reelflow run``, by ``reelflow
stage`` one after the other, and by ``dvc repro``. It takes minutes, so that only the long version
has it; tests/flows/test_dvc.py compares flow and DVC every time. The homes differ in all that must
not matter: their path, the working directory, time zone, locale and hash seed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT, environment, manifests
from fault_suite import LONG, Record
from smallest_run import SMALL, STAGES

CLI = (sys.executable, "-P", "-m", "components.pipeline.cli")
PARAMS = {name: value for name, _, value in (word.partition("=") for word in SMALL[1::2])}


@dataclass(frozen=True)
class Home:
    """A home in which the flow has run, and every way in which it is a place of its own."""

    folder: Path

    def call(self, *words: str, **more: str) -> str:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=environment(self.folder / ".platform", **more),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def executions(self) -> dict[str, dict[str, Any]]:
        """The only execution of every stage, by stage."""
        found = manifests(self.folder / ".platform")
        bodies = [json.loads(text)["body"] for text in found.values()]
        assert len(bodies) == len({body["stage"] for body in bodies})
        return {body["stage"]: body for body in bodies}

    def files(self, stage: str, artifact: str) -> dict[str, str]:
        record = self.executions()[stage]["outputs"][artifact]
        return {file["name"]: file["sha256"] for file in record["files"]}


def params_file(folder: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for path, value in PARAMS.items():
        *sections, name = path.split(".")
        section = params
        for part in sections:
            section = section[part]
        section[name] = yaml.safe_load(value)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def by_flow(home: Home) -> None:
    home.call(*CLI, "run", "recommend", TZ="UTC", PYTHONHASHSEED="0")


def by_stage(home: Home) -> None:
    other = {"TZ": "Asia/Kolkata", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    for stage in STAGES:
        home.call(*CLI, "stage", stage, **other)


def by_dvc(home: Home) -> None:
    for name in ("components", "flows", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "tmp", "cache", "config.local")
        shutil.copytree(ROOT / name, home.folder / name, ignore=ignored)
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, home.folder / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    alone = {"PATH": path, "PYTHONPATH": str(home.folder), "TZ": "America/St_Johns"}
    home.call("dvc", "config", "--local", "core.no_scm", "true", **alone)
    home.call("dvc", "repro", **alone)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Home]:
    made: dict[str, Home] = {}
    ways: tuple[tuple[str, Callable[[Home], None]], ...] = (
        ("run", by_flow),
        ("stage by stage", by_stage),
        ("dvc répro", by_dvc),
    )
    for name, way in ways:
        home = Home(tmp_path_factory.mktemp("homes") / name)
        home.folder.mkdir()
        params_file(home.folder)
        way(home)
        made[name] = home
    return made


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not LONG, reason="minutes: make faults"),
]


def test_every_artifact_is_bitwise_equal(homes: dict[str, Home], record: Record) -> None:
    first, *others = homes.values()
    compared = 0
    for other in others:
        theirs = other.executions()
        for stage, body in first.executions().items():
            # The page is about one run: see below.
            for artifact in set(body["outputs"]) - {"report"}:
                ours = first.files(stage, artifact)
                assert ours == other.files(stage, artifact), f"{stage}: {artifact}"
                compared += 1
            told = {k: v for k, v in body["metrics"].items() if "seconds" not in k}
            assert told.items() <= theirs[stage]["metrics"].items() or stage == "report"
    record("same seed and inputs, another way to run, another home", "bitwise equal", compared)


def test_keys_are_equal_where_nothing_outside_differs(homes: dict[str, Home]) -> None:
    # `register` knows its registry, and each home has its own.
    keys = [
        {stage: body["key"] for stage, body in home.executions().items() if stage != "register"}
        for home in homes.values()
    ]
    assert len(keys[0]) == len(STAGES) - 1
    assert all(other == keys[0] for other in keys)


def test_no_artifact_names_the_place_where_it_was_made(homes: dict[str, Home]) -> None:
    for home in homes.values():
        place = str(home.folder).encode()
        for file in (home.folder / ".platform" / "store" / "data").rglob("*"):
            if file.is_file():
                assert place not in file.read_bytes(), file


def test_reports_differ_in_times_alone(homes: dict[str, Home]) -> None:
    pages = set()
    for home in homes.values():
        (file,) = (home.folder / ".platform" / "store" / "data" / "report").rglob("report.html")
        pages.add(without_times(file.read_text(encoding="utf-8"), home.executions()))
    assert len(pages) == 1


def without_times(page: str, executions: dict[str, dict[str, Any]]) -> str:
    """The page without when, how long, how much memory, and in which registry."""
    for pattern in (
        r'<section id="stages">.*?</section>',
        r"<time .*?</time>",
        r"<dt>time of all stages</dt>.*?</div>",
        r"training_seconds.*?</t[dr]>",
    ):
        page = re.sub(pattern, "", page, flags=re.DOTALL)
    key = executions["register"]["key"]
    return page.replace(key, "").replace(key[:12], "")
