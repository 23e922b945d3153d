"""The benchmark of lifelong clusters compares like with like, at a size of seconds."""

from __future__ import annotations

import numpy as np

from benchmarks import lifelong_clusters as benchmark
from components.training.onerec.lifelong import hierarchical_kmeans


def test_quick_run_reports_both_and_ours_is_as_close() -> None:
    results = {result.name: result for result in benchmark.run(quick=True)}
    figures = ("items_a_second", "error", "items_a_cluster")
    assert set(results) == {f"{figure}_{size}" for figure in figures for size in ("short", "long")}
    for name, result in results.items():
        assert result.reference is not None
        if name.startswith("error"):
            # Other starts, other optima: within a tenth of scikit-learn's, with as few clusters.
            assert 0 < result.ours < 1.1 * result.reference < 1.1
        if name.startswith("items_a_cluster"):
            assert result.ours > 0.9 * result.reference


def test_both_find_the_same_clusters_where_they_are_plain() -> None:
    rng = np.random.default_rng(0)
    blob = np.arange(48) // 16
    x = (rng.normal(size=(3, 6))[blob] + 0.01 * rng.normal(size=(48, 6))).astype(np.float32)
    start = np.array([0, 48])
    ours = hierarchical_kmeans(x, np.arange(48), start, benchmark.LEAF)
    theirs = benchmark.by_scikit_learn(x, np.arange(48), start)
    for found in (ours, theirs):
        assert len({*zip(found.tolist(), blob.tolist(), strict=True)}) == 3
        assert len(set(found.tolist())) == 3
