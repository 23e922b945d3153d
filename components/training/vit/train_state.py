"""What a resumed training needs, as a folder of two files: tensors, and facts as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from components.pipeline.moments import moments_of
from components.training.vit.sampler import SavedState, State

TENSORS_FILE, STATE_FILE = "state.safetensors", "state.json"
_TENSOR_FIELDS = ("weights", "moments")


@dataclass
class TrainState:
    """Everything that a run between two epochs is.

    Attributes:
        epoch, step: those done.
        weights: of the model.
        moments: AdamW's state, by parameter name and moment.
        sampler: state of the sampler; None before the first epoch.
        curve: one mapping of figures an epoch.
    """

    epoch: int = 0
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    sampler: State | None = None
    curve: list[dict[str, float]] = field(default_factory=list)


def save_state(state: TrainState, folder: Path) -> None:
    """Write a state that has a sampler's: one safetensors file and one JSON file."""
    from safetensors.torch import save_file

    assert state.sampler is not None
    tensors = {
        f"{part}/{name}": value.contiguous()
        for part in _TENSOR_FIELDS
        for name, value in getattr(state, part).items()
    }
    for name, array in state.sampler.arrays.items():
        tensors[f"sampler/{name}"] = torch.from_numpy(array).contiguous()
    save_file(tensors, folder / TENSORS_FILE)
    facts = {
        "epoch": state.epoch,
        "step": state.step,
        "curve": state.curve,
        "sampler": {"epoch": state.sampler.epoch, "facts": dict(state.sampler.facts)},
    }
    (folder / STATE_FILE).write_text(json.dumps(facts))


def load_state(folder: Path) -> TrainState:
    """Read what `save_state` wrote."""
    from safetensors.torch import load_file

    facts = json.loads((folder / STATE_FILE).read_text())
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}, "sampler": {}}
    for name, value in load_file(folder / TENSORS_FILE).items():
        part, _, key = name.partition("/")
        parts[part][key] = value
    arrays = {name: value.numpy() for name, value in parts.pop("sampler").items()}
    return TrainState(
        **(facts | parts | {"sampler": SavedState(arrays=arrays, **facts["sampler"])})
    )


def keep(state: TrainState, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Copy weights and moments into the state, on the CPU."""
    state.weights = {
        name: value.detach().cpu().clone() for name, value in model.state_dict().items()
    }
    state.moments = moments_of(model, optimiser)
