"""Tiny stages that another process can import, with ways to go wrong that a parameter chooses."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from components.pipeline import params as params_module
from components.pipeline import stage as stage_module
from components.pipeline.errors import DataContractError
from components.pipeline.flow import Flow
from components.pipeline.params_base import Params, Seed
from components.pipeline.runner import Runner, open_store
from components.pipeline.settings import Settings
from components.pipeline.stage import REGISTRY, Stage, stage

FLOW = Flow("tiny_flow", "Count, double and add up.", ("numbers", "doubled", "total"))

Trouble = Literal[
    "none",
    "contract",
    "bug",
    "interrupt",
    "killed",
    "killed once",
    "hangs",
    "hangs in C",
    "exits",
    "talks",
]


class NumbersParams(Params):
    """Parameters of `numbers`."""

    count: int = Field(5, ge=1, le=1000, description="rows")
    trouble: Trouble = Field("none", description="how it goes wrong, having counted")
    folder: str = Field("", description="where each execution leaves a file of its name")
    rounds: int = Field(0, ge=0, description="tenths of a second that it takes")
    seed: Seed = Field(0, description="seed")


class DoubledParams(Params):
    """Parameters of `doubled`."""

    factor: float = Field(2.0, gt=0, description="what each number is multiplied by")
    folder: str = Field("", description="where each execution leaves a file of its name")


class TotalParams(Params):
    """Parameters of `total`."""

    label: str = Field("sum", description="name of the figure")
    folder: str = Field("", description="where each execution leaves a file of its name")


def _leave_a_trace(folder: str, name: str) -> int:
    """One more file in ``folder``; how many executions of ``name`` there were before."""
    if not folder:
        return 0
    before = len(list(Path(folder).glob(f"*-{name}")))
    (Path(folder) / f"{time.time_ns()}-{os.getpid()}-{name}").touch()
    return before


def numbers(params: NumbersParams, inputs: Any, outputs: Any, run: Any) -> dict[str, float]:
    """Counts from the seed."""
    before = _leave_a_trace(params.folder, "numbers")
    values = list(range(run.seed, run.seed + params.count))
    outputs["numbers"].write_table(pa.table({"n": pa.array(values, pa.int64())}))
    run.note(f"execution {before + 1}")
    checkpoint = run.scratch / "checkpoint"
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with run.progress(params.rounds or 1, "counting") as bar:
        bar.advance(start)
        for done in range(start, params.rounds):
            time.sleep(0.1)
            checkpoint.write_text(str(done + 1))
            run.log({"round": done + 1.0}, done + 1)
            bar.advance()
    if params.trouble == "talks":
        while True:
            run.log({"word": 1.0}, 1)
    _go_wrong(params.trouble, before)
    outputs["facts"].write_json({"count": params.count})
    return {"rows": params.count, "started_at_round": start}


def _go_wrong(trouble: Trouble, before: int) -> None:
    if trouble == "contract":
        raise DataContractError("column 'a' is missing", where="f.parquet", remedy="add it")
    if trouble == "bug":
        raise ZeroDivisionError("division by zero")
    if trouble == "interrupt":
        raise KeyboardInterrupt
    if trouble == "exits":
        os._exit(7)
    if trouble == "killed" or (trouble == "killed once" and not before):
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "hangs":
        time.sleep(600)
    if trouble == "hangs in C":
        # With the interpreter's lock held, as a loop in native code holds it: no Python runs.
        ctypes.PyDLL(None).sleep(600)


def doubled(params: DoubledParams, inputs: Any, outputs: Any, run: Any) -> dict[str, float]:
    """Multiplies."""
    _leave_a_trace(params.folder, "doubled")
    values = [n * params.factor for n in inputs["numbers"].read_table()["n"].to_pylist()]
    outputs["doubled"].write_table(pa.table({"d": pa.array(values, pa.float64())}))
    return {"largest": max(values)}


def total(params: TotalParams, inputs: Any, outputs: Any, run: Any) -> dict[str, float]:
    """Adds up."""
    _leave_a_trace(params.folder, "total")
    value = sum(inputs["doubled"].read_table()["d"].to_pylist())
    outputs["total"].write_json({params.label: value})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, value])
    run.figure("a line", figure)
    return {"total": value}


def register() -> None:
    """Put the stages into the registry."""
    stage(outputs=("numbers", "facts"), params=NumbersParams)(numbers)
    stage(inputs=("numbers",), outputs=("doubled",), params=DoubledParams)(doubled)
    stage(inputs=("doubled",), outputs=("total",), params=TotalParams)(total)


@contextmanager
def only_these_stages() -> Iterator[list[Stage]]:
    """The registry holds these stages and no others while the block runs."""
    real, find = dict(REGISTRY), stage_module.stage_modules
    REGISTRY.clear()
    stage_module.stage_modules = lambda: []
    register()
    try:
        yield [REGISTRY[name] for name in FLOW.stages]
    finally:
        stage_module.stage_modules = find
        REGISTRY.clear()
        REGISTRY.update(real)


def runner(settings: Settings, folder: Path, *overrides: str) -> Runner:
    """A runner whose stages leave a trace of each execution in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "params.yaml"
    file.write_text("")
    traces = [f"{name}.folder={folder}" for name in FLOW.stages]
    parameters = params_module.load_params(REGISTRY, file=file, overrides=(*traces, *overrides))
    return Runner(settings, open_store(settings), parameters)


def executions(folder: Path) -> list[str]:
    """Names of the stages that executed, in order."""
    return [file.name.split("-")[2] for file in sorted(folder.iterdir())]


# The process that forks for stages has no others; that of a test chooses.
if Path(sys.argv[0]).stem == "stage_process":
    register()
