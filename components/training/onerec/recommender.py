"""A trained recommender, loaded from its artifacts and ready to rank the whole catalogue.

Shapes: B requests, N items of the catalogue, Q levels, K length of a list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from components.data.content_digest import content_digest
from components.pipeline.errors import CorruptArtifactError
from components.training.onerec.data import Sequences, Targets
from components.training.onerec.decode import DeviceTrie, recommend
from components.training.onerec.encoder import EventEmbedding
from components.training.onerec.features import Features, ItemFeatures
from components.training.onerec.memory import TABLE, Successors
from components.training.onerec.model import OneRec
from components.training.onerec.trie import Trie, build_trie

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig


@dataclass(frozen=True)
class Recommender:
    """The model with the semantic ids and the features it was trained on.

    Attributes:
        codes_NQ: int32 semantic ids by item index.
        features: of the catalogue's items and of the users that were known.
        targets: the events that it learned as targets, and of which its memory counts.
    """

    model: OneRec
    trie: DeviceTrie
    codes_NQ: npt.NDArray[np.int32]
    features: Features
    targets: Targets = "positive"

    @classmethod
    def load(
        cls,
        recommender: Path,
        semantic_ids: Path,
        popularity_N: npt.NDArray[np.integer],
        device: str = "cpu",
    ) -> Recommender:
        """Read the folders of the artifacts ``recommender`` and ``semantic_ids``.

        Args:
            popularity_N: training popularity by item index; orders items that share an id.

        Raises:
            CorruptArtifactError: the model was trained on other semantic ids, or does not say on
                which.
        """
        from safetensors.numpy import load_file as load_arrays
        from safetensors.torch import load_file

        config = json.loads((recommender / "config.json").read_text())
        record = json.loads((semantic_ids / "data.json").read_text())
        codes_NQ = load_arrays(semantic_ids / "model.safetensors")["codes"]
        differ = _what_differs(config, record, codes_NQ)
        if differ is not None:
            raise CorruptArtifactError(
                differ,
                where=f"{recommender}, {semantic_ids}",
                remedy="use the semantic ids it was trained on, or train it again; in place of a "
                "registered version register a newly trained one: reelflow run recommend",
            )
        from components.training.onerec.config import OneRecConfig

        model = OneRec(OneRecConfig(**config["model"]))
        try:
            model.load_state_dict(load_file(recommender / "model.safetensors"))
        except RuntimeError as error:
            said = str(error).strip().splitlines()[-1].strip()
            raise CorruptArtifactError(
                f"its weights are not those of the model of now: {said}",
                where=str(recommender),
                remedy="train it again; in place of a registered version register a newly trained "
                "one: reelflow run recommend",
            ) from error
        if model.memory is not None:
            counted = Successors(**load_arrays(recommender / "memory.safetensors"))
            model.memory.fill(counted, codes_NQ)
            model.memory.drop_practice()
        trie = DeviceTrie.on(build_trie(codes_NQ, popularity_N), device)
        features = Features.load(recommender)
        features = replace(features, items=_read_by(model.config, features.items))
        return cls(model.to(device).eval(), trie, codes_NQ, features, config["targets"])

    def over(
        self,
        trie: Trie,
        codes_NQ: npt.NDArray[np.int32],
        new_items: pa.Table,
        content_MD: npt.NDArray[np.float32] | None,
    ) -> Recommender:
        """The same weights over another catalogue, which begins with the model's own items.

        It may be made of another such catalogue; what both have in common is shared. Items behind
        the model's own are known by their semantic ids and features: they share one embedding
        of zeros and have no successors, as an item that no training user met.

        Args:
            trie: what may be recommended.
            codes_NQ: semantic ids by item index, those of the model's own items first.
            new_items: ``author_id`` and ``tags`` of the others, in order.
            content_MD: their embeddings; None where the features have none.
        """
        _make_room_for_unknown(self.model)
        features = replace(self.features, items=self._items_with(new_items, content_MD))
        trie_here = DeviceTrie.on(trie, self.trie.items.device)
        return replace(self, trie=trie_here, codes_NQ=codes_NQ, features=features)

    def _items_with(
        self, new_items: pa.Table, content_MD: npt.NDArray[np.float32] | None
    ) -> ItemFeatures:
        own, num_items = self.features.items, self.model.config.num_items
        if len(own.author_N) == num_items and not len(new_items):
            return own
        new = self.features.vocabulary.items(new_items, content_MD)
        tags = max(own.tag_NT.shape[1], new.tag_NT.shape[1])

        def joined(own_Nx: npt.NDArray, new_Mx: npt.NDArray) -> npt.NDArray:
            return _behind(own_Nx[:num_items], new_Mx)

        def padded(x_NT: npt.NDArray) -> npt.NDArray:
            more = tags - x_NT.shape[1]
            return np.pad(x_NT, ((0, 0), (0, more))) if more else x_NT

        content_ND = None
        if own.content_ND is not None and new.content_ND is not None:
            content_ND = joined(own.content_ND, new.content_ND)
        return ItemFeatures(
            joined(own.author_N, new.author_N),
            joined(padded(own.tag_NT), padded(new.tag_NT)),
            joined(padded(own.tag_weight_NT), padded(new.tag_weight_NT)),
            content_ND,
        )

    def rank(
        self,
        sequences: Sequences,
        event_B: npt.NDArray[np.int64],
        *,
        beams: int,
        top_n: int,
        batch_size: int = 128,
        static_SF: npt.NDArray[np.int32] | None = None,
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Item lists for requests, a batch at a time, by constrained beam search.

        Args:
            sequences: histories; ``event_B`` are the events to be predicted.
            static_SF: static features of the users; None: those known of their ids.

        Yields:
            int32 [b, top_n] item indices, best first, -1 padded; their float32 log-probabilities.
        """
        sequences = self.features.attach(sequences, event_B, self.model.config, static_SF)
        with torch.inference_mode():
            yield from recommend(
                self.model,
                self.trie,
                sequences,
                event_B,
                self.codes_NQ,
                width=beams,
                top_n=top_n,
                batch_size=batch_size,
            )


def _read_by(config: OneRecConfig, items: ItemFeatures) -> ItemFeatures:
    """What a model reads of items; rows that it does not read become one zero, and no memory."""

    def kept(x_Nx: npt.NDArray, is_read: object) -> npt.NDArray:
        return x_Nx if is_read else np.broadcast_to(x_Nx.dtype.type(0), x_Nx.shape)

    return ItemFeatures(
        kept(items.author_N, config.author_rows),
        kept(items.tag_NT, config.tag_rows),
        kept(items.tag_weight_NT, config.tag_rows),
        items.content_ND if config.content_width or config.lifelong.entries else None,
    )


def _behind(own_Nx: npt.NDArray, new_Mx: npt.NDArray) -> npt.NDArray:
    """Rows behind those of a table; where all of it is one zero (`_read_by`), so is the whole."""
    if own_Nx.strides[0] == 0:
        return np.broadcast_to(own_Nx[0], (len(own_Nx) + len(new_Mx), *own_Nx.shape[1:]))
    return np.concatenate([own_Nx, new_Mx])


def trained_on(record: Mapping[str, Any], codes_NQ: npt.NDArray[np.integer]) -> dict[str, str]:
    """What a model says of the semantic ids it is trained on, beside its configuration.

    The version is that of the quantiser, by which codes of new items are made. One quantiser gives
    items of the catalogue different codes, by the rule for collisions: a model knows only some.

    Args:
        record: ``data.json`` of the artifact ``semantic_ids``.
        codes_NQ: int32 codes of the catalogue it is trained on; new items are not among them.
    """
    return {
        "semantic_ids_version": record["version"],
        "semantic_ids_codes": content_digest({"codes": codes_NQ}),
    }


def _what_differs(
    config: Mapping[str, Any], record: Mapping[str, Any], codes_NQ: npt.NDArray[np.integer]
) -> str | None:
    """How the semantic ids differ from those that a model was trained on; None: they do not."""
    these = trained_on(record, codes_NQ)
    version = config["semantic_ids_version"]
    if version != these["semantic_ids_version"]:
        return f"the model was trained on semantic ids {version}, these are {record['version']}"
    sizes = {
        "num_items": len(codes_NQ),
        "num_levels": codes_NQ.shape[1],
        "codebook_size": record["codebook_size"],
    }
    for name, found in sizes.items():
        if config["model"][name] != found:
            return (
                f"the model was trained on semantic ids of {name} {config['model'][name]}, these "
                f"have {found}"
            )
    codes = config.get("semantic_ids_codes")
    if codes is None:
        return (
            "the model does not say which semantic ids its items had: it was trained before models "
            "said so"
        )
    if codes != these["semantic_ids_codes"]:
        return (
            f"the model was trained on other semantic ids of the same codebooks: {codes}, these "
            f"are {these['semantic_ids_codes']}"
        )
    return None


def popularity(
    train_positive_count: npt.NDArray[np.integer], train_count: npt.NDArray[np.integer]
) -> npt.NDArray[np.integer]:
    """Positive training counts, or all counts where the source has no signal of liking."""
    return train_positive_count if train_positive_count.any() else train_count


def _make_room_for_unknown(model: OneRec) -> None:
    """One row more, for all items that the model was not trained with, in every table by item."""
    num_items = model.config.num_items
    for module in model.modules():
        if isinstance(module, EventEmbedding) and module.vid is not None:
            weight_ND = module.vid.weight.detach()
            if len(weight_ND) == num_items:
                rows_ND = torch.cat([weight_ND, weight_ND.new_zeros(1, weight_ND.shape[1])])
                module.vid = torch.nn.Embedding.from_pretrained(rows_ND)
    if model.memory is None:
        return
    for name, nothing in zip(TABLE, (-1, 0, 0), strict=True):
        table_FNx = cast(torch.Tensor, getattr(model.memory, f"served_{name}"))
        if table_FNx.shape[1] == num_items:
            row_F1x = torch.full_like(table_FNx[:, :1], nothing)
            grown = torch.cat([table_FNx, row_F1x], 1)
            model.memory.register_buffer(f"served_{name}", grown, persistent=False)
