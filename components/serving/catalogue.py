"""What may be recommended: the model's own items, new ones, and none that was withdrawn.

A change builds a new trie beside the old one, off the path of requests, and one assignment puts it
in its place: a batch reads one catalogue from beginning to end. The codebooks are frozen (arXiv
2506.13695, section 2.1), so a new item's semantic id is a pure function of its embedding.

Shapes: N items, M new ones, Q levels, D embedding width.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors.torch import load_file

from components.evaluation.registration.serving import ServedRecommender
from components.pipeline.errors import UsageError
from components.serving.journal import CONTENT, SCHEMA, Journal, Rows
from components.serving.schema import NewItem
from components.training.onerec.config import RQVAEConfig, TokenizerConfig
from components.training.onerec.recommender import popularity
from components.training.onerec.tokenizer import semantic_ids
from components.training.onerec.trie import build_trie


class ItemEncoder(Protocol):
    """Encodes the content of items with frozen codebooks."""

    def encode(self, items: pa.Table) -> npt.NDArray[np.int32]:
        """Semantic ids int32 [M, Q] of rows with the columns ``CONTENT`` and ``item_id``."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """One state of the catalogue; never changed.

    Attributes:
        recommendable: items in the trie.
        new, withdrawn, outdated: items of the journal that came, that went, and whose semantic id
            is of another quantiser.
    """

    served: ServedRecommender
    recommendable: int
    new: int
    withdrawn: int
    outdated: int


class Catalogue:
    """The live catalogue of a model.

    Args:
        files: folders of the artifacts that make the model.
        encoder: of the content of new items, where the model carries one.
    """

    def __init__(
        self, files: Mapping[str, Path], journal: Journal, encoder: ItemEncoder | None = None
    ) -> None:
        import pyarrow.parquet as pq

        self._base = ServedRecommender.from_files(files)
        columns = ["train_positive_count", "train_count"]
        catalogue = pq.read_table(files["catalogue"] / "table.parquet", columns=columns)
        self._popularity_N = popularity(*(column.to_numpy() for column in catalogue.columns))
        self._own = set(self._base.item_id_N.tolist())
        self._ids = json.loads((files["semantic_ids"] / "data.json").read_text())
        state = load_file(files["semantic_ids"] / "model.safetensors")
        self._quantizer = _quantizer(self._ids.get("method", "plain"), state)
        self._width = state.get("encoder.0.weight", state.get("codebooks", state["codes"])).shape[
            -1
        ]
        self._journal, self._encoder = journal, encoder
        self._building = threading.Lock()
        self._stamp: object = None
        self._now = self._snapshot({})
        self.refresh()

    @property
    def now(self) -> Snapshot:
        return self._now

    @property
    def levels(self) -> int:
        return int(self._base.recommender.codes_NQ.shape[1])

    @property
    def version(self) -> str:
        """Of the quantiser of the semantic ids."""
        return str(self._ids["version"])

    def refresh(self) -> bool:
        """Take over what the journal says, if it changed; whether it did."""
        with self._building:
            stamp = self._journal.stamp()
            if stamp == self._stamp:
                return False
            # The stamp before the rows: a change in between is found at the next look.
            self._now = self._snapshot(self._journal.read())
            self._stamp = stamp
            return True

    def add(self, items: Sequence[NewItem]) -> list[dict[str, Any]]:
        """Encode items and let them be recommended; withdrawn ones come back.

        Returns:
            for every item its ``semantic_id`` and ``status``: ``added``, ``updated``, ``restored``
            or, where the model was trained with it, ``known``.

        Raises:
            UsageError: an item cannot be encoded; none is then taken in.
        """
        fresh = [place for place, item in enumerate(items) if item.item_id not in self._own]
        codes = dict(zip(fresh, self._encode(items, fresh), strict=True))
        said: list[dict[str, Any]] = []

        def edit(rows: Rows) -> None:
            for place, item in enumerate(items):
                before = rows.get(item.item_id)
                gone = before is not None and bool(before["withdrawn"])
                if place in codes:
                    row = item.model_dump(include={*CONTENT, "item_id", "embedding"})
                    row |= {"semantic_id": codes[place], "version": self.version}
                    rows[item.item_id] = {name: row.get(name) for name in SCHEMA.names}
                    rows[item.item_id]["withdrawn"] = False
                    status = "restored" if gone else "updated" if before else "added"
                else:
                    rows.pop(item.item_id, None)
                    status = "restored" if gone else "known"
                semantic_id = codes.get(place) or self._own_code(item.item_id)
                said.append({"item_id": item.item_id, "semantic_id": semantic_id, "status": status})

        self._journal.change(edit)
        self.refresh()
        return said

    def withdraw(self, item_id: int) -> bool:
        """Recommend an item no more; False if there is no such item.

        Raises:
            UsageError: it is the last one.
        """
        found = True

        def edit(rows: Rows) -> None:
            nonlocal found
            row = rows.get(item_id)
            found = row is not None or item_id in self._own
            if not found:
                return
            gone = [i for i, r in rows.items() if r["withdrawn"]]
            if len(self._own | set(rows)) - len(set(gone) | {item_id}) < 1:
                raise UsageError(
                    "it is the last item that may be recommended",
                    where=f"item {item_id}",
                    remedy="add another item first, or end the service",
                )
            rows[item_id] = (row or dict.fromkeys(SCHEMA.names)) | {
                "item_id": item_id,
                "withdrawn": True,
            }

        self._journal.change(edit)
        self.refresh()
        return found

    def _own_code(self, item_id: int) -> list[int]:
        (place,) = np.flatnonzero(self._base.item_id_N == item_id)
        return [int(code) for code in self._base.recommender.codes_NQ[place]]

    def _snapshot(self, rows: Rows) -> Snapshot:
        base = self._base
        ours = [r for i, r in rows.items() if i not in self._own and r["semantic_id"] is not None]
        new = [r for r in ours if r["version"] == self.version]
        new_id_M = np.array([row["item_id"] for row in new], np.int64)
        code_MQ = np.array([row["semantic_id"] for row in new], np.int32)
        item_id_N = np.concatenate([base.item_id_N, new_id_M])
        codes_NQ = np.concatenate(
            [base.recommender.codes_NQ, code_MQ.reshape(len(new), self.levels)]
        )
        # What nobody met comes last among the items of its semantic id.
        popularity_N = np.concatenate([self._popularity_N, np.zeros(len(new), np.int64)])
        gone = np.array([i for i, row in rows.items() if row["withdrawn"]], np.int64)
        left = np.flatnonzero(~np.isin(item_id_N, gone))
        trie = build_trie(codes_NQ[left], popularity_N[left])
        trie = replace(trie, items=left[trie.items].astype(np.int32))
        table = pa.Table.from_pylist(new, schema=SCHEMA)
        over = base.recommender.over(trie, codes_NQ, table, self._content(new))
        served = ServedRecommender(over, item_id_N)
        return Snapshot(
            served,
            recommendable=len(left),
            new=sum(not row["withdrawn"] for row in new),
            withdrawn=len(item_id_N) - len(left),
            outdated=len(ours) - len(new),
        )

    def _content(self, new: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32] | None:
        """Embeddings float32 [M, D] of new items: as posted, else what their codes stand for."""
        own_ND = self._base.recommender.features.items.content_ND
        if own_ND is None:
            return None
        content_MD = np.zeros((len(new), own_ND.shape[1]), np.float32)
        for row, item in enumerate(new):
            told = item["embedding"]
            if told is None and self._quantizer is not None:
                code_1Q = torch.tensor([item["semantic_id"]])
                told = semantic_ids.decode(code_1Q, self._quantizer)[0].tolist()
            if told is not None and len(told) == own_ND.shape[1]:
                content_MD[row] = told
        return content_MD

    def _encode(self, items: Sequence[NewItem], places: Sequence[int]) -> list[list[int]]:
        """Semantic ids of the items at some places."""
        codes: dict[int, list[int]] = {}
        by_embedding = [p for p in places if items[p].embedding is not None]
        by_content = []
        K = int(self._ids["codebook_size"])
        for place in places:
            told = items[place].semantic_id
            if told is None:
                if items[place].embedding is None:
                    by_content.append(place)
            elif len(told) != self.levels or max(told) >= K:
                raise UsageError(
                    f"a semantic id of this model has {self.levels} codes below {K}",
                    where=f"items[{place}].semantic_id",
                    remedy="see GET /v1/model; or give the embedding",
                )
            else:
                codes[place] = told
        if by_embedding:
            codes |= zip(by_embedding, self._quantised(items, by_embedding), strict=True)
        if by_content:
            codes |= zip(by_content, self._of_content(items, by_content), strict=True)
        return [codes[place] for place in places]

    def _quantised(self, items: Sequence[NewItem], places: Sequence[int]) -> list[list[int]]:
        if self._quantizer is None:
            raise UsageError(
                "this model carries no codebooks",
                where=f"items[{places[0]}].embedding",
                remedy="give semantic_id",
            )
        for place in places:
            given = len(items[place].embedding or ())
            if given != self._width:
                raise UsageError(
                    f"{given} values, an embedding of this model has {self._width}",
                    where=f"items[{place}].embedding",
                    remedy="encode the item as the stage item_features does",
                )
        x_MD = torch.tensor([items[place].embedding for place in places], dtype=torch.float32)
        found: list[list[int]] = semantic_ids.encode(x_MD, self._quantizer).tolist()
        return found

    def _of_content(self, items: Sequence[NewItem], places: Sequence[int]) -> list[list[int]]:
        if self._encoder is None:
            raise UsageError(
                "this model carries no encoder of item content",
                where=f"items[{places[0]}]",
                remedy="give embedding or semantic_id",
            )
        names = ["item_id", *CONTENT]
        schema = pa.schema([SCHEMA.field(name) for name in names])
        rows = [items[place].model_dump(include=set(names)) for place in places]
        found: list[list[int]] = self._encoder.encode(
            pa.Table.from_pylist(rows, schema=schema)
        ).tolist()
        return found


def _quantizer(method: str, state: Mapping[str, torch.Tensor]) -> semantic_ids.Quantizer | None:
    """The frozen quantiser of an artifact `semantic_ids`; None where it carries none."""
    if "codebooks" not in state:
        return None
    config = TokenizerConfig()
    if "encoder.0.weight" in state:
        config = TokenizerConfig(rq_vae=_shape_of(state))
    return semantic_ids.load(method, state, config)


def _shape_of(state: Mapping[str, Any]) -> RQVAEConfig:
    """The widths of an RQ-VAE, told by its weights."""
    found = (re.fullmatch(r"encoder\.(\d+)\.weight", name) for name in state)
    places = sorted(int(match[1]) for match in found if match)
    widths = [len(state[f"encoder.{place}.weight"]) for place in places]
    return RQVAEConfig(hidden=widths[:-1], latent=widths[-1])
