"""Random subsets of given probabilities: Gumbel keys, the k largest, and how likely each was.

Randomness is a function of (seed, epoch, purpose, sample): a counter-based generator, made anew for
every call. Any process draws the same subset, whatever it drew before, and no generator that
anybody else uses is touched. Knows nothing of why a sample is likely.

Shapes: N samples, S chosen ones, C strata, s members of one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from components.pipeline.errors import StageError

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

#: Samples worked on at once: what is held beside the arrays over all N is a few of these.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Drawn:
    """A subset drawn without replacement.

    Attributes:
        index_S: int64, ascending.
        kappa_S: float64, the key that each had to exceed: the largest of those left out, of its
            own stratum; -inf where none was left out.
    """

    index_S: Int64
    kappa_S: Float64


def generator(seed: int, epoch: int, purpose: str, block: int = 0) -> np.random.Generator:
    """Random numbers of their own for every seed, epoch, purpose and block."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    key = np.frombuffer(digest[:16], np.uint64)
    return np.random.Generator(np.random.Philox(counter=[0, 0, 0, block], key=key))


def lot(seed: int, epoch: int, purpose: str) -> float:
    """One number, evenly from [0, 1)."""
    return float(generator(seed, epoch, purpose).random())


def blocks(size: int) -> Iterator[tuple[int, slice]]:
    """Number and range of every block of ``size`` samples."""
    for block, start in enumerate(range(0, size, BLOCK)):
        yield block, slice(start, min(start + BLOCK, size))


def draw(
    log_p_N: Float32,
    count: int | Int64,
    seed: int,
    epoch: int,
    strata: Strata | None = None,
    *,
    in_place: bool = False,
) -> Drawn:
    """``count`` samples by the Gumbel-top-k rule (arXiv 1903.06059): successive draws.

    That is, one after the other without replacement, each with probability proportional to p among
    those that are left; with strata, so many of each.

    Args:
        log_p_N: logarithms of probabilities, up to a constant.
        count: how many; with strata int64 [C], of each.
        in_place: ``log_p_N`` may be overwritten, which saves a copy.
    """
    key_N = log_p_N if in_place else log_p_N.copy()
    for block, rows in blocks(len(key_N)):
        # A Gumbel variable is minus the logarithm of an exponential one.
        waiting = generator(seed, epoch, "subset", block).standard_exponential(len(key_N[rows]))
        key_N[rows] -= np.log(np.maximum(waiting, np.finfo(np.float64).tiny))
    if strata is None:
        index_S, kappa = largest(key_N, int(count))
        return Drawn(index_S, np.full(len(index_S), kappa))
    found = []
    for stratum, wanted in enumerate(np.asarray(count).tolist()):
        member_s = strata.members(stratum)
        place, kappa = largest(key_N[member_s], wanted)
        found.append((member_s[place].astype(np.int64), np.full(len(place), kappa)))
    index_S, kappa_S = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order_S = np.argsort(index_S, kind="stable")
    return Drawn(index_S[order_S], kappa_S[order_S])


def largest(key_N: Float32, k: int) -> tuple[Int64, float]:
    """Ascending places of the k largest keys, of equal ones the first, and the next largest key."""
    size = len(key_N)
    if k >= size:
        return np.arange(size), -math.inf
    kappa = np.partition(key_N, size - k - 1)[size - k - 1]
    index_S = np.flatnonzero(key_N > kappa)
    if len(index_S) < k:
        equal = np.flatnonzero(key_N == kappa)[: k - len(index_S)]
        index_S = np.sort(np.concatenate([index_S, equal]))
    return index_S, float(kappa)


def inclusion(log_p_S: npt.NDArray[np.floating], kappa_S: Float64) -> Float64:
    """Probability ``1 - exp(-p exp(-kappa))`` that a sample's key exceeds kappa: float64 [S].

    Given the keys of all others it is exact, so sums weighted by its inverse are unbiased. It is
    not the marginal probability of being drawn, which has no closed form.
    """
    return -np.expm1(-np.exp(log_p_S.astype(np.float64) - kappa_S))


def shuffled(index_S: Int64, seed: int, epoch: int) -> Int64:
    """The order in which an epoch trains on its subset."""
    return generator(seed, epoch, "order").permutation(index_S)


class Strata:
    """Samples by class.

    Args:
        class_N: integers from 0.
        size: samples there are; None: as many as classes are given.

    Raises:
        StageError: ``class_N`` is not that.
    """

    def __init__(self, class_N: npt.NDArray[np.integer], size: int | None = None) -> None:
        _check_classes(class_N, size)
        self.count_C = np.bincount(class_N).astype(np.int64)
        width = np.int32 if len(class_N) <= np.iinfo(np.int32).max else np.int64
        order_N: npt.NDArray[np.integer] = np.argsort(class_N, kind="stable").astype(width)
        self._member_N = order_N
        self._start_C1 = np.concatenate([[0], np.cumsum(self.count_C)])

    @property
    def digest(self) -> str:
        """Of which sample is of which class."""
        parts = (self._member_N.astype("<i8"), self.count_C.astype("<i8"))
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]

    def members(self, stratum: int) -> npt.NDArray[np.integer]:
        """Ascending indices of a class."""
        start, end = self._start_C1[stratum : stratum + 2].tolist()
        return self._member_N[start:end]

    def shares(self, k: int, lot: float = 0.5) -> Int64:
        """``k`` dealt to the classes by their sizes: int64 [C].

        Each gets its exact share, rounded down or up. Which of both is up to ``lot``, evenly from
        [0, 1): then each gets its exact share in the mean, also where that is less than one sample
        (systematic sampling).
        """
        size = int(self.count_C.sum())
        # In integers: nothing is rounded twice.
        until_C = (np.cumsum(self.count_C) * k + int(lot * size)) // max(1, size)
        return np.diff(until_C, prepend=0).astype(np.int64)

    def chances(self, k: int) -> Float64:
        """Probability that a class has any part of ``k`` under an even lot: float64 [C]."""
        return np.minimum(1, self.count_C * (k / max(1, int(self.count_C.sum()))))


def _check_classes(class_N: npt.NDArray[np.integer], size: int | None) -> None:
    wanted = "one integer from 0 for each sample"
    if class_N.ndim != 1 or not np.issubdtype(class_N.dtype, np.integer):
        wrong = f"{class_N.dtype} of shape {class_N.shape}"
    elif size is not None and len(class_N) != size:
        wrong = f"{len(class_N)} of them for {size} samples"
    elif len(class_N) and class_N.min() < 0:
        row = int(np.flatnonzero(class_N < 0)[0])
        wrong = f"{class_N[row]} of sample {row}"
    else:
        return
    raise StageError(f"classes: {wrong}", where="data selection", remedy=f"give {wanted}")
