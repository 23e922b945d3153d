"""Hyper-parameters of the reward system (arXiv 2506.13695, section 2.4), with paper symbols."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.pipeline.params_base import Params, Seed


class PScoreSize(Params):
    """Architecture of the preference model."""

    d_model: int = Field(32, ge=2, description="width of user, item and attended history")
    heads: int = Field(2, ge=1, description="heads of the target attention")
    history: int = Field(50, ge=4, description="newest events that the target attends to")
    tower_hidden: int = Field(16, ge=1, description="hidden width of each objective's tower")
    fusion_hidden: int = Field(64, ge=1, description="hidden width of the fusion")
    item_buckets: int = Field(4096, ge=2, description="rows of the table of hashed item ids")
    author_buckets: int = Field(4096, ge=2, description="rows of the table of hashed authors")
    tag_buckets: int = Field(1024, ge=2, description="rows of the table of hashed tags")
    user_buckets: int = Field(1024, ge=2, description="rows of the table of hashed user features")
    dropout: float = Field(0.1, ge=0, lt=1, description="rate on the input of towers and fusion")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of heads {self.heads}")
        return self


class PScoreConfig(Params):
    """How the preference models are trained."""

    model: PScoreSize = Field(PScoreSize(), description="architecture")
    epochs: int = Field(2, ge=1, description="passes over the exposures")
    max_exposures: int = Field(
        150_000, ge=1, description="newest exposures to learn from, of both models together"
    )
    batch_size: int = Field(512, ge=1, description="exposures a step")
    learning_rate: float = Field(3e-3, gt=0, description="peak of AdamW's rate; cosine decay")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    tower_weight: float = Field(1.0, ge=0, description="weight of the towers' own losses")
    valid_share: float = Field(
        0.15, gt=0, lt=0.5, description="newest share of fully labelled exposures, for validation"
    )
    held_out_share: float = Field(
        0.2, ge=0, lt=1, description="share of users that neither model is trained on"
    )
    min_labels: int = Field(
        20,
        ge=2,
        description="an objective needs so many positive and negative labels, to learn from and "
        "to be weighed by",
    )
    candidates: int = Field(
        8, ge=1, description="weights w^xtr that are tried on validation; 1: equal ones"
    )


class AlignConfig(Params):
    """Reinforcement learning of the recommender beside supervised fine-tuning (2.4.1, 3.3)."""

    objective: Literal["ecpo", "grpo", "gbpo"] = Field(
        "ecpo",
        description="early-clipped GRPO; GRPO itself; or the objective of GBPO (arXiv 2508.20900), "
        "with the same advantages",
    )
    epsilon: float = Field(0.2, gt=0, lt=1, description="clipping range of the ratio, ε")
    delta: float = Field(0.1, ge=0, description="slack of ECPO's early clip, δ")
    steps: int = Field(30, ge=1, description="steps of the trainer")
    users: int = Field(32, ge=1, description="users a step")
    group: int = Field(32, ge=2, description="items generated for each user, G")
    sampler: Literal["beam", "constrained", "sample"] = Field(
        "beam",
        description="beam search or sampling, both among legal ids; or sampling over all codes",
    )
    preference_weight: float = Field(0.2, ge=0, description="weight of J_P, λ_1")
    format_weight: float = Field(1.2, ge=0, description="weight of J_format, λ_2")
    format_group: int = Field(
        32, ge=1, description="unconstrained samples a user, of which the format reward chooses"
    )
    format_k: int = Field(8, ge=1, description="samples that get the format reward, K")
    format_choice: Literal["random", "top"] = Field(
        "random", description="drawn at random, or the most probable ones"
    )
    sft_batch: int = Field(256, ge=1, description="samples of the supervised loss a step")
    rsft_drop: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of the train exposures, those played least, that are no supervised "
        "targets; nor are those of unknown play time, unless that of no target is known; "
        "0: all targets stay",
    )
    learning_rate: float = Field(3e-4, gt=0, description="rate of AdamW at the first step")
    last_rate: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of it that is left at the last step, in between it falls evenly; "
        "1: constant",
    )
    weight_decay: float = Field(0.1, ge=0, description="on matrices only")
    clip: float | None = Field(1.0, gt=0, description="largest norm of a gradient; null: none")
    balance_rate: float = Field(1e-3, ge=0, description="step of the experts' selection bias, γ")
    max_staleness: int = Field(
        2, ge=0, description="steps by which the weights of a rollout may be older, at most"
    )
    ahead: int = Field(
        1, ge=0, description="rollouts made while the trainer works; 0: they take turns"
    )
    viral_share: float = Field(
        1.0, gt=0, le=1, description="share of flagged items from which the industrial reward acts"
    )
    viral_alpha: float = Field(
        0.5, ge=0, lt=1, description="what the reward of a flagged item is then multiplied by, α"
    )
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints")

    @model_validator(mode="after")
    def _rollouts_ahead_are_within_the_bound(self) -> Self:
        if self.ahead > self.max_staleness:
            raise ValueError(
                f"ahead {self.ahead} is more than max_staleness {self.max_staleness}: a rollout "
                "made so early would be too old"
            )
        return self

    @model_validator(mode="after")
    def _format_samples_are_enough(self) -> Self:
        if self.format_k > self.format_group:
            raise ValueError(
                f"format_k {self.format_k} is more than format_group {self.format_group}"
            )
        return self


class AlignStageConfig(AlignConfig):
    """What is chosen beside the optimisation."""

    seed: Seed = Field(0, description="users of every step, samples and dropout")
