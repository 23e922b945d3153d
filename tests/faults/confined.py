"""Runs commands in namespaces of their own: other mounts, no network, another user."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

NOBODY = 65534


def require_namespaces(*kinds: str) -> list[str]:
    """Words that start a command in new namespaces (``mount``, ``net``), or a skip."""
    flags = [f"--{kind}" for kind in kinds]
    for words in (["unshare", *flags], ["unshare", "--map-root-user", *flags]):
        with_mount = "mount -t tmpfs tmpfs /mnt" if "mount" in kinds else "true"
        if (
            shutil.which("unshare")
            and subprocess.run(
                [*words, "sh", "-c", with_mount], capture_output=True, check=False
            ).returncode
            == 0
        ):
            return words
    pytest.skip(f"this machine allows no namespaces of its own: {', '.join(kinds)}")


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def run_script(
    script: str, out: Path, environment: dict[str, str], kinds: tuple[str, ...], commands: int
) -> list[Done]:
    """Run a shell script in new namespaces; ``run COMMAND…`` in it is kept as one of ``commands``.

    Args:
        out: folder, outside what the script mounts, for what the commands say.
    """
    out.mkdir(parents=True, exist_ok=True)
    prelude = f"""
set -e
n=0
run() {{ n=$((n+1)); set +e; "$@" >{q(out)}/$n.out 2>{q(out)}/$n.err </dev/null
         echo $? >{q(out)}/$n.code; set -e; }}
"""
    done = subprocess.run(
        [*require_namespaces(*kinds), "sh", "-c", prelude + script],
        env=environment,
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [
        Done(
            int((out / f"{n}.code").read_text()),
            (out / f"{n}.out").read_text(errors="replace"),
            (out / f"{n}.err").read_text(errors="replace"),
        )
        for n in range(1, commands + 1)
    ]
    for one in found:
        assert "Traceback" not in one.err, one.err
    return found


def q(value: object) -> str:
    """Quoted for the shell."""
    return shlex.quote(str(value))


def as_nobody() -> str:
    """Words, for a script with mounts of its own, that run a command as a user without rights.

    The interpreter may lie below a folder that only its owner can enter (/root); in the script's
    own mounts it can be reached.
    """
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user")
    return f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"


def reachable_interpreter(pin: Path) -> str:
    """Lines of a script with mounts of its own: anybody may start this interpreter."""
    base = Path(os.path.realpath(sys.executable)).parent.parent
    closed = [p for p in base.parents if p != Path("/") and not p.stat().st_mode & 0o001]
    if not closed:
        return ""
    pin.mkdir()
    return f"""
mount --bind {q(base)} {q(pin)}
mount -t tmpfs -o mode=755 tmpfs {q(closed[-1])}
mkdir -p {q(base)}
mount --bind {q(pin)} {q(base)}
"""


def path_without(program: str, folder: Path) -> str:
    """A PATH on which every program is found but one."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for file in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / file.name
            if file.name != program and not link.is_symlink():
                link.symlink_to(file)
    return str(folder)
