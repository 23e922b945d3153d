"""What `align_items` learned, frozen: tokens and fused embedding in, what is quantised out.

The report quantises the flattened output of the query transformer alone. Side by side with the
fused embedding, each brought to variance 1, is ours: a small catalogue has few pairs, and what no
pair tells is in the fused embedding still.

Shapes: N items, M tokens of an item, t their width, C width of the fused embedding, D width of the
embedding that comes out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from components.data.content_digest import content_digest
from components.training.onerec.tokenizer.alignment import Aligner

if TYPE_CHECKING:
    from components.training.onerec.config import AlignmentConfig

WEIGHTS = "aligner."


@dataclass(frozen=True)
class ItemAligner:
    """A function of each item alone.

    Attributes:
        config: with ``method: none`` the fused embedding is what comes out.
        aligner: the trained query transformer; None without one.
        scales: ``fused.mean``, ``fused.scale``, ``aligned.mean`` and ``aligned.scale``, which bring
            both parts to mean 0 and mean variance 1.
    """

    config: AlignmentConfig
    aligner: Aligner | None
    scales: Mapping[str, Tensor]

    @classmethod
    def unaligned(cls, config: AlignmentConfig) -> ItemAligner:
        """The fused embedding as it is."""
        return cls(config.model_copy(update={"method": "none"}), None, {})

    @classmethod
    def of(
        cls, config: AlignmentConfig, aligner: Aligner, fused_NC: Tensor, *tokens: Tensor
    ) -> ItemAligner:
        """An aligner with the scales of a catalogue; ``tokens`` are tokens and mask."""
        new = cls(config, aligner, {})
        parts = {"fused": fused_NC, "aligned": new._compressed(*tokens)}
        scales: dict[str, Tensor] = {}
        for name, x_ND in parts.items():
            mean_D = x_ND.double().mean(0)
            scales[f"{name}.mean"] = mean_D.float()
            scales[f"{name}.scale"] = (
                (x_ND - mean_D).square().mean().sqrt().clamp_min(1e-12).float()
            )
        return cls(config, aligner, scales)

    def embed(self, fused_NC: Tensor, token_NMt: Tensor, mask_NM: Tensor) -> Tensor:
        """What is quantised: float32 [N, D], each row a function of its item alone."""
        if self.aligner is None:
            return fused_NC
        aligned_ND = self._scaled("aligned", self._compressed(token_NMt, mask_NM))
        if self.config.method == "aligned":
            return aligned_ND
        return torch.cat([self._scaled("fused", fused_NC), aligned_ND], 1)

    def _compressed(self, token_NMt: Tensor, mask_NM: Tensor) -> Tensor:
        assert self.aligner is not None
        # In double precision, so that what else is encoded does not show in the last bits.
        precise = copy.deepcopy(self.aligner).double()
        return precise.embed(token_NMt.double(), mask_NM).float()

    def _scaled(self, part: str, x_ND: Tensor) -> Tensor:
        return (x_ND - self.scales[f"{part}.mean"]) / self.scales[f"{part}.scale"]

    def state(self) -> dict[str, Tensor]:
        """Tensors to keep, by name."""
        weights = {} if self.aligner is None else self.aligner.state_dict()
        return {**self.scales, **{WEIGHTS + name: value for name, value in weights.items()}}

    @property
    def digest(self) -> str:
        """Of all that it learned."""
        arrays = {name: value.cpu().numpy() for name, value in self.state().items()}
        return content_digest(arrays, self.facts())

    def facts(self) -> dict[str, Any]:
        """What else is to be kept."""
        return {"alignment": self.config.model_dump(mode="json")}

    @classmethod
    def load(cls, folder: Path) -> ItemAligner:
        """Read the folder of the artifact ``item_aligner``."""
        from safetensors.torch import load_file

        from components.training.onerec.config import AlignmentConfig

        record = json.loads((folder / "data.json").read_text())
        config = AlignmentConfig(**record["alignment"])
        if config.method == "none":
            return cls(config, None, {})
        state = load_file(folder / "model.safetensors")
        weights = {k.removeprefix(WEIGHTS): v for k, v in state.items() if k.startswith(WEIGHTS)}
        kinds, width = len(weights["kind"]), weights["project.weight"].shape[1]
        aligner = Aligner(kinds, width, config)
        aligner.load_state_dict(weights)
        scales = {name: value for name, value in state.items() if not name.startswith(WEIGHTS)}
        return cls(config, aligner.eval(), scales)
