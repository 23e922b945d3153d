"""SASRec with the counts that the recommender's successor memory has: a fair opponent of it.

A request's score of an item is ``(1 - λ) p(item) + λ c(item)``: p is SASRec's softmax, c the mean
over the newest events of what followed each in training, as shares, newer events weighing more.
λ and how fast weights fall are chosen on validation by NDCG@10.

Shapes: B examples, N items, E newest events, R successors kept of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import Tensor

from components.evaluation.ranking.metrics import gains, target_ranks
from components.training.sasrec.config import SasrecConfig
from components.training.sasrec.data import newest_windows, read_sequences
from components.training.sasrec.model import Sasrec

if TYPE_CHECKING:
    from components.pipeline.artifacts import Input

#: 0 is SASRec alone, 1 the counts alone.
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
#: Weight of an event relative to the next newer one; 0: the newest alone.
FADINGS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOP_N = 20
TABLES = ("item_NR", "weight_NR", "total_N")
BATCH = 512


@dataclass(frozen=True)
class CountedSasrec:
    """SASRec and the counts.

    Attributes:
        item_NR, weight_NR, total_N: as `memory.Successors` has them.
        events: newest events whose successors are counted, E.
    """

    model: Sasrec
    item_NR: Tensor
    weight_NR: Tensor
    total_N: Tensor
    events: int

    @classmethod
    def of(cls, artifacts: Mapping[str, Input]) -> CountedSasrec:
        """SASRec of a run, with the counts that the recommender of the same run serves with."""
        given = artifacts["sasrec"]
        model = Sasrec(SasrecConfig(**json.loads(Path(given.path("config.json")).read_text())))
        model.load_state_dict(given.load_state_dict())
        recommender = Path(artifacts["recommender"].path())
        counts = load_file(recommender / "memory.safetensors")
        memory = json.loads((recommender / "config.json").read_text())["model"]["memory"]
        item_NR, weight_NR, total_N = (counts[name] for name in TABLES)
        return cls(model.eval(), item_NR, weight_NR, total_N, memory["events"])

    def ranks(self, artifacts: Mapping[str, Input]) -> npt.NDArray[np.integer]:
        """1-based rank of every test user's target, 0 beyond `TOP_N`; by user id."""
        share, fading = self.chosen(artifacts["valid_examples"])
        user, rank = [], []
        for examples in artifacts["test_examples"].batches(batch_size=BATCH):
            likely_BN, counted_BN = self.likely(examples), self.counted(examples, fading)
            top_BK = _mixed(likely_BN, counted_BN, share).topk(TOP_N).indices.int().numpy()
            rank.append(target_ranks(top_BK, examples.column("target").to_numpy()))
            user.append(examples.column("user_id").to_numpy())
        order_U = np.argsort(np.concatenate(user), kind="stable")
        return np.concatenate(rank)[order_U]

    def chosen(self, valid: Input) -> tuple[float, float]:
        """The share λ of the counts and their fading with the highest validation NDCG@10."""
        gain: dict[tuple[float, float], float] = dict.fromkeys(product(SHARES, FADINGS), 0.0)
        for examples in valid.batches(batch_size=BATCH):
            likely_BN, target_B = self.likely(examples), examples.column("target").to_numpy()
            for fading in FADINGS:
                counted_BN = self.counted(examples, fading)
                for share in SHARES:
                    top_BK = _mixed(likely_BN, counted_BN, share).topk(10).indices.int().numpy()
                    gain[share, fading] += gains(target_ranks(top_BK, target_B), 10).sum()
        return max(gain, key=gain.__getitem__)

    def likely(self, examples: pa.RecordBatch) -> Tensor:
        """SASRec's probabilities: float32 [B, N]."""
        length = self.model.config.max_length
        history = read_sequences([examples], length)
        batch = newest_windows(history, length, np.arange(len(history)))
        given = (batch.items_BL, batch.positive_BL, batch.length_B)
        with torch.inference_mode():
            return self.model.last_scores(*map(torch.from_numpy, given)).softmax(1)

    def counted(self, examples: pa.RecordBatch, fading: float) -> Tensor:
        """What followed the newest events, in shares: float32 [B, N], rows of sum 1 at most."""
        found_BN = torch.zeros(len(examples), len(self.item_NR))
        for row, newest_E in enumerate(_newest(examples, self.events)):
            weight_E = fading ** torch.arange(len(newest_E), dtype=torch.float32)
            share_ER = self.weight_NR[newest_E] / self.total_N[newest_E, None].clamp_min(1e-9)
            share_ER = share_ER * (weight_E / weight_E.sum())[:, None]
            item_ER = self.item_NR[newest_E].long()
            # An empty place weighs 0.
            found_BN[row].scatter_add_(0, item_ER.clamp_min(0).flatten(), share_ER.flatten())
        return found_BN


def _newest(examples: pa.RecordBatch, events: int) -> Iterator[npt.NDArray[Any]]:
    """Items of the newest events of each history, newest first."""
    for items in examples.column("item_index").to_pylist():
        yield np.array(items[-events:][::-1], np.int64)


def _mixed(likely_BN: Tensor, counted_BN: Tensor, share: float) -> Tensor:
    return (1 - share) * likely_BN + share * counted_BN
