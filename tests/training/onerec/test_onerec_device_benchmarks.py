"""The benchmarks of speed and memory run, count and compare as they say, at a size of seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import onerec_kernels, onerec_memory, onerec_mfu
from benchmarks.synthetic_onerec import catalogue, full_batch
from components.training.onerec.flops import sample_flops
from components.training.onerec.named_configs import plain_config

ROOT = Path(__file__).parents[3]

#: What a bare machine with a GPU lacks.
BARE = """
import importlib, runpy, sys

ABSENT = {"pydantic", "prefect", "ray", "mlflow", "dvc", "rich", "psutil", "yaml", "boto3",
          "scipy", "sklearn", "pandas", "safetensors", "transformers", "matplotlib", "click"}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv = ["onerec_mfu", "--quick"]
"""

#: Of the method, what only the platform needs: parameters and stages.
PLATFORM = {"config", "stage", "align_stage"}


def on_a_bare_machine(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", BARE + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_file_of_the_method_is_read_without_the_platform() -> None:
    files = (ROOT / "components" / "training" / "onerec").rglob("*.py")
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted(files)
        if file.stem not in PLATFORM
    ]
    assert len(names) > 40
    on_a_bare_machine(f"for name in {names}: importlib.import_module(name)")


def test_the_ladder_runs_where_there_is_torch_numpy_and_pyarrow_alone() -> None:
    done = on_a_bare_machine(
        'runpy.run_module("benchmarks.onerec_mfu", run_name="__main__")',
        REELFLOW_PEAK_FLOPS="1e12",
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    names = [result["name"] for result in results]
    assert names[0] == "training_plain_per_second"
    assert "training_shared_context_mfu" in names
    assert "inference_bf16_weights_mfu" in names
    assert "inference_1_at_once_mfu" in names
    by_name = {result["name"]: result for result in results}
    for result in results:
        assert 0 < result["low"] <= result["ours"] <= result["high"]
    # Utilisation is FLOP/s over the peak that was said.
    flops = by_name["training_plain_teraflops"]["ours"]
    assert by_name["training_plain_mfu"]["ours"] == pytest.approx(flops)
    # FLOP/s are those counted for a sample; samples of one request pay for its context once.
    config = plain_config(onerec_mfu.size_for("cpu", quick=True).config)
    counted = sample_flops(onerec_mfu.new_model(config, "cpu"))
    grouped = counted.context / onerec_mfu.SAMPLES_A_REQUEST + counted.target
    for rung, each in (("plain", counted.forward), ("shared_context", grouped)):
        rate = by_name[f"training_{rung}_per_second"]["ours"]
        assert by_name[f"training_{rung}_teraflops"]["ours"] == pytest.approx(3e-12 * each * rate)


def test_no_peak_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(onerec_mfu.PEAK_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert onerec_mfu.device_peak() == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Unheard-of 9000")
    assert onerec_mfu.device_peak() is None
    monkeypatch.setenv(onerec_mfu.PEAK_VARIABLE, "5e12")
    assert onerec_mfu.device_peak() == 5e12


def test_every_rung_changes_one_thing() -> None:
    size = onerec_mfu.size_for("cuda", quick=False)
    for part in ("training", "inference"):
        ladder = onerec_mfu.rungs(size, part)
        for below, above in pairwise(ladder):
            before, after = vars(below), vars(above)
            assert sum(before[k] != after[k] for k in before if k != "name") == 1


def test_kernels_are_compared_with_what_they_replace() -> None:
    few, many, experts = onerec_kernels.run(quick=True)
    assert (few.name, many.name) == (
        "latency_2_beams_shared_keys",
        "latency_16_beams_shared_keys",
    )
    for result in (few, many, experts):
        assert result.reference is not None
        assert 0 < result.low <= result.ours <= result.high


def test_two_ways_that_differ_are_not_timed() -> None:
    with pytest.raises(AssertionError, match="differ by 1"):
        onerec_kernels.check_same(torch.zeros(3), torch.ones(3), 0.1)
    with pytest.raises(AssertionError, match="differ by nan"):
        onerec_kernels.check_same(torch.zeros(3), torch.full((3,), torch.nan), 0.1)


def test_synthetic_requests_fill_every_pathway() -> None:
    config = plain_config(onerec_mfu.size_for("cpu", quick=True).config)
    codes = catalogue(50, config.codebook_size)
    batch = full_batch(config, codes, 3)
    assert not batch.is_padded
    assert all(events.mask_BL.all() for events in batch.pathways.values())
    assert onerec_mfu.new_model(config, "cpu").encode(batch)[0].shape[1] == 1 + 20 + 16 + 4


def test_memory_is_measured_beside_what_grows() -> None:
    # In processes of their own: here, earlier tests leave memory that is taken again.
    ours, grown = (onerec_memory.measure_apart(60_000, arm, quick=True) for arm in ("sid", "vid"))
    # A gradient and two moments of 64 floats an item.
    more = grown["training_adds"] - ours["training_adds"]
    assert more > 0.8 * 60_000 * 64 * 4 * 3 / onerec_memory.MEBIBYTE
    assert 20 < ours["bytes_an_item"] < 40
    assert set(ours) == set(grown) == set(onerec_memory.UNITS)
    for part in ("training", "serving"):
        assert ours[f"{part}_peak"] > ours[f"{part}_adds"] >= 0


def test_a_catalogue_that_cannot_be_measured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onerec_memory.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="40 items, sid"):
        onerec_memory.measure_apart(40, "sid", quick=True)
