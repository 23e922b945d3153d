"""GPUs and cores that stages take are asked for before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from published import settings_in

from components.pipeline import hardware, machine
from components.pipeline.errors import HardwareError
from components.pipeline.hardware import require_hardware
from components.pipeline.params import load_params
from components.pipeline.stage import load_registry


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two devices and two cores, whatever this one has."""
    monkeypatch.setattr(machine, "gpus", lambda: ["NVIDIA H200", "NVIDIA H200"])
    monkeypatch.setattr(hardware, "cores", lambda: 2)
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


@pytest.mark.parametrize(("workers", "enough"), [(1, True), (2, True), (4, False)])
def test_every_worker_takes_a_gpu_of_its_own(
    workers: int, enough: bool, tmp_path: Path, devices: pytest.MonkeyPatch
) -> None:
    registry = load_registry()
    overrides = ["train_recommender.gpu=true", f"train_recommender.workers={workers}"]
    params = load_params(registry, overrides=overrides)
    asked = [registry["split"], registry["train_recommender"]], params, settings_in(tmp_path)
    if enough:
        require_hardware(*asked)
        return
    with pytest.raises(HardwareError, match="takes 4 GPUs, this machine has 2") as raised:
        require_hardware(*asked)
    assert raised.value.where == "stage 'train_recommender'"
    assert raised.value.exit_code == 2


def test_stages_that_do_not_run_and_runs_without_gpus_ask_for_none(
    tmp_path: Path, devices: pytest.MonkeyPatch
) -> None:
    devices.setattr(machine, "gpus", list)
    registry = load_registry()
    with_gpu = load_params(registry, overrides=["train_recommender.gpu=true"])
    require_hardware([registry["split"]], with_gpu, settings_in(tmp_path))
    require_hardware(registry.values(), load_params(registry), settings_in(tmp_path))


def test_a_cluster_is_not_judged_by_the_machine_that_sends_it_work(
    tmp_path: Path, devices: pytest.MonkeyPatch
) -> None:
    devices.setattr(machine, "gpus", list)
    registry = load_registry()
    params = load_params(registry, overrides=["train_recommender.gpu=true"])
    settings = dataclasses.replace(settings_in(tmp_path), ray_address="ray://head:10001")
    require_hardware(registry.values(), params, settings)


@pytest.mark.parametrize(("cores", "workers", "enough"), [(1, 2, True), (1, 4, False), (2, 4, True),
                                                          (2, 128, False)])  # fmt: skip
def test_a_local_ray_is_not_given_many_more_workers_than_cores(
    cores: int, workers: int, enough: bool, tmp_path: Path, devices: pytest.MonkeyPatch
) -> None:
    devices.setattr(hardware, "cores", lambda: cores)
    registry = load_registry()
    params = load_params(registry, overrides=[f"train_recommender.workers={workers}"])
    if enough:
        require_hardware(registry.values(), params, settings_in(tmp_path))
        return
    with pytest.raises(HardwareError, match=f"{workers} workers would share") as raised:
        require_hardware(registry.values(), params, settings_in(tmp_path))
    assert raised.value.where == "train_recommender.workers"
    assert "RAY_ADDRESS" in str(raised.value)
    there = dataclasses.replace(settings_in(tmp_path), ray_address="ray://head:10001")
    require_hardware(registry.values(), params, there)
