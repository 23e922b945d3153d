"""GPUs that stages take are asked for before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from published import settings_in

from components.pipeline import machine
from components.pipeline.errors import HardwareError
from components.pipeline.hardware import require_gpus
from components.pipeline.params import load_params
from components.pipeline.stage import load_registry


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two devices, whatever this one has."""
    monkeypatch.setattr(machine, "gpus", lambda: ["NVIDIA H200", "NVIDIA H200"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("shown", "count"),
    [(None, 2), ("0", 1), ("0, 1", 2), ("", 0), ("-1", 0), ("MIG-a,MIG-b,MIG-c", 3)],
)
def test_devices_hidden_from_cuda_do_not_count(
    shown: str | None, count: int, devices: pytest.MonkeyPatch
) -> None:
    if shown is not None:
        devices.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert machine.visible_gpus() == count


def test_a_list_of_devices_makes_none(devices: pytest.MonkeyPatch) -> None:
    devices.setattr(machine, "gpus", list)
    devices.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert machine.visible_gpus() == 0


@pytest.mark.parametrize(("workers", "enough"), [(1, True), (2, True), (3, False)])
def test_every_worker_takes_a_gpu_of_its_own(
    workers: int, enough: bool, tmp_path: Path, devices: pytest.MonkeyPatch
) -> None:
    registry = load_registry()
    overrides = ["train_recommender.gpu=true", f"train_recommender.workers={workers}"]
    params = load_params(registry, overrides=overrides)
    asked = [registry["split"], registry["train_recommender"]], params, settings_in(tmp_path)
    if enough:
        require_gpus(*asked)
        return
    with pytest.raises(HardwareError, match="takes 3 GPUs, this machine has 2") as raised:
        require_gpus(*asked)
    assert raised.value.where == "stage 'train_recommender'"
    assert raised.value.exit_code == 2


def test_stages_that_do_not_run_and_runs_without_gpus_ask_for_none(
    tmp_path: Path, devices: pytest.MonkeyPatch
) -> None:
    devices.setattr(machine, "gpus", list)
    registry = load_registry()
    with_gpu = load_params(registry, overrides=["train_recommender.gpu=true"])
    require_gpus([registry["split"]], with_gpu, settings_in(tmp_path))
    require_gpus(registry.values(), load_params(registry), settings_in(tmp_path))


def test_a_cluster_is_not_judged_by_the_machine_that_sends_it_work(
    tmp_path: Path, devices: pytest.MonkeyPatch
) -> None:
    devices.setattr(machine, "gpus", list)
    registry = load_registry()
    params = load_params(registry, overrides=["train_recommender.gpu=true"])
    settings = dataclasses.replace(settings_in(tmp_path), ray_address="ray://head:10001")
    require_gpus(registry.values(), params, settings)
