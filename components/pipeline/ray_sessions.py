"""Session folders of Ray: which are ours, and which no process uses any more.

Ray keeps logs and sockets of every cluster it starts in a folder of its own below the system's
temporary folder (a socket's path may not be long, so it cannot be below ``home``), and removes
none. Ours bear a mark with the home they worked for, so that nobody else's are ever touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from components.pipeline.errors import UsageError

MARK = "reelflow"
#: The longest path of a socket, less what Ray puts below its folder:
#: /ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store
LONGEST = 107 - 68
#: The home that a cluster started from here works for.
OWNER = "REELFLOW_SESSION_OWNER"


def mark(session: str) -> None:
    """Note that the session folder is of a cluster that Reelflow started."""
    # A full disk or a folder that is gone: gc then leaves the session to whoever made it.
    with suppress(OSError):
        (Path(session) / MARK).write_text(os.environ.get(OWNER, ""), encoding="utf-8")


def temporary_folder() -> Path:
    """The folder in which Ray makes its own, whether it can be written or not."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def choose_folder() -> None:
    """Have Ray use ``/tmp`` where ``TMPDIR`` (of a job on a cluster, often) is too long for it."""
    if not os.environ.get("RAY_TMPDIR") and len(os.fsencode(temporary_folder())) > LONGEST:
        os.environ["RAY_TMPDIR"] = "/tmp"


def require_short_folder() -> None:
    """Before a cluster is started.

    Raises:
        UsageError: the paths of its sockets would be too long.
    """
    folder = temporary_folder()
    if len(os.fsencode(folder)) > LONGEST:
        raise UsageError(
            f"{folder} has more than {LONGEST} bytes: the paths of Ray's sockets would be too long",
            where="RAY_TMPDIR",
            remedy="give it a short path, or unset it",
        )


def dead_sessions(home: Path) -> Iterator[Path]:
    """Session folders of runs of ``home`` that no process names on its command line."""
    root = temporary_folder() / "ray"
    ours = [
        file.parent
        for file in sorted(root.glob(f"session_*/{MARK}"))
        if not file.parent.is_symlink()
        and file.stat().st_uid == os.getuid()
        and file.read_text(encoding="utf-8") == str(home)
    ]
    if not ours:
        return
    in_use = _command_lines()
    yield from (folder for folder in ours if folder.name not in in_use)


def _command_lines() -> str:
    """What runs on this machine; the daemons of Ray name their session."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(file.read_bytes().decode(errors="replace"))
    return "\n".join(lines)
