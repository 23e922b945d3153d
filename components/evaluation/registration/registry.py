"""The MLflow model registry: versions, aliases, and the files of the champion.

A version holds safetensors, JSON and parquet next to one Python file that MLflow runs as source
(``recommender_model.py``): loading a model unpickles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHAMPION, CHALLENGER = "champion", "challenger"
MODEL_CODE = Path(__file__).with_name("recommender_model.py")
REQUIREMENTS = ("torch", "numpy", "pyarrow", "safetensors", "pydantic")


@dataclass(frozen=True)
class Version:
    """A registered version: its number, its tags and where its artifact files are."""

    number: str
    tags: Mapping[str, str]
    folder: Path


def champion(mlflow: Any, name: str, download_to: Path) -> Version | None:
    """The version with the champion alias, its files fetched; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        found = mlflow.MlflowClient().get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    download_to.mkdir(parents=True, exist_ok=True)
    folder = mlflow.artifacts.download_artifacts(
        f"models:/{name}/{found.version}", dst_path=str(download_to)
    )
    return Version(str(found.version), found.tags, Path(folder) / "artifacts")


def log_version(
    mlflow: Any, name: str, artifacts: Mapping[str, str], example: Any, tags: Mapping[str, str]
) -> str:
    """Log the model with its signature and register it as a new version.

    Args:
        artifacts: name → local folder or file that the model carries.
        example: input frame; the signature is inferred from it and from the prediction.

    Returns:
        The number of the new version.
    """
    from mlflow.models import infer_signature

    import components
    from components.evaluation.registration.recommender_model import Recommender

    served = Recommender.from_files({k: Path(v) for k, v in artifacts.items()})
    signature = infer_signature(example, served.predict_frame(example))
    info = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(MODEL_CODE),
        artifacts={k: Path(v).as_uri() for k, v in artifacts.items()},
        code_paths=[str(Path(str(components.__file__)).parent)],
        signature=signature,
        input_example=example,
        pip_requirements=list(REQUIREMENTS),
        registered_model_name=name,
    )
    number = str(info.registered_model_version)
    client = mlflow.MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(name, number, key, value)
    return number


def set_alias(mlflow: Any, name: str, alias: str, number: str) -> None:
    """Point ``alias`` at a version; the version that had it loses it."""
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, alias, number)
    if alias == CHAMPION:
        held = client.get_registered_model(name).aliases.get(CHALLENGER)
        if held is not None and str(held) == number:
            client.delete_registered_model_alias(name, CHALLENGER)
