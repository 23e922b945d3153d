"""Groups of items that a policy generates, with the log-probability it gave each at that time.

Shapes: B users, G items of a group, Q levels, K codebook size, W beams, C children of a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from components.training.onerec.attention import KeysValues
from components.training.onerec.data import Batch
from components.training.onerec.decode import MINUS_INFINITY, DeviceTrie, beam_search, children
from components.training.onerec.model import OneRec

Sampler = Literal["beam", "constrained", "sample"]


@dataclass(frozen=True)
class Group:
    """Generated items.

    Attributes:
        sid_BGQ: int64 codes.
        item_BG: int64 index of the most popular item of each id; -1: no item has it (illegal).
        log_old_BG: float32 log π_old of the whole id, under the policy over all codes.
    """

    sid_BGQ: Tensor
    item_BG: Tensor
    log_old_BG: Tensor

    @property
    def legal_BG(self) -> Tensor:
        return self.item_BG >= 0

    def cpu(self) -> Group:
        """The same in main memory, to be sent to another process."""
        return Group(self.sid_BGQ.cpu(), self.item_BG.cpu(), self.log_old_BG.cpu())


def generate(
    model: OneRec,
    trie: DeviceTrie,
    leaf_codes_VQ: Tensor,
    batch: Batch,
    size: int,
    sampler: Sampler,
    generator: torch.Generator,
) -> Group:
    """A group of items for every request.

    ``beam``: the most probable legal ids, not a sample of the policy, so that the estimate is
    biased, as the report accepts; where there are fewer legal ids than G the rest is illegal.
    ``constrained``: independent draws among legal codes. ``sample``: draws over all codes, which
    alone say how often the policy itself is legal. Duplicates are kept.

    Args:
        leaf_codes_VQ: int64 codes of the legal ids (`Trie.leaf_codes`).
    """
    model.eval()
    if sampler == "beam":
        beams = beam_search(model, trie, batch, size)
        missing = size - beams.leaf_BW.shape[1]
        leaf_BG = F.pad(beams.leaf_BW, (0, missing), value=-1)
        sid_BGQ = leaf_codes_VQ[leaf_BG.clamp_min(0)]
        log_BG = F.pad(beams.score_BW, (0, missing), value=MINUS_INFINITY)
    else:
        sid_BGQ, leaf_BG, log_BG = sample(model, trie, batch, size, sampler, generator)
    return Group(sid_BGQ, first_items(trie, leaf_BG), log_BG)


def first_items(trie: DeviceTrie, leaf_BG: Tensor) -> Tensor:
    """The most popular item of each leaf; -1 for leaf -1."""
    item_BG = trie.items[trie.item_ptr[leaf_BG.clamp_min(0)]].long()
    return item_BG.masked_fill(leaf_BG < 0, -1)


@torch.inference_mode()
def sample(
    model: OneRec,
    trie: DeviceTrie,
    batch: Batch,
    size: int,
    sampler: Literal["constrained", "sample"],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent draws, code after code.

    Returns:
        codes int64 [B, G, Q], their leaves int64 [B, G] (-1: illegal) and log-probabilities over
        all codes float32 [B, G].
    """
    z_BSD, mask_B11S = model.encode(batch)
    contexts = model.contexts(z_BSD)
    recall = model.recall(batch)
    B, device = len(z_BSD), z_BSD.device
    past: list[list[KeysValues]] = [[] for _ in model.decoder]
    row_BG = model.start_rows(B)
    node_BG = torch.zeros(B, size, dtype=torch.long, device=device)
    log_BG = torch.zeros(B, size, device=device)
    codes = []
    for depth in range(model.config.num_levels):
        x_BGD = model.step(row_BG, past, contexts, mask_B11S)
        log_p_BGK = F.log_softmax(model.logits(x_BGD, depth, recall), dim=-1)
        log_p_BGK = log_p_BGK.expand(-1, size, -1)
        chance_BGK = log_p_BGK.exp()
        child_BGC, real_BGC = children(trie, depth, node_BG.clamp_min(0))
        alive_BG1 = (node_BG >= 0)[..., None]
        real_BGC = alive_BG1.expand_as(child_BGC) if real_BGC is None else real_BGC & alive_BG1
        code_BGC = trie.code[depth][child_BGC].long()
        if sampler == "constrained":
            chance_BGC = chance_BGK.gather(2, code_BGC) * real_BGC
            # Where every child underflows they are drawn alike.
            chance_BGC = torch.where(chance_BGC.sum(-1, True) > 0, chance_BGC, real_BGC.float())
            code_BG = code_BGC.gather(2, _draw(chance_BGC, generator))[..., 0]
        else:
            code_BG = _draw(chance_BGK, generator)[..., 0]
        log_BG = log_BG + log_p_BGK.gather(2, code_BG[..., None])[..., 0]
        found_BGC = real_BGC & (code_BGC == code_BG[..., None])
        place_BG1 = found_BGC.int().argmax(-1, keepdim=True)
        node_BG = child_BGC.gather(2, place_BG1)[..., 0].long().masked_fill(~found_BGC.any(-1), -1)
        codes.append(code_BG)
        parent_BG = torch.zeros_like(code_BG) if depth == 0 else None
        recall = recall.follow(parent_BG, code_BG, depth)
        row_BG = code_BG + depth * model.config.codebook_size
    return torch.stack(codes, -1), node_BG, log_BG


def _draw(chance_BGX: Tensor, generator: torch.Generator) -> Tensor:
    """One index of the last dimension, drawn on the generator's device: int64 [B, G, 1].

    By the exponential race, whose cost does not depend on the number of draws.
    """
    race_BGX = torch.empty(chance_BGX.shape, device=generator.device).exponential_(
        generator=generator
    )
    return (chance_BGX / race_BGX.to(chance_BGX.device)).argmax(-1, keepdim=True)


def item_log_probs(model: OneRec, batch: Batch, sid_BGQ: Tensor) -> Tensor:
    """``log π(o | u) = Σ_l log π(s^l | s^<l, u)`` of whole groups, with gradient: float32 [B, G].

    The encoder runs once a user, and all items of a group share its keys and values.
    """
    log_p_XQ = model.sid_log_probs(batch, sid_BGQ.flatten(0, 1))
    return log_p_XQ.float().sum(1).unflatten(0, sid_BGQ.shape[:2])
