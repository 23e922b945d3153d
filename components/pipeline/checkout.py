"""The folder the commands are called in: what git and DVC need of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from components.pipeline.finding import Finding

ANSWERS_WITHIN_S = 1.5


def git(folder: Path) -> Finding:
    """Experiments of DVC are commits; everything else does without git."""
    tool = shutil.which("git")
    if tool is None:
        return Finding("git", "not found; dvc needs it", "apt-get install git")
    said = _ask(tool, folder, "rev-parse", "--show-toplevel", "--verify", "HEAD")
    if said is None:
        remedy = "git init && git add . && git commit -m start"
        inside = _ask(tool, folder, "rev-parse", "--is-inside-work-tree") is not None
        text = "no commit yet" if inside else f"{folder} is not a repository"
        return Finding("git", f"{tool}: {text}; dvc experiments need one", remedy)
    return Finding("git", f"{tool}: {said.splitlines()[0]} at {said.splitlines()[-1][:12]}")


def dvc(folder: Path) -> Finding:
    """Whether ``dvc repro`` can be called here, and whether another one is at work."""
    if not (folder / "dvc.yaml").is_file():
        return Finding(
            "dvc folder", f"no dvc.yaml in {folder}; dvc repro is for the project's folder"
        )
    if not (folder / ".dvc").is_dir():
        return Finding(
            "dvc folder", f"{folder} is not set up", "dvc init (dvc init --no-scm without git)"
        )
    lock = folder / ".dvc" / "tmp" / "rwlock"
    if lock.is_file() and lock.read_text().strip() not in ("", "{}"):
        return Finding(
            "dvc folder", "dvc.yaml; a dvc command is at work, or was killed in the middle"
        )
    return Finding("dvc folder", "dvc.yaml, ready")


def _ask(tool: str, folder: Path, *words: str) -> str | None:
    command = [tool, "-C", str(folder), *words]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWERS_WITHIN_S, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
