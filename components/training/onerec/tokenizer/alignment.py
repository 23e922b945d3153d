"""Compresses an item's tokens and aligns the result with what users do (arXiv 2506.13695, 2.1 b-d).

A query transformer reads the tokens M of an item and leaves M~. It is trained on pairs of items
that belong together: an in-batch contrastive loss L_I2I draws the M~ of a pair together, and a text
decoder that writes the title from M~ (L_cap) keeps it near its content; the loss is
``L_I2I + lambda · L_cap``. The report says nothing of the similarity, its temperature, lambda and
what happens to duplicates: here it is the cosine of the flattened M~, and a pair's own items are
never its negatives.

Knows tokens, pairs and titles; nothing of users, and no quantiser.

Shapes: N items, M tokens of an item, t their width, B pairs of a batch, q queries, d their width,
D = q · d width of the aligned embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.training.onerec.qformer import QFormer
from components.training.onerec.tokenizer.captions import PADDING, CaptionDecoder

if TYPE_CHECKING:
    from components.training.onerec.config import AlignmentConfig

#: Items encoded at a time.
ROWS = 4096
WARMUP = 20
LOG_EVERY_STEPS = 20
#: Retrieval is measured at so many neighbours, on so many pairs at most.
RECALL_AT, RECALL_PAIRS = 10, 4096


class Aligner(nn.Module):
    """Item tokens to compressed tokens M~.

    Each kind of token has a vector of its own, added to it; one learned state beside them is always
    there, so that an item of which nothing is known has something to be read.
    """

    def __init__(self, kinds: int, token_width: int, config: AlignmentConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(token_width, config.states)
        self.kind = nn.Parameter(torch.empty(kinds, config.states))
        self.always = nn.Parameter(torch.empty(config.states))
        for weight in (self.kind, self.always):
            nn.init.normal_(weight, std=0.02)
        self.norm = nn.RMSNorm(config.states)
        self.qformer = QFormer(
            queries=config.queries,
            width=config.width,
            states=config.states,
            blocks=config.blocks,
            heads=config.heads,
            ffn=4 * config.width,
        )

    def forward(self, token_BMt: Tensor, mask_BM: Tensor) -> Tensor:
        """Float [B, q, d]; ``mask_BM`` bool, True = the item has this token."""
        # Tokens have length 1: without the gain their entries would vanish beside the kinds'.
        state_BMs = self.project(token_BMt * math.sqrt(token_BMt.shape[-1])) + self.kind
        always_B1s = self.always.expand(len(token_BMt), 1, -1)
        state_BSs = self.norm(torch.cat([always_B1s, state_BMs], 1))
        mask_BS = F.pad(mask_BM, (1, 0), value=True)
        compressed_Bqd: Tensor = self.qformer(state_BSs, mask_BS)
        return compressed_Bqd

    @torch.no_grad()
    def embed(self, token_NMt: Tensor, mask_NM: Tensor) -> Tensor:
        """Flattened M~ of many items: float32 [N, D]."""
        parts = zip(token_NMt.split(ROWS), mask_NM.split(ROWS), strict=True)
        return torch.cat([self(token, mask).flatten(1) for token, mask in parts])


def contrastive_loss(
    left_BD: Tensor, right_BD: Tensor, left_B: Tensor, right_B: Tensor, temperature: float
) -> Tensor:
    """L_I2I: mean cross-entropy of finding a pair's right item among those of the batch, nats.

    Args:
        left_BD, right_BD: embeddings of the pairs' items.
        left_B, right_B: which items they are. Another pair's right item that is this pair's own
            left or right item is no negative.
    """
    score_BB = F.normalize(left_BD, dim=1) @ F.normalize(right_BD, dim=1).T / temperature
    same_BB = (right_B == right_B[:, None]) | (right_B == left_B[:, None])
    same_BB.fill_diagonal_(False)
    return F.cross_entropy(
        score_BB.masked_fill(same_BB, -torch.inf), torch.arange(len(left_B), device=left_B.device)
    )


@dataclass(frozen=True)
class ItemTokens:
    """Tokens of the catalogue (the artifact ``item_tokens``).

    Attributes:
        token_NMt: float32.
        mask_NM: bool, True = the item has this token.
        caption_NT: int64 of `captions.caption_ids`.
    """

    token_NMt: Tensor
    mask_NM: Tensor
    caption_NT: Tensor

    @property
    def captioned(self) -> Tensor:
        """Items that have a title: int64."""
        return (self.caption_NT != PADDING).any(1).nonzero()[:, 0]


def align(
    items: ItemTokens,
    pair_P2: npt.NDArray[np.integer],
    config: AlignmentConfig,
    seed: int,
    log: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
    times_P: npt.NDArray[np.float64] | None = None,
) -> Aligner:
    """Train an aligner on item pairs.

    Args:
        pair_P2: item indices of pairs, at least one pair.
        log: receives ``alignment_loss`` (L_I2I) and ``caption_loss`` (L_cap) with their step.
        times_P: how often D_pair holds each pair, to be drawn so often; None: once.
    """
    random = np.random.default_rng(seed)
    up_to_P = np.cumsum(np.ones(len(pair_P2)) if times_P is None else times_P)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, kinds, token_width = items.token_NMt.shape
        model = Aligner(kinds, token_width, config)
        decoder = CaptionDecoder(config.queries, config.width, config.caption)
    captioned = items.captioned if config.caption.weight else items.captioned[:0]
    parameters = [*model.parameters(), *(decoder.parameters() if len(captioned) else ())]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        drawn_B = random.random(config.pairs) * up_to_P[-1]
        pair_B2 = pair_P2[np.searchsorted(up_to_P, drawn_B, side="right")]
        # Similarity goes both ways, so either item may be the one that is looked for.
        turned_B = random.random(len(pair_B2)) < 0.5
        pair_B2 = np.where(turned_B[:, None], pair_B2[:, ::-1], pair_B2)
        written = np.zeros(0, np.int64)
        if len(captioned):
            written = random.integers(0, len(captioned), config.caption.items)
            written = captioned.numpy()[written]
        item_b, place = np.unique(np.concatenate([pair_B2.ravel(), written]), return_inverse=True)
        kept_bM = torch.from_numpy(
            random.random((len(item_b), items.mask_NM.shape[1])) >= config.token_dropout
        )
        chosen = torch.from_numpy(item_b)
        compressed_bqd = model(items.token_NMt[chosen], items.mask_NM[chosen] & kept_bM)
        place_B2, place_c = np.split(place, [pair_B2.size])
        left_B, right_B = torch.from_numpy(place_B2.reshape(-1, 2)).T
        flat_bD = compressed_bqd.flatten(1)
        loss = contrastive_loss(
            flat_bD[left_B], flat_bD[right_B], left_B, right_B, config.temperature
        )
        told = {"alignment_loss": loss.detach()}
        if len(captioned):
            words_cT = items.caption_NT[torch.from_numpy(written)]
            caption = decoder(compressed_bqd[torch.from_numpy(place_c)], words_cT)
            loss = loss + config.caption.weight * caption
            told["caption_loss"] = caption.detach()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if (step + 1) % LOG_EVERY_STEPS == 0 or step + 1 == config.steps:
            log({name: float(value) for name, value in told.items()}, step + 1)
    return model.eval()


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to a tenth of the peak."""
    warm = (step + 1) / WARMUP
    return min(1.0, warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def hold_out(pair_P2: npt.NDArray[np.integer], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which pairs only measure: bool [P], the same for both directions of a pair."""
    ends = np.sort(pair_P2, axis=1)
    _, number_P = np.unique(ends, axis=0, return_inverse=True)
    lot = np.random.default_rng(seed).random(int(number_P.max(initial=-1)) + 1)
    is_measured_P: npt.NDArray[np.bool_] = lot[number_P.ravel()] < share
    return is_measured_P


def retrieval_recall(x_ND: Tensor, pair_P2: npt.NDArray[np.integer]) -> float:
    """Share of pairs whose right item is among the ten nearest (cosine) of the left one.

    An item that is as near as others stands behind them: embeddings that tell nothing find nothing.
    """
    chosen = np.unique(
        np.linspace(0, len(pair_P2) - 1, min(len(pair_P2), RECALL_PAIRS)).astype(int)
    )
    unit_ND = F.normalize(x_ND, dim=1)
    hits = 0
    for part in np.array_split(pair_P2[chosen], max(1, len(chosen) // 256)):
        left_b, right_b = torch.from_numpy(part.astype(np.int64)).T
        score_bN = unit_ND[left_b] @ unit_ND.T
        score_bN[torch.arange(len(part)), left_b] = -torch.inf
        wanted_b1 = score_bN.gather(1, right_b[:, None])
        # Among those that are as near is the right item itself.
        hits += int(((score_bN >= wanted_b1).sum(1) <= RECALL_AT).sum())
    return hits / max(1, len(chosen))
