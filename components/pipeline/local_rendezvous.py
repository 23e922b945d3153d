"""How training workers of one machine find each other: by a file, not over the network.

Ray lets PyTorch open a server for it, and PyTorch asks the name server of the network who
``127.0.0.1`` is. Workers of one machine need neither.
"""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend


class _FileBackend(_TorchBackend):
    """PyTorch's process group over a new file for each set of workers, also after one died."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        file = str(Path(backend_config.folder) / f"meeting-{uuid.uuid4().hex}")
        size = len(worker_group)
        common = ("nccl" if gpus else "gloo", file, size, backend_config.timeout_s)
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [worker_group.execute_single_async(rank, _join, rank, *common) for rank in range(size)]
        )


def _join(rank: int, backend: str, file: str, size: int, timeout_s: float) -> None:
    store = dist.FileStore(file, size)  # type: ignore[attr-defined]
    timeout = dt.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


@dataclass
class FileRendezvous(TorchConfig):
    """``TorchConfig`` for workers that share this machine.

    Attributes:
        folder: where the file is made; PyTorch removes it with the last worker that ends well.
    """

    folder: str = ""

    @property
    def backend_cls(self) -> type[_FileBackend]:
        return _FileBackend
