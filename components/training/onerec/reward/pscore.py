"""P-Score: one personalised score of an item for a user (arXiv 2506.13695, section 2.4).

A SIM-like backbone (arXiv 2006.05639): the item attends to the user's newest events. One tower an
objective reads user, item and attended history, each with its own loss; the towers' hidden states
with user and item go through the fusion to one logit p, learned against every objective's label.
The search stage of SIM is left out: all events that are read are attended to. Items enter by
content, hashed id, author, tags and duration, so any item can be scored.

Shapes: B requests, G items of a request, L events, O objectives, D width, H hidden width of a
tower, N items, C width of content, F features of a user.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.training.onerec.data import (
    DURATION_BUCKETS,
    FEEDBACK_BITS,
    GAP_BUCKETS,
    WATCH_BUCKETS,
    Events,
)
from components.training.onerec.reward.features import HOURS, ItemFeatures, Requests

if TYPE_CHECKING:
    from components.training.onerec.reward.config import PScoreSize

#: Relative to item, user and attended history: two products beside the three.
INPUTS = 5


class ItemEmbedding(nn.Module):
    """Items by their features: the sum of what each says, normalised."""

    def __init__(self, size: PScoreSize, items: ItemFeatures) -> None:
        super().__init__()
        for field in fields(items):
            self.register_buffer(field.name, getattr(items, field.name), persistent=False)
        width = items.content_NC.shape[1]
        self.content = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size.d_model))
        self.id = nn.Embedding(size.item_buckets, size.d_model)
        self.author = nn.Embedding(size.author_buckets, size.d_model, padding_idx=0)
        self.tag = nn.EmbeddingBag(size.tag_buckets, size.d_model, mode="mean", padding_idx=0)
        self.duration = nn.Embedding(DURATION_BUCKETS, size.d_model)
        self.norm = nn.LayerNorm(size.d_model)
        for table in (self.id, self.author, self.tag, self.duration):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, item_X: Tensor) -> Tensor:
        """Float [..., D] of int64 item indices [...]."""
        # Each item is embedded once, however often a batch has it.
        distinct_N, place_X = item_X.unique(return_inverse=True)
        table = {
            f.name: cast(Tensor, getattr(self, f.name))[distinct_N] for f in fields(ItemFeatures)
        }
        embedded_ND = self.norm(
            self.content(table["content_NC"])
            + self.id(table["id_N"])
            + self.author(table["author_N"])
            + self.tag(table["tags_NT"])
            + self.duration(table["duration_N"])
        )
        return F.embedding(place_X, embedded_ND)


class PScore(nn.Module):
    """Towers of all objectives and their fusion.

    Args:
        objectives: names, in the order of the towers.
    """

    def __init__(self, size: PScoreSize, objectives: tuple[str, ...], items: ItemFeatures) -> None:
        super().__init__()
        self.size, self.objectives = size, objectives
        D, H, towers = size.d_model, size.tower_hidden, len(objectives)
        self.items = ItemEmbedding(size, items)
        self.feedback = nn.Parameter(0.05 * torch.randn(FEEDBACK_BITS, D))
        self.gap = nn.Embedding(GAP_BUCKETS, D)
        self.watch = nn.Embedding(WATCH_BUCKETS, D)
        self.hour = nn.Embedding(HOURS, D)
        self.user = nn.EmbeddingBag(size.user_buckets, D, mode="sum", padding_idx=0)
        for table in (self.gap, self.watch, self.hour, self.user):
            nn.init.normal_(table.weight, std=0.05)
        #: Stands beside the events, so that a user without any has something to attend to.
        self.no_event = nn.Parameter(torch.zeros(D))
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, 2 * D)
        self.mean_history = nn.Linear(D, D)
        self.user_norm = nn.LayerNorm(D)
        self.dropout = nn.Dropout(size.dropout)
        self.tower_in = nn.Linear(INPUTS * D, towers * H)
        self.tower_mid = nn.Parameter(torch.randn(towers, H, H) * (2 / H) ** 0.5)
        self.tower_mid_bias = nn.Parameter(torch.zeros(towers, H))
        self.tower_out = nn.Parameter(torch.randn(towers, H) * H**-0.5)
        self.tower_bias = nn.Parameter(torch.zeros(towers))
        self.fusion = nn.Sequential(
            nn.Linear(towers * H + 2 * D, size.fusion_hidden),
            nn.ReLU(),
            nn.Linear(size.fusion_hidden, 1),
        )
        bits = 2 ** torch.arange(FEEDBACK_BITS, dtype=torch.int32)
        self.register_buffer("bits", bits, persistent=False)

    def forward(self, requests: Requests, item_BG: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the towers float [B, G, O] and of the fusion float [B, G]."""
        hidden_BGOH, fused_BGX = self.states(requests, item_BG)
        tower_BGO = (hidden_BGOH * self.tower_out).sum(-1) + self.tower_bias
        return tower_BGO, self.fusion(fused_BGX)[..., 0]

    def states(self, requests: Requests, item_BG: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the towers [B, G, O, H]; the input of the fusion [B, G, O·H + 2D]."""
        G = item_BG.shape[1]
        event_BLD, mask_BL = self._history(requests.events)
        item_BGD = self.items(item_BG)
        attended_BGD = self._attend(item_BGD, event_BLD, mask_BL)
        weight_BL1 = mask_BL[..., None].to(event_BLD.dtype)
        mean_BD = (event_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        user_BD = self.user_norm(
            self.user(requests.user_BF) + self.hour(requests.hour_B) + self.mean_history(mean_BD)
        )
        user_BGD = user_BD[:, None].expand(-1, G, -1)
        x_BGX = self.dropout(
            torch.cat(
                [user_BGD, item_BGD, attended_BGD, item_BGD * attended_BGD, item_BGD * user_BGD], -1
            )
        )
        h_BGOH = F.relu(self.tower_in(x_BGX)).unflatten(-1, (len(self.objectives), -1))
        h_BGOH = torch.einsum("bgoh,ohi->bgoi", h_BGOH, self.tower_mid) + self.tower_mid_bias
        h_BGOH = F.relu(h_BGOH)
        return h_BGOH, torch.cat([h_BGOH.flatten(2), user_BGD, item_BGD], -1)

    def _history(self, events: Events) -> tuple[Tensor, Tensor]:
        set_BLb = (events.feedback_BL[..., None] & cast(Tensor, self.bits)) != 0
        event_BLD = (
            self.items(events.item_BL)
            + set_BLb.to(self.feedback.dtype) @ self.feedback
            + self.gap(events.gap_BL.int())
            + self.watch(events.watch_BL.int())
        )
        B = len(event_BLD)
        event_BLD = torch.cat([self.no_event.expand(B, 1, -1), event_BLD], 1)
        real_B1 = torch.ones(B, 1, dtype=torch.bool, device=event_BLD.device)
        return event_BLD, torch.cat([real_B1, events.mask_BL], 1)

    def _attend(self, item_BGD: Tensor, event_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        heads = self.size.heads
        q_BHGd = self.query(item_BGD).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_BHLd, v_BHLd = (
            x.transpose(1, 2)
            for x in self.key_value(event_BLD).unflatten(-1, (2, heads, -1)).unbind(2)
        )
        mixed_BHGd = F.scaled_dot_product_attention(
            q_BHGd, k_BHLd, v_BHLd, attn_mask=mask_BL[:, None, None]
        )
        return mixed_BHGd.transpose(1, 2).flatten(2)


def fused_loss(
    p_S: Tensor,
    tower_SO: Tensor,
    label_SO: Tensor,
    known_SO: Tensor,
    weight_O: Tensor,
    towers: float,
) -> Tensor:
    """``Σ_xtr w^xtr · BCE(y^xtr, p) + towers · Σ_xtr BCE(y^xtr, tower^xtr)`` (section 2.4).

    Each BCE is the mean over the exposures whose label is known; one without any counts 0.
    """
    label_SO, seen_SO = label_SO.to(p_S.dtype), known_SO.to(p_S.dtype)
    share_SO = seen_SO / seen_SO.sum(0).clamp_min(1)
    fused_SO = F.binary_cross_entropy_with_logits(
        p_S[:, None].expand_as(tower_SO), label_SO, reduction="none"
    )
    own_SO = F.binary_cross_entropy_with_logits(tower_SO, label_SO, reduction="none")
    return (share_SO * (weight_O * fused_SO + towers * own_SO)).sum()


def save_pscore(model: PScore, folder: Path, name: str) -> None:
    """Write one model as ``<name>.safetensors``; the features of its items as ``items.safetensors``
    and its architecture as ``config.json``, which all models of a folder share."""
    from safetensors.torch import save_file

    save_weights(model, folder / f"{name}.safetensors")
    features = {f.name: getattr(model.items, f.name).contiguous() for f in fields(ItemFeatures)}
    save_file(features, folder / "items.safetensors")
    facts = {"model": model.size.model_dump(mode="json"), "objectives": model.objectives}
    (folder / "config.json").write_text(json.dumps(facts))


def save_weights(model: PScore, file: Path) -> None:
    """Write the weights alone; a kill leaves no half of the file."""
    from safetensors.torch import save_file

    weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    unfinished = file.with_name(f"{file.name}.unfinished")
    save_file(weights, unfinished)
    unfinished.replace(file)


def load_pscore(folder: Path, name: str, device: str = "cpu") -> PScore:
    """Read a model of `save_pscore`, ready to score."""
    from safetensors.torch import load_file

    from components.training.onerec.reward.config import PScoreSize

    facts = json.loads((folder / "config.json").read_text())
    items = ItemFeatures(**load_file(folder / "items.safetensors"))
    model = PScore(PScoreSize(**facts["model"]), tuple(facts["objectives"]), items)
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return model.to(device).eval()
