"""A training loop of a few steps for Ray workers, with ways to die; importable by the workers."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

from components.pipeline.cluster import WorkerContext
from components.pipeline.errors import DataContractError

CHECKPOINT_EVERY = 5


def loop(config: dict[str, Any], worker: WorkerContext) -> None:
    """Data-parallel regression: what a step does is a function of weights, momentum and step.

    Config keys: `steps`; `log_to` a file that gets one line a step done by rank 0; `kill_rank`,
    `kill_at`, `marker`: that rank kills itself once at that step; `step_s` seconds a step takes;
    `fail` an error to raise at step 1: `contract` or `bug`.
    """
    torch.manual_seed(0)
    model = worker.prepare(torch.nn.Linear(4, 2))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    start = 0
    if worker.restored is not None:
        state = load_file(worker.restored / "state.safetensors")
        start = int(state.pop("step"))
        for parameter, name in zip(model.parameters(), ("weight", "bias"), strict=True):
            parameter.data.copy_(state[name])
            optimiser.state[parameter]["momentum_buffer"] = state[f"momentum.{name}"]
    for step in range(start + 1, config["steps"] + 1):
        if config.get("kill_rank") == worker.rank and step == config["kill_at"]:
            die_once(Path(config["marker"]))
        if step == 1:
            fail(config.get("fail"), worker.rank)
        time.sleep(config.get("step_s", 0))
        random = torch.Generator().manual_seed(step * worker.world_size + worker.rank)
        x_BD = torch.randn(8, 4, generator=random)
        loss = mse_loss(model(x_BD), x_BD[:, :2])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        worker.log({"loss": float(loss)}, step)
        if worker.rank == 0:
            with Path(config["log_to"]).open("a") as file:
                file.write(f"{step}\n")
        if step % CHECKPOINT_EVERY == 0:

            def save(folder: Path, done: int = step) -> None:
                tensors = {"step": torch.tensor(done)}
                for parameter, name in zip(model.parameters(), ("weight", "bias"), strict=True):
                    tensors[name] = parameter.detach()
                    momentum = optimiser.state[parameter]["momentum_buffer"]
                    tensors[f"momentum.{name}"] = momentum
                save_file(tensors, folder / "state.safetensors")

            worker.checkpoint({"loss": float(loss)}, save)


def die_once(marker: Path) -> None:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def fail(kind: str | None, rank: int) -> None:
    if kind == "contract" and rank == 1:
        raise DataContractError("column 'x' is missing", where="t.parquet", remedy="add it")
    if kind == "bug" and rank == 1:
        raise ZeroDivisionError("the learning rate is zero")


class Doubler:
    """An actor that holds a model: multiplies column `n`."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        values = [n * self.factor for n in table["n"].to_pylist()]
        return pa.table({"n": table["n"], "product": pa.array(values, pa.int64())})


class Hesitant(Doubler):
    """Takes its time, another each time."""

    def __call__(self, table: Any) -> Any:
        import random
        import time

        time.sleep(0.02 * random.random())
        return super().__call__(table)


class Broken:
    """An actor whose code is wrong."""

    def __call__(self, table: Any) -> Any:
        raise ValueError("the model expects 3 channels")


class Counter:
    """An actor whose jobs count on from where they are; one of them kills itself on the way."""

    def __init__(self, step: int, marker: str) -> None:
        self._step, self._marker = step, Path(marker)

    def __call__(self, count: int, end: int, fate: str) -> Iterator[tuple[int, int]]:
        while count < end:
            count += self._step
            if fate == "dies always" or (fate == "dies once" and count == end - 1):
                time.sleep(0.2)
                if fate == "dies always":
                    os.kill(os.getpid(), signal.SIGKILL)
                die_once(self._marker)
            if fate == "contract":
                raise DataContractError("column 'x' is missing", where="t.parquet", remedy="add it")
            if fate == "bug":
                raise ZeroDivisionError("the step is zero")
            yield count, os.getpid()


def main() -> None:
    """A driver: `python tiny_training.py STORAGE CONFIG-JSON`; prints the last checkpoint."""
    import sys

    from tiny_training import loop as importable_loop

    from components.pipeline.checkpoints import LocalCheckpoints
    from components.pipeline.cluster import train_on_ray

    config = json.loads(sys.argv[2])
    last = train_on_ray(
        importable_loop,
        config,
        num_workers=2,
        storage=LocalCheckpoints(Path(sys.argv[1])),
        name="work",
        log=lambda metrics, step: None,
    )
    print(last)


if __name__ == "__main__":
    main()
