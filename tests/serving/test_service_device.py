"""Claims about `reelflow serve --gpu`: who is refused, and where the model computes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from command_line import REELFLOW, ROOT, environment
from service_world import settings_of, version_files

from components.pipeline import machine
from components.pipeline.errors import HardwareError
from components.serving.engine import Deployed, Engine
from components.serving.schema import NewItem
from components.serving.service import ServeOptions, serve


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return version_files(tmp_path_factory.mktemp("device"))


def engine_on(device: str, artifacts: Path, folder: Path) -> Engine:
    end = folder / "ending"
    told = Deployed("m", "1", str(artifacts), str(folder), str(end), 8, 1, device=device)
    engine = Engine(told)
    assert engine.settled.wait(60)
    return engine


@pytest.mark.parametrize(
    ("visible", "replicas", "message"),
    [
        ("", 1, "--gpu: 1 replica takes 1 GPU, this machine has none\n  remedy: leave it out"),
        ("0", 2, "--gpu: 2 replicas take 2 GPUs, this machine has (none|1)\n"),
    ],
)
def test_fewer_gpus_than_replicas_are_refused_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    replicas: int,
    message: str,
) -> None:
    """Also where a machine has some: CUDA_VISIBLE_DEVICES hides them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.visible_gpus() < replicas
    with pytest.raises(HardwareError, match=message):
        serve(settings_of(tmp_path), ServeOptions(port=0, replicas=replicas, gpu=True))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_asks_for_gpus(tmp_path: Path) -> None:
    asked = subprocess.run(
        [*REELFLOW, "serve", "--port", "0", "--gpu"],
        env=environment(tmp_path) | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert asked.returncode == HardwareError.exit_code
    assert "--gpu: 1 replica takes 1 GPU, this machine has none" in asked.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_replica_whose_torch_finds_no_gpu_says_so(artifacts: Path, tmp_path: Path) -> None:
    engine = engine_on("cuda", artifacts, tmp_path)
    assert engine.state == "failed"
    assert f"--gpu: torch {torch.__version__} finds no GPU here" in engine.problem


def test_model_and_trie_lie_on_the_device_also_after_a_change(
    artifacts: Path, tmp_path: Path
) -> None:
    """On ``meta``, the device that computes nothing: only its first answer fails."""
    catalogue = engine_on("meta", artifacts, tmp_path)._catalogue
    for _ in range(2):
        found = catalogue.now.served.recommender
        # Buffers that no checkpoint has, too: what the model remembers of items.
        tensors = [*found.model.parameters(), *found.model.buffers()]
        for part in vars(found.trie).values():
            several = part if isinstance(part, tuple) else (part,)
            tensors += [x for x in several if isinstance(x, torch.Tensor)]
        assert len(tensors) > 30
        assert {x.device.type for x in tensors} == {"meta"}
        catalogue.add([NewItem(item_id=7, semantic_id=[1, 1, 1])])
