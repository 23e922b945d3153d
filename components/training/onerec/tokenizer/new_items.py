"""Semantic ids of items that nobody has seen yet, with everything that was learned frozen.

Raw item row → tokens and fused embedding (`item_encoder`) → aligned embedding (`item_aligner`) →
nearest code of every level (`semantic_ids`). Nothing is fitted again, so the codes mean what they
meant when the model was trained.

An item of the catalogue keeps the codes that the artifact ``semantic_ids`` gives it, which know its
history, and whose last one may have been taken (balance, or another item with the same codes).

Shapes: n items, Q quantiser levels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from components.data import visual_features
from components.data.item_encoder import ItemEncoder
from components.pipeline.errors import CorruptArtifactError, ParamsError
from components.training.onerec.tokenizer import semantic_ids as tokenizer
from components.training.onerec.tokenizer.item_aligner import ItemAligner


@dataclass(frozen=True)
class NewItemEncoder:
    """The frozen way from an item's row to its codes.

    Attributes:
        version: of the quantiser; a model that was trained on another does not know these codes.
    """

    encoder: ItemEncoder
    aligner: ItemAligner
    quantizer: tokenizer.Quantizer
    version: str

    @classmethod
    def load(cls, item_encoder: Path, item_aligner: Path, semantic_ids: Path) -> NewItemEncoder:
        """Read the folders of these three artifacts, of one run.

        Raises:
            ParamsError: these semantic ids have no place for new items (`require_place`).
            CorruptArtifactError: the embedding of the first two is not what the third quantises.
        """
        record = json.loads((semantic_ids / "data.json").read_text())
        require_place(record)
        new = cls(
            ItemEncoder.load(item_encoder),
            ItemAligner.load(item_aligner),
            read_quantizer(semantic_ids),
            record["version"],
        )
        for name, part, folder in (
            ("item_encoder", new.encoder, item_encoder),
            ("item_aligner", new.aligner, item_aligner),
        ):
            wanted = record.get(f"{name}_digest")
            if wanted is None:
                raise CorruptArtifactError(
                    f"these semantic ids do not say which {name} their items were encoded with",
                    where=str(semantic_ids),
                    remedy="make them again: reelflow run recommend",
                )
            if part.digest != wanted:
                raise CorruptArtifactError(
                    f"the items of these semantic ids were encoded with {name} {wanted}, this one "
                    f"is {part.digest}",
                    where=f"{folder}, {semantic_ids}",
                    remedy="give the artifacts of one run",
                )
        return new

    def embed(self, items: pa.Table, visual: pa.Table | None = None) -> Tensor:
        """What is quantised: float32 [n, D]."""
        seen = None
        if visual is not None:
            seen = visual_features.features(visual, "visual features of new items")
        encoded = self.encoder.encode(items, seen)
        return self.aligner.embed(
            torch.from_numpy(encoded.embedding_ND),
            torch.from_numpy(encoded.token_NMt),
            torch.from_numpy(encoded.mask_NM),
        )

    def encode(self, items: pa.Table, visual: pa.Table | None = None) -> npt.NDArray[np.int32]:
        """Codes int32 [n, Q] of rows of the contract `items`, each a function of its row alone,
        except at near ties (`semantic_ids.encode`).

        Args:
            items: ``item_id``, and what is known of title, caption, tags, author_id, duration_s.
            visual: item_id and embedding, where the encoder was fitted with visual features.

        Raises:
            DataContractError: a table breaks its contract; the message names row and column.
        """
        codes: npt.NDArray[np.int32] = tokenizer.encode(
            self.embed(items, visual), self.quantizer
        ).numpy()
        return codes


def read_quantizer(semantic_ids: Path) -> tokenizer.Quantizer:
    """The frozen quantiser in the folder of the artifact ``semantic_ids``."""
    from safetensors.torch import load_file

    from components.training.onerec.config import TokenizerConfig

    config = TokenizerConfig(**json.loads((semantic_ids / "data.json").read_text())["tokenizer"])
    return tokenizer.load(config.method, load_file(semantic_ids / "model.safetensors"), config)


def require_place(record: Mapping[str, Any]) -> None:
    """Refuse semantic ids that are no function of an item's embedding.

    Args:
        record: ``data.json`` of the artifact ``semantic_ids``.

    Raises:
        ParamsError: they have an extra digit, or were shuffled as a control.
    """
    if record.get("shuffled"):
        raise ParamsError(
            "semantic ids that were shuffled say nothing of items, and have no place for new ones",
            where="params.yaml semantic_ids.shuffled",
            remedy="train without",
        )
    if record["tokenizer"]["collisions"] == "extra_digit":
        raise ParamsError(
            "semantic ids with an extra digit have no place for new items: it numbers items, and "
            "is no function of what they are",
            where="params.yaml semantic_ids.collisions",
            remedy="train with next_free or keep",
        )
