"""Chooses the weights w^xtr of the fused loss on validation (arXiv 2506.13695, section 2.4).

The rule: candidates are equal weights and random ones; under each the fusion alone is trained again
on the towers' states. Of the candidates under which p's AUC falls for no objective, the one with
the highest mean AUC wins. A fall is one beyond doubt: its paired 95 % interval over users is below
zero. The report asks that all AUCs rise; of rare objectives no finite validation can say that.
Objectives with too few labels to be judged keep the mean weight.

Shapes: S exposures, O objectives, W candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from components.training.onerec.reward.exposures import (
    Cut,
    Exposures,
    label_rates,
    scoring_batches,
    usable,
)
from components.training.onerec.reward.features import Labels
from components.training.onerec.reward.pscore import PScore, fused_loss
from components.training.onerec.reward.pscore_measure import objective_auc, objective_difference

if TYPE_CHECKING:
    from components.training.onerec.reward.config import PScoreConfig

Int64 = npt.NDArray[np.int64]

FUSION_EXPOSURES, FUSION_STEPS, FUSION_BATCH, FUSION_RATE = 40_000, 200, 1024, 3e-3
#: Candidates are ``rate^-a · e^u``: a from 0 to 1, u from -log RANGE to log RANGE.
RANGE = 4.0


def search_weights(
    model: PScore, exposures: Exposures, labels: Labels, cut: Cut, config: PScoreConfig, seed: int
) -> tuple[npt.NDArray[np.float64], list[float]]:
    """The chosen weights, and the mean AUC of every candidate, equal weights first; equal weights
    and no AUC where validation can judge no objective."""
    judged = usable(labels, cut.valid_S, config.min_labels)
    if not judged:
        return np.ones(len(labels.names)), []
    rng = np.random.default_rng([seed, 1])
    drawn_S = cut.train_S
    if len(drawn_S) > FUSION_EXPOSURES:
        drawn_S = np.sort(rng.choice(drawn_S, FUSION_EXPOSURES, replace=False))
    with torch.inference_mode():
        inputs_train, inputs_valid = (
            torch.cat(
                [
                    model.states(*batch)[1][:, 0]
                    for batch in scoring_batches(
                        exposures, part, model.size.history, model.no_event.device
                    )
                ]
            )
            for part in (drawn_S, cut.valid_S)
        )
    count = len(labels.names)
    rate_O = label_rates(labels, cut.train_S)
    candidates = [np.ones(count)]
    for _ in range(config.candidates - 1):
        lot_O = rng.uniform(-np.log(RANGE), np.log(RANGE), count)
        drawn_O = rate_O ** -rng.uniform(0, 1) * np.exp(lot_O)
        candidates.append(_judged_alone(drawn_O, judged))
    p_valid = [
        _fusion_of(model, inputs_train.clone(), inputs_valid.clone(), labels, drawn_S, w, seed)
        for w in candidates
    ]
    users = exposures.users(cut.valid_S)
    mean_W = np.array(
        [np.mean([objective_auc(labels, cut.valid_S, o, p) for o in judged]) for p in p_valid]
    )

    def falls(w: int) -> bool:
        pair = p_valid[w], p_valid[0]
        return any(
            objective_difference(labels, cut.valid_S, o, *pair, users, seed).high < 0
            for o in judged
        )

    return candidates[choose_weights(mean_W, falls)], mean_W.tolist()


def choose_weights(mean_W: npt.NDArray[np.float64], falls: Callable[[int], bool]) -> int:
    """Which candidate: the highest mean AUC, of the first one and those that lower no objective.

    Args:
        mean_W: of every candidate.
        falls: whether a candidate lowers any objective.
    """
    by_mean = np.argsort(-mean_W, kind="stable").tolist()
    return next(w for w in by_mean if w == 0 or not falls(w))


def _judged_alone(weight_O: npt.NDArray[np.float64], judged: list[int]) -> npt.NDArray[np.float64]:
    """Weights whose mean is 1, where objectives that nobody judges have 1."""
    kept_O = np.ones(len(weight_O))
    kept_O[judged] = weight_O[judged] / weight_O[judged].mean()
    return kept_O


def _fusion_of(
    model: PScore,
    inputs_train: Tensor,
    inputs_valid: Tensor,
    labels: Labels,
    event_S: Int64,
    weight_O: npt.NDArray[np.float64],
    seed: int,
) -> npt.NDArray[np.float32]:
    """p of the validation exposures after training a fusion alone with some weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shapes = [layer for layer in model.fusion if isinstance(layer, nn.Linear)]
        fusion = nn.Sequential(
            nn.Linear(shapes[0].in_features, shapes[0].out_features),
            nn.ReLU(),
            nn.Linear(shapes[1].in_features, 1),
        ).to(inputs_train.device)
        optimiser = torch.optim.AdamW(fusion.parameters(), lr=FUSION_RATE)
        weights = torch.from_numpy(weight_O / weight_O.mean()).float().to(inputs_train.device)
        value_SO, known_SO = (
            torch.from_numpy(x[event_S]).to(inputs_train.device)
            for x in (labels.value_EO, labels.known_EO)
        )
        for step in range(FUSION_STEPS):
            for group in optimiser.param_groups:
                group["lr"] = FUSION_RATE * (1 - step / FUSION_STEPS)
            row_B = torch.randint(len(inputs_train), (min(FUSION_BATCH, len(inputs_train)),))
            row_B = row_B.to(inputs_train.device)
            p_B = fusion(inputs_train[row_B])[:, 0]
            towers_BO = torch.zeros(len(row_B), len(labels.names), device=p_B.device)
            loss = fused_loss(p_B, towers_BO, value_SO[row_B], known_SO[row_B], weights, 0.0)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        with torch.inference_mode():
            return fusion(inputs_valid)[:, 0].cpu().numpy()
