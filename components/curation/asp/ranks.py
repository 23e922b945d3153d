"""Ranks of scores among those that were seen, in one pass and without sorting.

Scores are counted by the leading bits of their floating point form, 13 of the fraction, so scores
that differ by less than one part in 8,192 share a rank: far below the noise of any signal. A sort
of 50 million scores would take longer than all the rest of a selection.

Shapes: N samples, b of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from components.curation.asp.draw import blocks

BITS = 22
_SHIFT = np.uint32(32 - BITS)
_SIGN = np.uint32(1 << 31)


#: Up to so many scores their places are sorted; beyond, counted for every possible place.
SORTED = 1 << 20


@dataclass(frozen=True)
class Ranks:
    """Where a score lies among all that were seen.

    Attributes:
        place_K: uint32, the places that occur, ascending; None: all there are.
        rank_K: float32 for each of them: ``(rank - 1/2) / n``, of equal scores the mean.
        lowest, highest: of the smallest and of the largest score.
    """

    place_K: npt.NDArray[np.uint32] | None
    rank_K: npt.NDArray[np.float32]
    lowest: float
    highest: float

    @classmethod
    def among(cls, score_N: npt.NDArray[np.float32], seen_N: npt.NDArray[np.bool_]) -> Ranks:
        """Of the scores of samples that were seen, of which there is one at least."""
        place_K: npt.NDArray[np.uint32] | None = None
        if len(score_N) <= SORTED:
            place_K, count_K = np.unique(_place(score_N[seen_N]), return_counts=True)
        else:
            count_K = np.zeros(1 << BITS, np.int64)
            for _, rows in blocks(len(score_N)):
                place_b = _place(score_N[rows][seen_N[rows]])
                count_K += np.bincount(place_b, minlength=len(count_K))
        rank_K = ((np.cumsum(count_K) - count_K / 2) / count_K.sum()).astype(np.float32)
        first, last = np.flatnonzero(count_K)[[0, -1]]
        return cls(place_K, rank_K, float(rank_K[first]), float(rank_K[last]))

    def of(self, score_b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """In (0, 1) for scores that were counted; of others it says nothing."""
        place_b = _place(score_b)
        if self.place_K is None:
            return self.rank_K[place_b]
        nth_b = np.searchsorted(self.place_K, place_b)
        return self.rank_K[np.minimum(nth_b, len(self.rank_K) - 1)]


def _place(score_b: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Leading bits, made to rise with the score: those of negative ones are turned around."""
    # Of the two zeros the one without a sign.
    bits_b = (score_b + np.float32(0)).view(np.uint32)
    rising_b = np.where(bits_b & _SIGN, ~bits_b, bits_b | _SIGN)
    return rising_b >> _SHIFT
