"""The architecture benchmark: what it keeps, what it makes of it, and CIFAR-10 for it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.stats import kendalltau

from benchmarks import cifar10, nas_runs, nas_table
from benchmarks.nas_runs import ASP_R, EVEN, FULL, SHORT, Job, Journal, jobs_of, place_in, rule_of
from benchmarks.nas_table import CIFAR, DIGITS, TABLE, tau, tau_difference
from components.curation.asp.nas_table import ArchitectureTable
from components.curation.asp.schedule import Schedule
from components.pipeline.errors import UsageError


def test_a_quick_run_makes_a_table_and_a_second_one_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REELFLOW_BENCH_HOME", str(tmp_path))
    first = nas_table.run(quick=True)
    found = {result.name: result for result in first}
    assert found["architectures"].ours == found["topologies"].ours == 5
    assert found["asp_r_0.5_seconds"].ours > 0
    assert -1 <= found["asp_r_0.5_kendall"].ours <= 1
    assert found["dynamic_random_0.5_kendall"].reference == found["full_kendall"].ours
    for rule in (ASP_R, EVEN, SHORT):
        regrets = [found[f"{rule}_0.5_regret_top_{k}"].ours for k in (1, 3)]
        assert regrets[0] >= regrets[1] >= 0
    (folder,) = tmp_path.iterdir()
    table = ArchitectureTable.read(folder / TABLE, complete=False)
    assert (len(table.architectures), table.seeds) == (5, (0, 1))
    # Where nothing passes, one class is all that is ever said.
    assert table.mean()[0] < 15 < table.mean().max()
    monkeypatch.setattr(nas_runs, "train", lambda place, job: pytest.fail("trained again"))
    assert nas_table.run(quick=True) == first


def test_what_was_trained_is_kept_by_line_and_a_cut_line_is_not(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    journal = Journal(file)
    journal.add("a", {"x": 1.5})
    journal.add("b", {"x": 2})
    file.write_text(file.read_text() + '["c", {"x"')
    journal = Journal(file)
    assert journal.known == {"a": {"x": 1.5}, "b": {"x": 2}}
    journal.add("c", {"x": 3})
    assert [json.loads(line)[0] for line in file.read_text().splitlines()] == ["a", "b", "c"]
    file.write_text("cut")
    assert Journal(file).known == {}


def test_every_cell_is_trained_by_every_arm_with_seeds_of_its_own() -> None:
    jobs = list(jobs_of(CIFAR))
    assert len(jobs) == len({job.key for job in jobs}) == 125 * (3 + 3 * 2 * 3)
    assert {job.rule for job in jobs[: 3 * 125]} == {FULL}
    of_table = {job.seed for job in jobs if job.rule == FULL}
    assert not of_table & {job.seed for job in jobs if job.rule != FULL}


def test_another_size_is_another_place(tmp_path: Path) -> None:
    here = place_in(tmp_path, None, DIGITS)
    assert place_in(tmp_path, None, DIGITS) == here
    assert place_in(tmp_path, None, replace(DIGITS, train=100)).folder != here.folder


@pytest.mark.parametrize("ratio", CIFAR.ratios)
def test_all_rules_cost_as_much_as_each_other(ratio: float) -> None:
    def cost(name: str) -> tuple[int, int]:
        schedule: Schedule = rule_of(name, ratio, 0, CIFAR).schedule
        return int(schedule.count_T.sum()), schedule.epochs

    samples = round(ratio * 80_000)
    assert cost(ASP_R) == cost(EVEN) == (samples, 10)
    assert cost(SHORT) == (samples, round(10 * ratio))


def test_a_missing_data_set_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REELFLOW_SHARED_DATA", str(tmp_path))
    with pytest.raises(UsageError, match="'cifar10' is not at hand"):
        nas_table.run()


def test_a_resample_weighs_pairs_as_if_its_architectures_stood_there_as_often() -> None:
    rng = np.random.default_rng(0)
    score_A, truth_A = rng.integers(0, 6, (2, 12)).astype(float)
    weight_RA = rng.multinomial(12, np.full(12, 1 / 12), 20)
    found_R = tau(score_A, truth_A, weight_RA)
    for weight_A, found in zip(weight_RA, found_R, strict=True):
        there = np.repeat(np.arange(12), weight_A)
        assert found == pytest.approx(kendalltau(score_A[there], truth_A[there]).statistic)
    assert np.isnan(tau(np.ones(12), truth_A, weight_RA)).all()


def test_intervals_of_differences_are_paired_and_know_of_topologies() -> None:
    rng = np.random.default_rng(1)
    truth_A = rng.normal(size=60)
    own_A = np.arange(60)
    good = [truth_A + 0.2 * rng.normal(size=60) for _ in range(3)]
    bad = [truth_A + 2.0 * rng.normal(size=60) for _ in range(3)]
    gap, low, high = tau_difference(good, bad, truth_A, own_A)
    assert 0 < low < gap < high
    assert tau_difference(good, good, truth_A, own_A) == (0, 0, 0)
    # Each architecture four times is no more evidence than once.
    four = [np.tile(x, 4) for x in good], [np.tile(x, 4) for x in bad], np.tile(truth_A, 4)
    _, wide_low, wide_high = tau_difference(*four, np.tile(own_A, 4))
    _, narrow_low, narrow_high = tau_difference(*four, np.arange(240))
    assert wide_high - wide_low == pytest.approx(high - low, rel=0.1)
    assert narrow_high - narrow_low < 0.7 * (wide_high - wide_low)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Two row groups of two images: pixels of one colour each, and halves of two colours."""

    def encoded(pixels_HWC: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels_HWC.astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    images = [np.full((32, 32, 3), [10 * i, 20 * i, 30 * i]) for i in range(4)]
    images[3][:, ::2] = 200
    images[3][:, 1::2] = 100
    rows = {
        "image_id": [f"cat/{i}" for i in range(4)],
        "label": pa.array([3, 1, 2, 0], pa.int8()),
        "image": [encoded(image) for image in images],
    }
    pq.write_table(pa.table(rows), tmp_path / cifar10.FILE, row_group_size=2)
    return tmp_path


def test_images_of_row_groups_are_read_in_the_order_asked_for(cifar: Path) -> None:
    found = cifar10.read_images(cifar, [1, 0], 16)
    assert found.id_N == ("cat/2", "cat/3", "cat/0", "cat/1")
    assert found.label_N.tolist() == [2, 0, 3, 1]
    assert (found.pixel_NCHW.dtype, found.pixel_NCHW.shape) == (torch.uint8, (4, 3, 16, 16))
    assert found.pixel_NCHW[0, :, 3, 5].tolist() == [20, 40, 60]
    # Columns of 200 and of 100 in turn: the mean over areas is 150 everywhere.
    assert (found.pixel_NCHW[1] == 150).all()
    some = cifar10.read_images(cifar, [0, 1], 32, np.array([3, 0]))
    assert some.id_N == ("cat/3", "cat/0")
    assert some.pixel_NCHW[0, 0, 0, :2].tolist() == [200, 100]
    assert some.part(1, 2).id_N == ("cat/0",)


def test_colours_are_standardised_by_the_training_images(cifar: Path) -> None:
    images = cifar10.read_images(cifar, [0, 1], 8)
    own_NCHW = images.standardised(images)
    torch.testing.assert_close(own_NCHW.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(own_NCHW.std((0, 2, 3)), torch.ones(3))
    first = images.part(0, 1)
    assert torch.equal(first.standardised(images), own_NCHW[:1])


def test_which_images_are_taken_depends_on_their_names_alone(cifar: Path) -> None:
    ids = cifar10.image_ids(cifar, [0, 1])
    assert ids == [f"cat/{i}" for i in range(4)]
    names = [f"dog/{i}" for i in range(500)]
    taken = [names[i] for i in cifar10.by_hash(names, 100)]
    assert taken == [names[::-1][i] for i in cifar10.by_hash(names[::-1], 100)]
    assert taken[:10] == [names[i] for i in cifar10.by_hash(names, 10)]
    assert len({*taken}) == 100
    assert taken != sorted(taken)


def test_cifar_10_is_split_into_images_that_do_not_meet(shared_data: Path) -> None:
    folder = shared_data / "cifar10"
    seen = cifar10.image_ids(folder, cifar10.TRAIN_GROUPS)
    test = cifar10.image_ids(folder, cifar10.TEST_GROUPS)
    assert (len(seen), len(test)) == (45_000, 5_000)
    assert not {*seen} & {*test}
    rows = cifar10.by_hash(seen, CIFAR.train + CIFAR.valid)
    assert len({*rows.tolist()}) == 11_000
    some = cifar10.read_images(folder, cifar10.TRAIN_GROUPS, 16, rows[:500])
    assert some.id_N == tuple(seen[row] for row in rows[:500])
    assert sorted(set(some.label_N.tolist())) == list(range(10))
    assert 100 < some.pixel_NCHW.float().mean() < 140


def test_a_job_says_all_that_tells_it_from_others() -> None:
    job = Job(EVEN, 0.1, 100, "|none~0|")
    assert job.key == "dynamic_random 0.1 100 |none~0|"
