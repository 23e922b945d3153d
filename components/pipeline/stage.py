"""What a stage is: a pure function from (params, input artifacts) to (output artifacts, metrics).

Declaring one registers it; Prefect flows, ``dvc.yaml`` and the command line are all derived from
the registry. This module is imported by every stage and stays small and cheap on purpose: an edit
here re-runs everything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.pipeline.errors import UsageError
from components.pipeline.params_base import Params

if TYPE_CHECKING:
    # Seen by type checkers only: what artifacts are made of does not decide what a stage computes.
    from components.pipeline.artifacts import Inputs as Inputs
    from components.pipeline.artifacts import Outputs as Outputs
else:
    Inputs = Outputs = Any

COMPONENTS = Path(__file__).resolve().parent.parent


class Bar(Protocol):
    """A progress bar."""

    def advance(self, amount: float = 1) -> None: ...


class Checkpoints(Protocol):
    """What a stage must not lose, be it killed or its machine lost; gone once it is published."""

    def fetch(self, name: str) -> Path:
        """Local folder ``name`` with all that was kept in it; made if it is not there."""

    def keep(self, file: Path) -> None:
        """A file of such a folder was written: it shall outlive this process and machine."""

    def arrow(self) -> tuple[Any, str]:
        """The place itself, for libraries that write by themselves: Arrow file system and path."""

    def clear(self) -> None:
        """Remove all of them."""


class Run(Protocol):
    """What a stage may tell while it runs.

    Attributes:
        seed: the seed of this stage.
        scratch: local folder for temporary files; it survives a kill of this stage and is deleted
            once its outputs are published.
        checkpoints: place of what a resume needs, on whatever machine.
    """

    seed: int
    scratch: Path
    checkpoints: Checkpoints

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics, with a step for curves."""

    def progress(self, total: float, label: str) -> AbstractContextManager[Bar]:
        """A bar that appears when the work takes over two seconds."""

    def figure(self, name: str, figure: Any) -> None:
        """Keep a matplotlib figure beside the run."""

    def note(self, text: str) -> None:
        """One line for the person who waits."""


StageFunction = Callable[[Any, Any, Any, Any], dict[str, float]]


@dataclass(frozen=True)
class Stage:
    """A registered stage.

    Attributes:
        name: name of the stage, of its section in params.yaml and of its function.
        inputs, outputs: artifact names.
        params: model that validates the section.
        module: dotted module; its import closure is the code that counts for the cache.
        external: digest of what the stage reads from outside the store, or None.
        gpus: how many GPUs it takes with given params; None for none.
    """

    name: str
    function: StageFunction
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: type[Params]
    module: str
    external: Callable[[Any], str | None] | None
    gpus: Callable[[Any], int] | None = None

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or self.name).strip().splitlines()[0]

    @property
    def seeded(self) -> bool:
        return "seed" in self.params.model_fields


REGISTRY: dict[str, Stage] = {}


def stage(
    *,
    inputs: tuple[str, ...] = (),
    outputs: tuple[str, ...],
    params: type[Params],
    external: Callable[[Any], str | None] | None = None,
    gpus: Callable[[Any], int] | None = None,
) -> Callable[[StageFunction], StageFunction]:
    """Register a function ``(params, inputs, outputs, run) -> metrics`` as the stage of its name.

    Args:
        inputs: artifacts read; each is written by exactly one other stage.
        outputs: artifacts written, published together.
        params: pydantic model of the stage's section in params.yaml.
        external: for stages that read data from outside the store: digest of that data; None where
            the parameters name no such data.
        gpus: how many GPUs the stage takes, so that a machine without them is told at once.

    Raises:
        ValueError: another module already has a stage or an output of that name.
    """

    def register(function: StageFunction) -> StageFunction:
        name = function.__name__
        new = Stage(name, function, inputs, outputs, params, function.__module__, external, gpus)
        known = REGISTRY.get(name)
        if known is not None and known.module != new.module:
            raise ValueError(f"stage '{name}' is defined in {known.module} and in {new.module}")
        for other in REGISTRY.values():
            twice = set(other.outputs) & set(outputs)
            if other.name != name and twice:
                raise ValueError(f"{sorted(twice)} are outputs of '{other.name}' and of '{name}'")
        REGISTRY[name] = new
        return function

    return register


def stage_modules() -> list[str]:
    """Modules that define stages: ``stage.py`` and ``*_stage.py`` below components."""
    files = [*COMPONENTS.rglob("stage.py"), *COMPONENTS.rglob("*_stage.py")]
    modules = (
        "components." + ".".join(file.relative_to(COMPONENTS).with_suffix("").parts)
        for file in files
    )
    return sorted(m for m in modules if m != __name__)


def load_registry() -> dict[str, Stage]:
    """Import all stage modules and return the registry."""
    for module in stage_modules():
        importlib.import_module(module)
    return REGISTRY


def find_stage(name: str) -> Stage:
    """The stage of that name.

    Raises:
        UsageError: there is none; the message lists what there is.
    """
    registry = load_registry()
    if name not in registry:
        import difflib

        near = difflib.get_close_matches(name, registry, 1)
        raise UsageError(
            f"there is no stage '{name}'",
            remedy=(f"did you mean '{near[0]}'? " if near else "")
            + "stages: "
            + ", ".join(sorted(registry)),
        )
    return registry[name]


def producer_of(artifact: str) -> Stage:
    """The stage that writes ``artifact``."""
    for candidate in load_registry().values():
        if artifact in candidate.outputs:
            return candidate
    raise UsageError(f"no stage writes the artifact '{artifact}'")
