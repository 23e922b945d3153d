"""What was chosen on this machine and why, what is wrong, and how to mend it.

Fast on purpose: versions come from package metadata, nothing heavy is imported, and everything
that waits for a network waits at the same time and not for long.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from threading import Thread

from components.pipeline import addresses, checkout, leftovers, limits
from components.pipeline.addresses import gib
from components.pipeline.cluster import OBJECT_STORE_BYTES
from components.pipeline.embedded_databases import databases
from components.pipeline.finding import Finding as Finding
from components.pipeline.machine import gpus
from components.pipeline.settings import QUIET_ENVIRONMENT, Settings

ROOT = Path(__file__).resolve().parent.parent.parent
ANSWER_WITHIN_S = 2.5
UI_PORTS = {"Prefect": 4200, "MLflow": 5000}

#: Outside these ranges Prefect installs and imports, and then fails where nobody looks.
FRAGILE = {
    "fastapi": "Prefect's server does not start, so every flow call fails",
    "sqlalchemy": "Prefect's scheduler never starts a nightly run, and nothing says so",
}


def examine(settings: Settings) -> list[Finding]:
    """Look at the machine, the installation and the addresses in force; changes nothing."""
    deadline = time.monotonic() + ANSWER_WITHIN_S
    waiting = {
        subject: _start(check, settings)
        for subject, check in {
            "gpu": lambda _: _gpu(),
            "store": addresses.store,
            "tracking": addresses.tracking,
            "prefect": addresses.prefect,
            "ray": addresses.ray,
            "schedules": addresses.schedules,
        }.items()
    }
    pins = _pins(ROOT / "requirements.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    findings = [
        _python(str(project["requires-python"])),
        _packages(pins, project["dependencies"]),
        *(_fragile(name, project["dependencies"]) for name in FRAGILE),
        limits.processor(),
        limits.memory(),
        _shared_memory(Path("/dev/shm")),
        limits.open_files(),
        limits.home_folder(),
        limits.encoding(),
        addresses.home(settings),
    ]
    for subject, answer in waiting.items():
        try:
            answered = answer.result(timeout=max(0.01, deadline - time.monotonic()))
            findings += [answered] if answered is not None else []
        except TimeoutError:
            text = f"no answer within {ANSWER_WITHIN_S:g} s"
            findings.append(Finding(subject, text, "check the address and the network", True))
        except ValueError as error:
            findings.append(Finding(subject, f"not an address: {error}", "mend the address", True))
    return [
        *findings,
        *databases(settings),
        limits.ports(UI_PORTS),
        leftovers.running(settings),
        leftovers.orphans(settings),
        checkout.git(Path.cwd()),
        checkout.dvc(Path.cwd()),
        _experiments(ROOT),
        _chromium(),
        _telemetry(),
    ]


def _start(
    check: Callable[[Settings], Finding | None], settings: Settings
) -> Future[Finding | None]:
    answer: Future[Finding | None] = Future()

    def work() -> None:
        try:
            answer.set_result(check(settings))
        except Exception as error:
            answer.set_exception(error)

    # A daemon thread: a service that never answers must not keep the program from ending.
    Thread(target=work, daemon=True).start()
    return answer


# The installation.


def _python(wanted: str) -> Finding:
    version = platform.python_version()
    where = f"{version} ({sys.prefix})"
    if not _fits(version, wanted):
        remedy = f"the project needs Python {wanted}: make a new .venv with it"
        return Finding("python", where, remedy, broken=True)
    return Finding("python", where)


def _pins(lock: Path) -> dict[str, str]:
    """Package → version of a lock file; empty if there is none."""
    if not lock.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in lock.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def _packages(pins: dict[str, str], dependencies: Sequence[str]) -> Finding:
    """Installed versions against the lock; a gap in what the project itself asks for is fatal."""
    remedy = "make setup"
    if not pins:
        return Finding("packages", "there is no requirements.lock to compare with", "make lock")
    asked = {_package(text) for text in dependencies}
    missing, different = [], []
    for name, pinned in pins.items():
        installed = _installed(name)
        if installed is None:
            missing.append(name)
        elif installed.split("+")[0] != pinned:
            different.append(f"{name} {installed} (locked {pinned})")
    if not missing and not different:
        return Finding("packages", f"{len(pins)} packages as in requirements.lock")
    said = []
    if different:
        said.append("other versions than locked: " + ", ".join(different))
    if missing:
        said.append("not installed: " + ", ".join(missing))
    return Finding("packages", "; ".join(said), remedy, broken=not asked.isdisjoint(missing))


def _fragile(name: str, dependencies: Sequence[str]) -> Finding:
    """One of the two packages whose wrong version breaks the platform without a word."""
    wanted = next(_range(text) for text in dependencies if _package(text) == name)
    installed = _installed(name)
    if installed is None:
        return Finding(name, "not installed", "make setup", broken=True)
    if _fits(installed, wanted):
        return Finding(name, f"{installed}, inside {wanted}, which Prefect needs")
    return Finding(
        name,
        f"{installed} is outside {wanted}: {FRAGILE[name]}",
        f"pip install '{name}{wanted}', or make setup",
        broken=True,
    )


def _package(requirement: str) -> str:
    """The name in ``sqlalchemy[asyncio]>=2.0,<2.1``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return match[0].lower().replace("_", "-")


def _range(requirement: str) -> str:
    """The range in ``sqlalchemy[asyncio]>=2.0,<2.1``."""
    return re.sub(r"^[A-Za-z0-9._-]+(\[.*?\])?", "", requirement).strip()


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, wanted: str) -> bool:
    """Whether a version lies inside a range of ``>=``, ``<`` and ``==`` clauses."""
    holds = {
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
        "==": lambda a, b: a == b,
    }
    for clause in wanted.split(","):
        match = re.fullmatch(r"\s*(>=|<|==)\s*([0-9.]+)\s*", clause)
        if match and not holds[match[1]](_numbers(version), _numbers(match[2])):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]
    return (*parts, *[0] * (3 - len(parts)))


# The machine.


def _shared_memory(folder: Path) -> Finding:
    """Ray keeps its object store there; if it is too small Ray falls back to the slow disk."""
    if not folder.is_dir():
        return Finding("shared memory", f"{folder} is not there; Ray uses the disk instead")
    free = shutil.disk_usage(folder).free
    text = f"{gib(free)} free in {folder}, Ray takes {gib(OBJECT_STORE_BYTES)}"
    if free < OBJECT_STORE_BYTES:
        remedy = "in a container: --shm-size=1g; Ray works from the disk until then, slowly"
        return Finding("shared memory", text, remedy)
    return Finding("shared memory", text)


def _gpu() -> Finding:
    found = gpus()
    if not found:
        return Finding("gpu", "none found; everything runs on the CPU")
    text = f"{len(found)} × {found[0]}"
    torch = _installed("torch") or ""
    if "+cpu" in torch:
        return Finding("gpu", f"{text}, but torch {torch} is the CPU build", "install CUDA torch")
    return Finding("gpu", f"{text}, torch {torch}")


def _chromium() -> Finding:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    return Finding("chromium", chromium or "not found; only tests of web pages use it")


def _experiments(project: Path) -> Finding:
    """DVC compares commits of git; a project that was unpacked from an archive has none."""
    if any((folder / ".git").exists() for folder in (project, *project.parents)):
        return Finding("dvc", f"{_installed('dvc')}, experiments are kept in this git repository")
    local = project / ".dvc" / "config.local"
    alone = local.is_file() and re.search(r"(?m)^\s*no_scm\s*=\s*true", local.read_text())
    works = "dvc repro works, " if alone else "dvc refuses to work: "
    return Finding(
        "dvc",
        f"{project} is no git repository: {works}experiments cannot be compared",
        "git init && git add --all && git commit -m start"
        + ("" if alone else "; or for dvc repro alone: dvc config --local core.no_scm true"),
    )


def _telemetry() -> Finding:
    loud = [
        f"{name}={os.environ[name]}"
        for name, quiet in QUIET_ENVIRONMENT.items()
        if name != "PREFECT_LOGGING_LEVEL" and os.environ.get(name, quiet) != quiet
    ]
    if loud:
        names = " ".join(setting.split("=")[0] for setting in loud)
        return Finding("telemetry", "set by you: " + ", ".join(loud), f"unset {names}")
    return Finding("telemetry", "off for every dependency")
