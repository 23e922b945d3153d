"""Three tiny stages in a row, for tests of what happens around stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from components.pipeline import params as params_module
from components.pipeline import stage as stage_module
from components.pipeline.params_base import Params, Seed
from components.pipeline.runner import Runner
from components.pipeline.settings import Settings
from components.pipeline.stage import REGISTRY, Stage, stage


class NumbersParams(Params):
    """Parameters of `numbers`."""

    count: int = Field(5, ge=1, le=1000, description="rows")
    attempt: int = Field(0, ge=0, description="changes the key and nothing else")
    seed: Seed = Field(0, description="seed")


class Rounding(Params):
    """A section within a section."""

    digits: int = Field(2, ge=0, lt=10, description="digits kept")


class DoubledParams(Params):
    """Parameters of `doubled`."""

    factor: float = Field(2.0, gt=0, description="what each number is multiplied by")
    rounding: Rounding = Field(default_factory=Rounding, description="how it is rounded")


class TotalParams(Params):
    """Parameters of `total`."""

    label: str = Field("sum", description="name of the figure")


class Tiny:
    """The stages, with hooks that a test may set.

    Attributes:
        during: called by `numbers` after it wrote its first output, with its `run`.
        outside: digest that `numbers` gives of its outside data.
        calls: names of the stages that executed, in order.
    """

    def __init__(self) -> None:
        self.during: Callable[[Any], None] = lambda run: None
        self.outside = "data of today"
        self.calls: list[str] = []

        @stage(outputs=("numbers", "facts"), params=NumbersParams, external=lambda _: self.outside)
        def numbers(params: NumbersParams, inputs: Any, outputs: Any, run: Any) -> dict[str, float]:
            """Count from the seed."""
            self.calls.append("numbers")
            table = pa.table(
                {"n": pa.array(list(range(run.seed, run.seed + params.count)), pa.int64())}
            )
            outputs["numbers"].write_table(table)
            self.during(run)
            outputs["facts"].write_json({"count": params.count})
            return {"rows": params.count}

        @stage(inputs=("numbers",), outputs=("doubled",), params=DoubledParams)
        def doubled(params: DoubledParams, inputs: Any, outputs: Any, run: Any) -> dict[str, float]:
            """Multiply."""
            self.calls.append("doubled")
            numbers = inputs["numbers"].read_table()["n"].to_pylist()
            values = [round(n * params.factor, params.rounding.digits) for n in numbers]
            outputs["doubled"].write_table(pa.table({"d": pa.array(values, pa.float64())}))
            return {"largest": max(values)}

        @stage(inputs=("doubled",), outputs=("total",), params=TotalParams)
        def total(params: TotalParams, inputs: Any, outputs: Any, run: Any) -> dict[str, float]:
            """Add up."""
            self.calls.append("total")
            value = sum(inputs["doubled"].read_table()["d"].to_pylist())
            outputs["total"].write_json({params.label: value})
            return {"total": value}

    @property
    def stages(self) -> list[Stage]:
        return [REGISTRY[name] for name in ("numbers", "doubled", "total")]

    def runner(self, folder: Path, *overrides: str, store: str | None = None) -> Runner:
        """A runner as a new process would make it, with its store and home below `folder`."""
        from components.pipeline.runner import open_store

        settings = Settings(folder / "home", store or str(folder / "store"), "", None, None)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "params.yaml"
        if not file.exists():
            file.write_text("")
        parameters = params_module.load_params(REGISTRY, file=file, overrides=overrides)
        return Runner(settings, open_store(settings), parameters)

    def run(self, folder: Path, *overrides: str, force: bool = False) -> list[str]:
        """Run all stages; the names of those that executed."""
        runner = self.runner(folder, *overrides)
        return [s.name for s in self.stages if not runner.execute(s, force=force)[1]]


@contextmanager
def tiny_registry() -> Iterator[Tiny]:
    """The registry holds the tiny stages and no others while the block runs."""
    real, find = dict(REGISTRY), stage_module.stage_modules
    REGISTRY.clear()
    stage_module.stage_modules = lambda: []
    try:
        yield Tiny()
    finally:
        stage_module.stage_modules = find
        REGISTRY.clear()
        REGISTRY.update(real)
