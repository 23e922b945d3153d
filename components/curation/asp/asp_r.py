"""ASP-R: samples are drawn by what training saw of them last.

The contract is that of ASP (arXiv 2310.11478, abstract): informative subsets, found anew for every
epoch at any ratio. The rule is our own. A sample's signals are averaged over its visits; their
ranks, how much they moved and how long ago the last visit was make its utility; a softmax of
utilities, mixed with an even share for all, makes the probabilities.

Shapes: N samples, S of a subset, M signals, b of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components.curation.asp import draw
from components.curation.asp.ranks import Ranks
from components.curation.asp.selector import Seen, Selector, Subset

if TYPE_CHECKING:
    from components.curation.asp.config import AspConfig

Float32 = npt.NDArray[np.float32]
#: Epochs up to which old signals count little, and a ratio up to which coverage counts more.
FEW_EPOCHS, SMALL_RATIO = 20, 0.1
FORGETTING = "forgetting"


@dataclass(frozen=True)
class Taste:
    """What makes a sample likely.

    Attributes:
        signals: weight of each signal's rank, negative: small values are preferred; none of them
            and nothing else makes a difference where it is empty.
        temperature: of the softmax over utilities.
    """

    signals: Mapping[str, float]
    temperature: float


@dataclass
class AspR(Selector):
    """The rule.

    Attributes:
        class_N: classes of the samples, for strata; None where the rule has none.
        score_MN: float32 moving averages of the signals; of a sample never seen 0.
        variance_N: float32 moving average of the squared deviation of the first signal.
        last_N: int32 epoch of the last visit, 0: none.
        forgotten_N: uint16, how often a sample went from right to wrong.
        correct_N: int8, right at the last visit.
    """

    config: AspConfig = field(kw_only=True)
    class_N: npt.NDArray[np.integer] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.schedule.size
        self.names = tuple(self.config.signals)
        self.score_MN = np.zeros((len(self.names), size), np.float32)
        self.variance_N = np.zeros(size, np.float32)
        self.last_N = np.zeros(size, np.int32)
        self.forgotten_N = np.zeros(size, np.uint16)
        self.correct_N = np.zeros(size, np.int8)
        self.strata = None
        if self.config.stratified:
            if self.class_N is None:
                raise ValueError("a stratified rule needs the classes of the samples")
            self.strata = draw.Strata(self.class_N)

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name != FORGETTING)

    @property
    def decay(self) -> float:
        """β."""
        if self.config.decay is not None:
            return self.config.decay
        return 0.5 if self.schedule.epochs <= FEW_EPOCHS else 0.8

    @property
    def uniform_share(self) -> float:
        """λ."""
        if self.config.uniform_share is not None:
            return self.config.uniform_share
        return 0.7 if self.config.schedule.ratio <= SMALL_RATIO else 0.5

    def describe(self) -> str:
        return f"AspR {self.config.model_dump_json()}"

    def taste(self) -> Taste:
        """What the next subset is drawn by."""
        return Taste(
            {str(name): w for name, w in self.config.signals.items()}, self.config.temperature
        )

    def arrays(self) -> dict[str, npt.NDArray]:
        own = ("score_MN", "variance_N", "last_N", "forgotten_N", "correct_N")
        return super().arrays() | {name: getattr(self, name) for name in own}

    def learn(self, seen: Seen) -> None:
        index_S, beta = seen.index_S, self.decay
        first_S = self.last_N[index_S] == 0
        lost_S = (self.correct_N[index_S] == 1) & ~seen.correct_S
        self.forgotten_N[index_S] += lost_S.astype(np.uint16)
        for m, name in enumerate(self.names):
            if name == FORGETTING:
                self.score_MN[m, index_S] = self.forgotten_N[index_S]
                continue
            value_S, before_S = seen.signals[name], self.score_MN[m, index_S]
            after_S = np.where(first_S, value_S, beta * before_S + (1 - beta) * value_S)
            self.score_MN[m, index_S] = after_S
            if m == 0:
                moved_S = beta * self.variance_N[index_S] + (1 - beta) * (value_S - after_S) ** 2
                self.variance_N[index_S] = np.where(first_S, 0, moved_S)
        self.correct_N[index_S] = seen.correct_S
        self.last_N[index_S] = self.epoch

    def select(self, epoch: int) -> Subset:
        count = self.schedule.count(epoch)
        size = self.schedule.size
        if count == size:
            return Subset(np.arange(size), entropy=math.log(size))
        log_p_N, entropy, utility_N = self._probabilities(epoch)
        if self.config.mode == "infobatch" and utility_N is not None:
            return self._easy_ones_left_out(utility_N, count, epoch)
        unbiased = self.config.mode == "unbiased"
        wanted = self.strata.shares(count) if self.strata else count
        drawn = draw.draw(log_p_N, wanted, self.seed, epoch, self.strata, in_place=not unbiased)
        weight_S = None
        if unbiased:
            pi_S = draw.inclusion(log_p_N[drawn.index_S], drawn.kappa_S)
            weight_S = self._weights(count / (size * pi_S))
        return Subset(drawn.index_S, weight_S, entropy)

    def _probabilities(self, epoch: int) -> tuple[Float32, float, Float32 | None]:
        """Logarithms of p, its entropy, and the utilities (none yet: all are alike)."""
        size = self.schedule.size
        seen_N = self.last_N > 0
        taste = self.taste()
        if epoch <= self.config.warm_up or not seen_N.any() or not taste.signals:
            return np.full(size, -math.log(size), np.float32), math.log(size), None
        keep = self.config.mode == "infobatch"
        utility_N = self._utility(epoch, seen_N, taste.signals)
        log_p_N = utility_N.copy() if keep else utility_N
        share, T = self.uniform_share, taste.temperature
        highest = float(log_p_N.max())
        total = 0.0
        for _, rows in draw.blocks(size):
            log_p_N[rows] = np.exp((log_p_N[rows] - highest) / T)
            total += float(log_p_N[rows].sum(dtype=np.float64))
        entropy = 0.0
        for _, rows in draw.blocks(size):
            p_b = (1 - share) / total * log_p_N[rows].astype(np.float64) + share / size
            log_p_b = np.log(p_b, out=np.full(len(p_b), -np.inf), where=p_b > 0)
            entropy -= float(p_b @ np.where(p_b > 0, log_p_b, 0))
            log_p_N[rows] = log_p_b
        return log_p_N, entropy, utility_N if keep else None

    def _utility(
        self, epoch: int, seen_N: npt.NDArray[np.bool_], signals: Mapping[str, float]
    ) -> Float32:
        config, size = self.config, self.schedule.size
        rows_M = [self.names.index(name) for name in signals]
        ranks = [Ranks.among(self.score_MN[m], seen_N) for m in rows_M]
        weights = np.array([*signals.values()], np.float32)
        spread = math.sqrt(float(self.variance_N.max())) or 1.0
        stale_after = math.ceil(1 / config.schedule.ratio)
        utility_N = np.empty(size, np.float32)
        hard_N = np.zeros(size if config.noise_share else 0, bool)
        for _, rows in draw.blocks(size):
            seen_b = seen_N[rows]
            rank_b = np.zeros(len(seen_b), np.float32)
            for weight, m, rank in zip(weights, rows_M, ranks, strict=True):
                # Who was never seen might be what is looked for most.
                unseen = rank.highest if weight > 0 else 1 - rank.highest
                own_b = np.where(seen_b, rank.of(self.score_MN[m, rows]), unseen)
                rank_b += weight * own_b.astype(np.float32)
            waited_b = np.minimum(1, (epoch - self.last_N[rows]) / stale_after)
            utility_N[rows] = (
                rank_b
                + config.uncertainty * np.sqrt(self.variance_N[rows]) / spread
                + config.staleness * waited_b
            )
            if config.noise_share:
                whole = np.abs(weights).sum()
                hard_N[rows] = seen_b & (rank_b / whole > 1 - config.noise_share)
        if config.noise_share:
            utility_N[hard_N] = np.median(utility_N[seen_N])
        return utility_N

    def _easy_ones_left_out(self, utility_N: Float32, count: int, epoch: int) -> Subset:
        """All above the mean utility and some of the others, which stand for the rest of them.

        The rule of InfoBatch (arXiv 2303.04947) at a given size. Where even those above the mean
        are too many, some of them are drawn evenly, and no other.
        """
        size = self.schedule.size
        hard_N = utility_N >= utility_N.mean(dtype=np.float64)
        hard = int(hard_N.sum())
        few, many = (~hard_N, size - hard) if count >= hard else (hard_N, hard)
        taken = count - hard if count >= hard else count
        log_p_N = np.where(few, np.float32(0), np.float32(-np.inf))
        index_S = draw.draw(log_p_N, taken, self.seed, epoch, in_place=True).index_S
        stands_for = many / max(1, taken)
        weight_S = np.full(len(index_S), stands_for, np.float32)
        if count >= hard:
            whole = np.flatnonzero(hard_N)
            index_S = np.concatenate([index_S, whole])
            weight_S = np.concatenate([weight_S, np.ones(hard, np.float32)])
        order_S = np.argsort(index_S, kind="stable")
        return Subset(index_S[order_S], self._weights(weight_S[order_S], capped=False))

    def _weights(self, weight_S: npt.NDArray, *, capped: bool = True) -> Float32:
        if capped and self.config.max_weight is not None:
            weight_S = np.minimum(weight_S, self.config.max_weight)
        if self.config.normalised:
            weight_S = weight_S / weight_S.mean()
        return weight_S.astype(np.float32)
