"""What a resumed training needs, as a folder of two files: weights, AdamW's moments and facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from components.pipeline.moments import moments_of
from components.training.onerec.model import OneRec

TENSORS_FILE, STATE_FILE = "state.safetensors", "state.json"


@dataclass
class TrainState:
    """Everything a resumed run needs.

    Attributes:
        step: steps done.
        weights, best_weights: of the model, newest and best on validation.
        moments: AdamW's state, by parameter name and moment.
        best_score, best_step: highest validation NDCG@10 and its step.
        stale: validations since then.
        seconds: training time so far, over all resumptions.
        stopped: why training ended, empty while it goes on: ``steps``, ``patience``, ``time``.
        curve: what was logged so far, without the clock's figures: one mapping a step.
    """

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0
    stopped: str = ""
    curve: list[dict[str, float]] = field(default_factory=list)

    def note(self, metrics: Mapping[str, float], step: int) -> None:
        """Add metrics to the curve; those of one step share a row."""
        kept = {name: v for name, v in metrics.items() if name not in _CLOCK_METRICS}
        if self.curve and self.curve[-1]["step"] == step:
            self.curve[-1].update(kept)
        else:
            self.curve.append({"step": step, **kept})


#: They differ between two runs of the same work.
_CLOCK_METRICS = ("samples_per_second",)

_TENSOR_FIELDS = ("weights", "best_weights", "moments")


def save_state(state: TrainState, folder: Path) -> None:
    """Write a checkpoint: one safetensors file and one JSON file."""
    from safetensors.torch import save_file

    tensors = {
        f"{part}/{name}": value.contiguous()
        for part in _TENSOR_FIELDS
        for name, value in getattr(state, part).items()
    }
    save_file(tensors, folder / TENSORS_FILE)
    facts = {name: value for name, value in vars(state).items() if name not in _TENSOR_FIELDS}
    (folder / STATE_FILE).write_text(json.dumps(facts))


def load_state(folder: Path) -> TrainState:
    """Read a checkpoint of `save_state`."""
    from safetensors.torch import load_file

    state = TrainState(**json.loads((folder / STATE_FILE).read_text()))
    for name, value in load_file(folder / TENSORS_FILE).items():
        part, _, key = name.partition("/")
        getattr(state, part)[key] = value
    return state


def keep(state: TrainState, model: OneRec, optimiser: torch.optim.Optimizer) -> None:
    """Copy weights and moments of the model into the state."""
    state.weights = copied(model.state_dict())
    state.moments = moments_of(model, optimiser)


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights on the CPU that no training changes."""
    return {name: value.detach().cpu().clone() for name, value in weights.items()}
