"""The proxy-ranking benchmark: its variants of the data, its methods and its figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from benchmarks.proxy_methods import METHODS, Reference, Setting
from benchmarks.proxy_ranking import (
    FULL,
    OURS,
    QUICK,
    SEEDS,
    TRUTH_SEEDS,
    Job,
    Trained,
    agreement,
    difference,
    figures,
    jobs,
    tau_b,
    train_job,
)
from benchmarks.proxy_trials import (
    VARIANTS,
    Images,
    Task,
    Trial,
    accuracy,
    candidates,
    load_task,
    new_model,
    shifted,
)
from components.curation.asp.sampler import Sampler


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(1_000, 400, 100, None)


def variant(task: Task, name: str) -> Task:
    return VARIANTS[name](task, np.random.default_rng(0))


def test_parts_of_a_task_share_no_image(task: Task) -> None:
    parts = (task.train, task.valid, task.held_out)
    assert [len(part) for part in parts] == [1_000, 400, 100]
    rows = [{x.numpy().tobytes() for x in part.x_N} for part in parts]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]
    assert float(task.train.x_N.mean()) == pytest.approx(0, abs=1e-4)
    assert float(task.train.x_N.std()) == pytest.approx(1, abs=1e-3)


def test_redundant_images_are_five_of_one(task: Task) -> None:
    train = variant(task, "redundant").train
    assert len(train) == 1_000
    by_copy = train.y_N.view(5, 200)
    assert (by_copy == by_copy[0]).all()
    assert not torch.equal(train.x_N[0], train.x_N[200])
    # A copy is nearer to its original, somewhere moved, than other images of its class are.
    moved = [
        (shifted(train.x_N[:1], d, r) - train.x_N[200:201]).square().mean()
        for d in range(-2, 3)
        for r in range(-2, 3)
    ]
    others = train.x_N[:200][train.y_N[:200] == train.y_N[0]][1:]
    assert min(moved) < (others - train.x_N[:1]).square().mean((1, 2, 3)).min()


def test_classes_of_the_imbalanced_variant_fall_to_a_fiftieth(task: Task) -> None:
    count = torch.bincount(variant(task, "imbalanced").train.y_N)
    assert (count.diff() <= 0).all()
    assert int(count[-1]) == round(int(count[0]) / 50)


def test_a_fifth_of_the_labels_is_wrong_and_images_stay(task: Task) -> None:
    train = variant(task, "mislabelled").train
    assert int((train.y_N != task.train.y_N).sum()) == 200
    assert train.x_N is task.train.x_N
    assert train.y_N.unique().tolist() == [*range(10)]


def test_half_of_the_images_are_near_to_the_mean_of_their_class(task: Task) -> None:
    train = variant(task, "half_easy").train
    changed = (train.x_N != task.train.x_N).flatten(1).any(1)
    assert int(changed.sum()) == 500
    means = torch.stack([task.train.x_N[task.train.y_N == c].mean(0) for c in range(10)])
    own = means[task.train.y_N[changed]]
    expected = own + 0.3 * (task.train.x_N[changed] - own)
    torch.testing.assert_close(train.x_N[changed], expected)


def test_variants_validate_on_the_same_images(task: Task) -> None:
    for name in VARIANTS:
        assert variant(task, name).valid is task.valid


def test_moved_images_come_in_with_zeros() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3) + 1
    assert shifted(x, 1, 0)[0, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert shifted(x, 0, -1)[0, 0].tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    assert torch.equal(shifted(x, 0, 0), x)


def test_accuracy_is_the_mean_of_the_classes(task: Task) -> None:
    model = new_model(task, candidates(1)[0], 0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(10.0))
    y = torch.tensor([9] * 9 + [0])
    assert accuracy(model, Images(task.valid.x_N[:10], y), 10) != 0.9
    assert accuracy(model, Images(task.valid.x_N[:10], y), 10) == pytest.approx(
        np.nanmean([1.0, 0.0, *[np.nan] * 8])
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_on_the_samples_it_says(task: Task, name: str) -> None:
    setting = Setting(task, 0.2, 3, 0)
    rule = METHODS[name](setting)(1)
    subset = rule.select(1)
    whole = name in ("full", "short", "infobatch")
    if name == "infobatch":
        assert 500 <= len(subset.index_S) <= 1_000
    else:
        assert len(subset.index_S) == (1_000 if whole else 200)
    assert rule.schedule.epochs == (1 if name == "short" else 3)
    if subset.weight_S is not None and not whole:
        assert subset.weight_S.mean() == pytest.approx(1, abs=1e-5)


def test_static_choices_are_the_same_for_all_candidates_of_a_search(task: Task) -> None:
    for name in ("static_random", "herding", "grad_match"):
        rule = METHODS[name](Setting(task, 0.1, 2, 3))
        assert np.array_equal(rule(0).select(1).index_S, rule(1).select(2).index_S)
    dynamic = METHODS["dynamic_random"](Setting(task, 0.1, 2, 3))
    assert not np.array_equal(dynamic(0).select(1).index_S, dynamic(1).select(1).index_S)


def test_networks_behind_static_choices_have_seeds_of_their_own(task: Task) -> None:
    reference = Reference(task, 2, 0)
    assert not {reference.seed + n for n in range(10)} & {*SEEDS, *TRUTH_SEEDS}
    assert reference.score("el2n").shape == (1_000,)
    assert np.array_equal(reference.score("el2n"), Reference(task, 2, 0).score("el2n"))
    assert not np.array_equal(reference.score("el2n"), Reference(task, 2, 1).score("el2n"))


def test_a_candidate_gives_the_same_for_the_same_seed_and_leaves_no_trace(task: Task) -> None:
    candidate = {**candidates(1)[0], "dropout": 0.5}
    state = torch.random.get_rng_state()

    def metric(seed: int) -> float:
        rule = METHODS[OURS](Setting(task, 0.5, 3, 0))(0)
        sampler = Sampler(rule, 64)
        return Trial(task, seed)(candidate, sampler, lambda value, samples: None)

    assert metric(1) == metric(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_agreement_of_hand_made_ranks() -> None:
    truth = np.linspace(0.1, 0.8, 8)
    same = agreement(2 * truth, truth)
    assert (same["tau"], same["spearman"]) == (pytest.approx(1), pytest.approx(1))
    assert (same["regret"], same["best_5_found"]) == (0, 5)
    back = agreement(-truth, truth)
    assert back["tau"] == pytest.approx(-1)
    assert back["regret"] == pytest.approx(0.7)
    assert back["top_3_regret"] == pytest.approx(0.5)
    assert back["best_5_found"] == 2
    # One swap of neighbours among 28 pairs, outside the best quarter.
    swapped = truth.copy()
    swapped[[0, 1]] = truth[[1, 0]]
    assert agreement(swapped, truth)["tau"] == pytest.approx(1 - 2 / 28)
    assert agreement(swapped, truth)["tau_of_best_quarter"] == pytest.approx(1)


def test_tau_of_samples_with_repeats_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 30).astype(float), rng.random(30)
    for _ in range(5):
        index = rng.integers(0, 30, 30)
        times = np.bincount(index, minlength=30)[None].astype(float)
        assert tau_b(x, y, times)[0] == pytest.approx(kendalltau(x[index], y[index]).statistic)


def test_the_interval_of_a_difference_holds_nothing_if_runs_are_alike() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(40)

    def runs(noise: float, seed: int) -> list[Trained]:
        lot = np.random.default_rng(seed)
        return [Trained(truth + noise * lot.normal(size=40), 1.0, 0.1) for _ in range(3)]

    alike = difference("x", runs(0.1, 1), runs(0.1, 2), truth)
    assert alike.low < 0 < alike.high
    better = difference("x", runs(0.05, 1), runs(1.0, 2), truth)
    assert better.low > 0.1


def test_figures_of_known_runs() -> None:
    truth = np.linspace(0.4, 0.7, 10)
    found = {Job("plain", FULL, 1.0, seed): Trained(truth, 60.0, 1.0) for seed in TRUTH_SEEDS}
    for seed in SEEDS:
        found[Job("plain", OURS, 0.1, seed)] = Trained(truth**2, 6.0, 0.1)
        found[Job("plain", "short", 0.1, seed)] = Trained(-truth, 5.0, 0.1)
    rows = {row.name: row for row in figures(found)}
    assert rows["plain_asp_r_0.1_tau"].ours == pytest.approx(1)
    assert rows["plain_asp_r_0.1_times_fewer_seconds"].ours == 10
    assert rows["plain_asp_r_minus_short_0.1_tau"].ours == pytest.approx(2)
    assert rows["plain_short_0.1_top_3_regret"].ours == pytest.approx(0.7 - truth[2])
    assert rows["plain_asp_r_0.1_seconds"].n == len(SEEDS)


def test_a_job_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("half_easy", OURS, 0.3, 0)
    first = train_job(tmp_path, QUICK, job, None)
    again = train_job(tmp_path, QUICK, job, None)
    assert capsys.readouterr().out.count("half_easy: asp_r") == 1
    assert np.array_equal(first.metric_K, again.metric_K)
    assert (first.seconds, first.cost) == (again.seconds, again.cost)
    assert first.cost == pytest.approx(0.3)
    assert first.metric_K.shape == (QUICK.candidates,)


def test_arms_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jobs()
    assert {job.method for job in whole} == {*METHODS}
    assert {job.ratio for job in whole if job.method == OURS} == {0.05, 0.1, 0.2, 0.3, 0.5}
    assert len({*whole}) == len(whole)
    monkeypatch.setenv("REELFLOW_BENCH_ARMS", "short")
    assert {job.method for job in jobs()} == {OURS, FULL, "short"}
