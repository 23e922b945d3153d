"""Manifests: what an execution of a stage published, and the store that keeps them.

A manifest is the only thing readers trust. It appears in one atomic step and names every file of
every output with its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.pipeline.errors import CorruptArtifactError, StageError, StorageError
from components.pipeline.storage import Folder

MANIFEST_FORMAT = 1
#: Manifests read at a time: of an object store each takes a round trip.
READS = 8


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
        # In the order in which it was made: who reads it later must not show another page of it.
        outer = {"format": MANIFEST_FORMAT, "digest": digest_json(self.body), "body": self.body}
        return json.dumps(outer, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, stage: str, where: str) -> Manifest:
        """Parse and check a manifest of ``stage``.

        Raises:
            CorruptArtifactError: not JSON, of an unknown format, or its digest does not fit.
        """
        remedy = f"make it again, with the same options as before: reelflow stage {stage} --force"
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
        for name in _file_names(body):
            # Whoever can write to the store must not reach files outside it.
            if name.startswith("/") or ".." in name.split("/"):
                raise CorruptArtifactError(
                    f"the manifest names '{name}', which lies outside the store",
                    where=where,
                    remedy=remedy,
                )
        return cls(body)


def _file_names(body: Mapping[str, Any]) -> Iterator[str]:
    for record in body["outputs"].values():
        yield record["path"]
        yield record["digest"]
        yield from (file["name"] for file in record["files"])


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
        if data is None:
            return None
        return Manifest.from_bytes(data, stage, self.folder.address(name))

    def manifests(self, stage: str = "") -> list[Manifest]:
        """All readable manifests (of one stage), newest first."""
        prefix = f"manifests/{stage}" if stage else "manifests"
        found = []
        names = self.folder.names(prefix, ".json")
        with ThreadPoolExecutor(READS) as pool:
            contents = list(pool.map(self.folder.read, names))
        for name, data in zip(names, contents, strict=True):
            if data is None:
                continue
            try:
                found.append(Manifest.from_bytes(data, stage, self.folder.address(name)))
            except CorruptArtifactError:
                continue
        return sorted(found, key=lambda m: str(m.body["created_at"]), reverse=True)

    def publish(self, manifest: Manifest, *, replace: bool) -> Manifest:
        """Make ``manifest`` visible; with ``replace`` False an earlier one under its key wins.

        Returns:
            The manifest that readers now see.

        Raises:
            StorageError: the store does not take it, or has lost a file that it names.
        """
        name = f"manifests/{manifest.stage}/{manifest.key}.json"

        def require_files() -> None:
            """A store that lost files meanwhile (it came back empty) gets no manifest of them."""
            records = list(manifest.body["outputs"].values())
            folders = {record["path"].rpartition("/")[0] for record in records}
            there = {f.name: f.size for folder in folders for f in self.folder.files(folder)}
            for record in records:
                for file in record["files"]:
                    file_name = f"{record['path']}/{file['name']}"
                    if there.get(file_name) != file["size"]:
                        raise StorageError(
                            "cannot publish: the store has lost this file since it was uploaded",
                            where=self.folder.address(file_name),
                            remedy="find out what happened to the store, then give the same "
                            "command again: what it lost is made anew",
                        )

        if self.folder.put(name, manifest.to_bytes(), replace=replace, before=require_files):
            return manifest
        winner = self.manifest(manifest.stage, manifest.key)
        if winner is None:
            raise StageError(
                "another process removed the manifest", where=self.folder.address(name)
            )
        return winner
