"""What an optimiser remembers, by names that outlive it, so that a checkpoint can hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def moments_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by ``parameter/moment``, copied to the CPU: shapes are those of the parameters,
    a step count has none.
    """
    return {
        f"{name}/{moment}": value.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        for moment, value in optimiser.state.get(parameter, {}).items()
    }


def restore_moments(
    model: nn.Module, optimiser: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    """Give a fresh AdamW the state of `moments_of`; the model is of the same architecture."""
    parameters = dict(model.named_parameters())
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        # Only a fused AdamW keeps its step count where the parameter is.
        on_host = moment == "step" and not optimiser.defaults["fused"]
        place = value.clone() if on_host else value.to(parameter.device, copy=True)
        optimiser.state[parameter][moment] = place
