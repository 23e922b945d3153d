"""The methods under evaluation behind one face: histories in, item lists out.

Shapes: B examples, K length of a list, N items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from components.evaluation.ranking.baselines import Bigrams, rank_by_bigrams
from components.training.onerec.data import read_sequences as read_onerec_sequences
from components.training.onerec.recommender import Recommender
from components.training.sasrec.data import newest_windows, read_sequences
from components.training.sasrec.model import Sasrec

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


class Ranker(Protocol):
    """Ranks the whole catalogue for the histories of a batch of examples."""

    def rank(self, examples: pa.RecordBatch, k: int) -> Int32:
        """int32 [B, k] item indices, best first, -1 padded; the target is never looked at."""
        ...


@dataclass(frozen=True)
class PopularityRanker:
    """The same most popular items for everybody."""

    popularity: Int32

    def rank(self, examples: pa.RecordBatch, k: int) -> Int32:
        return np.tile(self.popularity[:k], (len(examples), 1))


@dataclass(frozen=True)
class BigramRanker:
    """What followed the last item most often; with ``positive_context`` the last positive one."""

    bigrams: Bigrams
    popularity: Int32
    positive_context: bool

    def rank(self, examples: pa.RecordBatch, k: int) -> Int32:
        return rank_by_bigrams(
            self.bigrams, self.popularity, last_items(examples, self.positive_context), k
        )


@dataclass(frozen=True)
class SasrecRanker:
    """SASRec by the scores of all items."""

    model: Sasrec

    def rank(self, examples: pa.RecordBatch, k: int) -> Int32:
        length = self.model.config.max_length
        history = read_sequences([examples], length)
        batch = newest_windows(history, length, np.arange(len(history)))
        with torch.inference_mode():
            scores_BN = self.model.last_scores(
                torch.from_numpy(batch.items_BL),
                torch.from_numpy(batch.positive_BL),
                torch.from_numpy(batch.length_B),
            )
            return scores_BN.topk(min(k, scores_BN.shape[1]), dim=1).indices.int().numpy()


@dataclass
class OneRecRanker:
    """The generative recommender by constrained beam search; keeps the scores of its last call."""

    recommender: Recommender
    beams: int
    scores_BK: Float32 | None = None

    def rank(self, examples: pa.RecordBatch, k: int) -> Int32:
        sequences = read_onerec_sequences([examples])
        lists = self.recommender.rank(
            sequences, sequences.example_targets(), beams=self.beams, top_n=k
        )
        items, scores = zip(*lists, strict=True)
        self.scores_BK = np.concatenate(scores)
        return np.concatenate(items)


def last_items(examples: pa.RecordBatch, positive: bool) -> npt.NDArray[np.int64]:
    """int64 [B]: item index of the last (positive) event of each history, -1 for none."""
    column = examples.column("item_index")
    length = column.value_lengths().to_numpy(zero_copy_only=False)
    item_E = column.flatten().to_numpy()
    wanted_E = np.ones(len(item_E), bool)
    if positive:
        wanted_E = examples.column("positive").flatten().to_numpy(zero_copy_only=False)
    user_E = np.repeat(np.arange(len(length)), length)
    place = np.flatnonzero(wanted_E)
    last_B = np.full(len(length), -1, np.int64)
    # Later events of a user overwrite earlier ones.
    last_B[user_E[place]] = item_E[place]
    return last_B


def shuffled_histories(examples: pa.RecordBatch, seed: int) -> pa.RecordBatch:
    """The same examples with the histories dealt out to other users: a control."""
    order = pa.array(np.random.default_rng(seed).permutation(len(examples)))
    kept = ("user_id", "target", "target_timestamp_ms")
    columns = {
        name: column if name in kept else column.take(order)
        for name, column in zip(examples.schema.names, examples.columns)
    }
    return pa.RecordBatch.from_pydict(columns)


def seen_items(lists_BK: Int32, examples: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """bool [B, K]: which entries of the lists are in the history of the example."""
    column = examples.column("item_index")
    length = column.value_lengths().to_numpy(zero_copy_only=False)
    item_E = column.flatten().to_numpy().astype(np.int64)
    stride = int(max(lists_BK.max(initial=0), item_E.max(initial=0))) + 1
    history = item_E + np.repeat(np.arange(len(length)), length) * stride
    wanted = lists_BK.astype(np.int64) + np.arange(len(lists_BK))[:, None] * stride
    return np.isin(wanted, history) & (lists_BK >= 0)
