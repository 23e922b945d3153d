"""Claims about static subsets, against brute force and other implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import nnls

from components.curation.asp import coresets
from components.curation.asp.draw import Strata
from components.pipeline.errors import StageError


def points(seed: int, size: int = 12, width: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, width))


def distances(x_ND: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x_ND[:, None] - x_ND[None], axis=-1)


@pytest.mark.parametrize("seed", range(5))
def test_k_center_leaves_at_most_twice_the_least_distance(seed: int) -> None:
    away_NN = distances(points(seed))

    def radius(chosen: tuple[int, ...]) -> float:
        return float(away_NN[:, list(chosen)].min(1).max())

    least = min(radius(c) for c in itertools.combinations(range(12), 3))
    found = coresets.k_center(points(seed), 3)
    assert len(found) == 3
    assert radius(tuple(found)) <= 2 * least + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_craig_is_a_greedy_optimum_of_facility_location(seed: int) -> None:
    away_NN = distances(points(seed))
    near_NN = away_NN.max() - away_NN

    def value(chosen: tuple[int, ...]) -> float:
        return float(near_NN[:, list(chosen)].max(1).sum())

    best = max(value(c) for c in itertools.combinations(range(12), 4))
    index_k, weight_k = coresets.craig(points(seed), 4)
    assert value(tuple(index_k)) >= (1 - 1 / math.e) * best
    greedy: list[int] = []
    for _ in range(4):
        left = [n for n in range(12) if n not in greedy]
        greedy.append(max(left, key=lambda n: value((*greedy, n))))
    # Two samples may gain the same.
    assert value(tuple(index_k)) == pytest.approx(value(tuple(greedy)))
    nearest_N = near_NN[:, index_k].argmax(1)
    assert weight_k.tolist() == np.bincount(nearest_N, minlength=4).tolist()


def test_craig_says_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coresets, "PAIR_BYTES", 4 * 100)
    coresets.craig(points(0, size=10), 2)
    with pytest.raises(StageError, match="similarities of 11 samples") as refused:
        coresets.craig(points(0, size=11), 2)
    assert "of 10 at most" in str(refused.value)


def test_herding_has_the_mean_of_all() -> None:
    x_ND = points(3, size=300, width=8)
    found = coresets.herding(x_ND, 30)
    assert len(set(found)) == 30
    off = np.linalg.norm(x_ND[found].mean(0) - x_ND.mean(0))
    rng = np.random.default_rng(0)
    by_chance = [x_ND[rng.choice(300, 30, replace=False)].mean(0) - x_ND.mean(0) for _ in range(99)]
    assert off < 0.25 * min(np.linalg.norm(by_chance, axis=1))
    # The first is the one nearest to the mean.
    (first,) = coresets.herding(x_ND, 1)
    assert first == np.linalg.norm(x_ND - x_ND.mean(0), axis=1).argmin()


def test_grad_match_is_least_squares_with_weights_that_are_not_negative() -> None:
    x_ND = points(0, size=10, width=4)
    whole_D = x_ND.sum(0)
    index_k, weight_k = coresets.grad_match(x_ND, 10, ridge=1e-9)
    _, residual = nnls(x_ND.T, whole_D)
    assert residual == pytest.approx(0, abs=1e-8)
    assert np.linalg.norm(weight_k @ x_ND[index_k] - whole_D) < 1e-4
    assert (weight_k >= 0).all()
    # With a ridge it is the solution of the sum of both squares.
    index_k, weight_k = coresets.grad_match(x_ND, 3, ridge=0.5)
    part_kD = x_ND[index_k]

    def loss(w_k: np.ndarray) -> float:
        return float(np.square(w_k @ part_kD - whole_D).sum() + 0.5 * np.square(w_k).sum())

    steps = np.random.default_rng(0).normal(scale=0.05, size=(2_000, 3))
    assert all(loss(weight_k) <= loss(np.maximum(weight_k + s, 0)) + 1e-9 for s in steps)


def test_grad_match_takes_first_what_points_most_along_the_whole() -> None:
    x_ND = points(1, size=40, width=6)
    (first,), _ = coresets.grad_match(x_ND, 1)
    assert first == (x_ND @ x_ND.sum(0)).argmax()
    off = []
    for k in (2, 5, 10, 20):
        index_k, weight_k = coresets.grad_match(x_ND, k, ridge=1e-6)
        off.append(np.linalg.norm(weight_k @ x_ND[index_k] - x_ND.sum(0)))
    assert off[-1] < 0.05 * off[0]


def softmax_loss(x_VD: np.ndarray, y_V: np.ndarray, w_CD: np.ndarray, b_C: np.ndarray) -> float:
    logit_VC = x_VD @ w_CD.T + b_C
    own_V = logit_VC[np.arange(len(y_V)), y_V]
    return float((np.log(np.exp(logit_VC).sum(1)) - own_V).mean())


def test_glister_takes_what_lowers_the_validation_loss() -> None:
    rng = np.random.default_rng(0)
    true_CD = rng.normal(size=(3, 5))
    x_ND, valid_VD = rng.normal(size=(400, 5)), rng.normal(size=(100, 5))
    y_N, y_V = (x_ND @ true_CD.T).argmax(1), (valid_VD @ true_CD.T).argmax(1)
    wrong_N = rng.random(400) < 0.3
    y_N = np.where(wrong_N, (y_N + 1) % 3, y_N)
    w_CD, b_C = np.zeros((3, 5)), np.zeros(3)
    found = coresets.glister(x_ND, y_N, valid_VD, y_V, w_CD, b_C, 60)
    assert len(set(found)) == 60
    assert wrong_N[found].mean() < 0.1

    def after_a_step(index_S: np.ndarray) -> float:
        error_SC = coresets._errors(x_ND[index_S] @ w_CD.T + b_C, y_N[index_S])
        moved_CD = w_CD - 0.5 * error_SC.T @ x_ND[index_S] / len(index_S)
        return softmax_loss(valid_VD, y_V, moved_CD, b_C - 0.5 * error_SC.mean(0))

    by_chance = [after_a_step(rng.choice(400, 60, replace=False)) for _ in range(50)]
    assert after_a_step(found) < min(by_chance)


def test_top_takes_the_largest_of_all_or_of_each_class() -> None:
    score_N = np.array([0.1, 0.9, 0.8, 0.7, 0.3, 0.2, 0.25, 0.6])
    assert coresets.top(score_N, 3).tolist() == [1, 2, 3]
    strata = Strata(np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    assert coresets.top(score_N, 4, strata).tolist() == [1, 2, 4, 7]


def test_the_entropy_histogram_favours_rare_entropies() -> None:
    rng = np.random.default_rng(0)
    entropy_N = 10 ** np.concatenate([rng.uniform(-1.9, -1.6, 900), rng.uniform(-0.4, -0.1, 100)])
    counts = [
        int((coresets.entropy_histogram(entropy_N, 100, 0.5, seed) >= 900).sum())
        for seed in range(20)
    ]
    # The bins weigh 1 and 801: nearly all are of the rare one until it is used up.
    assert min(counts) > 60
    found = coresets.entropy_histogram(entropy_N, 100, 0.5, 0)
    assert (np.diff(found) > 0).all()
    assert len(found) == 100


def test_last_gradients_are_those_of_the_loss() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    x_ND, y_N = torch.randn(6, 4), torch.randint(0, 3, (6,))
    found = coresets.last_gradients(layer(x_ND).detach().numpy(), y_N.numpy(), x_ND.numpy())
    for n in range(6):
        layer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x_ND[n : n + 1]), y_N[n : n + 1]).backward()
        whole = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
        torch.testing.assert_close(torch.from_numpy(found[n]), whole, rtol=1e-4, atol=1e-6)
