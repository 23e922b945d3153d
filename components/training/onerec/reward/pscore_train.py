"""Trains preference models on exposures and chooses the weights w^xtr on later ones.

All exposures are learned from, not only liked ones; a label the source did not record has no part
in any loss. Two models learn from disjoint users: one is the reward, the other judges what the
reward made of the recommender. Validation is the newest part of the fully labelled exposures; it
chooses w^xtr and is what AUCs are reported on.

Shapes: S exposures, O objectives, U users.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from components.pipeline.errors import StageError
from components.training.onerec.reward.exposures import (
    Cut,
    Exposures,
    label_rates,
    of_objectives,
)
from components.training.onerec.reward.features import Labels
from components.training.onerec.reward.pscore import PScore, fused_loss
from components.training.onerec.reward.pscore_weights import search_weights

if TYPE_CHECKING:
    from components.training.onerec.reward.config import PScoreConfig

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trained:
    """A preference model and how it was chosen.

    Attributes:
        weight_O: w^xtr.
        tried: mean AUC of p of every candidate, equal weights first.
    """

    model: PScore
    weight_O: npt.NDArray[np.float64]
    tried: list[float]


def train_pscore(
    exposures: Exposures,
    cut: Cut,
    objectives: list[int],
    config: PScoreConfig,
    seed: int,
    *,
    weight_O: npt.NDArray[np.float64] | None = None,
    device: str = "cpu",
    advance: Callable[[float], None] = lambda share: None,
    found: Callable[[npt.NDArray[np.float64], list[float]], None] = lambda weight_O, tried: None,
) -> Trained:
    """Choose w^xtr, unless given, and train.

    A model trained with equal weights gives the towers' states for the search
    (`pscore_weights.py`); then everything is trained with what it found.

    Args:
        found: told what the search found, as soon as it has: the same call with these weights given
            then trains the same model.

    Raises:
        StageError: the loss is no longer a number.
    """
    labels = of_objectives(exposures.labels, objectives)
    given = np.ones(len(objectives)) if weight_O is None else weight_O
    searches = weight_O is None and config.candidates > 1 and len(objectives) > 1
    passes = 2 if searches else 1

    def fit(weight_O: npt.NDArray[np.float64], begun: int) -> PScore:
        def told(share: float) -> None:
            advance((begun + share) / passes)

        return _fit(exposures, labels, cut.train_S, weight_O, config, seed, device, told)

    model = fit(given, 0)
    if not searches:
        return Trained(model, given, [])
    weight_O, tried = search_weights(model, exposures, labels, cut, config, seed)
    found(weight_O, tried)
    if np.array_equal(weight_O, given):
        return Trained(model, weight_O, tried)
    return Trained(fit(weight_O, 1), weight_O, tried)


def _fit(
    exposures: Exposures,
    labels: Labels,
    train_S: Int64,
    weight_O: npt.NDArray[np.float64],
    config: PScoreConfig,
    seed: int,
    device: str,
    advance: Callable[[float], None],
) -> PScore:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PScore(config.model, labels.names, exposures.items).to(device).train()
        _start_at_the_rates(model, labels, train_S)
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        weights = torch.from_numpy(weight_O / weight_O.mean()).float().to(device)
        rng = np.random.default_rng(seed)
        batches = math.ceil(len(train_S) / config.batch_size)
        total = config.epochs * batches
        for step in range(total):
            if step % batches == 0:
                order_S = train_S[rng.permutation(len(train_S))]
            event_B = order_S[step % batches * config.batch_size :][: config.batch_size]
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
            requests = exposures.requests(event_B, config.model.history).to(device)
            item_B1 = torch.from_numpy(exposures.sequences.item_E[event_B].astype(np.int64))[
                :, None
            ]
            tower_BGO, p_BG = model(requests, item_B1.to(device))
            loss = fused_loss(
                p_BG[:, 0],
                tower_BGO[:, 0],
                torch.from_numpy(labels.value_EO[event_B]).to(device),
                torch.from_numpy(labels.known_EO[event_B]).to(device),
                weights,
                config.tower_weight,
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if step % 20 == 0 or step + 1 == total:
                _require_finite(float(loss.detach()), step)
            advance((step + 1) / total)
    return model.eval()


def _start_at_the_rates(model: PScore, labels: Labels, train_S: Int64) -> None:
    """Towers begin at their objective's rate: rare ones need not first unlearn one half."""
    rate_O = label_rates(labels, train_S)
    with torch.no_grad():
        model.tower_bias.copy_(torch.from_numpy(np.log(rate_O / (1 - rate_O))))


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise StageError(
            f"the loss of the preference model is {loss} at step {step}",
            where="stage 'train_reward_model'",
            remedy="lower train_reward_model.learning_rate",
        )
