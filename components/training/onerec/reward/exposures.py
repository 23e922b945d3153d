"""Exposures to learn a preference from: all impressions, and which of their labels are known.

Shapes: S exposures, E events, O objectives, U users, F features of a user.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.pipeline.errors import DataContractError
from components.training.onerec.data import Sequences
from components.training.onerec.reward.features import ItemFeatures, Labels, Requests, requests_at

Int64 = npt.NDArray[np.int64]

SCORE_BATCH = 2048


@dataclass(frozen=True)
class Exposures:
    """Everything that preference models read.

    Attributes:
        sequences: train sequences; every event is an exposure.
        labels: of every event.
        user_UF: features of the users of ``sequences``.
        codes_NQ: semantic ids, as `Sequences` batches carry them; the model does not read them.
    """

    sequences: Sequences
    labels: Labels
    user_UF: Int64
    codes_NQ: npt.NDArray[np.integer]
    items: ItemFeatures

    def requests(self, event_S: Int64, history: int) -> Requests:
        return requests_at(self.sequences, event_S, self.user_UF, self.codes_NQ, history)

    def users(self, event_S: Int64) -> Int64:
        return np.searchsorted(self.sequences.start_U1, event_S, side="right") - 1


@dataclass(frozen=True)
class Cut:
    """Exposures by their use: int64 events, ascending in time; validation comes after training."""

    train_S: Int64
    valid_S: Int64


def cut_by_time(exposures: Exposures, valid_share: float, max_exposures: int) -> Cut:
    """The newest of the fully labelled exposures validate; the newest before them train.

    Raises:
        DataContractError: no label is known, or all exposures have the same time.
    """
    known_EO = exposures.labels.known_EO
    if not known_EO.any():
        raise DataContractError(
            "there is no feedback to learn a preference from",
            where="artifact 'interactions'",
            remedy="bring a source with signals of feedback (click, like, watch time, …)",
        )
    time_E = exposures.sequences.time_ms_E
    count_E = known_EO.sum(1)
    full_S = np.flatnonzero(count_E == count_E.max())
    border = np.quantile(time_E[full_S], 1 - valid_share)
    valid_S = full_S[time_E[full_S] > border]
    train_S = np.flatnonzero((count_E > 0) & (time_E <= border))
    if not len(valid_S) or not len(train_S):
        raise DataContractError(
            f"{len(train_S)} exposures would train and {len(valid_S)} validate: their times do "
            "not tell them apart",
            where="artifact 'interactions'",
            remedy="bring exposures with times",
        )
    train_S = train_S[np.argsort(time_E[train_S], kind="stable")][-max_exposures:]
    return Cut(train_S, valid_S[np.argsort(time_E[valid_S], kind="stable")])


def usable(labels: Labels, event_S: Int64, min_labels: int) -> list[int]:
    """Objectives with at least so many positive and so many negative known labels."""
    known_SO, value_SO = labels.known_EO[event_S], labels.value_EO[event_S]
    positive_O, negative_O = (known_SO & value_SO).sum(0), (known_SO & ~value_SO).sum(0)
    return np.flatnonzero(np.minimum(positive_O, negative_O) >= min_labels).tolist()


def of_objectives(labels: Labels, objectives: list[int]) -> Labels:
    """The labels of some objectives."""
    names = tuple(labels.names[o] for o in objectives)
    return Labels(names, labels.value_EO[:, objectives], labels.known_EO[:, objectives])


def label_rates(labels: Labels, event_S: Int64) -> npt.NDArray[np.float64]:
    """Share of positive among the known labels, never quite 0 or 1."""
    known_SO, value_SO = labels.known_EO[event_S], labels.value_EO[event_S]
    rate_O: npt.NDArray[np.float64] = (value_SO.sum(0) + 1) / (known_SO.sum(0) + 2)
    return rate_O


def scoring_batches(
    exposures: Exposures, event_S: Int64, history: int, device: torch.device
) -> Iterator[tuple[Requests, Tensor]]:
    """Requests of some exposures with their items int64 [B, 1]."""
    for start in range(0, len(event_S), SCORE_BATCH):
        event_B = event_S[start : start + SCORE_BATCH]
        item_B1 = torch.from_numpy(exposures.sequences.item_E[event_B].astype(np.int64))[:, None]
        requests = exposures.requests(event_B, history)
        yield requests.to(device), item_B1.to(device)
