"""Architecture, augmentation and training of a vision transformer, and its named sizes.

The sizes ``deit_*`` are those of DeiT (arXiv 2012.12877, table 1) without distillation token; the
optimiser and regularisation follow its table 9 where a field below has its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from components.pipeline.params_base import Params, Seed


class VitConfig(Params):
    """The architecture: everything needed to rebuild a model beside its weights."""

    image_size: int = Field(32, ge=1, description="height and width of an image, pixels")
    channels: int = Field(3, ge=1, description="colours of a pixel")
    patch: int = Field(4, ge=1, description="height and width of a patch, pixels")
    d_model: int = Field(96, ge=1, description="model width D")
    heads: int = Field(3, ge=1, description="attention heads of a block, H")
    layers: int = Field(6, ge=1, description="blocks, L")
    mlp: int = Field(192, ge=1, description="hidden neurons of a block's MLP, M")
    classes: int = Field(10, ge=2, description="classes")
    dropout: float = Field(0.0, ge=0, lt=1, description="rate on embeddings and residual branches")
    stochastic_depth: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="how often a sample skips a branch of the last block; rises linearly from 0 in "
        "the first one",
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of heads {self.heads}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch {self.patch}")
        return self

    @property
    def tokens(self) -> int:
        """Positions of the sequence: the patches and the CLS token."""
        return (self.image_size // self.patch) ** 2 + 1


def _deit(d_model: int, heads: int) -> VitConfig:
    return VitConfig(
        image_size=224,
        patch=16,
        d_model=d_model,
        heads=heads,
        layers=12,
        mlp=4 * d_model,
        classes=1000,
        stochastic_depth=0.1,
    )


#: ``cifar`` is ours: 65 tokens, as many heads and blocks as a cut can tell apart, and small enough
#: for processor cores.
SIZES: Mapping[str, VitConfig] = {
    "deit_tiny": _deit(192, 3),
    "deit_small": _deit(384, 6),
    "deit_base": _deit(768, 12),
    "cifar": VitConfig(),
}


class AugmentConfig(Params):
    """How an image is changed each time it is trained on."""

    crop_padding: int = Field(
        4, ge=0, description="black pixels around the image, of which a window is cut at random"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of a mirror image")
    erasing: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability that a rectangle becomes the mean colour (0.25 in DeiT)",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description="how much of another training image is added, alpha of the Beta distribution "
        "(0.8 in DeiT); 0: none",
    )


class TrainConfig(Params):
    """How a model is trained: AdamW (0.9, 0.999), linear warm-up, cosine decay to nothing."""

    seed: Seed = Field(0, description="weights, augmentation, dropout and stochastic depth")
    epochs: int = Field(20, ge=1, description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images a step, of all workers together")
    learning_rate: float = Field(1e-3, gt=0, description="peak of warm-up and cosine decay")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(0.05, ge=0, description="on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of a target that all classes have alike"
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="changes of the training images")
    evaluate_every: int = Field(
        1, ge=1, description="epochs between validations; the last epoch always has one"
    )
