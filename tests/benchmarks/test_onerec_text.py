"""The figures of the text benchmark from made-up ranks."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.onerec_text import CONTROLS, OURS, Ranks, figures

USERS = 400


def ranks_with_hits(share: float, seed: int) -> Ranks:
    """Targets in first place for a share of the users, nowhere for the others."""
    hit_U = np.arange(USERS) < round(share * USERS)
    return Ranks(np.random.default_rng(seed).permutation(hit_U).astype(np.int32))


def test_figures_are_means_and_paired_differences() -> None:
    shares = {OURS: 0.5, "sasrec": 0.4, "tiger_rq_vae": 0.1, "cornac_tiger": 0.3}
    shares |= {"onerec_shuffled": 0.35, "without_memory": 0.2, "without_memory_shuffled": 0.1}
    ranks = {
        name: [ranks_with_hits(share, seed) for seed in (0, 1)] for name, share in shares.items()
    }
    found = {result.name: result for result in figures(ranks, {OURS: [0.25, 0.35]})}
    assert found["onerec_ndcg_at_10"].ours == pytest.approx(0.5)
    assert found["onerec_ndcg_at_10"].reference == pytest.approx(0.3)  # the better TIGER
    assert found["sasrec_hr_at_10"].reference == pytest.approx(0.5)
    gap = found["onerec_minus_sasrec_ndcg_at_10"]
    assert gap.ours == pytest.approx(0.1)
    assert 0 < gap.low < gap.ours < gap.high < 0.2
    for control, (base, lost) in {
        "onerec_shuffled": (OURS, 0.3),
        "without_memory_shuffled": ("without_memory", 0.5),
    }.items():
        assert CONTROLS[control] == base
        assert found[f"{control}_loses_of_ndcg_at_10"].ours == pytest.approx(lost)
    assert found["onerec_collision_rate"].ours == pytest.approx(0.3)
    assert found["onerec_hr_at_5"].n == found["onerec_shuffled_loses_of_hr_at_10"].n == 2


def test_intervals_are_paired() -> None:
    """Two methods that hit nearly the same users differ with near certainty, if by little."""
    ours = np.zeros(USERS, np.int32)
    ours[:200] = 1
    theirs = ours.copy()
    theirs[:20] = 0
    shared = {"tiger_rq_vae": [Ranks(theirs)]} | {name: [Ranks(ours)] for name in CONTROLS}
    ranks = {OURS: [Ranks(ours)], "without_memory": [Ranks(ours)], **shared}
    gap = {r.name: r for r in figures(ranks, {})}["onerec_minus_tiger_rq_vae_hr_at_10"]
    assert gap.ours == pytest.approx(0.05)
    assert gap.high - gap.low < 0.05  # unpaired it would be about 0.14
