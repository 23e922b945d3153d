"""Artifacts: folders of files that a stage reads or writes, and the manifests that publish them.

One protocol serves a folder and an object store. A stage writes below a name nobody reads
(``data/<stage>/<attempt>``); then one manifest, ``manifests/<stage>/<key>.json``, appears in one
atomic step and makes all outputs of the stage visible at once. Readers look at manifests only, so
a stage killed at any instant leaves nothing that is ever read. Digests in the manifest are checked
when an artifact is opened.

Only Arrow/parquet, safetensors and JSON are read back: nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.errors import CorruptArtifactError, StageError
from components.pipeline.storage import Folder

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

ROW_GROUP = 256 * 1024
TABLE_FILE = "table.parquet"
MANIFEST_FORMAT = 1


def digest_json(value: object) -> str:
    """SHA-256 (hex) of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What one execution of a stage published.

    Attributes:
        body: JSON content; keys ``stage, key, code, code_digest, params, params_digest, inputs,
            external, outputs, metrics, created_at, seconds, peak_rss_bytes, seed, environment``.
    """

    body: dict[str, Any]

    @property
    def stage(self) -> str:
        return str(self.body["stage"])

    @property
    def key(self) -> str:
        return str(self.body["key"])

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.body["metrics"])

    def output_digest(self, name: str) -> str:
        return str(self.body["outputs"][name]["digest"])

    def to_bytes(self) -> bytes:
        return json.dumps(
            {"format": MANIFEST_FORMAT, "digest": digest_json(self.body), "body": self.body},
            indent=1,
            sort_keys=True,
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            CorruptArtifactError: not JSON, of an unknown format, or its digest does not fit.
        """
        remedy = "run the stage again with --force"
        try:
            outer = json.loads(data)
            body, digest, version = outer["body"], outer["digest"], outer["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(
                "the manifest is not readable", where=where, remedy=remedy
            ) from error
        if version != MANIFEST_FORMAT:
            raise CorruptArtifactError(
                f"the manifest has format {version}, this program reads {MANIFEST_FORMAT}",
                where=where,
                remedy=remedy,
            )
        if digest_json(body) != digest:
            raise CorruptArtifactError("the manifest was altered", where=where, remedy=remedy)
        return cls(body)


class Store:
    """Manifests and artifact files below one URI.

    Args:
        uri: a folder or ``s3://bucket/prefix``.
        fetched: local folder for copies of artifacts that lie in an object store.
    """

    def __init__(self, uri: str, fetched: Path) -> None:
        self.folder = Folder(uri)
        self.uri = uri
        self.fetched = fetched

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest published under ``key``, or None."""
        name = f"manifests/{stage}/{key}.json"
        data = self.folder.read(name)
        return None if data is None else Manifest.from_bytes(data, self.folder.path(name))

    def manifests(self, stage: str = "") -> list[Manifest]:
        """All readable manifests (of one stage), newest first."""
        prefix = f"manifests/{stage}" if stage else "manifests"
        found = []
        for name in self.folder.names(prefix, ".json"):
            data = self.folder.read(name)
            if data is None:
                continue
            try:
                found.append(Manifest.from_bytes(data, self.folder.path(name)))
            except CorruptArtifactError:
                continue
        return sorted(found, key=lambda m: str(m.body["created_at"]), reverse=True)

    def publish(self, manifest: Manifest, *, replace: bool) -> Manifest:
        """Make ``manifest`` visible; with ``replace`` False an earlier one under its key wins.

        Returns:
            The manifest that readers now see.
        """
        name = f"manifests/{manifest.stage}/{manifest.key}.json"
        if self.folder.put(name, manifest.to_bytes(), replace=replace):
            return manifest
        winner = self.manifest(manifest.stage, manifest.key)
        if winner is None:
            raise StageError("another process removed the manifest", where=self.folder.path(name))
        return winner


class Input:
    """A published artifact, read-only; files are checked against their digests when opened."""

    def __init__(self, store: Store, name: str, manifest: Manifest) -> None:
        self.name = name
        self._store = store
        self._manifest = manifest
        self._record = manifest.body["outputs"][name]
        self._checked: set[str] = set()

    @property
    def manifest(self) -> dict[str, Any]:
        """Body of the manifest of the stage that wrote this artifact."""
        return self._manifest.body

    @property
    def digest(self) -> str:
        return str(self._record["digest"])

    @property
    def rows(self) -> int | None:
        """Rows of the artifact's table; None if it holds no table."""
        return self._record.get("rows")

    @property
    def files(self) -> list[str]:
        return [str(f["name"]) for f in self._record["files"]]

    def path(self, name: str = "") -> str:
        """Local path of the artifact's folder, or of file ``name`` in it, checked.

        Raises:
            CorruptArtifactError: a file is missing or its content is not what was published.
        """
        for file in self._record["files"]:
            if not name or file["name"] == name:
                self._check(file)
        return str(self._root() / name) if name else str(self._root())

    def _root(self) -> Path:
        if self._store.folder.is_local:
            return Path(self._store.folder.path(self._record["path"]))
        return self._store.fetched / self.digest

    def _check(self, file: dict[str, Any]) -> None:
        if file["name"] in self._checked:
            return
        local = self._root() / file["name"]
        if not self._store.folder.is_local and not _matches(local, file):
            self._store.folder.download(f"{self._record['path']}/{file['name']}", local)
        if not _matches(local, file):
            raise CorruptArtifactError(
                f"artifact '{self.name}' of stage '{self._manifest.stage}' is missing or was "
                f"altered after it was published",
                where=f"{self._store.uri}/{self._record['path']}/{file['name']}",
                remedy=f"make it again: reelflow stage {self._manifest.stage} --force",
            )
        self._checked.add(file["name"])

    def _table_files(self) -> list[str]:
        names = [n for n in self.files if n.endswith(".parquet")]
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
        return json.loads(Path(self.path(name)).read_text())

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

    @contextmanager
    def writer(self, schema: pa.Schema) -> Iterator[Any]:
        """A streaming parquet writer (zstd): ``write_batch`` / ``write_table``."""
        import pyarrow.parquet as pq

        with pq.ParquetWriter(self.path(TABLE_FILE), schema, compression="zstd") as writer:
            yield writer

    def write_table(self, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        pq.write_table(table, self.path(TABLE_FILE), compression="zstd", row_group_size=ROW_GROUP)

    def write_json(self, value: object, name: str = "data.json") -> None:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        Path(self.path(name)).write_text(text)

    def save_state_dict(
        self,
        tensors: Mapping[str, Any],
        metadata: dict[str, str] | None = None,
        name: str = "model.safetensors",
    ) -> None:
        """Write torch tensors or numpy arrays as safetensors."""
        import numpy as np

        if all(isinstance(value, np.ndarray) for value in tensors.values()):
            from safetensors.numpy import save_file as save_arrays

            save_arrays(
                {k: np.ascontiguousarray(v) for k, v in tensors.items()}, self.path(name), metadata
            )
            return
        from safetensors.torch import save_file

        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            self.path(name),
            metadata,
        )


class Outputs(Mapping[str, Output]):
    """The output artifacts of one execution of a stage, below a folder nobody reads yet."""

    def __init__(self, store: Store, stage: str, names: tuple[str, ...], staging: Path) -> None:
        self._store = store
        self._attempt = f"data/{stage}/{uuid.uuid4().hex}"
        local = Path(store.folder.path(self._attempt)) if store.folder.is_local else staging
        self._root = local
        self._outputs = {name: Output(name, local / name) for name in names}
        for output in self._outputs.values():
            output.path()

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
        """
        return {name: self._seal(name, output) for name, output in self._outputs.items()}

    def _seal(self, name: str, output: Output) -> dict[str, Any]:
        root = Path(output.path())
        destination = f"{self._attempt}/{name}"
        files: list[dict[str, Any]] = []
        rows: int | None = None
        schema: str | None = None
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            relative = path.relative_to(root).as_posix()
            if path.suffix == ".parquet":
                import pyarrow.parquet as pq

                with pq.ParquetFile(path) as table:
                    rows = (rows or 0) + table.metadata.num_rows
                    schema = table.schema_arrow.to_string(show_field_metadata=False)
            _make_durable(path)
            files.append(
                {"name": relative, "size": path.stat().st_size, "sha256": digest_file(path)}
            )
            if not self._store.folder.is_local:
                self._store.folder.upload(path, f"{destination}/{relative}")
        record: dict[str, Any] = {"path": destination, "files": files, "digest": digest_json(files)}
        if rows is not None:
            record |= {"rows": rows, "schema": schema}
        return record

    def discard(self) -> None:
        """Remove what was written: the stage failed, or another execution was first."""
        shutil.rmtree(self._root, ignore_errors=True)
        if not self._store.folder.is_local:
            self._store.folder.delete_folder(self._attempt)

    def clean_staging(self) -> None:
        """Remove the local copy of what now lies in the object store."""
        if not self._store.folder.is_local:
            shutil.rmtree(self._root, ignore_errors=True)


def _make_durable(path: Path) -> None:
    """Flush to disk and make read-only, so that a later careless write fails loudly."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.chmod(0o444)
