"""What `train_reward_model` has finished, so that a killed one goes on behind it.

Shapes: O objectives.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components.training.onerec.reward.pscore import PScore, save_weights

if TYPE_CHECKING:
    from components.pipeline.stage import Checkpoints

WEIGHTS = "weights.json"


class Finished:
    """Files in the folder of the stage's checkpoints, each of which appears whole.

    Attributes:
        weight_O: w^xtr; None before they are chosen.
        tried: mean AUC of every candidate, as `search_weights` gives them.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._folder, self._keep = checkpoints.fetch("models"), checkpoints.keep
        self.weight_O: npt.NDArray[np.float64] | None = None
        self.tried: list[float] = []
        if (self._folder / WEIGHTS).exists():
            said = json.loads((self._folder / WEIGHTS).read_text())
            self.weight_O, self.tried = np.array(said["weights"]), said["tried"]

    def choose(self, weight_O: npt.NDArray[np.float64], tried: list[float]) -> None:
        """The weights are found."""
        self.weight_O, self.tried = weight_O, tried
        unfinished = self._folder / f"{WEIGHTS}.unfinished"
        unfinished.write_text(json.dumps({"weights": weight_O.tolist(), "tried": tried}))
        self._keep(unfinished.replace(self._folder / WEIGHTS))

    def load(self, name: str, make: Callable[[], PScore]) -> PScore | None:
        """A trained model, ready to score; None before it is trained.

        Args:
            make: a model of the same architecture.
        """
        from safetensors.torch import load_file

        file = self._folder / f"{name}.safetensors"
        if not file.exists():
            return None
        model = make()
        model.load_state_dict(load_file(file))
        return model.eval()

    def save(self, name: str, model: PScore) -> None:
        """A model is trained."""
        file = self._folder / f"{name}.safetensors"
        save_weights(model, file)
        self._keep(file)
