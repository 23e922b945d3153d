"""`reelflow serve` in a process of its own, on a real registry with a tiny champion."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from command_line import REELFLOW, ROOT, environment
from registration_world import NAME, Model, first_catalogue, model_files
from stage_harness import Bench

from components.evaluation.registration import registry
from components.evaluation.registration.serving import MODEL_FILES
from components.pipeline.code_digest import closure_digests, combined_digest
from components.pipeline.manifest import digest_json
from components.pipeline.settings import Settings
from components.pipeline.tracking import connect

#: As wide as there are semantic ids; not the default of the code.
EVALUATED_BEAMS = 48


def settings_of(home: Path) -> Settings:
    return Settings(home, str(home / "store"), f"sqlite:///{home / 'mlflow.db'}", None, None)


def register(home: Path, folder: Path, files: dict[str, Path], tags: dict[str, str]) -> str:
    """A new version in the registry of ``home``, laid out in ``folder`` as the stage lays it out.

    Without `mlflow.pyfunc.log_model`, which tries the model out for seconds.
    """
    for name, place in files.items():
        shutil.copytree(place, folder / "artifacts" / name)
    registry._copy_code(folder / "code")
    written = {"signature": registry.signature(EVALUATED_BEAMS).to_dict()}
    (folder / "MLmodel").write_text(yaml.safe_dump(written))
    client = connect(settings_of(home)).MlflowClient()
    if not client.search_registered_models(f"name = '{NAME}'"):
        client.create_registered_model(NAME)
    return str(client.create_model_version(NAME, folder.as_uri(), tags=tags).version)


def register_champion(home: Path, folder: Path) -> dict[str, Path]:
    """A champion of the code of now; the files of its artifacts."""
    bench = Bench(folder / "bench")
    Model(first_catalogue(), seed=1).fill(bench)
    files = model_files(bench)
    digests = {f"{name}_digest": name for name in MODEL_FILES}
    code = combined_digest(closure_digests(registry.MODEL_MODULE))
    tags = digests | {registry.MODEL_DIGEST: digest_json([digests, code])}
    number = register(home, folder / "model", files, tags)
    registry.set_alias(connect(settings_of(home)), NAME, registry.CHAMPION, number)
    return files


def version_files(folder: Path) -> Path:
    """A folder with the folders of all artifacts of a version, without a registry."""
    bench = Bench(folder / "bench")
    Model(first_catalogue(), seed=1).fill(bench)
    for name, place in model_files(bench).items():
        shutil.copytree(place, folder / "artifacts" / name)
    return folder / "artifacts"


@dataclass
class Reply:
    """What came back."""

    status: int
    body: Any
    headers: dict[str, str]


class Service:
    """A running `reelflow serve`."""

    def __init__(self, home: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [*REELFLOW, "serve", "--port", "0", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(home),
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        else:
            raise AssertionError(self.process.stderr.read())
        found = re.search(r"http://[^/]+", said)
        assert found is not None
        self.address, self.said = found[0], said

    def started(self) -> list[psutil.Process]:
        """The processes that belong to it now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        """Those of them that answer requests."""
        found = []
        for process in self.started():
            # One may be gone by now.
            with suppress(psutil.NoSuchProcess):
                found += [process] if "ServeReplica" in process.name() else []
        return found

    def ready(self) -> bool:
        """Whether it says so; while a replica is replaced, Ray may answer for it."""
        try:
            return self.get("/readyz").status == 200
        except (OSError, ValueError):
            return False

    def get(self, path: str) -> Reply:
        return self._send(urllib.request.Request(self.address + path))

    def post(self, path: str, body: Any) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(self.address + path, data, kind))

    def delete(self, path: str) -> Reply:
        return self._send(urllib.request.Request(self.address + path, method="DELETE"))

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code

    @staticmethod
    def _send(request: urllib.request.Request) -> Reply:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Reply(answer.status, json.load(answer), dict(answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, json.loads(error.read() or b"{}"), dict(error.headers))
