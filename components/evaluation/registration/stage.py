"""The `register` stage: a version in the model registry, champion or challenger.

Shapes: U test users.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from components.pipeline.credentials import without_credentials
from components.pipeline.params_base import Params, Seed
from components.pipeline.stage import Inputs, Outputs, Run, stage

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from components.evaluation.registration.gate import Verdict
    from components.evaluation.registration.registry import Version
    from components.pipeline.settings import Settings


class RegisterParams(Params):
    """The name in the registry and what a new champion has to win."""

    model_name: str = Field(
        default="recommender",
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="name in the model registry; the data source is appended",
    )
    gate_metric: Literal["ndcg_at_10", "ndcg_at_20", "hr_at_10", "hr_at_20"] = Field(
        default="ndcg_at_10", description="metric on which a challenger must beat the champion"
    )
    seed: Seed = Field(default=0, description="bootstrap of the paired difference")


def tracking_server(params: RegisterParams) -> str:
    """Which registry: the address of a server without credentials, or the identity of a database.

    A version lives in the registry and not in the store: with another registry, or after its
    database was deleted, the result of this stage is none. A SQLite database is known by the time
    it was made, wherever it lies. A version that somebody deleted by hand is not noticed.
    """
    from components.pipeline.settings import load_settings

    settings = load_settings()
    if settings.tracking_database is not None:
        return f"sqlite {_made_at(settings.tracking_database)}"
    return without_credentials(settings.tracking)


@stage(
    inputs=(
        "catalogue",
        "test_examples",
        "item_encoder",
        "item_aligner",
        "semantic_ids",
        "recommender",
        "evaluation",
        "source",
    ),
    outputs=("registration",),
    params=RegisterParams,
    external=tracking_server,
)
def register(
    params: RegisterParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Registers the model; it becomes champion only if it beats the champion on the same users."""
    from components.evaluation.registration import registry
    from components.pipeline.settings import load_settings
    from components.pipeline.storage import exclusive
    from components.pipeline.tracking import connect

    settings = load_settings()
    mlflow = connect(settings)
    name = f"{params.model_name}-{inputs['source'].read_json()['format']}"
    tags = _tags(inputs)
    # Two runs at once would both be compared with the champion that one of them replaces.
    with (
        exclusive(settings.home / "locks" / "registry", lambda: run.note("another run registers")),
        _inside_a_run(mlflow, settings, name),
    ):
        champion = registry.champion(mlflow, name)
        verdict, previous = _verdict(mlflow, name, champion, tags, params, inputs, run)
        tags |= {"gate": verdict.reason[:500], "previous_champion": previous or ""}
        _keep(mlflow, settings, name, tags, inputs)
        number = _version(mlflow, name, tags, inputs, run)
        registry.set_alias(mlflow, name, verdict.decision, number)
    outputs["registration"].write_json(
        {
            "model": name,
            "version": number,
            "alias": verdict.decision,
            "decision": verdict.decision,
            "reason": verdict.reason,
            "gate": verdict.to_json(),
            "previous_champion": previous,
            "tracking": _address(settings.tracking),
        }
    )
    run.note(f"{name} version {number}: {verdict.decision} ({verdict.reason})")
    return {"version": float(number), "is_champion": float(verdict.decision == "champion")}


def _verdict(
    mlflow: Any,
    name: str,
    champion: Version | None,
    tags: dict[str, str],
    params: RegisterParams,
    inputs: Inputs,
    run: Run,
) -> tuple[Verdict, str | None]:
    """What the gate says, and the number of the champion that this model was compared with."""
    from components.evaluation.registration import gate, registry
    from components.evaluation.registration.champion import rank_champion

    users, ranks = _our_ranks(inputs)
    ours_U, metric = ranks.to_numpy(), params.gate_metric
    if champion is None:
        return gate.unopposed(metric, ours_U, "the first model of this name"), None
    if champion.tags.get(registry.MODEL_DIGEST) == tags[registry.MODEL_DIGEST]:
        # Registered by an earlier run, perhaps one that was killed before it could say so.
        reason = f"this model is the champion already, version {champion.number}"
        previous = champion.tags.get("previous_champion") or None
        return gate.unopposed(metric, ours_U, reason), previous
    run.note(f"ranking the champion, version {champion.number}, on the new test examples")
    champion_U = rank_champion(
        registry.fetch(mlflow, name, champion.number, run.scratch / "champion"),
        inputs,
        users,
        top_n=gate.cutoff(metric),
        beams=int(inputs["evaluation"].read_json()["beams"]),
        run=run,
    )
    verdict = gate.judge(metric, ours_U, champion_U, f"version {champion.number}", run.seed)
    return verdict, champion.number


def _our_ranks(inputs: Inputs) -> tuple[pa.Array, pa.Array]:
    """The evaluated users, ascending, and the ranks of their targets in our lists."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from components.pipeline.errors import StageError

    table = inputs["evaluation"].read_table(["user_id", "method", "rank"])
    ours = table.filter(pc.equal(table["method"].cast(pa.string()), "onerec")).sort_by("user_id")
    if not len(ours):
        raise StageError(
            "there is no rank of 'onerec' to judge the model by",
            where="artifact 'evaluation'",
            remedy="a test period with users: see the metrics of split",
        )
    return ours["user_id"].combine_chunks(), ours["rank"].combine_chunks()


def _tags(inputs: Inputs) -> dict[str, str]:
    """What the version is made of, by the digests of the results."""
    from components.evaluation.registration import registry
    from components.evaluation.registration.serving import ENCODER_FILES, MODEL_FILES
    from components.pipeline.code_digest import closure_digests, combined_digest
    from components.pipeline.manifest import digest_json

    digests = {f"{name}_digest": inputs[name].digest for name in MODEL_FILES}
    code = combined_digest(closure_digests(registry.MODEL_MODULE))
    return {
        **digests,
        **{f"{name}_digest": inputs[name].digest for name in ENCODER_FILES},
        # Not the encoder: another one whose embeddings have the same codes ranks alike.
        registry.MODEL_DIGEST: digest_json([digests, code]),
        "evaluation_digest": inputs["evaluation"].digest,
        "test_examples_digest": inputs["test_examples"].digest,
        "manifest_key": str(inputs["recommender"].manifest["key"]),
        "source": without_credentials(str(inputs["source"].read_json().get("uri", ""))),
    }


def _keep(mlflow: Any, settings: Settings, name: str, tags: dict[str, str], inputs: Inputs) -> None:
    """Tell every gc of the store what the version is made of, before there is a version."""
    from components.evaluation.registration import registry
    from components.pipeline.references import refer, registry_identity

    needs = [tags[tag] for tag in tags if tag.endswith("_digest") or tag == "manifest_key"]
    identity = registry_identity(settings, mlflow.MlflowClient())
    refer(inputs["recommender"].store, identity, name, tags[registry.MODEL_DIGEST], needs)


def _version(mlflow: Any, name: str, tags: dict[str, str], inputs: Inputs, run: Run) -> str:
    """The number of the version of this model: a new one, or one that a killed run left."""
    from pathlib import Path

    import pandas as pd

    from components.evaluation.registration import registry
    from components.evaluation.registration.serving import ENCODER_FILES, MODEL_FILES

    number = registry.find(mlflow, name, tags[registry.MODEL_DIGEST])
    if number is not None:
        registry.set_tags(mlflow, name, number, tags)
        return number
    item_ids = inputs["catalogue"].read_table(["item_id"])["item_id"]
    return registry.log_version(
        mlflow,
        name,
        {artifact: Path(inputs[artifact].path()) for artifact in MODEL_FILES + ENCODER_FILES},
        pd.DataFrame({"item_ids": [item_ids[:3].to_pylist(), item_ids[:1].to_pylist()]}),
        tags,
        beams=int(inputs["evaluation"].read_json()["beams"]),
        scratch=run.scratch / "model",
    )


@contextmanager
def _inside_a_run(mlflow: Any, settings: Settings, name: str) -> Iterator[None]:
    """The run of this stage if a flow has opened one, or else one of its own."""
    import os

    from components.pipeline.tracking import connect

    if mlflow.active_run() is not None:
        yield
        return
    if "MLFLOW_RUN_ID" in os.environ:
        # Opened by the process of the flow; MLflow goes on in the run of this name.
        with mlflow.start_run():
            yield
        return
    # Models of an experiment that the platform made go to its own folder of artifacts.
    connect(settings, name)
    with mlflow.start_run(run_name="register"):
        yield


def _made_at(database: Path) -> str:
    """When MLflow made this SQLite database; read without MLflow, whose import takes seconds."""
    import sqlite3

    if not database.is_file():
        return "none"
    try:
        connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
        try:
            (made,) = connection.execute("SELECT MIN(creation_time) FROM experiments").fetchone()
        finally:
            connection.close()
    except sqlite3.Error:
        return "none"
    return str(made)


def _address(tracking: str) -> str:
    """The address of a server; the path of an embedded database says nothing on another machine."""
    return "sqlite" if tracking.startswith("sqlite:") else without_credentials(tracking)
