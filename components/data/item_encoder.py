"""The frozen encoder of item rows: what `item_features` learned, applied to any rows of `items`.

It gives every item a few tokens, one a *view* of the item (words of the title, tags, …), and one
fused embedding. All it does is a function of the row and of what was learned before, so a row that
is new is encoded as it would have been among the old ones. Only co-occurrence cannot be told of a
row: while the catalogue is encoded it is known by item, for others it is predicted from their
content. The encoder that is kept is for those others (`ItemEncoder.for_new_items`).

It stands with the tables because curation fits it and the service of the recommender applies it.

Shapes: N items, F terms of a view, d width of a block, D width of the embedding, M tokens of an
item, t width of a token, c width of all content blocks together, X numbers of an item.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.data.content_digest import content_digest
from components.data.contracts import ITEMS
from components.data.visual_features import VisualFeatures
from components.pipeline.errors import DataContractError

if TYPE_CHECKING:
    import scipy.sparse as sp

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]

#: Hashed features: memory does not grow with the vocabulary, and no vocabulary has to be kept.
TEXT_FEATURES = 2**18
#: Columns of `items` that are read.
COLUMNS = ("item_id", "title", "caption", "tags", "author_id", "duration_s")
#: Blocks of the fused embedding that a row alone tells.
CONTENT = ("text", "tags", "author")
#: What is known of each item of the log, and of no other.
OF_KNOWN_ITEMS = ("cooccurrence.item_id", "cooccurrence.block")
#: Items encoded at a time.
ROWS = 8_192


@dataclass(frozen=True)
class EncodedItems:
    """Some items, encoded.

    Attributes:
        embedding_ND: float32, the fused embedding.
        token_NMt: float32, zeros where an item lacks a token.
        mask_NM: True = the item has this token.
    """

    embedding_ND: Float
    token_NMt: Float
    mask_NM: Bool


@dataclass(frozen=True)
class ItemEncoder:
    """What was learned of a catalogue.

    Attributes:
        arrays: by ``part.name``; a view or block that nothing was learned of has none.
        facts: ``weights`` of the blocks, ``tags`` in the order of their columns, ``kinds`` of the
            tokens in their order, ``token_dimension``.
    """

    arrays: Mapping[str, Array]
    facts: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> ItemEncoder:
        """Read the folder of the artifact ``item_encoder``."""
        from safetensors.numpy import load_file

        return cls(
            load_file(folder / "model.safetensors"), json.loads((folder / "data.json").read_text())
        )

    @property
    def digest(self) -> str:
        """Of all that it learned."""
        return content_digest(self.arrays, self.facts)

    def for_new_items(self) -> ItemEncoder:
        """Without the rows of the items that the log knew, which grow with the catalogue.

        Items that nobody met are encoded as before; those that the log knew too, as if it had not.
        """
        known = {name: self.arrays[name][:0] for name in OF_KNOWN_ITEMS if name in self.arrays}
        return replace(self, arrays={**self.arrays, **known})

    def encode(self, items: pa.Table, visual: VisualFeatures | None = None) -> EncodedItems:
        """Tokens and embedding of rows of `items`, in their order.

        Args:
            items: columns of the contract `ITEMS`; nullable ones may be missing.
            visual: visual features of items; those of others are ignored.

        Raises:
            DataContractError: a column is missing or has another type.
        """
        items = conform(items)
        parts = [
            self._encode(items.slice(start, ROWS), visual)
            for start in range(0, max(1, len(items)), ROWS)
        ]
        return EncodedItems(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0]))
        )

    def _encode(self, items: pa.Table, visual: VisualFeatures | None) -> EncodedItems:
        content, views = self.content(items)
        blocks = dict(content)
        occurrence_Nd = self.known_cooccurrence(items["item_id"])
        if occurrence_Nd is not None:
            views["cooccurrence"] = occurrence_Nd
            blocks["cooccurrence"] = self.predict_missing(occurrence_Nd, content)
        views["numeric"] = self._numbers(items)
        views |= self._visual(items["item_id"], visual)
        kinds, width = self.facts["kinds"], self.facts["token_dimension"]
        token_NMt = np.zeros((len(items), len(kinds), width), np.float32)
        for place, kind in enumerate(kinds):
            view_Nd = views[kind]
            kept = view_Nd[:, :width]
            token_NMt[:, place, : kept.shape[1]] = kept if kind == "numeric" else unit_rows(kept)
        embedding_ND = np.zeros((len(items), self.arrays["pca.rotation"].shape[1]), np.float32)
        if len(items):
            # In double precision, so that what else is encoded does not show in the last bits.
            centred_Nd = self.joined(blocks).astype(np.float64) - self.arrays["pca.mean"]
            embedding_ND = (centred_Nd @ self.arrays["pca.rotation"]).astype(np.float32)
        return EncodedItems(embedding_ND, token_NMt, np.asarray(token_NMt.any(2)))

    def content(self, items: pa.Table) -> tuple[dict[str, Float], dict[str, Float]]:
        """Blocks float32 [N, d] of what a row tells, and the views of them that become tokens.

        Rows have length 1, or 0 where nothing is known. Words of title and caption have one space,
        so that title, caption and character n-grams are told apart as views and add up to a block.
        """
        blocks: dict[str, Float] = {}
        views: dict[str, Float] = {}
        if "words.projection" in self.arrays:
            titles, captions = texts(items)
            words = self._project("words", word_counts(_joined_texts(titles, captions)))
            characters = self._project("characters", character_counts(titles, captions))
            blocks["text"] = unit_rows(words + characters)
            views["title"] = self._project("words", word_counts(titles))
            views["caption"] = self._project("words", word_counts(captions))
            views["characters"] = characters
        if "tags.projection" in self.arrays:
            views["tags"] = blocks["tags"] = unit_rows(
                self._project(
                    "tags", listed_counts(items["tags"], pa.array(self.facts["tags"], pa.string()))
                )
            )
        if "author.projection" in self.arrays:
            known = pa.array(self.arrays["author.ids"])
            views["author"] = blocks["author"] = unit_rows(
                self._project("author", listed_counts(items["author_id"], known))
            )
        return blocks, views

    def _project(self, view: str, counts_NF: sp.csr_matrix) -> Float:
        columns = self.arrays.get(f"{view}.columns")
        if columns is not None:
            counts_NF = counts_NF[:, columns]
        weighed_NF = weigh_terms(
            counts_NF, self.arrays[f"{view}.idf"], text=view in ("words", "characters")
        )
        # A few rows have few terms, and a projection has tens of thousands.
        used = np.unique(weighed_NF.indices)
        projection_ud = self.arrays[f"{view}.projection"][used].astype(np.float32)
        projected: Float = weighed_NF[:, used] @ projection_ud
        return projected

    def known_cooccurrence(self, item_id: pa.ChunkedArray) -> Float | None:
        """The kept block of items that the log knew, zeros for others; None: no such block."""
        if "cooccurrence.block" not in self.arrays:
            return None
        row = pc.index_in(item_id, pa.array(self.arrays["cooccurrence.item_id"]))
        row_N = pc.fill_null(row, -1).to_numpy()
        kept = self.arrays["cooccurrence.block"]
        block_Nd = np.zeros((len(row_N), kept.shape[1]), np.float32)
        block_Nd[row_N >= 0] = kept[row_N[row_N >= 0]]
        return block_Nd

    def predict_missing(self, block_Nd: Float, content: Mapping[str, Float]) -> Float:
        """Zero rows of the co-occurrence block, filled by the ridge regression on content."""
        weights_cd = self.arrays.get("cooccurrence.ridge")
        missing_N = ~block_Nd.any(1)
        if weights_cd is None or not missing_N.any():
            return block_Nd
        filled_Nd = block_Nd.copy()
        content_nc = self.joined(content)[missing_N].astype(np.float64)
        filled_Nd[missing_N] = unit_rows(content_nc @ weights_cd)
        return filled_Nd

    def joined(self, blocks: Mapping[str, Float]) -> Float:
        """Weighted blocks side by side: float32 [N, sum of their widths]."""
        weights = self.facts["weights"]
        return np.concatenate([weights[name] * block for name, block in blocks.items()], 1)

    def _numbers(self, items: pa.Table) -> Float:
        """Random Fourier features of the numbers of an item (Rahimi and Recht, 2007).

        Items whose numbers are alike have tokens of a large inner product. A number that is
        unknown stands at its mean.
        """
        number_NX = numbers(items)
        z_NX = (number_NX - self.arrays["numeric.mean"]) / self.arrays["numeric.scale"]
        # Far beyond what was seen there is nothing left to tell apart.
        z_NX = np.nan_to_num(z_NX).clip(-4, 4)
        frequency_Xt = self.arrays["numeric.frequency"]
        wave_Nt = np.cos(z_NX @ frequency_Xt + self.arrays["numeric.phase"])
        wave_Nt *= np.sqrt(2 / frequency_Xt.shape[1])
        known_N1 = np.isfinite(number_NX).any(1, keepdims=True)
        return (wave_Nt * known_N1).astype(np.float32)

    def _visual(self, item_id: pa.ChunkedArray, visual: VisualFeatures | None) -> dict[str, Float]:
        places = [kind for kind in self.facts["kinds"] if kind.startswith("visual_")]
        if not places:
            return {}
        axes_vt = self.arrays["visual.axes"]
        token_NPt = np.zeros((len(item_id), len(places), axes_vt.shape[1]), np.float32)
        if visual is not None:
            visual.require_width(len(axes_vt))
            item, place, vector_Vv = visual.of_items(item_id, len(places))
            token_NPt[item, place] = (vector_Vv - self.arrays["visual.mean"]) @ axes_vt
        return {kind: token_NPt[:, place] for place, kind in enumerate(places)}


def conform(items: pa.Table) -> pa.Table:
    """The columns `COLUMNS` of a table of items, nullable ones that it lacks as nulls.

    Raises:
        DataContractError: ``item_id`` is missing or null, or a column cannot be cast.
    """
    columns = []
    for name in COLUMNS:
        field = ITEMS.schema.field(name)
        if name not in items.schema.names:
            if not field.nullable:
                raise DataContractError(
                    f"the table of items has no column '{name}'",
                    where=f"columns {', '.join(items.schema.names) or 'none'}",
                    remedy="give rows of the contract `items`",
                )
            columns.append(pa.nulls(len(items), field.type))
            continue
        try:
            column = items[name].cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataContractError(
                f"{items[name].type} cannot be read as {field.type}",
                where=f"items column '{name}'",
                remedy="give rows of the contract `items`",
            ) from error
        if column.null_count and not field.nullable:
            row = pc.index(pc.is_null(column), True).as_py()
            raise DataContractError(
                "an item without an id",
                where=f"items row {row} column '{name}'",
                remedy="give every item an id",
            )
        columns.append(column)
    return pa.table(columns, names=list(COLUMNS))


def texts(items: pa.Table) -> tuple[list[str], list[str]]:
    """Titles and captions, "" where unknown."""
    return (
        pc.fill_null(items["title"], "").to_pylist(),
        pc.fill_null(items["caption"], "").to_pylist(),
    )


def _joined_texts(titles: Sequence[str], captions: Sequence[str]) -> list[str]:
    return [f"{title}\n{caption}" for title, caption in zip(titles, captions, strict=True)]


def word_counts(documents: Sequence[str]) -> sp.csr_matrix:
    """Counts of hashed words and word pairs: float32 [N, TEXT_FEATURES]."""
    return _hashed(documents, ngram_range=(1, 2))


def character_counts(titles: Sequence[str], captions: Sequence[str]) -> sp.csr_matrix:
    """Counts of hashed character n-grams: float32 [N, TEXT_FEATURES].

    They serve scripts without spaces, spelling variants and model numbers; they are taken of the
    caption only where there is no title, since they are many.
    """
    documents = [title or caption for title, caption in zip(titles, captions, strict=True)]
    return _hashed(documents, analyzer="char_wb", ngram_range=(3, 4))


def _hashed(documents: Sequence[str], **options: Any) -> sp.csr_matrix:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=TEXT_FEATURES, alternate_sign=False, norm=None, dtype=np.float32, **options
    )
    return vectorizer.transform(documents)


def listed_counts(values: pa.ChunkedArray, known: pa.Array) -> sp.csr_matrix:
    """How often each known value stands in each row of a column of values or of lists: [N, F]."""
    import scipy.sparse as sp

    column = values.combine_chunks()
    if pa.types.is_list(column.type):
        length = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        row, entries = np.repeat(np.arange(len(column)), length), column.flatten()
    else:
        row, entries = np.arange(len(column)), column
    place = pc.fill_null(pc.index_in(entries, known, skip_nulls=True), -1).to_numpy()
    kept = place >= 0
    ones = np.ones(int(kept.sum()), np.float32)
    return sp.csr_matrix((ones, (row[kept], place[kept])), (len(column), len(known)))


def weigh_terms(counts_NF: sp.csr_matrix, idf_F: Array, *, text: bool) -> sp.csr_matrix:
    """Counts times inverse document frequency; of text sublinear and with rows of length 1."""
    weighed_NF = counts_NF.astype(np.float32)
    if text:
        weighed_NF.data = 1 + np.log(weighed_NF.data)
    weighed_NF.data *= idf_F.astype(np.float32)[weighed_NF.indices]
    if text:
        length_N = np.sqrt(np.asarray(weighed_NF.multiply(weighed_NF).sum(1))).ravel()
        weighed_NF.data /= np.repeat(np.maximum(length_N, 1e-12), np.diff(weighed_NF.indptr))
    return weighed_NF.astype(np.float32)


def numbers(items: pa.Table) -> Array:
    """Numbers of an item, NaN where unknown: float64 [N, X].

    Logarithms of the duration in seconds, of the words of title and caption, of the tags.
    """

    def logarithm(values: pa.ChunkedArray) -> Array:
        number_N = pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
        return np.log1p(np.where(number_N >= 0, number_N, np.nan))

    def words(name: str) -> pa.ChunkedArray:
        return pc.list_value_length(pc.utf8_split_whitespace(items[name]))

    columns = (
        items["duration_s"],
        words("title"),
        words("caption"),
        pc.list_value_length(items["tags"]),
    )
    return np.stack([logarithm(column) for column in columns], 1)


def unit_rows(block_Nd: Array) -> Float:
    """Rows of length 1; zero rows stay."""
    norm_N1 = np.linalg.norm(block_Nd, axis=1, keepdims=True)
    return (block_Nd / np.maximum(norm_N1, 1e-12)).astype(np.float32)
