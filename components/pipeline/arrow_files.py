"""An artifact store as an Arrow file system, for libraries that want to write one by themselves.

Ray Train keeps its checkpoints through it, from the driver and from every worker. What it reads
and writes goes the way of everything else in the store, with the same patience and the same errors,
and a file appears whole or not at all. Credentials are found where it runs: nothing but the
address of the store travels to a worker.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pyarrow import NativeFile, PythonFile, fs

from components.pipeline.storage import Folder


class StoreFiles(fs.FileSystemHandler):
    """Paths are names relative to the store; folders are there as long as a file is in them."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._folder = Folder(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFiles, (self._uri,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreFiles) and other._uri == self._uri

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._uri)

    def get_type_name(self) -> str:
        return "reelflow-store"

    def normalize_path(self, path: str) -> str:
        return path.strip("/")

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> fs.FileInfo:
        for file in self._folder.files(path):
            return fs.FileInfo(path, fs.FileType.Directory, mtime=file.written)
        kind = fs.FileType.File if self._folder.exists(path) else fs.FileType.NotFound
        return fs.FileInfo(path, kind)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        base = self.normalize_path(selector.base_dir)
        files = self._folder.files(base)
        if not files and not selector.allow_not_found:
            raise FileNotFoundError(base)
        found: dict[str, fs.FileInfo] = {}
        for file in files:
            parts = file.name.removeprefix(f"{base}/").split("/")
            for depth in range(1, len(parts)):
                name = "/".join([base, *parts[:depth]])
                found.setdefault(name, fs.FileInfo(name, fs.FileType.Directory))
            found[file.name] = fs.FileInfo(
                file.name, fs.FileType.File, size=file.size, mtime=file.written
            )
        depth = base.count("/") + 1
        return [i for n, i in found.items() if selector.recursive or n.count("/") == depth]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing to do: a folder is there once a file is."""

    def delete_dir(self, path: str) -> None:
        self._folder.delete_folder(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self._folder.delete_folder(path)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("nobody empties a store this way")

    def delete_file(self, path: str) -> None:
        self._folder.delete(path)

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError("an object store does not rename")

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError("files of a store are not copied within it")

    def open_input_stream(self, path: str) -> NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> NativeFile:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            self._folder.download(path, copy, Path(folder))
            # An open file outlives its name.
            return PythonFile(copy.open("rb"), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> NativeFile:
        return PythonFile(_Upload(self._folder, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> NativeFile:
        raise NotImplementedError("an object is written once")


class _Upload:
    """A file that goes to the store when it is closed."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115  (it is closed with this one)

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._file.flush()
            self._folder.upload(Path(self._file.name), self._name)
        finally:
            self._file.close()
