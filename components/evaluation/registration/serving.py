"""The registered recommender without MLflow: histories of item ids in, lists of items out.

A version of the registry carries this code beside its weights. As a program,
``python -m components.evaluation.registration.serving``, it answers a file of requests.

Shapes: B requests, E events of all of them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.pipeline.errors import DataContractError, ParamsError
from components.training.onerec.data import read_sequences
from components.training.onerec.recommender import Recommender, popularity

#: The artifacts that make a model.
MODEL_FILES = ("recommender", "semantic_ids", "catalogue")
#: With ``semantic_ids``, those that encode new items by their content; ranking needs none of them.
ENCODER_FILES = ("item_encoder", "item_aligner")

#: What a request may tell of each event: the type, and what stands for "unknown".
OPTIONAL: dict[str, tuple[pa.DataType, Any]] = {
    "timestamp_ms": (pa.int64(), 0),
    "feedback": (pa.uint8(), 0),
    "positive": (pa.bool_(), True),
    "watch_time_s": (pa.float32(), float("nan")),
    "duration_s": (pa.float32(), float("nan")),
}
#: What it may tell of itself.
OF_REQUEST: dict[str, pa.DataType] = {
    "request_timestamp_ms": pa.int64(),
    "user_id": pa.int64(),
    "user_features": pa.map_(pa.string(), pa.string()),
}
ANSWERS = pa.schema([("item_ids", pa.list_(pa.int64())), ("scores", pa.list_(pa.float32()))])

TOP_N, BEAMS = 20, 64
CHUNK = 2048


class ServedRecommender:
    """A model with the item ids of its catalogue, in the order of its item indices."""

    def __init__(self, recommender: Recommender, item_id_N: npt.NDArray[np.int64]) -> None:
        self.recommender, self.item_id_N = recommender, item_id_N
        self._order_N = np.argsort(item_id_N, kind="stable")

    @classmethod
    def from_files(cls, files: Mapping[str, Path], device: str = "cpu") -> ServedRecommender:
        """The model from the folders of the artifacts ``MODEL_FILES``."""
        popularity_N = read_popularity(files["catalogue"])
        recommender = Recommender.load(
            files["recommender"], files["semantic_ids"], popularity_N, device
        )
        table = pq.read_table(files["catalogue"] / "table.parquet", columns=["item_id"])
        return cls(recommender, table["item_id"].to_numpy())

    def over(
        self, recommender: Recommender, item_id_N: npt.NDArray[np.int64] | None = None
    ) -> ServedRecommender:
        """The same over another catalogue; None: of the same items, whose ids are shared."""
        if item_id_N is not None:
            return ServedRecommender(recommender, item_id_N)
        other = copy.copy(self)
        other.recommender = recommender
        return other

    def places(self, id_E: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Item indices int64 [E] of item ids, -1 where the catalogue has none."""
        # The order instead of ids in order: those would be another eight bytes an item.
        at_E = np.searchsorted(self.item_id_N, id_E, sorter=self._order_N)
        place_E = self._order_N[np.minimum(at_E, len(self._order_N) - 1)]
        return np.where(self.item_id_N[place_E] == id_E, place_E, -1)

    def recommend(self, requests: pa.Table, *, top_n: int = TOP_N, beams: int = BEAMS) -> pa.Table:
        """The next items for every request.

        Args:
            requests: list column ``item_ids``, oldest first; nulls and ids that the model does not
                know are left out of the history, which may be empty. Optional: the list columns of
                ``OPTIONAL``, as long as ``item_ids`` or null (an unknown time is taken to be that
                of the event before, or of the next one that is known); the time of the request,
                ``request_timestamp_ms`` (unknown: that of the newest event); ``user_id``, whose
                features are those at the time of training; and ``user_features``, a map from
                columns of the users' table to values as text, instead of what is known of
                ``user_id``. Users, columns and values that the model does not know count as
                unknown.
            beams: width of the beam; a list is shorter than ``top_n`` where the ids found by so
                many beams have fewer items.

        Returns:
            ``ANSWERS``: item ids, best first, and the log-probabilities of their semantic ids.

        Raises:
            DataContractError: a list has another length than ``item_ids``.
            ParamsError: ``top_n`` or ``beams`` is less than 1.
        """
        for name, value in (("top_n", top_n), ("beams", beams)):
            if value < 1:
                raise ParamsError(f"{value} is less than 1", where=f"parameter '{name}'")
        if not len(requests):
            return ANSWERS.empty_table()
        sequences = read_sequences([self._examples(requests)])
        lists = self.recommender.rank(
            sequences,
            sequences.example_targets(),
            beams=beams,
            top_n=top_n,
            static_SF=self._static(requests, sequences.user_id_U),
        )
        items, scores = map(np.concatenate, zip(*lists, strict=True))
        real = items >= 0
        ends = np.concatenate([[0], np.cumsum(real.sum(1))])
        return pa.table(
            {
                "item_ids": _lists(ends, pa.array(self.item_id_N[items[real]])),
                "scores": _lists(ends, pa.array(scores[real], pa.float32())),
            },
            schema=ANSWERS,
        )

    def _static(
        self, requests: pa.Table, user_id_B: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int32]:
        """Static features of the users: told by the request, else what is known of the id."""
        features = self.recommender.features
        static_BF = features.static_of(user_id_B)
        if "user_features" in requests.schema.names:
            told = requests["user_features"].combine_chunks()
            is_told_B = told.is_valid().to_numpy(zero_copy_only=False)
            rows = told.filter(told.is_valid())
            columns = {
                name: pc.map_lookup(rows, name, "last") for name in features.vocabulary.columns
            }
            static_BF[is_told_B] = features.vocabulary.static(user_id_B[is_told_B], columns)
        return static_BF

    def _examples(self, requests: pa.Table) -> pa.RecordBatch:
        """The requests as examples whose target, which nobody reads, is item 0."""
        ids = requests["item_ids"].combine_chunks()
        length_B = pc.list_value_length(ids).fill_null(0).to_numpy(zero_copy_only=False)
        told_E = ids.flatten().cast(pa.int64())
        id_E = told_E.fill_null(0).to_numpy()
        row_E = np.repeat(np.arange(len(requests)), length_B)
        place_E = self.places(id_E)
        known_E = (place_E >= 0) & told_E.is_valid().to_numpy(False)

        values = {name: _values(requests, name, length_B) for name in OPTIONAL}
        values["timestamp_ms"] = _times_beside(values["timestamp_ms"], row_E)
        now_B = np.zeros(len(requests), np.int64)
        np.maximum.at(now_B, row_E, values["timestamp_ms"])
        if "request_timestamp_ms" in requests.schema.names:
            told = requests["request_timestamp_ms"].cast(pa.int64()).fill_null(0).to_numpy()
            # Without the times of the events, that of the request says nothing.
            now_B = np.where((told > 0) & (now_B > 0), told, now_B)

        kept_B = np.bincount(row_E[known_E], minlength=len(requests))
        ends = np.concatenate([[0], np.cumsum(kept_B)])
        columns = {"item_index": _lists(ends, pa.array(place_E[known_E], pa.int32()))}
        for name, (kind, _) in OPTIONAL.items():
            columns[name] = _lists(ends, pa.array(values[name][known_E], kind))
        if "user_id" in requests.schema.names:
            columns["user_id"] = requests["user_id"].combine_chunks().cast(pa.int64())
        columns["target"] = pa.array(np.zeros(len(requests), np.int32))
        columns["target_timestamp_ms"] = pa.array(now_B)
        return pa.RecordBatch.from_pydict(columns)


def read_popularity(catalogue: Path) -> npt.NDArray[np.integer]:
    """Training popularity [N] by item index, out of the folder of the artifact ``catalogue``."""
    columns = ["train_positive_count", "train_count"]
    table = pq.read_table(catalogue / "table.parquet", columns=columns)
    return popularity(*(table[name].to_numpy() for name in columns))


def _values(requests: pa.Table, name: str, length_B: npt.NDArray[np.integer]) -> npt.NDArray[Any]:
    """The values of an optional column for every event, "unknown" where a request has none."""
    kind, unknown = OPTIONAL[name]
    value_E = np.full(int(length_B.sum()), unknown, kind.to_pandas_dtype())
    if name not in requests.schema.names:
        return value_E
    lists = requests[name].combine_chunks()
    is_given_B = lists.is_valid().to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(
        is_given_B
        & (pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False) != length_B)
    )
    if len(wrong):
        row = int(wrong[0])
        raise DataContractError(
            f"{len(lists[row])} values for {length_B[row]} item_ids",
            where=f"request {row} column '{name}'",
            remedy="give one value an item, or leave the column out",
        )
    given = lists.flatten().cast(kind).fill_null(pa.scalar(unknown, kind))
    value_E[np.repeat(is_given_B, length_B)] = given.to_numpy(zero_copy_only=False)
    return value_E


def _times_beside(
    time_ms_E: npt.NDArray[np.int64], row_E: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Times of events; an unknown one is that of the event before it, or else of the next known.

    Of a request that tells some times, an event without one was not long ago, as 0 would say.
    """
    event_E = np.arange(len(time_ms_E))
    is_known_E = time_ms_E > 0
    before_E = np.maximum.accumulate(np.where(is_known_E, event_E, -1))
    after_E = np.minimum.accumulate(np.where(is_known_E, event_E, len(event_E))[::-1])[::-1]
    found_E = time_ms_E
    for near_E in (after_E, before_E):
        is_there_E = (near_E >= 0) & (near_E < len(event_E))
        near_E = np.where(is_there_E, near_E, 0)
        is_there_E &= row_E[near_E] == row_E
        found_E = np.where(is_there_E, time_ms_E[near_E], found_E)
    return found_E


def requests_table(frame: Any) -> pa.Table:
    """Requests as Arrow from a pandas frame whose cells are lists, arrays or missing."""
    kinds = {"item_ids": pa.list_(pa.int64()), **OF_REQUEST}
    kinds |= {name: pa.list_(kind) for name, (kind, _) in OPTIONAL.items()}
    told = {name: frame[name].tolist() for name in kinds if name in frame.columns}
    if "user_features" in told:
        told["user_features"] = [
            [(name, _as_text(value)) for name, value in cell.items()]
            if isinstance(cell, Mapping)
            else None
            for cell in told["user_features"]
        ]
    return pa.table(
        {name: pa.array(cells, kinds[name], from_pandas=True) for name, cells in told.items()}
    )


def _as_text(value: Any) -> str | None:
    """A value of a users' column as Arrow writes it: flags in lower case."""
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool | np.bool_) else str(value)


def _lists(ends: npt.NDArray[np.integer], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)


def main() -> None:
    """Answer a parquet file of requests; prints how many after each batch."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "model", type=Path, help="folder with the folders " + ", ".join(MODEL_FILES)
    )
    parser.add_argument("requests", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--top-n", type=int, default=TOP_N)
    parser.add_argument("--beams", type=int, default=BEAMS)
    given = parser.parse_args()
    served = ServedRecommender.from_files({name: given.model / name for name in MODEL_FILES})
    with pq.ParquetFile(given.requests) as file, pq.ParquetWriter(given.answers, ANSWERS) as writer:
        for batch in file.iter_batches(batch_size=CHUNK):
            requests = pa.Table.from_batches([batch])
            writer.write_table(served.recommend(requests, top_n=given.top_n, beams=given.beams))
            print(len(batch), flush=True)


if __name__ == "__main__":
    main()
