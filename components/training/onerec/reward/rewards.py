"""What a generated item is worth: preference, format and industrial rewards (section 2.4, 4.3.3).

Shapes: B users, G items generated for each, N items of the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from components.training.onerec.reward.features import Requests
from components.training.onerec.reward.pscore import PScore

#: Scores of this many (user, item) pairs are computed at a time.
PAIRS = 16_384


@torch.inference_mode()
def preference_reward(model: PScore, requests: Requests, item_BG: Tensor) -> Tensor:
    """P-Score ``σ(p)`` of every item: float32 [B, G]; NaN where the item is -1 (illegal)."""
    step = max(1, PAIRS // item_BG.shape[1])
    parts = []
    for start in range(0, len(item_BG), step):
        rows = slice(start, start + step)
        _, p_BG = model(requests.part(rows), item_BG[rows].clamp_min(0))
        parts.append(p_BG.sigmoid())
    return torch.cat(parts).masked_fill(item_BG < 0, torch.nan)


def format_advantage(
    legal_BG: Tensor,
    log_old_BG: Tensor,
    k: int,
    choice: Literal["random", "top"],
    generator: torch.Generator,
) -> Tensor:
    """Advantages of the format reward: float32 [B, G], 1 for a chosen legal sample, else 0.

    ``random`` draws K of the G samples; ``top`` takes the most probable ones, the arm that the
    report shows to fail. Illegal ones are dropped, never pushed down: pushing down squeezes the
    mass onto what is already probable (section 2.4).
    """
    if choice == "random":
        lot_BG = torch.rand(legal_BG.shape, generator=generator)
    else:
        lot_BG = log_old_BG.float().cpu()
    chosen_BK = lot_BG.topk(min(k, lot_BG.shape[1]), 1).indices.to(legal_BG.device)
    drawn_BG = torch.zeros_like(legal_BG).scatter(1, chosen_BK, True)
    return (drawn_BG & legal_BG).float()


def flagged_items(
    item_ids: npt.NDArray[np.int64], items: pa.Table, tags: list[str]
) -> tuple[Tensor, list[str]]:
    """Items with any of some tags, bool [N], and those of the tags that no item has.

    Args:
        item_ids: of the catalogue.
        items: ``item_id, tags``.
    """
    of_items = items["tags"].combine_chunks()
    row, word = pc.list_parent_indices(of_items).to_numpy(), of_items.flatten()
    hit = pc.is_in(word, pa.array(tags, pa.string())).to_numpy(zero_copy_only=False)
    flagged_N = np.isin(item_ids, items["item_id"].to_numpy()[row[hit]])
    unknown = set(tags).difference(word.unique().to_pylist())
    return torch.from_numpy(flagged_N), sorted(unknown)


@dataclass
class IndustrialReward:
    """Makes flagged items (viral farms) worth less while they take too large a share (4.3.3).

    Attributes:
        flagged_N: bool.
        share: of flagged items from which it acts, f.
        alpha: factor on their rewards, α.
        memory: how much of the measured share a step keeps.
        exposed: share of flagged items among what was generated lately; None before any, and
            where no item is flagged.
    """

    flagged_N: Tensor
    share: float
    alpha: float
    memory: float = 0.9
    exposed: float | None = None

    def __call__(self, reward_BG: Tensor, item_BG: Tensor) -> Tensor:
        """``r' = α r`` for flagged items if their share exceeds f, which is brought up to date."""
        if not self.flagged_N.any():
            return reward_BG
        legal_BG = item_BG >= 0
        flagged_BG = self.flagged_N[item_BG.clamp_min(0)] & legal_BG
        now = float(flagged_BG.sum() / legal_BG.sum().clamp_min(1))
        before = now if self.exposed is None else self.exposed
        self.exposed = self.memory * before + (1 - self.memory) * now
        if self.exposed <= self.share:
            return reward_BG
        return torch.where(flagged_BG, self.alpha * reward_BG, reward_BG)
