"""How good a preference model is, objective by objective, on exposures after its training.

Shapes: S exposures, O objectives, W sets of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from components.training.onerec.reward.auc import (
    Auc,
    auc,
    auc_difference,
    auc_interval,
    gauc_interval,
)
from components.training.onerec.reward.exposures import (
    Exposures,
    of_objectives,
    scoring_batches,
    usable,
)
from components.training.onerec.reward.features import Labels
from components.training.onerec.reward.pscore import PScore

if TYPE_CHECKING:
    from components.training.onerec.reward.config import PScoreConfig

Int64 = npt.NDArray[np.int64]

#: Fixed sums that the fusion is compared with.
SUMS = 200


@torch.inference_mode()
def score_exposures(
    model: PScore, exposures: Exposures, event_S: Int64
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Logits of towers float32 [S, O] and of p float32 [S]."""
    scored = [
        model(requests, item_B1)
        for requests, item_B1 in scoring_batches(
            exposures, event_S, model.size.history, model.no_event.device
        )
    ]
    tower = torch.cat([tower_BGO[:, 0] for tower_BGO, _ in scored])
    p = torch.cat([p_BG[:, 0] for _, p_BG in scored])
    return tower.cpu().numpy(), p.cpu().numpy()


def objective_auc(labels: Labels, event_S: Int64, o: int, score_S: npt.NDArray) -> float:
    known_S = labels.known_EO[event_S, o]
    return auc(score_S[known_S], labels.value_EO[event_S, o][known_S])


def objective_auc_interval(
    labels: Labels, event_S: Int64, o: int, score_S: npt.NDArray, user_S: Int64, seed: int
) -> Auc:
    known_S = labels.known_EO[event_S, o]
    label_S = labels.value_EO[event_S, o][known_S]
    return auc_interval(score_S[known_S], label_S, user_S[known_S], seed)


def objective_difference(
    labels: Labels,
    event_S: Int64,
    o: int,
    score_S: npt.NDArray,
    reference_S: npt.NDArray,
    user_S: Int64,
    seed: int,
) -> Auc:
    known_S = labels.known_EO[event_S, o]
    label_S = labels.value_EO[event_S, o][known_S]
    return auc_difference(score_S[known_S], reference_S[known_S], label_S, user_S[known_S], seed)


@dataclass(frozen=True)
class Measured:
    """What one objective says of a preference model, on validation.

    Attributes:
        positives: known positive labels.
        tower_auc, tower_gauc: of the objective's own tower.
        p_auc: of the fused score.
        sum_auc: of the best fixed sum of all towers' scores.
    """

    positives: int
    exposures: int
    tower_auc: Auc
    tower_gauc: Auc
    p_auc: Auc
    sum_auc: float


def measure_pscore(
    model: PScore, exposures: Exposures, valid_S: Int64, config: PScoreConfig, seed: int
) -> dict[str, Measured]:
    """AUCs by objective.

    The fixed sum adds the towers' probabilities with one set of weights for everybody: of `SUMS`
    random sets (and each tower alone) the one with the highest mean AUC on these exposures, over
    the objectives with enough labels. It is chosen and measured on the same exposures, which
    favours it.
    """
    labels = of_objectives(
        exposures.labels, [exposures.labels.names.index(n) for n in model.objectives]
    )
    tower_SO, p_S = score_exposures(model, exposures, valid_S)
    users = exposures.users(valid_S)
    judged = usable(labels, valid_S, config.min_labels)
    rng = np.random.default_rng([seed, 2])
    towers = len(model.objectives)
    rate_O = np.maximum(labels.value_EO[valid_S].mean(0), 1e-6)
    weights = np.concatenate([np.eye(towers), rng.dirichlet(np.full(towers, 0.5), SUMS)])
    sums_WS = (weights / rate_O) @ (1 / (1 + np.exp(-tower_SO.astype(np.float64)))).T
    by_sum = [[objective_auc(labels, valid_S, o, s) for o in judged] for s in sums_WS]
    best_sum = sums_WS[int(np.mean(by_sum, axis=1).argmax())] if judged else sums_WS[0]
    found = {}
    for o, name in enumerate(model.objectives):
        known_S = labels.known_EO[valid_S, o]
        label_S = labels.value_EO[valid_S, o][known_S]
        found[name] = Measured(
            positives=int(label_S.sum()),
            exposures=int(known_S.sum()),
            tower_auc=objective_auc_interval(labels, valid_S, o, tower_SO[:, o], users, seed),
            tower_gauc=gauc_interval(tower_SO[known_S, o], label_S, users[known_S], seed),
            p_auc=objective_auc_interval(labels, valid_S, o, p_S, users, seed),
            sum_auc=objective_auc(labels, valid_S, o, best_sum),
        )
    return found
