"""Floating-point operations of a forward pass, counted by formula (arXiv 2506.13695).

``Σ_layers (2 · active weights of products · positions + 4 · T_q · T_kv · d)`` for pathways,
QFormer, encoder, decoder and heads. Look-ups, norms and softmax count nothing, nor do experts that
do not compute; training is three times the forward pass. It is the count of model FLOPs
utilisation, which belongs to a peak of *dense* products.

Shapes: S encoder positions, T decoder positions, L events read, q queries, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from components.training.onerec.encoder import Pathway
from components.training.onerec.experts import MixtureOfExperts
from components.training.onerec.model import OneRec
from components.training.onerec.qformer import QFormer

TRAINING_FACTOR = 3


@dataclass(frozen=True)
class Flops:
    """Operations of one sample (or request), by what they compute.

    Attributes:
        pathways: dense layers over events, and QFormers.
        encoder: layers over the context's positions.
        keys_values: the context's keys and values for the decoder.
        decoder: layers over the positions that are written, their attention to the context too.
        head: scores of the codes.
    """

    pathways: int
    encoder: int
    keys_values: int
    decoder: int
    head: int

    @property
    def context(self) -> int:
        """What the history costs, however much is written."""
        return self.pathways + self.encoder + self.keys_values

    @property
    def target(self) -> int:
        """What writing costs."""
        return self.decoder + self.head

    @property
    def forward(self) -> int:
        return self.context + self.target

    @property
    def training(self) -> int:
        """Forward and backward."""
        return TRAINING_FACTOR * self.forward


def sample_flops(model: OneRec, *, positions: int | None = None) -> Flops:
    """One training sample with a full history: Q positions [BOS, s¹ … s^(Q-1)], teacher-forced.

    Args:
        model: may live on the device ``meta``.
        positions: encoder positions S; None: as many as the model has.
    """
    T = model.config.num_levels
    return _flops(model, T, T * T, positions)


def request_flops(model: OneRec, beams: int, *, positions: int | None = None) -> Flops:
    """One request's beam search: the context once, then BOS and ``beams`` positions a level, or as
    many as there are prefixes, if these are fewer."""
    T, scores = 0, 0
    for depth in range(model.config.num_levels):
        width = min(beams, model.config.codebook_size**depth)
        T, scores = T + width, scores + width * (depth + 1)
    return _flops(model, T, scores, positions)


def _flops(model: OneRec, T: int, scores: int, positions: int | None) -> Flops:
    """For T decoder positions that make some scores of self-attention a layer and head."""
    D = model.config.d_model
    S = len(model.position) if positions is None else positions
    entries = model.config.lifelong.entries
    pathways = sum(_pathway(cast(Pathway, p), entries) for p in model.pathways.values())
    encoder = sum(S * _products(layer) + 4 * S * S * D for layer in model.encoder)
    lazy = model.lazy_context
    own_keys_values = 4 * D * D if lazy is None else 0
    keys_values = S * (len(model.decoder) * own_keys_values if lazy is None else _products(lazy))
    decoder = sum(
        T * (_products(layer) - own_keys_values) + 4 * D * (scores + T * S)
        for layer in model.decoder
    )
    head = 2 * T * D * model.config.codebook_size
    return Flops(pathways, encoder, keys_values, decoder, head)


def _products(module: nn.Module) -> int:
    """Operations of a module's products for one position."""
    count = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            count += 2 * part.weight.numel()
        elif isinstance(part, MixtureOfExperts):
            expert = part.gate_up[0].numel() + part.down[0].numel()
            count += 2 * (part.active * expert + part.router.numel())
    return count


def _pathway(pathway: Pathway, entries: int) -> int:
    """A pathway's dense layers over its events, and what its QFormer does with them."""
    module = cast(nn.Module, pathway)
    formers = [part for part in module.modules() if isinstance(part, QFormer)]
    L = entries if formers else pathway.num_positions
    within = sum(_products(former) for former in formers)
    # Bits of feedback select rows by a product.
    bits = sum(2 * p.numel() for n, p in module.named_parameters() if n.endswith("events.feedback"))
    return L * (_products(module) - within + bits) + sum(_qformer(f, L) for f in formers)


def _qformer(former: QFormer, L: int) -> int:
    q, D = former.query.shape
    count = 0
    for block in former.blocks:
        key_value = 2 * cast(nn.Linear, block.key_value).weight.numel()
        count += L * key_value + q * (_products(block) - key_value) + 4 * q * L * D
    return count
