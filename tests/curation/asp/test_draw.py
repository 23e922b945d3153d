"""Claims about drawing subsets, against exact probabilities of small cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import chisquare, gumbel_r, kstest

from components.curation.asp import draw

P_4 = np.array([0.1, 0.2, 0.3, 0.4])


def log_p(p_N: np.ndarray) -> np.ndarray:
    return np.log(p_N).astype(np.float32)


def test_a_subset_has_its_size_and_no_sample_twice_and_is_a_function_of_seed_and_epoch() -> None:
    p_N = np.random.default_rng(0).dirichlet(np.ones(1000))

    def drawn(seed: int, epoch: int) -> np.ndarray:
        return draw.draw(log_p(p_N), 100, seed, epoch).index_S

    index_S = drawn(0, 1)
    assert len(index_S) == 100
    assert (np.diff(index_S) > 0).all()
    assert np.array_equal(index_S, drawn(0, 1))
    for other in (drawn(0, 2), drawn(1, 1)):
        assert 0 < len(np.setdiff1d(index_S, other)) < 100


def test_inclusion_is_that_of_successive_draws() -> None:
    """Plackett-Luce, by enumeration of all orders of two of four."""
    exact_4 = np.zeros(4)
    for first, second in itertools.permutations(range(4), 2):
        exact_4[[first, second]] += P_4[first] * P_4[second] / (1 - P_4[first])
    draws = 20_000
    count_4 = np.zeros(4)
    for epoch in range(draws):
        count_4[draw.draw(log_p(P_4), 2, 7, epoch).index_S] += 1
    error_4 = np.sqrt(exact_4 * (1 - exact_4) / draws)
    assert (np.abs(count_4 / draws - exact_4) < 4 * error_4).all()


def test_sums_weighted_by_inverse_inclusion_are_unbiased() -> None:
    """Σ 1/π over a subset is N on average, and so for any values of the samples."""
    p_N = np.random.default_rng(1).dirichlet(np.full(30, 2.0))
    value_N = np.random.default_rng(2).normal(size=30)
    totals, sums = [], []
    for epoch in range(20_000):
        drawn = draw.draw(log_p(p_N), 8, 3, epoch)
        weight_S = 1 / draw.inclusion(log_p(p_N)[drawn.index_S], drawn.kappa_S)
        totals.append(weight_S.sum())
        sums.append(weight_S @ value_N[drawn.index_S])
    for found, exact in ((totals, 30.0), (sums, value_N.sum())):
        error = np.std(found) / math.sqrt(len(found))
        assert abs(np.mean(found) - exact) < 4 * error


def test_equal_probabilities_draw_every_sample_alike() -> None:
    count_N = np.zeros(50)
    for epoch in range(2_000):
        count_N[draw.draw(np.zeros(50, np.float32), 10, 0, epoch).index_S] += 1
    assert count_N.sum() == 20_000
    # Draws without replacement vary less than the multinomial of the test: by (1 - 10 / 50).
    assert chisquare(count_N).statistic / 0.8 < 49 + 4 * math.sqrt(2 * 49)


def test_random_numbers_are_the_same_however_large_the_blocks_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draw, "BLOCK", 64)
    key_N = np.zeros(200, np.float32)
    draw.draw(key_N, 10, 0, 1, in_place=True)
    parts = [draw.generator(0, 1, "subset", b).standard_exponential(64) for b in range(4)]
    assert np.allclose(key_N, -np.log(np.concatenate(parts)[:200]), rtol=1e-6)
    assert len(np.unique(key_N)) == 200
    assert kstest(key_N, gumbel_r.cdf).pvalue > 1e-3


def test_nobody_elses_random_numbers_are_touched() -> None:
    before = np.random.get_state()[1].copy()
    draw.draw(np.zeros(50, np.float32), 10, 0, 1)
    draw.shuffled(np.arange(10), 0, 1)
    assert np.array_equal(np.random.get_state()[1], before)


def test_of_equal_keys_the_first_are_taken() -> None:
    key_N = np.array([1, 3, 2, 2, 2, 0], np.float32)
    index_S, kappa = draw.largest(key_N, 3)
    assert (index_S.tolist(), kappa) == ([1, 2, 3], 2.0)
    assert draw.largest(key_N, 6)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert draw.largest(key_N, 6)[1] == -math.inf


def test_strata_have_exact_shares_by_largest_remainder() -> None:
    strata = draw.Strata(np.array([0] * 50 + [2] * 30 + [1] * 7))
    assert strata.count_C.tolist() == [50, 7, 30]
    # Exactly 5.75, 0.80 and 3.45.
    assert strata.shares(10).tolist() == [6, 1, 3]
    assert strata.members(1).tolist() == list(range(80, 87))
    p_N = np.random.default_rng(0).dirichlet(np.ones(87))
    drawn = draw.draw(log_p(p_N), strata.shares(10), 0, 1, strata)
    assert np.bincount(np.searchsorted([50, 80], drawn.index_S, side="right")).tolist() == [6, 3, 1]
    assert (np.diff(drawn.index_S) > 0).all()
    # What had to be exceeded is that of the own stratum.
    assert len(np.unique(drawn.kappa_S)) == 3
