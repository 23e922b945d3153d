"""Hierarchical k-means of lifelong histories: all sets at once against recursion by scikit-learn.

Both cut every set into the cube root of its size until no cluster has more than 20 items, in an
embedding of 128 dimensions with clusters of its own. Ours is the pathway's
(`components.training.onerec.lifelong`); the reference calls ``sklearn.cluster.KMeans`` (k-means++,
one start, as many iterations) for each set. Sets are many short histories, as of KuaiRand, and
a single long one.

Figures: items clustered a second on one thread, and the error: the mean squared distance of an item
to the centre of its cluster, over that to the mean of its set. More clusters make a smaller error,
so items a cluster stand beside it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.result import Result, measure

if TYPE_CHECKING:
    import numpy as np

SUMMARY = "lifelong histories: items clustered a second against recursion by scikit-learn"

LEAF, DIMENSION = 20, 128


def run(quick: bool = False) -> list[Result]:
    """Short and long histories; ``quick`` has few of them and one repeat."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    sizes = {
        "short": rng.integers(21, 110, 40 if quick else 2_000),
        "long": np.array([600 if quick else 20_000]),
    }
    results = []
    with threadpool_limits(1):
        for name, size_S in sizes.items():
            results += _compare(name, size_S, rng, repeats=1 if quick else 5)
    return results


def _compare(name: str, size_S: np.ndarray, rng: np.random.Generator, repeats: int) -> list[Result]:
    import numpy as np

    from components.training.onerec.lifelong import hierarchical_kmeans

    catalogue = max(7_500, int(size_S.max()))
    centre = rng.normal(size=(300, DIMENSION))
    noise = rng.normal(size=(catalogue, DIMENSION))
    x_ND = (centre[rng.integers(0, 300, catalogue)] + noise).astype(np.float32)
    start_S1 = np.concatenate([[0], np.cumsum(size_S)])
    item_P = np.concatenate([rng.permutation(catalogue)[:n] for n in size_S])

    took = measure(lambda: hierarchical_kmeans(x_ND, item_P, start_S1, LEAF), repeats=repeats)
    ours_P = hierarchical_kmeans(x_ND, item_P, start_S1, LEAF)
    began = time.perf_counter()
    theirs_P = by_scikit_learn(x_ND, item_P, start_S1)
    reference = time.perf_counter() - began
    items = len(item_P)
    ours, theirs = (error(x_ND[item_P], leaf_P, start_S1) for leaf_P in (ours_P, theirs_P))
    held, held_reference = (items / len(np.unique(leaf_P)) for leaf_P in (ours_P, theirs_P))
    return [
        Result(
            f"items_a_second_{name}",
            items / took.median,
            items / reference,
            "items/s",
            items / took.high,
            items / took.low,
            took.n,
            True,
        ),
        Result(f"error_{name}", ours, theirs, "of the variance", ours, ours, 1, False),
        Result(f"items_a_cluster_{name}", held, held_reference, "items", held, held, 1, True),
    ]


def by_scikit_learn(x_ND: np.ndarray, item_P: np.ndarray, start_S1: np.ndarray) -> np.ndarray:
    """The cluster of every point: int64 [P], numbered over all sets."""
    from itertools import pairwise

    import numpy as np
    from sklearn.cluster import KMeans

    from components.training.onerec.lifelong import ITERATIONS

    leaf_P = np.zeros(len(item_P), np.int64)
    waiting = [np.arange(a, b) for a, b in pairwise(start_S1.tolist())]
    found = 0
    while waiting:
        held = waiting.pop()
        if len(held) <= LEAF:
            leaf_P[held] = found
            found += 1
            continue
        k = int(np.cbrt(len(held)) + 1e-9)
        means = KMeans(k, n_init=1, max_iter=ITERATIONS, random_state=0)
        label = means.fit_predict(x_ND[item_P[held]])
        waiting += [held[label == j] for j in np.unique(label)]
    return leaf_P


def error(x_PD: np.ndarray, leaf_P: np.ndarray, start_S1: np.ndarray) -> float:
    """Squared distance to the leaf's centre over that to the set's mean."""
    import numpy as np

    set_P = np.arange(len(start_S1) - 1).repeat(np.diff(start_S1))
    return _within(x_PD, leaf_P) / _within(x_PD, set_P)


def _within(x_PD: np.ndarray, of_P: np.ndarray) -> float:
    import numpy as np

    order = np.argsort(of_P, kind="stable")
    _, begin, size = np.unique(of_P[order], return_index=True, return_counts=True)
    mean = np.add.reduceat(x_PD[order].astype(np.float64), begin) / size[:, None]
    return float(((x_PD[order] - mean.repeat(size, 0)) ** 2).sum())
