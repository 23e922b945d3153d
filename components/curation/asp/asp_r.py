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
Int64 = npt.NDArray[np.int64]
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
        variance_N: float32 moving average of the squared deviation of the first signal that is not
            counted.
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
            self.strata = draw.Strata(self.class_N, size)

    @property
    def ratio(self) -> float:
        """Share of the samples in the first subset, for what is chosen by the ratio."""
        return self.schedule.count(1) / self.schedule.size

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
        return 0.7 if self.ratio <= SMALL_RATIO else 0.5

    def describe(self) -> str:
        return f"AspR {self.config.model_dump_json()} {self.classes()}"

    def classes(self) -> str:
        """Of which classes the strata are."""
        return "" if self.strata is None else self.strata.digest

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
            if name == self.signals[0]:
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
        wanted: int | Int64 = count
        if self.strata:
            wanted = self.strata.shares(count, draw.lot(self.seed, epoch, "shares"))
        drawn = draw.draw(log_p_N, wanted, self.seed, epoch, self.strata, in_place=not unbiased)
        weight_S = None
        if unbiased:
            pi_S = draw.inclusion(log_p_N[drawn.index_S], drawn.kappa_S)
            if self.strata and self.class_N is not None:
                pi_S *= self.strata.chances(count)[self.class_N[drawn.index_S]]
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
            log_p_N[rows] = (log_p_N[rows] - highest) / T
            total += float(np.exp(log_p_N[rows]).sum(dtype=np.float64))
        entropy = 0.0
        for _, rows in draw.blocks(size):
            log_p_b = log_p_N[rows].astype(np.float64) - math.log(total)
            p_b = np.exp(log_p_b)
            if share:
                p_b = (1 - share) * p_b + share / size
                log_p_b = np.log(p_b)
            entropy -= float(p_b @ log_p_b)
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
        stale_after = math.ceil(1 / self.ratio)
        utility_N = np.empty(size, np.float32)
        for _, rows in draw.blocks(size):
            seen_b = seen_N[rows]
            rank_b = np.zeros(len(seen_b), np.float32)
            for weight, m, rank in zip(weights, rows_M, ranks, strict=True):
                # Who was never seen might be what is looked for most.
                unseen = rank.highest if weight > 0 else rank.lowest
                own_b = np.where(seen_b, rank.of(self.score_MN[m, rows]), unseen)
                rank_b += weight * own_b.astype(np.float32)
            utility_N[rows] = rank_b
        # Who looks for small values does not prefer wrong labels.
        guarded = config.noise_share and weights.sum() > 0
        hard_N = self._hardest(utility_N, seen_N) if guarded else None
        for _, rows in draw.blocks(size):
            waited_b = np.minimum(1, (epoch - self.last_N[rows]) / stale_after)
            utility_N[rows] += (
                config.uncertainty * np.sqrt(self.variance_N[rows]) / spread
                + config.staleness * waited_b
            )
        if hard_N is not None:
            utility_N[hard_N] = np.median(utility_N[seen_N])
        return utility_N

    def _hardest(self, rank_N: Float32, seen_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whose labels may be wrong: of all signals together, whose mean rank is no even one."""
        ranks = Ranks.among(rank_N, seen_N)
        hard_N = np.zeros(len(rank_N), bool)
        for _, rows in draw.blocks(len(rank_N)):
            hard_N[rows] = seen_N[rows] & (ranks.of(rank_N[rows]) > 1 - self.config.noise_share)
        return hard_N

    def _easy_ones_left_out(self, utility_N: Float32, count: int, epoch: int) -> Subset:
        """Samples of at least the mean utility, and others half as likely, which weigh twice.

        The rule of InfoBatch (arXiv 2303.04947) at a given size: all hard ones are in while there
        is room for them and for half of the easy ones; with less room both are fewer alike.
        """
        easy_N = utility_N < utility_N.mean(dtype=np.float64)
        easy = int(easy_N.sum())
        hard = len(easy_N) - easy
        wanted = (
            hard if count >= hard + easy / 2 else math.floor(count * hard / (hard + easy / 2) + 0.5)
        )
        of_hard = max(wanted, count - easy)
        index_S, weight_S = np.zeros(0, np.int64), np.zeros(0)
        for part_N, many, taken in ((~easy_N, hard, of_hard), (easy_N, easy, count - of_hard)):
            if not taken:
                continue
            log_p_N = np.where(part_N, np.float32(0), np.float32(-np.inf))
            found_s = draw.draw(log_p_N, taken, self.seed, epoch, in_place=True).index_S
            index_S = np.concatenate([index_S, found_s])
            weight_S = np.concatenate([weight_S, np.full(taken, many / taken)])
        order_S = np.argsort(index_S, kind="stable")
        return Subset(index_S[order_S], self._weights(weight_S[order_S], capped=False))

    def _weights(self, weight_S: npt.NDArray, *, capped: bool = True) -> Float32:
        if capped and self.config.max_weight is not None:
            weight_S = np.minimum(weight_S, self.config.max_weight)
        if self.config.normalised:
            weight_S = weight_S / weight_S.mean()
        return weight_S.astype(np.float32)
