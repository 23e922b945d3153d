"""Hyper-parameters of item embeddings."""

from __future__ import annotations

from pydantic import Field, model_validator

from components.pipeline.params_base import Params, Seed


class ItemFeaturesParams(Params):
    """What an item embedding is made of; a weight of 0 leaves its block out."""

    seed: Seed = Field(0, description="random projections of the decompositions")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads; others give other last bits")
    dimension: int = Field(128, ge=2, le=4096, description="width of the embedding, D")
    block_dimension: int = Field(256, ge=2, le=4096, description="width of each block")
    text_weight: float = Field(1.0, ge=0, description="title and caption")
    tags_weight: float = Field(0.3, ge=0, description="tags")
    author_weight: float = Field(0.2, ge=0, description="author, where one has several items")
    cooccurrence_weight: float = Field(1.0, ge=0, description="what train users did near it")
    window: int = Field(5, ge=1, le=100, description="events apart that still count as together")
    positive_only: bool = Field(
        True, description="co-occurrence among positive events only, where there is one"
    )
    whitening: float = Field(
        0.5, ge=0, le=1, description="0: distances as they are; 1: equal variance in all dimensions"
    )
    token_dimension: int = Field(128, ge=2, le=4096, description="width of an item token, d_t")
    cooccurrence_token: bool = Field(
        True, description="co-occurrence as a token of its own beside those of content"
    )
    visual: str | None = Field(
        None,
        min_length=1,
        description="parquet file of a visual stage: item_id and embedding, a vector an item or a "
        "list of them; null: none",
    )
    visual_tokens: int = Field(5, ge=1, le=1024, description="vectors of an item at most")

    @model_validator(mode="after")
    def _some_block(self) -> ItemFeaturesParams:
        if not (
            self.text_weight or self.tags_weight or self.author_weight or self.cooccurrence_weight
        ):
            raise ValueError("all weights are 0: an embedding needs at least one block")
        return self
