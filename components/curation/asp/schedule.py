"""How many samples each epoch trains on, and what that costs beside all of them.

Steps, and with them the schedule of a learning rate, are counted by what is really trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from components.curation.asp.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """Sizes of the subsets of all epochs.

    Attributes:
        size: samples there are, N.
        count_T: int64, samples of each epoch.
        of_epochs: epochs of the training that it stands for; None: as many as it has.
    """

    size: int
    count_T: npt.NDArray[np.int64]
    of_epochs: int | None = None

    @classmethod
    def of(cls, config: ScheduleConfig, size: int, epochs: int) -> Schedule:
        """Of ``size`` samples; each epoch has one at least."""
        first, last = config.ratio, config.last_ratio or config.ratio
        passed_T = np.arange(epochs) / max(1, epochs - 1)
        if config.kind == "cosine":
            passed_T = (1 - np.cos(np.pi * passed_T)) / 2
        ratio_T = first + (last - first) * passed_T
        tail = math.floor(config.full_tail * epochs)
        if tail:
            ratio_T[-tail:] = 1.0
        # Halves go up: those of numpy's rounding would go to even sizes.
        count_T = np.floor(ratio_T * size + 0.5).astype(np.int64)
        return cls(size, count_T.clip(1, size))

    @property
    def epochs(self) -> int:
        return len(self.count_T)

    def count(self, epoch: int) -> int:
        """Samples of an epoch 1 … epochs."""
        return int(self.count_T[epoch - 1])

    @property
    def cost(self) -> float:
        """R: trained samples by those of the training on all data."""
        return float(self.count_T.sum() / self.whole)

    @property
    def whole(self) -> int:
        """Samples that the training on all data trains on."""
        return self.size * (self.of_epochs or self.epochs)

    def steps(self, batch_size: int) -> int:
        """Updates of all epochs."""
        return int((-(-self.count_T // batch_size)).sum())
