"""Parameters of a selection."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from components.pipeline.params_base import Params

Signal = Literal["loss", "el2n", "grand_last", "entropy", "margin", "forgetting"]


class ScheduleConfig(Params):
    """How large the subset of each epoch is."""

    ratio: float = Field(0.1, gt=0, le=1, description="share of the samples an epoch trains on")
    kind: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the share gets from `ratio` to `last_ratio`"
    )
    last_ratio: float | None = Field(
        None, gt=0, le=1, description="share of the last epoch; of a constant schedule none"
    )
    full_tail: float = Field(
        0.0, ge=0, lt=1, description="share of the epochs, the last ones, that train on all data"
    )

    @model_validator(mode="after")
    def _ends_somewhere(self) -> ScheduleConfig:
        if (self.kind == "constant") != (self.last_ratio is None):
            wanted = "has none" if self.kind == "constant" else "needs one"
            raise ValueError(
                f"last_ratio is {self.last_ratio}, and a {self.kind} schedule {wanted}"
            )
        return self


class AspConfig(Params):
    """The rule ASP-R: what makes a sample likely, and how the drawn ones are weighed."""

    signals: dict[Signal, float] = Field(
        {"el2n": 1.0}, min_length=1, description="weight of each signal's rank"
    )
    decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share of the old value in the moving averages; none: 0.5 up to 20 epochs, "
        "0.8 beyond",
    )
    uncertainty: float = Field(0.1, ge=0, description="weight of how much a sample's signal moved")
    staleness: float = Field(0.2, ge=0, description="weight of how long it was not drawn")
    noise_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the samples, the hardest, that count as the median one; 0.02 to 0.1 "
        "where labels are wrong",
    )
    temperature: float = Field(0.3, gt=0, description="of the softmax over utilities")
    uniform_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the probability that all samples have alike; none: 0.5, and 0.7 up "
        "to a ratio of 0.1",
    )
    warm_up: int = Field(1, ge=0, description="first epochs whose subsets are drawn evenly")
    stratified: bool = Field(False, description="each class has its share of every subset")
    mode: Literal["biased", "unbiased", "infobatch"] = Field(
        "biased",
        description="the drawn ones weigh alike; by the inverse of their probability; or easy ones "
        "are drawn half as likely as hard ones, and weigh twice as much",
    )
    max_weight: float | None = Field(
        5.0, gt=0, description="largest weight of the mode `unbiased`; none: as it comes"
    )
    normalised: bool = Field(True, description="weights of a subset have mean 1")

    @field_validator("signals")
    @classmethod
    def _weigh_something(cls, signals: dict[Signal, float]) -> dict[Signal, float]:
        weights = signals.values()
        if not all(map(math.isfinite, weights)) or min(weights) < 0 or not math.fsum(weights):
            raise ValueError("weights are numbers of at least 0, and one of them is more")
        return signals

    @model_validator(mode="after")
    def _of_one_kind(self) -> AspConfig:
        if self.mode == "infobatch" and self.stratified:
            raise ValueError("the mode infobatch parts samples by their utility, not by class")
        return self
