"""Exposures to learn a preference from: all impressions, and which of their labels are known.

Shapes: S exposures, E events, O objectives, U users, F features of a user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from components.data.hashing import splitmix64
from components.pipeline.errors import DataContractError
from components.training.onerec.data import Sequences
from components.training.onerec.reward.features import (
    ItemFeatures,
    Labels,
    Requests,
    item_features,
    known_signals,
    labels_of,
    requests_at,
    user_features,
)

if TYPE_CHECKING:
    from components.training.onerec.reward.config import PScoreConfig, PScoreSize

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]

SCORE_BATCH = 2048


@dataclass(frozen=True)
class Exposures:
    """Everything that preference models read.

    Attributes:
        sequences: train sequences; every event is an exposure.
        labels: of every event.
        user_UF: features of the users of ``sequences``.
        codes_NQ: semantic ids, as `Sequences` batches carry them; the model does not read them, so
            those of a source's tables are zeros.
    """

    sequences: Sequences
    labels: Labels
    user_UF: Int64
    codes_NQ: npt.NDArray[np.integer]
    items: ItemFeatures

    @classmethod
    def of(
        cls,
        sequences: Sequences,
        keys: pa.Table,
        interactions: Iterable[pa.RecordBatch],
        item_ids: Int64,
        items: pa.Table,
        users: pa.Table,
        content_NC: Tensor,
        size: PScoreSize,
    ) -> Exposures:
        """Exposures of the tables of a source.

        Args:
            keys: the train sequences' ``user_id, item_index, timestamp_ms``.
            interactions, items, users: as `features.py` reads them.
            item_ids: of the catalogue, ascending.
        """
        known_E = known_signals(keys, interactions, item_ids)
        return cls(
            sequences,
            labels_of(sequences, known_E),
            user_features(keys["user_id"].to_numpy(), users, size.user_buckets),
            np.zeros((len(item_ids), 1), np.int32),
            item_features(item_ids, items, content_NC, size),
        )

    def requests(self, event_S: Int64, history: int) -> Requests:
        return requests_at(self.sequences, event_S, self.user_UF, self.codes_NQ, history)

    def users(self, event_S: Int64) -> Int64:
        return np.searchsorted(self.sequences.start_U1, event_S, side="right") - 1


@dataclass(frozen=True)
class Cut:
    """Exposures by their use: int64 events, ascending in time.

    Validation comes after training; where a source tells so few times apart that no moment cuts it,
    both have exposures of one time, of different users but for one.
    """

    train_S: Int64
    valid_S: Int64


def cut_by_time(
    exposures: Exposures,
    valid_share: float,
    *,
    objectives: list[int] | None = None,
    min_labels: int = 1,
) -> Cut:
    """The newest of the fully labelled exposures validate; all before them may train.

    Fully labelled are exposures of which the most labels are known, of those numbers of labels that
    enough exposures have: a few rows that know more than all others move no border.

    Args:
        objectives: whose labels count; None: all.
        min_labels: exposures that shall validate, at least.

    Raises:
        DataContractError: no label is known, or of one exposure alone.
    """
    known_EO = exposures.labels.known_EO
    count_E = (known_EO if objectives is None else known_EO[:, objectives]).sum(1)
    known_S = _by_time(exposures, np.flatnonzero(count_E))
    if len(known_S) < 2:
        raise DataContractError(
            f"there is no feedback to learn a preference from: labels are known of {len(known_S)} "
            "exposures",
            where="artifact 'interactions'",
            remedy="bring a source with signals of feedback (click, like, watch time, …)",
        )
    # So many labels, or more, are known of …
    exposures_C = np.bincount(count_E[known_S])[::-1].cumsum()[::-1]
    enough_C = np.flatnonzero(exposures_C >= max(2, min_labels / valid_share))
    full_S = known_S[count_E[known_S] >= enough_C.max(initial=1)]
    first = np.flatnonzero(known_S == full_S[_border(exposures, full_S, valid_share)])[0]
    valid_S = known_S[first:][np.isin(known_S[first:], full_S)]
    return Cut(known_S[:first], valid_S)


def _by_time(exposures: Exposures, event_S: Int64) -> Int64:
    """Events in order of time, those of one time by user, and users by a hash of their ids."""
    sequences = exposures.sequences
    user_S = exposures.users(event_S)
    lot_S = splitmix64(sequences.user_id_U[user_S].astype(np.uint64))
    return event_S[np.lexsort((event_S, user_S, lot_S, sequences.time_ms_E[event_S]))]


def _border(exposures: Exposures, full_S: Int64, valid_share: float) -> int:
    """Where the newest share of exposures in order of time begins: 1 … S - 1.

    At the change of time next to it, unless that would make the share twice or half as large.
    """
    wanted = min(max(1, round(valid_share * len(full_S))), len(full_S) - 1)
    time_S = exposures.sequences.time_ms_E[full_S]
    change = 1 + np.flatnonzero(np.diff(time_S))
    newer = len(full_S) - change
    change = change[(2 * newer >= wanted) & (newer <= 2 * wanted)]
    exact = len(full_S) - wanted
    return int(change[np.abs(change - exact).argmin()]) if len(change) else exact


@dataclass(frozen=True)
class Material:
    """What two preference models learn from, and what both are measured on.

    Attributes:
        objectives: with enough labels for either model.
        cuts: exposures of each model, by the name of its users.
        valid_S: validation exposures of all users.
    """

    objectives: list[int]
    cuts: Mapping[str, Cut]
    valid_S: Int64


def divide(exposures: Exposures, groups: Mapping[str, Bool], config: PScoreConfig) -> Material:
    """Exposures of disjoint users for each model, and the objectives that either can learn.

    Users whom no model learns from have no part in validation by which weights are chosen.

    Args:
        groups: users of each model, bool [U] each (`split_users` without those held out).
    """
    labels = exposures.labels
    objectives = usable(labels, np.arange(len(labels.known_EO)), config.min_labels)
    nothing_S = np.zeros(0, np.int64)
    if not objectives:
        return Material([], dict.fromkeys(groups, Cut(nothing_S, nothing_S)), nothing_S)
    cut = cut_by_time(
        exposures,
        config.valid_share,
        objectives=objectives,
        min_labels=config.min_labels,
    )
    any_U = np.logical_or.reduce(list(groups.values()))
    # Only then the newest: what nobody learns from takes no place.
    learned_S = cut.train_S[any_U[exposures.users(cut.train_S)]][-config.max_exposures :]
    user_S, choosing_V = exposures.users(learned_S), any_U[exposures.users(cut.valid_S)]
    cuts = {
        name: Cut(learned_S[own_U[user_S]], cut.valid_S[choosing_V])
        for name, own_U in groups.items()
    }
    learned = [set(usable(labels, own.train_S, config.min_labels)) for own in cuts.values()]
    shared = [o for o in objectives if all(o in own for own in learned)]
    return Material(shared, cuts, cut.valid_S)


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
