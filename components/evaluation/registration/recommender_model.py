"""The registered recommender as MLflow serves it: histories of item ids in, items out.

MLflow stores this file as source and runs it to load the model ("models from code"); the weights
beside it are safetensors. Nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from components.evaluation.registration.serving import ServedRecommender, requests_table


class Recommender(mlflow.pyfunc.PythonModel):
    """Recommends the next items for histories; see `ServedRecommender.recommend`."""

    def load_context(self, context: Any) -> None:
        self.served = ServedRecommender.from_files(
            {name: Path(path) for name, path in context.artifacts.items()}
        )

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row a request: lists ``item_ids`` and ``scores``."""
        options = {name: int(value) for name, value in (params or {}).items()}
        answers = self.served.recommend(requests_table(model_input), **options)
        return pd.DataFrame(answers.to_pydict())


mlflow.models.set_model(Recommender())
