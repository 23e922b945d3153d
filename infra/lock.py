"""Write requirements.lock from pyproject.toml: one resolution, every package pinned.

pip resolves (dry run) what the project and its ``dev`` extra ask for. Local version parts are
dropped (``torch==2.13.0+cpu`` becomes ``torch==2.13.0``): the public index carries only the public
version, and it is satisfied by the CPU wheel and by the CUDA wheel alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", report.name, *wanted], check=True)
        installs = json.load(report)["install"]
    packages = [install["metadata"] for install in installs]
    pins = sorted(
        f"{p['name'].lower().replace('_', '-')}=={p['version'].split('+')[0]}" for p in packages
    )
    header = "# Made by `make lock` from pyproject.toml; do not edit by hand.\n"
    (ROOT / "requirements.lock").write_text(header + "\n".join(pins) + "\n")
    print(f"requirements.lock: {len(pins)} packages")


if __name__ == "__main__":
    main()
