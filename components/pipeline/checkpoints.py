"""Checkpoints of unfinished stages, where a machine that is lost cannot take them along.

With a store in a folder they lie in the stage's scratch folder. With an object store they go below
``scratch/<stage>/<key>/`` of it, so that the same command resumes from them on any machine; the
scratch folder then holds copies. They are removed once the stage is published.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from components.pipeline.errors import StorageError
from components.pipeline.storage import Folder

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


class LocalCheckpoints:
    """Checkpoints in a folder: what is written there is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, name: str) -> Path:
        """Folder ``name`` with all that was kept in it; made if it is not there."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def keep(self, file: Path) -> None:
        """A file of such a folder was written: it shall outlive this process."""

    def arrow(self) -> tuple[FileSystem, str]:
        """The place itself, for libraries that write by themselves: a file system, a path."""
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), str(self._folder.absolute())

    def clear(self) -> None:
        """Remove all of them: the stage is published."""
        shutil.rmtree(self._folder, ignore_errors=True)


class StoredCheckpoints:
    """Checkpoints in an object store.

    Args:
        store: the artifact store.
        place: folder in it, of this stage and key alone.
        local: folder for copies.
    """

    def __init__(self, store: Folder, place: str, local: Path) -> None:
        self._store, self._place, self._local = store, place, local
        self._used = False

    def fetch(self, name: str) -> Path:
        """Local folder ``name`` with all that was kept in it, by whatever machine.

        Raises:
            StorageError: the store does not give it.
        """
        self._used = True
        folder = self._local / name
        # The store has the truth: a copy here may be older than what another machine kept since.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in self._store.files(f"{self._place}/{name}"):
            copy = self._local / file.name.removeprefix(f"{self._place}/")
            self._store.download(file.name, copy, self._local / ".partial")
        return folder

    def keep(self, file: Path) -> None:
        """Put a file of such a folder into the store, whole or not at all.

        Raises:
            StorageError: the store does not take it.
        """
        self._store.upload(file, f"{self._place}/{file.relative_to(self._local).as_posix()}")

    def arrow(self) -> tuple[FileSystem, str]:
        """The place itself, for libraries that write by themselves: a file system, a path."""
        from pyarrow.fs import PyFileSystem

        from components.pipeline.arrow_files import StoreFiles

        self._used = True
        return PyFileSystem(StoreFiles(self._store.uri)), self._place

    def clear(self) -> None:
        """Remove all of them; what the store does not remove at once is left to ``gc``."""
        if self._used:
            with contextlib.suppress(StorageError):
                self._store.delete_folder(self._place, once=True)
        shutil.rmtree(self._local, ignore_errors=True)
