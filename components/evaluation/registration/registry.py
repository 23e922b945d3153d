"""The MLflow model registry: versions, aliases, and the files of a version.

A version holds safetensors, JSON and parquet, one Python file that MLflow runs as source
(``recommender_model.py``) and the modules that file can reach: loading a model unpickles nothing,
and answers with the code that the model was registered with. A version without an alias, which a
killed run may leave, is never served; the next run that makes the same model takes it over.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from components.pipeline.code_digest import ROOT, closure_files
from components.pipeline.errors import StorageError
from components.pipeline.references import MODEL_DIGEST as MODEL_DIGEST

CHAMPION, CHALLENGER = "champion", "challenger"
MODEL_MODULE = "components.evaluation.registration.recommender_model"
REQUIREMENTS = ("torch", "numpy", "pandas", "pyarrow", "safetensors", "pydantic")

#: What to do about a champion that cannot be used.
WAY_OUT = (
    "take the alias 'champion' off that version in the registry: the next model is then the first"
)


@dataclass(frozen=True)
class Version:
    """A registered version: its number and its tags."""

    number: str
    tags: Mapping[str, str]


def champion(mlflow: Any, name: str) -> Version | None:
    """The version with the champion alias; None if there is none, or no model of this name."""
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    try:
        number = client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if number is None:
        return None
    return Version(str(number), client.get_model_version(name, str(number)).tags)


def find(mlflow: Any, name: str, model_digest: str) -> str | None:
    """The number of the newest version with these files and this code, if there is one."""
    query = f"name = '{name}' and tags.{MODEL_DIGEST} = '{model_digest}'"
    found = mlflow.MlflowClient().search_model_versions(query)
    return max((str(version.version) for version in found), key=int, default=None)


def fetch(mlflow: Any, name: str, number: str, folder: Path) -> Path:
    """The files of a version as a local folder, which is made anew: ``artifacts``, ``code``, ….

    Raises:
        StorageError: they are not there any more, or the server does not give them.
    """
    from mlflow.exceptions import MlflowException

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    uri, found = f"models:/{name}/{number}", ""
    try:
        model = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
    except (MlflowException, OSError) as error:
        found = f": {error}"
    else:
        # Of a folder that is gone MLflow downloads nothing, without a word.
        if (model / "artifacts").is_dir() and (model / "code").is_dir():
            return model
    raise StorageError(
        f"the files of version {number} cannot be fetched{found}",
        where=f"model registry '{name}'",
        remedy=f"bring its files back, or {WAY_OUT}",
    )


def log_version(
    mlflow: Any,
    name: str,
    files: Mapping[str, Path],
    example: Any,
    tags: Mapping[str, str],
    *,
    beams: int,
    scratch: Path,
) -> str:
    """Log the model with its signature and register it as a new version.

    Args:
        files: folders of the artifacts that the model carries.
        example: a frame of requests, kept beside the model.
        tags: of the version; it never exists without them.
        beams: width of the beam where a request names none: the width that was evaluated.
        scratch: local folder for the copies that MLflow uploads.

    Returns:
        The number of the new version.
    """
    # Imported here for its file, and so that its code counts for the cache of the stage.
    from components.evaluation.registration import recommender_model

    shutil.rmtree(scratch, ignore_errors=True)
    # MLflow keeps the names of folders, which are digests where artifacts were fetched.
    for artifact, folder in files.items():
        shutil.copytree(folder, scratch / artifact)
    with _same_import_path():
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=recommender_model.__file__,
            artifacts={artifact: (scratch / artifact).as_uri() for artifact in files},
            code_paths=[str(_copy_code(scratch / "code"))],
            signature=signature(beams),
            input_example=example,
            pip_requirements=[_pinned(package) for package in REQUIREMENTS],
        )
    # MLflow tells the person at the terminal in its own words; the stage has its own.
    with contextlib.redirect_stderr(io.StringIO()):
        version = mlflow.register_model(info.model_uri, name, tags=dict(tags))
    return str(version.version)


def set_tags(mlflow: Any, name: str, number: str, tags: Mapping[str, str]) -> None:
    """Overwrite tags of a version."""
    client = mlflow.MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(name, number, key, value)


def set_alias(mlflow: Any, name: str, alias: str, number: str) -> None:
    """Point ``alias`` at a version; another version that had it loses it.

    A challenger that becomes champion is a challenger no longer.
    """
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, alias, number)
    if alias == CHAMPION:
        held = client.get_registered_model(name).aliases.get(CHALLENGER)
        if held is not None and str(held) == number:
            client.delete_registered_model_alias(name, CHALLENGER)


def signature(beams: int) -> Any:
    """What the model takes and gives: `serving.ServedRecommender.recommend`, in MLflow's types.

    Wide types: MLflow refuses Python's own numbers where the narrow ones stand.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Map

    from components.evaluation.registration.serving import TOP_N

    optional = {
        "timestamp_ms": Array(DataType.long),
        "feedback": Array(DataType.long),
        "positive": Array(DataType.boolean),
        "watch_time_s": Array(DataType.double),
        "duration_s": Array(DataType.double),
        "request_timestamp_ms": DataType.long,
        "user_id": DataType.long,
        "user_features": Map(DataType.string),
    }
    requests = [ColSpec(Array(DataType.long), "item_ids")]
    requests += [ColSpec(kind, name, required=False) for name, kind in optional.items()]
    answers = [
        ColSpec(Array(DataType.long), "item_ids"),
        ColSpec(Array(DataType.float), "scores"),
    ]
    params = [
        ParamSpec("top_n", DataType.integer, TOP_N),
        ParamSpec("beams", DataType.integer, beams),
    ]
    return ModelSignature(Schema(requests), Schema(answers), ParamSchema(params))


def _copy_code(folder: Path) -> Path:
    """Copy the modules that the served model can reach; the folder of their package."""
    for file in closure_files(MODEL_MODULE):
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return folder / "components"


def _pinned(package: str) -> str:
    """``torch==2.13.0``, without the build (``+cpu``) that an index may not have."""
    return f"{package}=={metadata.version(package).partition('+')[0]}"


@contextlib.contextmanager
def _same_import_path() -> Iterator[None]:
    """Undo what MLflow adds to ``sys.path`` when it tries the model out."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before
