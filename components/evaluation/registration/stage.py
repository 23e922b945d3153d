"""The `register` stage: a new version in the model registry, champion or challenger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from components.pipeline.stage import Inputs, Outputs, Run, stage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MODEL_FILES = ("recommender", "semantic_ids", "catalogue")


class RegisterParams(BaseModel):
    """The name in the registry and what a new champion has to win."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_name: str = Field(
        default="recommender",
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="name in the model registry; the data source is appended",
    )
    gate_metric: Literal["ndcg_at_10", "ndcg_at_20", "hr_at_10", "hr_at_20"] = Field(
        default="ndcg_at_10", description="metric on which a challenger must beat the champion"
    )
    seed: int = Field(default=0, ge=0, description="bootstrap of the paired difference")


def tracking_server(params: RegisterParams) -> str:
    """What the registry holds is outside the store: another tracking server is another input."""
    from components.pipeline.settings import load_settings

    return load_settings().tracking


@stage(
    inputs=("catalogue", "test_examples", "semantic_ids", "recommender", "evaluation", "source"),
    outputs=("registration",),
    params=RegisterParams,
    external=tracking_server,
)
def register(
    params: RegisterParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Registers the model; it becomes champion only if it beats the champion on the same users."""
    import pandas as pd

    from components.evaluation.registration import registry
    from components.evaluation.registration.gate import judge
    from components.pipeline.settings import load_settings
    from components.pipeline.tracking import connect

    source = inputs["source"].read_json()
    name = f"{params.model_name}-{source['format']}"
    settings = load_settings()
    mlflow = connect(settings)
    ranks = inputs["evaluation"].read_table(["user_id", "method", "rank"]).to_pandas()
    ours = ranks[ranks["method"] == "onerec"].sort_values("user_id", kind="stable")

    champion = registry.champion(mlflow, name, run.scratch / "champion")
    champion_rank = None
    if champion is not None:
        run.note(f"ranking the champion, version {champion.number}, on the new test examples")
        champion_rank = _rank_champion(champion.folder, inputs, ours["user_id"])
    verdict = judge(
        params.gate_metric,
        ours["rank"].to_numpy(),
        champion_rank,
        f"version {champion.number}" if champion else "",
        run.seed,
    )
    files = {artifact: inputs[artifact].path() for artifact in MODEL_FILES}
    tags = {f"{artifact}_digest": inputs[artifact].digest for artifact in MODEL_FILES}
    tags |= {
        "evaluation_digest": inputs["evaluation"].digest,
        "manifest_key": str(inputs["recommender"].manifest["key"]),
        "gate": verdict.reason[:500],
    }
    first = inputs["test_examples"].read_table(["item_index"]).slice(0, 2)["item_index"].to_pylist()
    item_ids = inputs["catalogue"].read_table(["item_id"])["item_id"].to_numpy()
    example = pd.DataFrame({"item_ids": [item_ids[row].tolist() for row in first]})
    number = registry.log_version(mlflow, name, files, example, tags)
    registry.set_alias(mlflow, name, verdict.decision, number)
    outputs["registration"].write_json(
        {
            "model": name,
            "version": number,
            "alias": verdict.decision,
            "decision": verdict.decision,
            "reason": verdict.reason,
            "gate": verdict.to_json(),
            "previous_champion": champion.number if champion else None,
            "tracking": _without_password(settings.tracking),
        }
    )
    run.note(f"{name} version {number}: {verdict.decision} ({verdict.reason})")
    return {"version": float(number), "is_champion": float(verdict.decision == "champion")}


def _rank_champion(folder: Path, inputs: Inputs, user_ids: Any) -> npt.NDArray[np.int32]:
    """1-based ranks of this run's test targets in the champion's lists, in the order of users.

    The champion has its own catalogue: items are matched by id, and what it does not know is
    left out of the histories and counts as a miss when it is the target.
    """
    import numpy as np

    from components.evaluation.registration.recommender_model import Recommender

    champion = Recommender.from_files({name: folder / name for name in MODEL_FILES})
    item_ids = inputs["catalogue"].read_table(["item_id"])["item_id"].to_numpy()
    beams = int(inputs["evaluation"].read_json()["beams"])
    rank_of: dict[int, int] = {}
    for batch in inputs["test_examples"].batches(batch_size=2048):
        frame = batch.to_pandas()
        frame = frame[frame["user_id"].isin(user_ids)]
        if frame.empty:
            continue
        frame["item_ids"] = [item_ids[row] for row in frame["item_index"]]
        listed = champion.predict_frame(frame, beams=beams)["item_ids"]
        for user, target, items in zip(frame["user_id"], item_ids[frame["target"]], listed):
            rank_of[user] = items.index(target) + 1 if target in items else 0
    return np.array([rank_of[user] for user in user_ids], np.int32)


def _without_password(uri: str) -> str:
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host))
