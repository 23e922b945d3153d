"""Parameters and floating-point operations of a vision transformer, counted by formula.

A product of matrices counts two operations for each multiplication that it has; norms, GELU and
softmax count nothing, as in PyTorch's own counter. Sizes are those of the weights, so that a cut
model is counted as it is. With N tokens, width D, H heads of width d and M neurons a block has

    attention 2 (4 N D H d + 2 N² H d),  MLP 2 (2 N D M).

Shapes: L blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from components.training.vit.model import Attention, Block, Mlp, Vit


@dataclass(frozen=True)
class Flops:
    """Operations of one image, by what they compute.

    Attributes:
        patches: embedding of the patches.
        attention_L, mlp_L: the two branches of every block.
        head: scores of the classes.
    """

    patches: int
    attention_L: tuple[int, ...]
    mlp_L: tuple[int, ...]
    head: int

    @property
    def forward(self) -> int:
        return self.patches + sum(self.attention_L) + sum(self.mlp_L) + self.head

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass: what papers on compression call FLOPs."""
        return self.forward // 2


def image_flops(model: Vit) -> Flops:
    """Operations of a forward pass; the model may live on the device ``meta``."""
    N = model.config.tokens
    blocks = [cast(Block, block) for block in model.blocks]
    return Flops(
        patches=(N - 1) * _products(model.patches),
        attention_L=tuple(attention_flops(block.attention, N) for block in blocks),
        mlp_L=tuple(mlp_flops(block.mlp, N) for block in blocks),
        head=_products(model.head),
    )


def attention_flops(attention: Attention, tokens: int) -> int:
    """Operations of a branch of attention for one image."""
    linears = (attention.query, attention.key, attention.value, attention.proj)
    # Each query against each key, and each weight times a value.
    mixing = 2 * 2 * tokens**2 * attention.value.out_features
    return tokens * sum(map(_products, linears)) + mixing


def mlp_flops(mlp: Mlp, tokens: int) -> int:
    """Operations of a branch of the MLP for one image."""
    return tokens * (_products(mlp.fc1) + _products(mlp.fc2))


def parameters(model: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(parameter.numel() for parameter in model.parameters())


def _products(linear: nn.Linear) -> int:
    """Operations of a linear layer for one position."""
    return 2 * linear.weight.numel()
