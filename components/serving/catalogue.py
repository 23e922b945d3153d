"""What may be recommended: the model's own items, new ones, and none that was withdrawn.

A change builds a new trie beside the old one, off the path of requests, and one assignment puts it
in its place: a batch reads one catalogue from beginning to end. The codebooks are frozen (arXiv
2506.13695, section 2.1), so a new item's semantic id is a function of its embedding alone, up to
near ties (`semantic_ids.encode`).

Shapes: N items, M new ones, Q levels, D embedding width.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from components.evaluation.registration.serving import (
    ENCODER_FILES,
    ServedRecommender,
    read_popularity,
)
from components.pipeline.errors import ParamsError, UsageError
from components.serving.journal import CONTENT, SCHEMA, Journal, Rows
from components.serving.schema import NewItem
from components.training.onerec.tokenizer import new_items, semantic_ids
from components.training.onerec.tokenizer.new_items import NewItemEncoder
from components.training.onerec.trie import Trie, build_trie


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
        files: folders of the artifacts that make the model, and of those that encode new items by
            their content.
        device: of the model and of the trie; new items are encoded on the processor.
    """

    def __init__(self, files: Mapping[str, Path], journal: Journal, device: str = "cpu") -> None:
        served = ServedRecommender.from_files(files, device)
        self._own_items = len(served.item_id_N)
        self._popularity_N = read_popularity(files["catalogue"])
        # Arrow would keep the place of columns that were read for a next table; there is none.
        pa.default_memory_pool().release_unused()
        self._ids = json.loads((files["semantic_ids"] / "data.json").read_text())
        self._codebook_size = int(self._ids["codebook_size"])
        self._quantizer = new_items.read_quantizer(files["semantic_ids"])
        self._encoder = _encoder(files)
        self._journal = journal
        self._building = threading.Lock()
        self._stamp: object = None
        self._now = Snapshot(served, self._own_items, new=0, withdrawn=0, outdated=0)
        self.refresh()

    @property
    def now(self) -> Snapshot:
        return self._now

    @property
    def levels(self) -> int:
        return int(self._now.served.recommender.codes_NQ.shape[1])

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
        fresh = [place for place, item in enumerate(items) if not self._is_own(item.item_id)]
        codes, embeddings = self._encode(items, fresh)
        said: list[dict[str, Any]] = []

        def edit(rows: Rows) -> None:
            for place, item in enumerate(items):
                before = rows.get(item.item_id)
                gone = before is not None and bool(before["withdrawn"])
                if place in codes:
                    row = item.model_dump(include={*CONTENT, "item_id"})
                    row |= {"semantic_id": codes[place], "version": self.version}
                    row["embedding"] = embeddings.get(place)
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
            found = row is not None or self._is_own(item_id)
            if not found:
                return
            new = {r["item_id"] for r in self._new(rows)}
            gone = {i for i, r in rows.items() if r["withdrawn"]} | {item_id}
            gone_here = sum(i in new or self._is_own(i) for i in gone)
            if gone_here == self._own_items + len(new):
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

    def _own_place(self, item_id: int) -> int | None:
        """Where the model has an item: in every state of the catalogue its own come first."""
        (place,) = self._now.served.places(np.array([item_id])).tolist()
        return place if 0 <= place < self._own_items else None

    def _is_own(self, item_id: int) -> bool:
        return self._own_place(item_id) is not None

    def _own_code(self, item_id: int) -> list[int]:
        codes_NQ = self._now.served.recommender.codes_NQ
        return [int(code) for code in codes_NQ[self._own_place(item_id)]]

    def _new(self, rows: Mapping[int, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Rows of items that came after the model, with semantic ids of its own codebooks.

        Raises:
            CorruptArtifactError: one has a semantic id that these codebooks cannot write.
        """
        new = [
            row
            for item_id, row in rows.items()
            if not self._is_own(item_id)
            and row["semantic_id"] is not None
            and row["version"] == self.version
        ]
        for row in new:
            if not self._is_written_here(row["semantic_id"]):
                raise self._journal.corrupt(
                    f"item {row['item_id']} has the semantic id {row['semantic_id']}, and the "
                    f"model's have {self.levels} codes below {self._codebook_size}"
                )
        return new

    def _is_written_here(self, semantic_id: Sequence[int | None]) -> bool:
        codes = [code for code in semantic_id if code is not None]
        fits = len(codes) == len(semantic_id) == self.levels
        return fits and min(codes) >= 0 and max(codes) < self._codebook_size

    def _snapshot(self, rows: Rows) -> Snapshot:
        # Made of the state of now: another one, kept for this alone, would take as much again.
        now, new, own = self._now.served, self._new(rows), self._own_items
        ours = sum(r["semantic_id"] is not None and not self._is_own(i) for i, r in rows.items())
        item_id_N, codes_NQ = now.item_id_N, now.recommender.codes_NQ
        popularity_N = self._popularity_N
        is_same = not new and len(item_id_N) == own
        if not is_same:
            new_id_M = np.array([row["item_id"] for row in new], np.int64)
            code_MQ = np.array([row["semantic_id"] for row in new], np.int32)
            item_id_N = np.concatenate([item_id_N[:own], new_id_M])
            codes_NQ = np.concatenate([codes_NQ[:own], code_MQ.reshape(len(new), self.levels)])
            # What nobody met comes last among the items of its semantic id.
            popularity_N = np.append(popularity_N, np.zeros(len(new), popularity_N.dtype))
        trie = _trie(codes_NQ, popularity_N, self._gone(rows, new))
        if trie is None:
            raise UsageError(
                f"nothing may be recommended: all {len(item_id_N)} items were withdrawn, and of "
                f"{ours - len(new)} others the semantic ids are of other codebooks",
                where=str(self._journal.file),
                remedy="move it away and post the new items again",
            )
        table = pa.Table.from_pylist(new, schema=SCHEMA)
        over = now.recommender.over(trie, codes_NQ, table, self._content(new))
        served = now.over(over, None if is_same else item_id_N)
        return Snapshot(
            served,
            recommendable=len(trie.items),
            new=sum(not row["withdrawn"] for row in new),
            withdrawn=len(item_id_N) - len(trie.items),
            outdated=ours - len(new),
        )

    def _gone(self, rows: Rows, new: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.int64]:
        """Indices of the items that were withdrawn, of the model's own and of new ones."""
        own = [self._own_place(i) for i, row in rows.items() if row["withdrawn"]]
        behind = [self._own_items + place for place, row in enumerate(new) if row["withdrawn"]]
        return np.array([place for place in own if place is not None] + behind, np.int64)

    def _content(self, new: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32] | None:
        """Embeddings float32 [M, D] of new items: their own, else what their codes stand for."""
        own_ND = self._now.served.recommender.features.items.content_ND
        if own_ND is None:
            return None
        content_MD = np.zeros((len(new), own_ND.shape[1]), np.float32)
        for row, item in enumerate(new):
            told = item["embedding"]
            if told is None:
                code_1Q = torch.tensor([item["semantic_id"]])
                told = semantic_ids.decode(code_1Q, self._quantizer)[0].tolist()
            if len(told) == own_ND.shape[1]:
                content_MD[row] = told
        return content_MD

    def _encode(
        self, items: Sequence[NewItem], places: Sequence[int]
    ) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
        """Semantic ids of the items at some places, and the embeddings that they come from."""
        codes: dict[int, list[int]] = {}
        embeddings: dict[int, list[float]] = {}
        by_content = []
        for place in places:
            told, embedding = items[place].semantic_id, items[place].embedding
            if embedding is not None:
                embeddings[place] = self._checked(embedding, f"items[{place}].embedding")
            elif told is None:
                by_content.append(place)
            elif not self._is_written_here(told):
                raise UsageError(
                    f"a semantic id of this model has {self.levels} codes below "
                    f"{self._codebook_size}",
                    where=f"items[{place}].semantic_id",
                    remedy="see GET /v1/model; or give the embedding",
                )
            else:
                codes[place] = told
        if by_content:
            embeddings |= zip(by_content, self._of_content(items, by_content), strict=True)
        if embeddings:
            codes |= zip(embeddings, self._quantised(list(embeddings.values())), strict=True)
        return codes, embeddings

    def _checked(self, embedding: list[float], where: str) -> list[float]:
        """An embedding as it was posted, if it can be quantised."""
        self._encoder_for(where)
        width = int(self._ids["dimension"])
        if len(embedding) != width:
            raise UsageError(
                f"{len(embedding)} values, an embedding of this model has {width}",
                where=where,
                remedy="encode the item as the stages item_features and align_items do, or give "
                "its content",
            )
        return embedding

    def _quantised(self, embedding_MD: list[list[float]]) -> list[list[int]]:
        x_MD = torch.tensor(embedding_MD, dtype=torch.float32)
        found: list[list[int]] = semantic_ids.encode(x_MD, self._quantizer).tolist()
        return found

    def _of_content(self, items: Sequence[NewItem], places: Sequence[int]) -> list[list[float]]:
        """Embeddings of what is said of items, in the space of the model's own items."""
        encoder = self._encoder_for(f"items[{places[0]}]")
        names = ["item_id", *CONTENT]
        rows = [items[place].model_dump(include=set(names)) for place in places]
        for place, row in zip(places, rows, strict=True):
            if not any(_says_something(row[name]) for name in CONTENT):
                raise UsageError(
                    "nothing is said of the item",
                    where=f"items[{place}]",
                    remedy=f"give some of {', '.join(CONTENT)}; or embedding or semantic_id",
                )
        schema = pa.schema([SCHEMA.field(name) for name in names])
        embedding_MD = encoder.embed(pa.Table.from_pylist(rows, schema=schema))
        found: list[list[float]] = embedding_MD.tolist()
        return found

    def _encoder_for(self, where: str) -> NewItemEncoder:
        """The frozen encoder of what is said at ``where``.

        Raises:
            UsageError: the semantic ids of this model have no place for new items.
        """
        if isinstance(self._encoder, ParamsError):
            remedy = f"give semantic_id, or {self._encoder.remedy}"
            raise UsageError(self._encoder.what, where=where, remedy=remedy)
        return self._encoder


def _says_something(value: Any) -> bool:
    """Whether a field of content holds more than blanks."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list):
        return any(_says_something(part) for part in value)
    return value is not None


def _trie(
    codes_NQ: npt.NDArray[np.int32],
    popularity_N: npt.NDArray[np.integer],
    gone: npt.NDArray[np.int64],
) -> Trie | None:
    """Of all items but those that are gone, by index; None: there are no others."""
    if not len(gone):
        return build_trie(codes_NQ, popularity_N)
    is_left_N = np.ones(len(codes_NQ), bool)
    is_left_N[gone] = False
    left = np.flatnonzero(is_left_N)
    if not len(left):
        return None
    trie = build_trie(codes_NQ[left], popularity_N[left])
    return replace(trie, items=left[trie.items].astype(np.int32))


def _encoder(files: Mapping[str, Path]) -> NewItemEncoder | ParamsError:
    """The frozen encoder of new items, or why these semantic ids have no place for any."""
    try:
        return NewItemEncoder.load(*(files[name] for name in (*ENCODER_FILES, "semantic_ids")))
    except ParamsError as why:
        return why
