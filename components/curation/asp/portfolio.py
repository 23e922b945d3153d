"""The automatic rule: what samples are drawn by is itself chosen, by what it gave so far.

Every few epochs EXP3 (Auer et al. 2002) picks one of several tastes, among them no taste at all.
Its reward is how much the loss of samples held out for this purpose, neither trained on nor used to
rank candidates, fell for every thousand samples trained on.

Shapes: A tastes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from components.curation.asp import draw
from components.curation.asp.asp_r import AspR, Taste
from components.curation.asp.selector import Diverged, Seen

#: Signals that a portfolio knows; an even draw comes beside them.
SIGNALS = {"el2n": 1.0, "loss": 1.0, "entropy": 1.0, "margin": 1.0, "forgetting": -1.0}
TEMPERATURES = (0.15, 0.3, 0.6)
TASTES = (
    Taste({}, 1.0),
    *(Taste({name: sign}, T) for name, sign in SIGNALS.items() for T in TEMPERATURES),
)


@dataclass
class Portfolio(AspR):
    """ASP-R whose taste is picked anew every ``every`` epochs. Its config names all the signals.

    Attributes:
        every: epochs of a taste, J.
        explore: γ, share of the picks that are even.
        gain_A: float64, logarithms of EXP3's weights.
        told: loss at the last pick and at the last epoch, samples since the pick, largest change.
    """

    every: int = field(default=2, kw_only=True)
    explore: float = field(default=0.2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [name for name in SIGNALS if name not in self.names]
        if missing:
            raise ValueError(f"a portfolio needs the signals {', '.join(missing)}, too")
        self.gain_A = np.zeros(len(TASTES))
        self.told = np.array([math.nan, math.nan, 0.0, 0.0])

    @property
    def wants_validation(self) -> bool:
        return True

    def describe(self) -> str:
        return f"Portfolio {self.every} {self.explore} {super().describe()}"

    def arrays(self) -> dict[str, npt.NDArray]:
        return super().arrays() | {"gain_A": self.gain_A, "told": self.told}

    @property
    def likely_A(self) -> npt.NDArray[np.float64]:
        """Probability of every taste to be picked next."""
        weight_A = np.exp(self.gain_A - self.gain_A.max())
        return (1 - self.explore) * weight_A / weight_A.sum() + self.explore / len(weight_A)

    def taste(self) -> Taste:
        return TASTES[self._picked()]

    def _picked(self) -> int:
        """Of the period that goes on: the weights change at its end alone."""
        period = self.epoch // self.every
        edge_A = np.cumsum(self.likely_A)
        chosen = int((edge_A <= draw.lot(self.seed, period, "taste")).sum())
        return min(chosen, len(TASTES) - 1)

    def learn(self, seen: Seen) -> None:
        # `epoch` has moved on already, and with the last epoch of a period so has the pick: its
        # reward is given by `judge`, which looks back.
        super().learn(seen)
        self.told[2] += len(seen.index_S)

    def judge(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"the loss of held-out samples is {loss} after epoch {self.epoch}")
        self.told[1] = loss
        if self.epoch % self.every:
            return
        before, _, samples, most = self.told
        if math.isfinite(before):
            fell = (before - loss) / (samples / 1000)
            most = max(most, abs(fell))
            reward = 0.5 + 0.5 * fell / most if most else 0.5
            likely_A = self.likely_A
            self.epoch -= 1
            picked = self._picked()
            self.epoch += 1
            self.gain_A[picked] += self.explore * reward / likely_A[picked] / len(TASTES)
        self.told[:] = loss, loss, 0.0, most
