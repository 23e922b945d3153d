"""Hyper-parameters of SASRec and of its search."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.pipeline.params_base import Params, Seed


class SasrecConfig(Params):
    """The architecture of one SASRec: everything needed to rebuild it beside its weights."""

    num_items: int = Field(ge=1, description="catalogue size N")
    width: int = Field(64, ge=2, description="model width d")
    blocks: int = Field(2, ge=1, description="self-attention blocks b")
    heads: int = Field(2, ge=1, description="attention heads")
    max_length: int = Field(50, ge=1, description="newest events that the model sees, n")
    dropout: float = Field(0.2, ge=0, lt=1, description="rate on embeddings and residual branches")
    tied: bool = Field(True, description="items are scored by their input embeddings")


class SasrecGrid(Params):
    """Every combination of these is a candidate; the choice is made on validation NDCG@10."""

    learning_rate: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (5e-4, 1e-3), min_length=1, description="peak rates"
    )
    dropout: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.2, 0.5), min_length=1, description="dropout rates"
    )
    width: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (64, 128), min_length=1, description="model widths d"
    )
    tied: tuple[bool, ...] = Field(
        (True, False),
        min_length=1,
        description="score items by their input embeddings, or by others",
    )

    def cells(self) -> list[tuple[float, float, int, bool]]:
        """Learning rate, dropout, width and tied of every candidate."""
        return list(itertools.product(self.learning_rate, self.dropout, self.width, self.tied))


class SasrecParams(Params):
    """How the SASRec baseline is tuned and trained."""

    seed: Seed = Field(0, description="weights, order of batches and dropout")
    grid: SasrecGrid = Field(SasrecGrid(), description="candidates of the search")
    blocks: int = Field(2, ge=1, description="self-attention blocks")
    heads: int = Field(2, ge=1, description="attention heads")
    max_length: int = Field(50, ge=1, description="newest events that the model sees")
    targets: Literal["positive", "all"] = Field(
        "positive", description="events that are predicted; every event is fed"
    )
    events_per_user: int = Field(
        200, ge=2, description="newest train events of a user to learn from"
    )
    batch_size: int = Field(128, ge=1, description="windows of events a step")
    rung_epochs: int = Field(
        4,
        ge=1,
        description="epochs after which the worse half of the candidates stops, doubled with every "
        "halving; fewer where they would take over 250 steps",
    )
    max_epochs: int = Field(60, ge=1, description="epochs of the candidate that is left")
    patience: int = Field(4, ge=1, description="epochs without a better validation score")
    valid_users: int = Field(10_000, ge=1, description="validation users at most (spread evenly)")
    max_minutes: float = Field(
        14.0, gt=0, description="safety limit of the whole search; a note says when it cut short"
    )
    workers: int = Field(
        2, ge=1, description="candidates that train at once, each in a process of its own"
    )
    threads: int = Field(1, ge=1, description="CPU threads of a worker")

    @model_validator(mode="after")
    def _heads_divide_widths(self) -> SasrecParams:
        for width in self.grid.width:
            if width % self.heads:
                raise ValueError(f"grid.width {width} is no multiple of heads {self.heads}")
        return self
