"""Side features of items and users: vocabularies, and what they make of tables.

A vocabulary, fitted on train users and the catalogue, turns the values of a table into rows of an
embedding; row 0 means unknown: no value, a rare one, no table, no such user. Users and values may
come and go, rows keep their meaning, because the vocabularies lie beside the weights.

Shapes: N items, U users, S users of sequences, F static features, T tags of an item, A authors,
D width of the content space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from components.data.hashing import splitmix64
from components.training.onerec.lifelong import Clusters, cluster_histories

if TYPE_CHECKING:
    from components.training.onerec.config import FeatureConfig, OneRecConfig
    from components.training.onerec.data import Sequences

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

#: Stands for a user of whom not even the id is known.
UNKNOWN_USER = int(np.iinfo(np.int64).min)
#: Tags of an item that are read, the first as they are listed.
TAGS_PER_ITEM = 8
#: Name of the static feature that is the user's id itself.
USER_ID = "user_id"
FILE, ARRAYS = "features.json", "features.safetensors"


@dataclass(frozen=True)
class ItemFeatures:
    """Features of the catalogue's items, by item index.

    Attributes:
        author_N: int32 rows.
        tag_NT: int32 rows, 0 behind the item's last tag; T is 1 at least.
        tag_weight_NT: float32, one over the number of the item's tags, 0 where there is none.
        content_ND: float32 embedding of the content space, in which lifelong histories are
            clustered and which a model may read; None: neither.
    """

    author_N: Int32
    tag_NT: Int32
    tag_weight_NT: Float32
    content_ND: Float32 | None = None


@dataclass(frozen=True)
class SideInformation:
    """What is known beside the events of some sequences.

    Attributes:
        static_SF: int32 rows of the static features of every user of the sequences.
        clusters: of the lifelong histories of the requests that will be read.
    """

    items: ItemFeatures
    static_SF: Int32
    clusters: Clusters | None


@dataclass(frozen=True)
class Vocabulary:
    """What rows of embeddings stand for; a model names it and is nothing without it.

    Attributes:
        author_id_A: int64, ascending; row 1 + place. Empty where authors are hashed.
        author_rows: rows of the author table, with row 0; 0: the model reads no author.
        tags: row 1 + place.
        columns: values of each column of ``users``, row 1 + place.
        user_buckets: buckets of hashed user ids; 0: the model does not read them.
    """

    author_id_A: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))
    author_rows: int = 0
    tags: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    user_buckets: int = 0

    @classmethod
    def fit(
        cls, items: pa.Table, users: pa.Table, train_user_id: pa.Array, config: FeatureConfig
    ) -> Vocabulary:
        """Values that occur ``min_count`` times or more, the most frequent first.

        Args:
            items: ``author_id`` and ``tags`` of the catalogue's items.
            users: ``user_id`` and categorical columns: string, integer, bool, or a dictionary.
            train_user_id: users whose values are counted.
        """
        author_id_A = pc.unique(items["author_id"]).drop_null().to_numpy(zero_copy_only=False)
        known = len(author_id_A)
        read = config.authors and known
        author_rows = 1 + min(known, config.authors) if read else 0
        by_hash = known > config.authors
        tags = items["tags"].combine_chunks()
        # Of each item once: a tag is known by the items that have it.
        pairs = pa.table({"item": pc.list_parent_indices(tags), "tag": tags.flatten()})
        listed = pairs.group_by(["item", "tag"]).aggregate([])["tag"]
        columns: dict[str, tuple[str, ...]] = {}
        if config.static:
            chosen = users.filter(pc.is_in(users["user_id"], value_set=train_user_id))
            for name in users.schema.names:
                if name != USER_ID and _is_categorical(users.schema.field(name).type):
                    values = _frequent(chosen[name], config.min_count, config.values)
                    if values:
                        columns[name] = values
        return cls(
            np.zeros(0, np.int64) if by_hash or not read else np.sort(author_id_A),
            author_rows,
            _frequent(listed, config.min_count, config.tags) if config.tags else (),
            columns,
            config.user_buckets if config.static else 0,
        )

    @property
    def static_rows(self) -> list[int]:
        """Rows of each static feature, with row 0."""
        ids = [1 + self.user_buckets] if self.user_buckets else []
        return ids + [1 + len(values) for values in self.columns.values()]

    def items(self, items: pa.Table, content_ND: Float32 | None = None) -> ItemFeatures:
        """Features of items in the order of the table; new items may be among them."""
        ids = items["author_id"].combine_chunks()
        has_author = ids.is_valid().to_numpy(zero_copy_only=False)
        author_N = _rows_of_ids(
            ids.fill_null(0).to_numpy(), self.author_id_A, max(0, self.author_rows - 1)
        )
        tags = items["tags"].combine_chunks()
        length_N = pc.fill_null(pc.list_value_length(tags), 0).to_numpy(zero_copy_only=False)
        row_E = _rows_of_values(tags.flatten(), self.tags)
        item_E = np.arange(len(items)).repeat(length_N)[row_E > 0]
        row_E = row_E[row_E > 0]
        place_E = np.arange(len(item_E)) - np.searchsorted(item_E, item_E)
        kept = place_E < TAGS_PER_ITEM
        tag_NT = np.zeros((len(items), 1 + int(place_E[kept].max(initial=0))), np.int32)
        tag_NT[item_E[kept], place_E[kept]] = row_E[kept]
        real_NT = tag_NT > 0
        weight_NT = real_NT / np.maximum(real_NT.sum(1, keepdims=True), 1)
        return ItemFeatures(
            (author_N * has_author).astype(np.int32),
            tag_NT,
            weight_NT.astype(np.float32),
            content_ND,
        )

    def static(self, user_id_S: Int64, columns: Mapping[str, pa.Array]) -> Int32:
        """Rows int32 [S, F] of users from their ids and the columns that are known of them."""
        parts = []
        if self.user_buckets:
            bucket_S = _rows_of_ids(user_id_S, np.zeros(0, np.int64), self.user_buckets)
            parts.append(np.where(user_id_S == UNKNOWN_USER, 0, bucket_S))
        for name, values in self.columns.items():
            given = columns.get(name)
            nothing = np.zeros(len(user_id_S), np.int64)
            parts.append(nothing if given is None else _rows_of_values(given, values))
        if not parts:
            return np.zeros((len(user_id_S), 0), np.int32)
        return np.stack(parts, 1).astype(np.int32)


@dataclass(frozen=True)
class Features:
    """The vocabulary and what it made of the tables `items` and `users`.

    Attributes:
        user_id_U: int64, ascending.
        static_UF: int32 rows of the static features of every row of ``users``.
    """

    vocabulary: Vocabulary
    items: ItemFeatures
    user_id_U: Int64
    static_UF: Int32

    @classmethod
    def fit(
        cls,
        items: pa.Table,
        users: pa.Table,
        train_user_id: pa.Array,
        config: FeatureConfig,
        content_ND: Float32 | None = None,
    ) -> Features:
        """Fit a vocabulary (`Vocabulary.fit`) and apply it; ``items`` in the catalogue's order."""
        vocabulary = Vocabulary.fit(items, users, train_user_id, config)
        users = users.sort_by(USER_ID)
        user_id_U = users[USER_ID].to_numpy()
        columns = {name: users[name].combine_chunks() for name in vocabulary.columns}
        static_UF = vocabulary.static(user_id_U, columns)
        return cls(vocabulary, vocabulary.items(items, content_ND), user_id_U, static_UF)

    @classmethod
    def none(cls, num_items: int) -> Features:
        """Of a source that says nothing of items and users."""
        tags = np.zeros((num_items, 1), np.int32)
        items = ItemFeatures(np.zeros(num_items, np.int32), tags, tags.astype(np.float32))
        return cls(Vocabulary(), items, np.zeros(0, np.int64), np.zeros((0, 0), np.int32))

    def sizes(self, config: FeatureConfig) -> dict[str, object]:
        """What `OneRecConfig` needs to know of the features."""
        content_ND, vocabulary = self.items.content_ND, self.vocabulary
        return {
            "author_rows": vocabulary.author_rows,
            "tag_rows": 1 + len(vocabulary.tags) if vocabulary.tags else 0,
            "content_width": content_ND.shape[1]
            if config.content and content_ND is not None
            else 0,
            "static_rows": vocabulary.static_rows,
        }

    def static_of(self, user_id_S: Int64) -> Int32:
        """Static features of users by id: int32 [S, F]; who has no row is known by id at most."""
        static_SF = self.vocabulary.static(user_id_S, {})
        if len(self.user_id_U):
            place_S = np.minimum(
                np.searchsorted(self.user_id_U, user_id_S), len(self.user_id_U) - 1
            )
            known_S = self.user_id_U[place_S] == user_id_S
            static_SF[known_S] = self.static_UF[place_S[known_S]]
        return static_SF

    def attach(
        self,
        sequences: Sequences,
        event_S: Int64,
        config: OneRecConfig,
        static_SF: Int32 | None = None,
    ) -> Sequences:
        """The sequences with all that a model reads beside their events.

        Args:
            event_S: the targets of requests that will be read; their lifelong histories are
                clustered here, once.
            static_SF: static features of the users, where they are known better than by id.
        """
        if static_SF is None:
            static_SF = self.static_of(sequences.user_id_U)
        clusters = None
        if config.lifelong.entries:
            clusters = cluster_histories(sequences, event_S, self.items, config.lifelong)
        return replace(sequences, side=SideInformation(self.items, static_SF, clusters))

    def save(self, folder: Path) -> None:
        """Write JSON and safetensors beside the weights of a model."""
        from safetensors.numpy import save_file

        said = {
            "author_rows": self.vocabulary.author_rows,
            "tags": self.vocabulary.tags,
            "users": self.vocabulary.columns,
            "user_buckets": self.vocabulary.user_buckets,
        }
        (folder / FILE).write_text(json.dumps(said, indent=1, ensure_ascii=False))
        arrays = {
            "author_id": self.vocabulary.author_id_A,
            "author": self.items.author_N,
            "tag": self.items.tag_NT,
            "tag_weight": self.items.tag_weight_NT,
            "user_id": self.user_id_U,
            "static": self.static_UF,
        }
        if self.items.content_ND is not None:
            arrays["content"] = self.items.content_ND
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, folder / ARRAYS)

    @classmethod
    def load(cls, folder: Path) -> Features:
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        said = json.loads((folder / FILE).read_text())
        arrays = load_file(folder / ARRAYS)
        vocabulary = Vocabulary(
            arrays["author_id"],
            said["author_rows"],
            tuple(said["tags"]),
            {name: tuple(values) for name, values in said["users"].items()},
            said["user_buckets"],
        )
        items = ItemFeatures(
            arrays["author"], arrays["tag"], arrays["tag_weight"], arrays.get("content")
        )
        return cls(vocabulary, items, arrays["user_id"], arrays["static"])


def _is_categorical(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    kinds = (pt.is_string, pt.is_large_string, pt.is_integer, pt.is_boolean)
    return any(is_kind(kind) for is_kind in kinds)


def _frequent(values: pa.Array | pa.ChunkedArray, least: int, most: int) -> tuple[str, ...]:
    """The ``most`` most frequent values as text, ``least`` times or more; equal ones by name."""
    counted = pc.value_counts(values.cast(pa.string()).drop_null())
    table = pa.table({"value": counted.field("values"), "count": counted.field("counts")})
    table = table.filter(pc.greater_equal(table["count"], least))
    table = table.sort_by([("count", "descending"), ("value", "ascending")])
    return tuple(table["value"].slice(0, most).to_pylist())


def _rows_of_values(values: pa.Array | pa.ChunkedArray, known: Sequence[str]) -> Int64:
    """Row 1 + place among ``known`` of every value, 0 where it is none of them."""
    place = pc.index_in(values.cast(pa.string()), value_set=pa.array(known, pa.string()))
    return pc.add(pc.fill_null(place, -1), 1).cast(pa.int64()).to_numpy(zero_copy_only=False)


def _rows_of_ids(id_N: Int64, known_A: Int64, buckets: int) -> Int64:
    """Row 1 + place among the ascending ``known_A``, or 1 + bucket by hash where none is listed."""
    if not buckets:
        return np.zeros(len(id_N), np.int64)
    if not len(known_A):
        hashed_N = splitmix64(id_N.astype(np.uint64)) % np.uint64(buckets)
        return hashed_N.astype(np.int64) + 1
    place_N = np.minimum(np.searchsorted(known_A, id_N), len(known_A) - 1)
    return np.where(known_A[place_N] == id_N, place_N + 1, 0)
