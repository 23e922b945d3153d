"""Small image classifiers made of one cell, in the plan of NAS-Bench-201 (arXiv 2001.00326).

A stem, then the cell at C, 2C and 4C channels with a halving of the edges between, normalisation,
the mean over the image and a linear layer. Beside the published network there is one cell a stage
instead of five, and a single convolution halves instead of a residual block, around which an image
could bypass a bad cell. Operations are the published ones: a convolution is ReLU, convolution
without bias, batch normalisation; pooling leaves the border out of its means. Edges that lead
nowhere are not built.

Shapes: B batch, C channels, H, W edges of the image, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.curation.asp.nas_cell import CONV_1X1, CONV_3X3, NONE, POOL, SKIP, Architecture

#: Colours of an image.
COLOURS = 3


class Output(NamedTuple):
    """What the network says of a batch.

    Attributes:
        logit_BK: float.
        feature_BD: float, what the last layer reads.
    """

    logit_BK: Tensor
    feature_BD: Tensor


class Cost(NamedTuple):
    """What a network costs.

    Attributes:
        parameters: numbers that are trained.
        flops: multiply-accumulates of convolutions and linear layers for one image; these
            NAS-Bench-201 calls FLOPs.
    """

    parameters: int
    flops: int


def convolution(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """ReLU, convolution and normalisation; at a stride of 1 the image keeps its size."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out),
    )


class Pool(nn.Module):
    """Means of 3 × 3 pixels, at the border of as many as there are.

    As ``AvgPool2d(3, 1, 1, count_include_pad=False)``, by a convolution of each channel alone: on a
    processor that takes a fifth of the time, and pooling took more than any other operation.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("one_C133", torch.ones(channels, 1, 3, 3), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        one_C133 = self.get_buffer("one_C133")
        count_11HW = F.conv2d(x_BCHW.new_ones(1, 1, *x_BCHW.shape[2:]), one_C133[:1], padding=1)
        return F.conv2d(x_BCHW, one_C133, padding=1, groups=len(one_C133)) / count_11HW


def operation(name: str, channels: int) -> nn.Module:
    """An edge's operation, [B, C, H, W] to [B, C, H, W]. ``none`` has no module."""
    if name == SKIP:
        return nn.Identity()
    if name == POOL:
        return Pool(channels)
    return convolution(channels, channels, {CONV_1X1: 1, CONV_3X3: 3}[name])


class Cell(nn.Module):
    """One cell.

    Attributes:
        edges: operations by ``source-target``, of edges from which the output is reached.
    """

    def __init__(self, architecture: Architecture, channels: int) -> None:
        super().__init__()
        self._targets: Mapping[int, tuple[int, ...]] = live_edges(architecture)
        self._last = architecture.nodes - 1
        self.edges = nn.ModuleDict(
            {
                f"{source}-{target}": operation(
                    dict(architecture.incoming[target - 1])[source], channels
                )
                for target, sources in self._targets.items()
                for source in sources
            }
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        node_N = {0: x_BCHW}
        nothing = torch.zeros_like(x_BCHW)
        for target, sources in self._targets.items():
            brought = [
                self.edges[f"{source}-{target}"](node_N.get(source, nothing)) for source in sources
            ]
            node_N[target] = sum(brought[1:], start=brought[0])
        return node_N.get(self._last, nothing)


def live_edges(architecture: Architecture) -> dict[int, tuple[int, ...]]:
    """Sources by target, ascending, of edges that are not ``none`` and lead to the output."""
    last = architecture.nodes - 1
    wanted, found = {last}, dict[int, tuple[int, ...]]()
    for target in range(last, 0, -1):
        if target not in wanted:
            continue
        incoming = architecture.incoming[target - 1]
        sources = tuple(source for source, name in incoming if name != NONE)
        wanted.update(sources)
        if sources:
            found[target] = sources
    return dict(sorted(found.items()))


class CellNetwork(nn.Module):
    """A stem, three stages of a cell, and a classifier."""

    def __init__(self, architecture: Architecture, channels: int, classes: int) -> None:
        super().__init__()
        stem = nn.Conv2d(COLOURS, channels, 3, padding=1, bias=False)
        self.body = nn.Sequential(
            nn.Sequential(stem, nn.BatchNorm2d(channels)),
            Cell(architecture, channels),
            convolution(channels, 2 * channels, 3, stride=2),
            Cell(architecture, 2 * channels),
            convolution(2 * channels, 4 * channels, 3, stride=2),
            Cell(architecture, 4 * channels),
            nn.Sequential(nn.BatchNorm2d(4 * channels), nn.ReLU()),
        )
        self.head = nn.Linear(4 * channels, classes)

    def forward(self, x_BCHW: Tensor) -> Output:
        """Logits, and the features they are made of. Images are [B, 3, H, W]."""
        feature_BD = self.body(x_BCHW).mean((2, 3))
        return Output(self.head(feature_BD), feature_BD)


def build(architecture: Architecture, channels: int = 16, classes: int = 10) -> CellNetwork:
    """The network of a cell, with fresh weights of PyTorch's generator."""
    return CellNetwork(architecture, channels, classes)


def cost(network: CellNetwork, edge: int) -> Cost:
    """Of a network for images of ``edge`` times ``edge`` pixels."""
    flops = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal flops
        # Of a value as many as a row of the weights has numbers.
        flops += output.numel() * module.get_parameter("weight")[0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    was_training = network.training
    with torch.no_grad():
        network.eval()(next(network.parameters()).new_zeros(1, COLOURS, edge, edge))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return Cost(sum(p.numel() for p in network.parameters()), flops)
