"""Hyper-parameters of the tokenizer, the encoder-decoder and its training, with paper symbols.

Paper: arXiv 2506.13695 (OneRec technical report). Values the paper gives are for thousands of
accelerators; the defaults here are those of two processor cores.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from components.pipeline.params_base import Params, Seed


class RQVAEConfig(Params):
    """The quantiser of TIGER (arXiv 2305.05065), at the width of our embeddings."""

    hidden: list[Annotated[int, Field(ge=1, le=65_536)]] = Field(
        [256, 128], max_length=8, description="hidden widths of the encoder; mirrored to decode"
    )
    latent: int = Field(32, ge=1, le=65_536, description="width of the space that is quantised")
    commitment: float = Field(0.25, ge=0, description="weight of the commitment loss, beta")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    batch_size: int = Field(1024, ge=1, description="items a step")
    epochs: int = Field(300, ge=1, description="passes over the catalogue")


class TokenizerConfig(Params):
    """Semantic ids of item embeddings (section 2.1)."""

    num_levels: int = Field(3, ge=1, le=8, description="levels of a semantic id, L_t")
    codebook_size: int | None = Field(
        None,
        ge=2,
        le=65_536,
        description="codes a level, N_t; null: chosen by the catalogue's size",
    )
    method: Literal["plain", "balanced", "in_turn", "rq_vae"] = Field(
        "balanced",
        description="residual k-means: plain; with buckets of equal size, by prices (balanced; at "
        "the last level it also avoids collisions) or filled in turn (arXiv 2502.18965, Alg. 1); "
        "or RQ-VAE",
    )
    collisions: Literal["keep", "next_free", "extra_digit"] = Field(
        "next_free",
        description="items with the same codes: keep them so, give all but the nearest the "
        "next-nearest code of the last level that is free under their prefix, or give every item "
        "one more code that numbers those of the same codes, as TIGER does (arXiv 2305.05065)",
    )
    iterations: int = Field(25, ge=20, description="Lloyd iterations at most")
    restarts: int = Field(1, ge=1, description="k-means++ starts a level; the lowest error wins")
    rq_vae: RQVAEConfig = Field(RQVAEConfig(), description="RQ-VAE alone")

    @model_validator(mode="after")
    def _free_codes_are_those_under_a_prefix(self) -> Self:
        if self.collisions == "next_free" and self.num_levels == 1:
            raise ValueError(
                "collisions next_free gives codes that are free under a prefix, which num_levels 1 "
                "has not: choose keep or extra_digit"
            )
        return self


class PairsConfig(Params):
    """Which items belong together, by the training split (`tokenizer/pairs.py`)."""

    latest: int = Field(
        10, ge=1, le=1000, description="latest positive clicks among which a target's partner is"
    )
    partners: int = Field(10, ge=1, le=1000, description="Swing partners of an item at most")
    items_per_user: int = Field(
        100, ge=2, le=10_000, description="positive items of a user that Swing counts, a sample"
    )
    users_per_item: int = Field(
        100, ge=2, le=10_000, description="users of an item that Swing counts, a sample"
    )


class CaptionConfig(Params):
    """The decoder that keeps aligned embeddings near their text (`tokenizer/captions.py`)."""

    weight: float = Field(1.0, ge=0, description="of the caption loss, lambda; 0: none")
    words: int = Field(1024, ge=2, le=2**20, description="rows of the hashed vocabulary")
    length: int = Field(12, ge=1, le=1024, description="words of a title at most")
    width: int = Field(64, ge=2, le=4096, description="model width")
    layers: int = Field(2, ge=1, le=24, description="layers of the decoder")
    heads: int = Field(4, ge=1, le=64, description="attention heads")
    items: int = Field(64, ge=1, le=65_536, description="items a step whose titles are written")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class AlignmentConfig(Params):
    """How item embeddings are aligned with what users do (section 2.1, b to d)."""

    method: Literal["none", "aligned", "side_by_side"] = Field(
        "side_by_side",
        description="none: the fused embedding as it is; aligned: the query transformer's output; "
        "side_by_side: both (ours)",
    )
    queries: int = Field(4, ge=1, le=64, description="queries of the query transformer, N_q")
    width: int = Field(32, ge=2, le=4096, description="of a query, d_t")
    blocks: int = Field(2, ge=1, le=24, description="blocks of the query transformer, N_c")
    heads: int = Field(4, ge=1, le=64, description="attention heads")
    states: int = Field(64, ge=2, le=4096, description="width of the tokens it reads")
    token_dropout: float = Field(
        0.2, ge=0, lt=1, description="tokens hidden in training: new items lack some"
    )
    steps: int = Field(200, ge=1, le=1_000_000, description="training steps")
    pairs: int = Field(512, ge=2, le=65_536, description="item pairs a step (1024 at full size)")
    learning_rate: float = Field(4e-3, gt=0, description="peak of warm-up and cosine decay")
    weight_decay: float = Field(0.05, ge=0, description="on matrices only")
    temperature: float = Field(0.07, gt=0, description="of the contrastive loss, tau")
    held_out: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="share of the pairs that only measure the alignment; the co-occurrence in item "
        "features has counted them",
    )
    caption: CaptionConfig = Field(CaptionConfig(), description="the text decoder")
    pairing: PairsConfig = Field(PairsConfig(), description="the item pairs")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class MemoryConfig(Params):
    """The successor memory from which the decoder may copy (`memory.py`; not in the report)."""

    successors: int = Field(
        16, ge=0, le=1024, description="successors remembered of each item; 0: no memory"
    )
    events: int = Field(4, ge=1, le=64, description="newest events whose successors are recalled")
    window: int = Field(
        3, ge=1, le=64, description="events after an item that count as its successors"
    )


class LazyDecoderConfig(Params):
    """Keys and values of the lazy decoder (`lazy_decoder.py`)."""

    key_layers: int = Field(
        1, ge=1, le=256, description="groups of decoder layers that share keys, L_kv"
    )
    key_heads: int = Field(
        1, ge=1, le=1024, description="heads of keys and values, G_kv; each serves several queries"
    )
    values: Literal["keys", "own"] = Field(
        "keys", description="values are the keys (S_kv = 1), or have a slice of their own (2)"
    )


class FeatureConfig(Params):
    """Side features of items and users (section 2.2); rows of their tables never follow growth."""

    static: bool = Field(
        True, description="the pathway of what is known of the user, where there is such a table"
    )
    static_width: int = Field(
        8, ge=1, description="width of each static feature (64 in the paper at d_model 1024)"
    )
    user_buckets: int = Field(
        0,
        ge=0,
        le=100_000_000,
        description="rows for the user's id, shared by hash; 0: users are known by features alone",
    )
    authors: int = Field(
        65_536,
        ge=0,
        le=100_000_000,
        description="rows for authors; more authors share them by hash; 0: none is read",
    )
    author_width: int = Field(
        16, ge=1, description="width of an author (512 in the paper at d_model 1024)"
    )
    tags: int = Field(
        10_000, ge=0, le=1_000_000, description="most frequent tags that are read; 0: none"
    )
    values: int = Field(
        1_000, ge=1, le=1_000_000, description="most frequent values of a user column that are read"
    )
    content: bool = Field(
        True,
        description="the embedding that semantic ids are made of, beside each event's item; an "
        "addition of ours: ids of few codes tell little of an item",
    )
    min_count: int = Field(
        5, ge=1, description="items with a tag, or train users with a value, for it to be known"
    )


class LifelongConfig(Params):
    """The lifelong pathway (section 2.2): clusters of a long history, read by a QFormer."""

    entries: int = Field(
        0,
        ge=0,
        le=100_000,
        description="newest events that are read as their clusters, L_l (2000 in the paper); "
        "0: no such pathway",
    )
    queries: int = Field(4, ge=1, le=1024, description="queries, N_q (128 in the paper)")
    blocks: int = Field(2, ge=1, le=32, description="QFormer blocks, N_l")
    leaf: int = Field(20, ge=8, le=1024, description="items of a cluster at most, M")


class OneRecSize(Params):
    """What may be chosen of the architecture."""

    architecture: Literal["encoder_decoder", "lazy_decoder"] = Field(
        "encoder_decoder",
        description="the report's, or a decoder that reads the embedded history without an "
        "encoder (arXiv 2508.20900)",
    )
    lazy: LazyDecoderConfig = Field(LazyDecoderConfig(), description="the lazy decoder alone")
    d_model: int = Field(64, ge=2, description="model width, d_model")
    heads: int = Field(4, ge=1, description="attention heads")
    encoder_layers: int = Field(2, ge=1, description="encoder layers, L_enc")
    decoder_layers: int = Field(2, ge=1, description="decoder layers, L_dec")
    ffn: int = Field(128, ge=1, description="hidden width of a feed-forward")
    experts: int = Field(
        0, ge=0, le=4096, description="experts of a mixture; 0: dense feed-forwards of width ffn"
    )
    active_experts: int = Field(2, ge=1, description="experts that compute a position, k")
    gating: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="how an expert's affinity is made of its logit"
    )
    moe_in: Literal["decoder", "both"] = Field(
        "decoder", description="where the mixtures are: in the decoder, or in the encoder too"
    )
    moe_every: int = Field(
        1, ge=1, description="every n-th layer has a mixture, counted back from the last one"
    )
    feature_width: int = Field(
        16, ge=1, description="width of each event feature (128 in the paper at d_model 1024)"
    )
    short_term: int = Field(20, ge=1, description="newest events the encoder reads, L_s")
    positive_feedback: int = Field(
        32, ge=0, description="newest positive events it reads, L_p; 0: no such pathway"
    )
    lifelong: LifelongConfig = Field(LifelongConfig(), description="clusters of long histories")
    features: FeatureConfig = Field(FeatureConfig(), description="what is known beside the events")
    dropout: float = Field(0.1, ge=0, lt=1, description="rate on embeddings and residual branches")
    item_input: Literal["sid", "vid", "both"] = Field(
        "both",
        description="what stands for an item in the input: its semantic id, tied with the decoder; "
        "an embedding of its own (vid), a table of the catalogue's size that a step of training "
        "reads and writes whole; or their sum",
    )
    memory: MemoryConfig = Field(
        MemoryConfig(), description="what followed an item before, for the decoder to copy"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _as_many_experts_as_are_active(self) -> Self:
        if self.experts and self.active_experts > self.experts:
            raise ValueError(
                f"active_experts {self.active_experts} is more than experts {self.experts}"
            )
        return self

    @model_validator(mode="after")
    def _lazy_decoder_shares_evenly(self) -> Self:
        if self.architecture == "lazy_decoder":
            for name, whole, part in (
                ("heads", self.heads, self.lazy.key_heads),
                ("decoder_layers", self.decoder_layers, self.lazy.key_layers),
            ):
                if whole % part:
                    raise ValueError(f"{name} {whole} is no multiple of its lazy groups, {part}")
        return self

    @model_validator(mode="after")
    def _memory_looks_at_events_that_are_read(self) -> Self:
        for name in ("events", "window") if self.memory.successors else ():
            if getattr(self.memory, name) > self.short_term:
                raise ValueError(
                    f"memory.{name} {getattr(self.memory, name)} is more than short_term "
                    f"{self.short_term}"
                )
        return self


class OneRecConfig(OneRecSize):
    """The whole architecture: what is needed to rebuild a model beside its weights.

    The semantic ids and the vocabularies of the features say what `OneRecSize` leaves out.
    """

    num_levels: int = Field(3, ge=1, le=8, description="levels of a semantic id, L_t")
    codebook_size: int = Field(128, ge=2, description="codes a level, N_t")
    num_items: int = Field(1, ge=1, description="catalogue size N")
    author_rows: int = Field(0, ge=0, description="rows of the author table; 0: not read")
    tag_rows: int = Field(0, ge=0, description="rows of the tag table; 0: not read")
    content_width: int = Field(0, ge=0, description="width of the content space; 0: not read")
    static_rows: list[int] = Field([], description="rows of each static feature; none: no pathway")


class TrainConfig(Params):
    """How the model is trained; one rule of optimisation for every size (AdamW 0.9, 0.95)."""

    seed: Seed = Field(0, description="weights, order of samples and dropout")
    epochs: int = Field(20, ge=1, description="passes over the training targets at most")
    max_steps: int = Field(3_000, ge=1, description="steps at most, if that is less")
    batch_size: int = Field(256, ge=1, description="samples a step, of all workers together")
    learning_rate: float = Field(1e-3, gt=0, description="peak of warm-up and cosine decay")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    balance_rate: float = Field(
        1e-3, ge=0, description="step of the experts' selection bias, γ; 0: loads are not balanced"
    )
    targets: Literal["positive", "all"] = Field(
        "positive", description="events that are learned as targets; every event is read"
    )
    evaluate_every: int = Field(
        200, ge=1, description="steps between validations, each of which leaves a checkpoint"
    )
    patience: int = Field(4, ge=1, description="validations without a better score before the end")
    valid_users: int = Field(2_000, ge=1, description="validation users at most (spread evenly)")
    valid_beams: int = Field(32, ge=10, description="beam width of validation, W")
    max_minutes: float = Field(
        10.0, gt=0, description="safety limit, looked at after each validation"
    )
