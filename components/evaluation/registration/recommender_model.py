"""The registered recommender as MLflow serves it: histories in, items out.

MLflow stores this file as source and runs it to load the model ("models from code"); the weights
beside it are safetensors. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.training.onerec.data import read_sequences
from components.training.onerec.recommender import Recommender as OneRecRecommender
from components.training.onerec.recommender import popularity

#: Optional columns of a request, with the type of their elements and what stands for "unknown".
OPTIONAL = {
    "timestamp_ms": (pa.int64(), 0),
    "feedback": (pa.uint8(), 0),
    "positive": (pa.bool_(), True),
    "watch_time_s": (pa.float32(), float("nan")),
    "duration_s": (pa.float32(), float("nan")),
}
TOP_N, BEAMS = 20, 128


class Recommender(mlflow.pyfunc.PythonModel):
    """Recommends the next items for histories of item ids."""

    def load_context(self, context: Any) -> None:
        self._load({name: Path(path) for name, path in context.artifacts.items()})

    @classmethod
    def from_files(cls, files: Mapping[str, Path]) -> Recommender:
        """The model from the folders ``recommender``, ``semantic_ids`` and ``catalogue``."""
        model = cls()
        model._load(files)
        return model

    def _load(self, files: Mapping[str, Path]) -> None:
        catalogue = pq.read_table(files["catalogue"] / "table.parquet")
        self.item_ids = catalogue["item_id"].to_numpy()
        counts = popularity(
            catalogue["train_positive_count"].to_numpy(), catalogue["train_count"].to_numpy()
        )
        self.recommender = OneRecRecommender.load(
            files["recommender"], files["semantic_ids"], counts
        )

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        options = params or {}
        return self.predict_frame(
            model_input, int(options.get("top_n", TOP_N)), int(options.get("beams", BEAMS))
        )

    def predict_frame(
        self, requests: pd.DataFrame, top_n: int = TOP_N, beams: int = BEAMS
    ) -> pd.DataFrame:
        """One row a request.

        Args:
            requests: column ``item_ids`` (oldest first; ids the model does not know are left
                out), and optionally the columns of ``OPTIONAL``, lists of the same lengths.

        Returns:
            columns ``item_ids`` and ``scores`` (log-probabilities), lists of at most ``top_n``.
        """
        sequences = read_sequences([self._batch(requests)])
        lists = self.recommender.rank(
            sequences, sequences.example_targets(), beams=beams, top_n=top_n
        )
        rows = [
            (self.item_ids[item[item >= 0]].tolist(), score[item >= 0].astype(float).tolist())
            for items, scores in lists
            for item, score in zip(items, scores)
        ]
        return pd.DataFrame(rows, columns=["item_ids", "scores"])

    def _batch(self, requests: pd.DataFrame) -> pa.RecordBatch:
        columns: dict[str, list[Any]] = {"item_index": [], **{name: [] for name in OPTIONAL}}
        now = []
        for request in requests.to_dict("records"):
            ids = np.asarray(request["item_ids"], np.int64)
            place = np.searchsorted(self.item_ids, ids)
            place = np.minimum(place, len(self.item_ids) - 1)
            known = self.item_ids[place] == ids
            columns["item_index"].append(place[known].astype(np.int32))
            for name, (_, unknown) in OPTIONAL.items():
                values = request.get(name)
                given = np.full(len(ids), unknown) if values is None else np.asarray(values)
                columns[name].append(given[known])
            times = columns["timestamp_ms"][-1]
            now.append(int(times.max()) if len(times) else 0)
        types = {"item_index": pa.int32(), **{name: kind for name, (kind, _) in OPTIONAL.items()}}
        arrays = {
            name: pa.array([list(v) for v in values], pa.list_(types[name]))
            for name, values in columns.items()
        }
        arrays["target"] = pa.array(np.zeros(len(requests), np.int32))
        arrays["target_timestamp_ms"] = pa.array(now, pa.int64())
        return pa.RecordBatch.from_pydict(arrays)


mlflow.models.set_model(Recommender())
