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

MARK = "reelflow"
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
