"""Artifacts: folders of files that a stage reads or writes, and the manifests that publish them.

One protocol serves a folder and an object store. A stage writes below a name nobody reads
(``data/<stage>/<attempt>``); then one manifest, ``manifests/<stage>/<key>.json``, appears in one
atomic step and makes all outputs of the stage visible at once. Readers look at manifests only, so
a stage killed at any instant leaves nothing that is ever read. Digests in the manifest are checked
when an artifact is opened.

Only Arrow/parquet, safetensors and JSON are read back: nothing here unpickles.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.errors import CorruptArtifactError, StageError, StorageError
from components.pipeline.manifest import Manifest as Manifest
from components.pipeline.manifest import Store as Store
from components.pipeline.manifest import digest_file, digest_json
from components.pipeline.storage import sync
from components.pipeline.table_writer import ROW_GROUP, TableWriter, encoding

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

TABLE_FILE = "table.parquet"
TRANSFERS = 8
#: A copy that does not match may have been harmed on its way; the object itself seldom is.
FETCHES = 3


class Input:
    """A published artifact, read-only; files are checked against their digests when opened."""

    def __init__(self, store: Store, name: str, manifest: Manifest) -> None:
        self.name = name
        self._store = store
        self._manifest = manifest
        self._record = manifest.body["outputs"][name]
        self._files: dict[str, dict[str, Any]] = {f["name"]: f for f in self._record["files"]}
        self._checked: set[str] = set()

    @property
    def manifest(self) -> dict[str, Any]:
        """Body of the manifest of the stage that wrote this artifact."""
        return self._manifest.body

    @property
    def store(self) -> Store:
        """Where it was published."""
        return self._store

    @property
    def digest(self) -> str:
        return str(self._record["digest"])

    @property
    def uri(self) -> str:
        """Address of the artifact's folder in the store."""
        return f"{self._store.uri.rstrip('/')}/{self._record['path']}"

    @property
    def rows(self) -> int | None:
        """Rows of the artifact's table; None if it holds no table."""
        return self._record.get("rows")

    @property
    def files(self) -> list[str]:
        return list(self._files)

    def path(self, name: str = "") -> str:
        """Local path of the artifact's folder, or of a file or folder ``name`` in it, checked.

        Raises:
            CorruptArtifactError: a file is missing or its content is not what was published.
            StageError: the artifact never had a file of that name.
        """
        if name in self._files:
            self._check(self._files[name])
            return str(self._root() / name)
        wanted = [f for n, f in self._files.items() if not name or n.startswith(f"{name}/")]
        if name and not wanted:
            raise StageError(
                f"artifact '{self.name}' of stage '{self._manifest.stage}' has no file '{name}'",
                remedy="its files: " + (", ".join(self.files[:10]) or "none"),
            )
        folder = self._root() / name
        if self._store.folder.is_local:
            for file in wanted:
                self._check(file)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(self._check, wanted))
        return str(folder)

    def _root(self) -> Path:
        if self._store.folder.is_local:
            return Path(self._store.folder.path(self._record["path"]))
        return self._store.fetched / self.digest

    def _check(self, file: dict[str, Any]) -> None:
        if file["name"] in self._checked:
            return
        local = self._root() / file["name"]
        intact = _matches(local, file)
        if not intact and not self._store.folder.is_local:
            remote = f"{self._record['path']}/{file['name']}"
            for _ in range(FETCHES):
                self._store.folder.download(remote, local, self._store.fetched / ".partial")
                intact = _matches(local, file)
                if intact:
                    break
        if not intact:
            raise CorruptArtifactError(
                f"artifact '{self.name}' of stage '{self._manifest.stage}' is missing or was "
                f"altered after it was published",
                where=f"{self.uri}/{file['name']}",
                remedy="make it again, with the same options as before: "
                f"reelflow stage {self._manifest.stage} --force",
            )
        self._checked.add(file["name"])

    def _table_files(self) -> list[str]:
        names = [n for n in self.files if n.endswith(".parquet")]
        if not names:
            raise StageError(
                f"artifact '{self.name}' of stage '{self._manifest.stage}' holds no table",
                remedy="its files: " + (", ".join(self.files[:10]) or "none"),
            )
        return [self.path(n) for n in names]

    @property
    def schema(self) -> pa.Schema:
        import pyarrow.parquet as pq

        return pq.read_schema(self._table_files()[0])

    def read_table(self, columns: list[str] | None = None) -> pa.Table:
        """The whole table in memory."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pa.concat_tables([pq.read_table(f, columns=columns) for f in self._table_files()])

    def batches(
        self, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[pa.RecordBatch]:
        """The table in batches of at most ``batch_size`` rows, in constant memory."""
        import pyarrow.parquet as pq

        for path in self._table_files():
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=batch_size, columns=columns)

    def read_json(self, name: str = "data.json") -> Any:
        return json.loads(Path(self.path(name)).read_text(encoding="utf-8"))

    def load_state_dict(self, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self.path(name)))

    def load_arrays(self, name: str = "model.safetensors") -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        return dict(load_file(self.path(name)))


def _matches(local: Path, file: Mapping[str, Any]) -> bool:
    return (
        local.is_file()
        and local.stat().st_size == file["size"]
        and digest_file(local) == file["sha256"]
    )


class Inputs(Mapping[str, Input]):
    """The input artifacts of a stage by name."""

    def __init__(self, artifacts: Mapping[str, Input], upstream: list[Manifest]) -> None:
        self._artifacts = dict(artifacts)
        self._upstream = upstream

    def __getitem__(self, name: str) -> Input:
        return self._artifacts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._artifacts)

    def __len__(self) -> int:
        return len(self._artifacts)

    def lineage(self) -> list[dict[str, Any]]:
        """Manifest bodies of every stage upstream, in the order they ran."""
        return [m.body for m in self._upstream]


class Output:
    """An artifact being written: a local folder that is published when the stage returns."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder

    def path(self, name: str = "") -> str:
        """Local path to write to: the artifact's folder, or file ``name`` in it."""
        target = self._folder / name if name else self._folder
        (target.parent if name else target).mkdir(parents=True, exist_ok=True)
        return str(target)

    @contextlib.contextmanager
    def writer(self, schema: pa.Schema) -> Iterator[TableWriter]:
        """A streaming parquet writer (zstd): ``write_batch`` / ``write_table``."""
        import pyarrow.parquet as pq

        with pq.ParquetWriter(self.path(TABLE_FILE), schema, **encoding(schema)) as file:
            writer = TableWriter(file)
            yield writer
            writer.flush()

    def write_table(self, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        how = encoding(table.schema)
        pq.write_table(table, self.path(TABLE_FILE), row_group_size=ROW_GROUP, **how)

    def write_json(self, value: object, name: str = "data.json") -> None:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        Path(self.path(name)).write_text(text, encoding="utf-8")

    def save_state_dict(
        self,
        tensors: Mapping[str, Any],
        metadata: dict[str, str] | None = None,
        name: str = "model.safetensors",
    ) -> None:
        """Write torch tensors or numpy arrays as safetensors."""
        import numpy as np

        file = self.path(name)
        if all(isinstance(value, np.ndarray) for value in tensors.values()):
            from safetensors.numpy import save_file as save_arrays

            save_arrays({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file, metadata)
        else:
            from safetensors.torch import save_file

            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file, metadata
            )
        _sort_metadata(Path(file))


def _sort_metadata(file: Path) -> None:
    """Order the metadata of a safetensors file, which the library writes in random order."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        if "__metadata__" in header:
            ordered = dict(sorted(header.pop("__metadata__").items()))
            header = {"__metadata__": ordered, **header}
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(text) <= length, "the header must keep its length"
            stream.seek(8)
            stream.write(text.ljust(length))


class Outputs(Mapping[str, Output]):
    """The output artifacts of one execution of a stage, below a folder nobody reads yet.

    Raises:
        StorageError: the store cannot be written; better said before the work than after it.
    """

    def __init__(self, store: Store, stage: str, names: tuple[str, ...], staging: Path) -> None:
        self._folder = store.folder
        self._attempt = f"data/{stage}/{uuid.uuid4().hex}"
        if self._folder.is_local:
            self._root = Path(self._folder.path(self._attempt))
        else:
            # What a killed execution left here must not be published with the new files.
            shutil.rmtree(staging, ignore_errors=True)
            self._root = staging
            self._folder.put(f"{self._attempt}/started", b"", replace=True)
        self._outputs = {name: Output(name, self._root / name) for name in names}
        try:
            for output in self._outputs.values():
                output.path()
        except OSError as error:
            other = "--store or ARTIFACT_ROOT" if self._folder.is_local else "REELFLOW_HOME"
            raise StorageError(
                f"cannot make a folder for stage '{stage}': {error.strerror}",
                where=str(self._root),
                remedy=f"check the rights and the free space, or give another folder with {other}",
            ) from error

    def __getitem__(self, name: str) -> Output:
        return self._outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def seal(self) -> dict[str, Any]:
        """Flush and digest all files, upload them if the store is remote.

        Returns:
            The ``outputs`` section of the manifest.

        Raises:
            StageError: an output holds a symbolic link.
            StorageError: the upload failed.
        """
        # An upload waits for the store more than for anything else: those of all outputs at once.
        under_way: list[Iterator[None]] = []
        with ThreadPoolExecutor(TRANSFERS) as pool:
            try:
                sealed = {
                    name: self._seal(name, output, pool, under_way)
                    for name, output in self._outputs.items()
                }
                for uploads in under_way:
                    list(uploads)
            except BaseException:
                # Where one was in vain the next would only wait as long.
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if self._folder.is_local:
            for folder in [self._root, *(p for p in self._root.rglob("*") if p.is_dir())]:
                sync(folder)
            self._folder.sync_names(self._attempt)
        return sealed

    def _seal(
        self, name: str, output: Output, pool: ThreadPoolExecutor, under_way: list[Iterator[None]]
    ) -> dict[str, Any]:
        root = Path(output.path())
        destination = f"{self._attempt}/{name}"
        paths = sorted(p for p in root.rglob("*") if p.is_symlink() or p.is_file())
        relative = [path.relative_to(root).as_posix() for path in paths]
        files = list(pool.map(_finish_file, paths, relative))
        if not self._folder.is_local:
            names = [f"{destination}/{name}" for name in relative]
            under_way.append(pool.map(self._folder.upload, paths, names))
        record: dict[str, Any] = {"path": destination, "files": files, "digest": digest_json(files)}
        return record | _table_facts([path for path in paths if path.suffix == ".parquet"])

    def discard(self) -> None:
        """Remove what was written: the stage failed, or another execution was first."""
        shutil.rmtree(self._root, ignore_errors=True)
        if not self._folder.is_local:
            # Nobody reads these files; an outage here must not hide why they are discarded.
            with contextlib.suppress(StorageError):
                self._folder.delete_folder(self._attempt, once=True)

    def clean_staging(self) -> None:
        """Remove the local copy of what now lies in the object store."""
        if not self._folder.is_local:
            shutil.rmtree(self._root, ignore_errors=True)


def _finish_file(path: Path, name: str) -> dict[str, Any]:
    """Flush a file to disk, make it read-only so that a careless write fails, and digest it."""
    if path.is_symlink():
        raise StageError(
            f"an output holds the symbolic link '{name}': what it points to could change",
            remedy="write or copy the file itself",
        )
    sync(path)
    path.chmod(0o444)
    return {"name": name, "size": path.stat().st_size, "sha256": digest_file(path)}


def _table_facts(paths: list[Path]) -> dict[str, Any]:
    import pyarrow.parquet as pq

    rows, schema = 0, None
    for path in paths:
        with pq.ParquetFile(path) as table:
            rows += table.metadata.num_rows
            schema = table.schema_arrow.to_string(show_field_metadata=False)
    return {"rows": rows, "schema": schema} if paths else {}
