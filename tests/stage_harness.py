"""Runs one stage function on real artifacts in a folder, without a cache or a tracker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from components.pipeline.artifacts import Input, Inputs, Manifest, Outputs, Store
from components.pipeline.checkpoints import LocalCheckpoints

Log = Callable[[dict[str, float], int | None], None]


class SilentRun:
    """The `run` of a stage under test: keeps what was logged and noted."""

    def __init__(self, scratch: Path, seed: int, log: Log) -> None:
        self.scratch, self.seed, self._log = scratch, seed, log
        self.checkpoints = LocalCheckpoints(scratch)
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.notes: list[str] = []

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((dict(metrics), step))
        self._log(metrics, step)

    def progress(self, total: float, label: str) -> Any:
        return nullcontext(_Bar())

    def figure(self, name: str, figure: Any) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


class _Bar:
    def advance(self, amount: float = 1) -> None: ...


class Bench:
    """A folder of artifacts: `give` puts one there, `run` lets a stage write more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(str(folder / "store"), folder / "fetched")
        self.artifacts: dict[str, Input] = {}
        self.last_run: SilentRun | None = None

    def give(self, name: str, fill: Callable[[Any], None]) -> None:
        """Make artifact `name` from what `fill(output)` writes."""
        outputs = Outputs(self.store, f"given_{name}", (name,), self.folder / "staging")
        fill(outputs[name])
        self._seal(f"given_{name}", outputs)

    def run(
        self,
        stage: Callable[..., dict[str, float]],
        params: Any,
        seed: int = 0,
        log: Log = lambda metrics, step: None,
    ) -> dict[str, float]:
        """Call the registered stage function on the artifacts it names.

        `log` hears what the stage logs, when it does.
        """
        from components.pipeline.stage import REGISTRY

        name = stage.__name__
        declared = REGISTRY[name]
        outputs = Outputs(self.store, name, declared.outputs, self.folder / "staging")
        scratch = self.folder / "scratch" / name
        scratch.mkdir(parents=True, exist_ok=True)
        self.last_run = SilentRun(scratch, seed, log)
        inputs = Inputs({i: self.artifacts[i] for i in declared.inputs}, [])
        metrics = stage(params, inputs, outputs, self.last_run)
        self._seal(name, outputs)
        return metrics

    def digests(self, *names: str) -> list[str]:
        return [self.artifacts[name].digest for name in names]

    def _seal(self, stage: str, outputs: Outputs) -> None:
        manifest = Manifest({"stage": stage, "key": "test", "outputs": outputs.seal()})
        for name in outputs:
            self.artifacts[name] = Input(self.store, name, manifest)
