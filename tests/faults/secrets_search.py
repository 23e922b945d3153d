"""Looks for secrets wherever a run may have left them, in every form they may have there."""

from __future__ import annotations

import base64
import gzip
import io
import os
import sqlite3
import threading
import zipfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote, quote_plus

import psutil
import pyarrow.parquet as pq

CORE = 9


def forms(secret: str) -> list[bytes]:
    """The secret as it is, quoted for an address, and in base64 at each of the three alignments."""
    raw = secret.encode()
    found = {raw, quote(secret, safe="").encode(), quote_plus(secret).encode()}
    found.add(secret.replace("/", "\\/").encode())
    for shift in range(3):
        # Without the characters at its ends, which depend on what stands beside the secret.
        encoded = base64.b64encode(b"x" * shift + raw).rstrip(b"=")
        found.add(encoded[4 if shift else 0 : -1][:-1])
        found.add(base64.urlsafe_b64encode(b"x" * shift + raw).rstrip(b"=")[4 if shift else 0 : -2])
    assert all(len(form) >= CORE for form in found)
    return sorted(found)


def search(folders: list[Path], secrets: dict[str, str]) -> list[str]:
    """``NAME in FILE`` for every secret that a file below ``folders`` holds.

    Args:
        secrets: secret by name of its variable.
    """
    wanted = {name: forms(secret) for name, secret in secrets.items()}
    found = []
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            with suppress(FileNotFoundError):
                if file.is_symlink() or not file.is_file():
                    continue
                for content in contents(file):
                    found += [f"{name} in {file}" for name in holds(content, wanted)]
    return sorted(set(found))


def holds(content: bytes, wanted: dict[str, list[bytes]]) -> list[str]:
    """Names of the secrets in ``content``."""
    return [name for name, texts in wanted.items() if any(text in content for text in texts)]


def contents(file: Path) -> Iterator[bytes]:
    """The bytes of a file, and what is packed in it."""
    raw = file.read_bytes()
    yield raw
    if raw.startswith(b"SQLite format 3"):
        yield from _database(file)
    elif raw.startswith(b"PAR1") and raw.endswith(b"PAR1"):
        yield str(pq.read_table(file).to_pylist()).encode()
    elif raw.startswith(b"\x1f\x8b"):
        with suppress(OSError, EOFError):
            yield gzip.decompress(raw)
    elif raw.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(raw)) as packed:
            yield from (packed.read(name) for name in packed.namelist())


def _database(file: Path) -> Iterator[bytes]:
    """Every value: a long one lies in pieces in the file."""
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            with suppress(sqlite3.Error):
                yield str(database.execute(f'SELECT * FROM "{name}"').fetchall()).encode()


class CommandLines:
    """Keeps the command line of every process of a home while the block runs."""

    def __init__(self, home: Path) -> None:
        self._wanted = f"REELFLOW_HOME={home}".encode()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.seen: set[bytes] = set()

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        known: set[tuple[int, float]] = set()
        while not self._ended.wait(0.1):
            for process in psutil.process_iter():
                with suppress(psutil.Error, OSError):
                    folder = Path(f"/proc/{process.pid}")
                    command = (folder / "cmdline").read_bytes()
                    identity = (process.pid, hash(command))
                    if identity in known or process.pid == os.getpid():
                        continue
                    if self._wanted in (folder / "environ").read_bytes().split(b"\0"):
                        known.add(identity)
                        self.seen.add(command)
