"""Constrained beam search over the array trie, and exhaustive scoring of every legal id.

Only children of live nodes are ever candidates, so every result is legal, the search is exact
whenever the beam is as wide as there are prefixes, and nothing depends on the order of a Python
loop over beams: there is none. The encoder runs once a request; the keys and values of its output
are shared by all beams and never copied for them (arXiv 2506.13695, section 4.5 and appendix B).

Shapes: B batch, W beams, C candidates of a beam, K codebook size, Q levels, S encoder positions,
D width, V nodes of a depth, N items of a list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from components.training.onerec.attention import KeysValues
from components.training.onerec.data import Batch, Sequences, assemble
from components.training.onerec.model import OneRec
from components.training.onerec.trie import Trie

MINUS_INFINITY = -math.inf
#: Bytes of logits that exhaustive scoring holds at a time.
SCORE_BYTES = 64 << 20


@dataclass(frozen=True)
class DeviceTrie:
    """The arrays of a `Trie` as int32 tensors where the model is: about 20 bytes an item.

    Attributes:
        offset_C: int64, for each depth ``0 … C - 1``, with C the most children of a node there.
        even: for each depth, whether all nodes have that many, as the root always does.
    """

    child_ptr: tuple[Tensor, ...]
    code: tuple[Tensor, ...]
    item_ptr: Tensor
    items: Tensor
    offset_C: tuple[Tensor, ...]
    even: tuple[bool, ...]

    @classmethod
    def on(cls, trie: Trie, device: str | torch.device = "cpu") -> DeviceTrie:
        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            tuple(map(move, trie.child_ptr)),
            tuple(map(move, trie.code)),
            move(trie.item_ptr),
            move(trie.items),
            tuple(move(np.arange(trie.fan_out(depth))) for depth in range(trie.num_levels)),
            tuple(bool(np.ptp(np.diff(ptr)) == 0) for ptr in trie.child_ptr),
        )


@dataclass(frozen=True)
class Beams:
    """Semantic ids of every request, best first.

    Attributes:
        leaf_BW: int64 leaf of the trie; -1 where there are fewer legal ids than beams.
        score_BW: float32 log-probability of the whole id; -inf there.
    """

    leaf_BW: Tensor
    score_BW: Tensor


@torch.inference_mode()
def beam_search(model: OneRec, trie: DeviceTrie, batch: Batch, width: int) -> Beams:
    """The ``width`` most probable legal semantic ids of every request.

    A level's probabilities are over all its codes, also illegal ones (section 2.3), so a score is
    the model's log-probability of the id. Which of equal scores stay at the edge of the beam is
    not defined.
    """
    z_BSD, mask_B11S = model.encode(batch)
    contexts = model.contexts(z_BSD)
    recall = model.recall(batch)
    B, device = len(z_BSD), z_BSD.device
    past: list[list[KeysValues]] = [[] for _ in model.decoder]
    row_BW = model.start_rows(B)
    node_BW = torch.zeros(B, 1, dtype=torch.long, device=device)
    score_BW = torch.zeros(B, 1, device=device)
    for depth, codes in enumerate(trie.code):
        x_BWD = model.step(row_BW, past, contexts, mask_B11S)
        log_p_BWK = F.log_softmax(model.logits(x_BWD, depth, recall), dim=-1)
        child_BWC, real_BWC = children(trie, depth, node_BW)
        candidate_BWC = log_p_BWK.gather(2, codes[child_BWC].long()) + score_BW[..., None]
        if real_BWC is not None:
            candidate_BWC = candidate_BWC.masked_fill_(~real_BWC, MINUS_INFINITY)
        score_BW, chosen_BW = _top(candidate_BWC.flatten(1), width)
        node_BW = child_BWC.flatten(1).gather(1, chosen_BW)
        if depth + 1 < len(trie.code):
            parent_BW = chosen_BW // candidate_BWC.shape[2]
            past = [_follow(own, parent_BW) for own in past]
            code_BW = codes[node_BW].long()
            recall = recall.follow(parent_BW, code_BW, depth)
            row_BW = code_BW + depth * model.config.codebook_size
    return Beams(node_BW.masked_fill_(score_BW == MINUS_INFINITY, -1), score_BW)


def children(trie: DeviceTrie, depth: int, node_BW: Tensor) -> tuple[Tensor, Tensor | None]:
    """Children of live nodes, each row filled up to the largest fan-out, and which are real.

    None in place of the second where all are.
    """
    ptr_V1 = trie.child_ptr[depth]
    child_BWC = ptr_V1[node_BW][..., None] + trie.offset_C[depth]
    if trie.even[depth]:
        return child_BWC, None
    real_BWC = child_BWC < ptr_V1[node_BW + 1][..., None]
    return child_BWC.clamp_max_(len(trie.code[depth]) - 1), real_BWC


def _top(score_BX: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` best of every row, best first, equal ones in order of place."""
    width = min(width, score_BX.shape[1])
    score_BW, place_BW = score_BX.topk(width, dim=1)
    place_BW, order_BW = place_BW.sort(dim=1)
    score_BW, by_score_BW = score_BW.gather(1, order_BW).sort(dim=1, descending=True, stable=True)
    return score_BW, place_BW.gather(1, by_score_BW)


def _follow(own: list[KeysValues], parent_BW: Tensor) -> list[KeysValues]:
    """Each new beam takes over the earlier positions of its parent; shared ones stay shared."""
    index = parent_BW[:, :, None, None]
    return [
        (k, v)
        if k.shape[1] == 1
        else (
            k.gather(1, index.expand(-1, -1, *k.shape[2:])),
            v.gather(1, index.expand(-1, -1, *v.shape[2:])),
        )
        for k, v in own
    ]


@torch.inference_mode()
def score_catalogue(model: OneRec, trie: DeviceTrie, batch: Batch) -> Tensor:
    """Log-probability of every legal semantic id: float32 [B, V] in leaf order.

    Teacher-forced over the whole tree: a prefix is computed once for all ids below it. The oracle
    of the beam, and an exact alternative where the catalogue is small.
    """
    z_BSD, mask_B11S = model.encode(batch)
    contexts = model.contexts(z_BSD)
    recall = model.recall(batch)
    B, K, device = len(z_BSD), model.config.codebook_size, z_BSD.device
    past: list[list[KeysValues]] = [[] for _ in model.decoder]
    row_BV = model.start_rows(B)
    score_BV = torch.zeros(B, 1, device=device)
    step = max(1, SCORE_BYTES // (4 * B * max(K, 4 * model.config.d_model)))
    for depth, codes in enumerate(trie.code):
        codes = codes.long()
        parent_C = torch.repeat_interleave(trie.child_ptr[depth].diff()).long()
        parts, grown = [], []
        for start in range(0, row_BV.shape[1], step):
            part = slice(start, start + step)
            # A copy of the lists: every part appends its own newest position.
            own = [[(_cut(k, part), _cut(v, part)) for k, v in layer] for layer in past]
            x_BvD = model.step(row_BV[:, part], own, contexts, mask_B11S)
            match_BvM = _cut(recall.match_BWM, part)
            logits_BvK = model.logits(x_BvD, depth, replace(recall, match_BWM=match_BvM))
            log_p_BvK = F.log_softmax(logits_BvK, dim=-1)
            first, last = trie.child_ptr[depth][
                [start, min(start + step, row_BV.shape[1])]
            ].tolist()
            below = slice(first, last)
            parts.append(log_p_BvK[:, parent_C[below] - start, codes[below]])
            grown.append([layer[-1] for layer in own])
        score_BV = score_BV[:, parent_C] + torch.cat(parts, 1)
        if depth + 1 < len(trie.code):
            for number, layer in enumerate(past):
                keys, values = zip(*(part[number] for part in grown), strict=True)
                layer.append((torch.cat(keys, 1), torch.cat(values, 1)))
            parent_BC = parent_C.expand(B, -1)
            past = [_follow(layer, parent_BC) for layer in past]
            recall = recall.follow(parent_BC, codes.expand(B, -1), depth)
            row_BV = (codes + depth * K).expand(B, -1)
    return score_BV


def _cut(x: Tensor, part: slice) -> Tensor:
    return x if x.shape[1] == 1 else x[:, part]


def resolve_items(trie: DeviceTrie, beams: Beams, top_n: int) -> tuple[Tensor, Tensor]:
    """The first items of the semantic ids: each id's items, most popular first, then the next's.

    Returns:
        int32 [B, N] item indices (-1 where there are fewer) and their ids' scores (-inf there).
    """
    leaf_BW = beams.leaf_BW.clamp_min(0)
    count_BW = (trie.item_ptr[leaf_BW + 1] - trie.item_ptr[leaf_BW]) * (beams.leaf_BW >= 0)
    end_BW = count_BW.cumsum(1)
    place_BN = torch.arange(top_n, device=leaf_BW.device).expand(len(leaf_BW), -1).contiguous()
    beam_BN = torch.searchsorted(end_BW, place_BN, right=True)
    real_BN = beam_BN < leaf_BW.shape[1]
    beam_BN = beam_BN.clamp_max(leaf_BW.shape[1] - 1)
    within_BN = place_BN - (end_BW - count_BW).gather(1, beam_BN)
    entry_BN = trie.item_ptr[leaf_BW.gather(1, beam_BN)] + within_BN
    item_BN = trie.items[entry_BN.clamp_max(len(trie.items) - 1)].masked_fill(~real_BN, -1)
    score_BN = beams.score_BW.gather(1, beam_BN).masked_fill(~real_BN, MINUS_INFINITY)
    return item_BN.int(), score_BN


def recommend(
    model: OneRec,
    trie: DeviceTrie,
    sequences: Sequences,
    event_S: np.ndarray,
    codes_NQ: np.ndarray,
    *,
    width: int,
    top_n: int,
    batch_size: int = 128,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Item lists for many requests, a batch at a time, in the order of ``event_S``.

    Args:
        event_S: target events of `sequences` (``sequences.example_targets()``).

    Yields:
        int32 [B, top_n] item indices, best first, -1 padded; float32 [B, top_n] scores.
    """
    device = model.position.device
    if model.training:
        # It visits every module, which a request would feel.
        model.eval()
    for start in range(0, len(event_S), batch_size):
        batch = assemble(sequences, event_S[start : start + batch_size], codes_NQ, model.config)
        for events in batch.pathways.values():
            # Items that came after training share the row behind the model's own.
            events.item_BL.clamp_max_(model.config.num_items)
        beams = beam_search(model, trie, batch.to(device), width)
        items, scores = resolve_items(trie, beams, top_n)
        yield items.cpu().numpy(), scores.cpu().numpy()
