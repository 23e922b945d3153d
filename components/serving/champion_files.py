"""The version to be served, out of the model registry: which one, its files, its own settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from components.data.contracts import FEEDBACK
from components.evaluation.registration import registry
from components.evaluation.registration.champion import run_program
from components.evaluation.registration.serving import (
    BEAMS,
    ENCODER_FILES,
    MODEL_FILES,
    OPTIONAL,
    ServedRecommender,
)
from components.pipeline.errors import CorruptArtifactError, StageError, UsageError

#: What the artifacts of a version may hold: nothing that would have to be unpickled.
READABLE = {".safetensors", ".json", ".parquet"}
#: Items and beams of the questions that tell whether other code answers alike, and how closely.
PROBED, SAME_WITHIN = 32, 1e-3


@dataclass(frozen=True)
class Chosen:
    """A version in a local folder.

    Attributes:
        files: folder with a folder for each of ``MODEL_FILES`` and ``ENCODER_FILES``.
        beams: width of the beam that it was evaluated with.
    """

    name: str
    number: str
    files: Path
    beams: int


def choose(mlflow: Any, name: str | None, number: str | None, folder: Path) -> Chosen:
    """Find and fetch a version: the champion of ``name``, or the one of that number.

    Args:
        name: of a registered model; None where only one has a champion.
        folder: receives the files.

    Raises:
        UsageError: no such model or version, no champion, or several.
        StorageError: its files cannot be fetched.
        CorruptArtifactError: they are not those of a recommender.
        StageError: the code of now would answer otherwise than the version's own.
    """
    name = name or _only_champion(mlflow)
    version = _version(mlflow, name, number)
    place = registry.fetch(mlflow, name, version.number, folder / "version")
    files = place / "artifacts"
    _require_readable(files, f"{name} version {version.number}")
    if not _same_code(version):
        _require_same_answers(place, f"{name} version {version.number}")
    return Chosen(name, version.number, files, _beams(place))


def _only_champion(mlflow: Any) -> str:
    models = list(mlflow.MlflowClient().search_registered_models())
    with_champion = [m.name for m in models if registry.CHAMPION in (m.aliases or {})]
    if len(with_champion) == 1:
        return str(with_champion[0])
    if with_champion:
        raise UsageError(
            f"several models have a champion: {', '.join(sorted(with_champion))}",
            where="--model",
            remedy=f"name one: --model {min(with_champion)}",
        )
    raise UsageError(
        "there is no champion yet: "
        + (f"only {', '.join(sorted(m.name for m in models))}" if models else "no model at all"),
        where=f"model registry {mlflow.get_tracking_uri()}",
        remedy="reelflow run recommend registers one; or name a version: --model NAME --version N",
    )


def _version(mlflow: Any, name: str, number: str | None) -> registry.Version:
    from mlflow.exceptions import MlflowException

    where = f"model registry '{name}'"
    if number is None:
        champion = registry.champion(mlflow, name)
        if champion is None:
            raise UsageError(
                "it has no champion",
                where=where,
                remedy="reelflow run recommend registers one; or name a version: --version N",
            )
        return champion
    try:
        found = mlflow.MlflowClient().get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UsageError(
            f"it has no version {number}",
            where=where,
            remedy="leave --version out for the champion, or see the versions in MLflow",
        ) from None
    return registry.Version(str(found.version), found.tags)


def _require_readable(files: Path, what: str) -> None:
    strange = [f for f in sorted(files.rglob("*")) if f.is_file() and f.suffix not in READABLE]
    missing = [name for name in MODEL_FILES + ENCODER_FILES if not (files / name).is_dir()]
    if strange or missing:
        raise CorruptArtifactError(
            f"{what} is no recommender: "
            + (f"'{strange[0].name}' is not read" if strange else f"'{missing[0]}' is missing"),
            where=str(files),
            remedy="name another version or model (--version, --model), or register a newly "
            "trained one: reelflow run recommend",
        )


def _beams(place: Path) -> int:
    """The default that its signature gives to ``beams``."""
    signature = (yaml.safe_load((place / "MLmodel").read_text()) or {}).get("signature") or {}
    for param in json.loads(signature.get("params") or "[]"):
        if param.get("name") == "beams":
            return int(param["default"])
    return BEAMS


def _same_code(version: registry.Version) -> bool:
    """Whether the version was registered with the code of now; so if it does not say."""
    if registry.MODEL_DIGEST not in version.tags:
        return True
    from components.pipeline.code_digest import closure_digests, combined_digest
    from components.pipeline.manifest import digest_json

    digests = {f"{name}_digest": version.tags.get(f"{name}_digest") for name in MODEL_FILES}
    code = combined_digest(closure_digests(registry.MODEL_MODULE))
    return version.tags.get(registry.MODEL_DIGEST) == digest_json([digests, code])


def _probes(served: ServedRecommender) -> pa.Table:
    """Requests that tell of everything that a request may tell of, users of the model among them.

    What users' features are is looked at by their ids: the columns of ``user_features`` are each
    source's own.
    """
    rng, now = np.random.default_rng(0), 1_700_000_000_000
    lengths = (0, 1, 5, 30)
    of_events: dict[str, Callable[[int], Any]] = {
        "item_ids": lambda n: rng.choice(served.item_id_N, n),
        "timestamp_ms": lambda n: now + 60_000 * np.arange(n),
        "feedback": lambda n: rng.integers(0, 1 << len(FEEDBACK), n),
        "positive": lambda n: rng.random(n) < 0.5,
        "watch_time_s": lambda n: rng.uniform(0, 60, n),
        "duration_s": lambda n: rng.uniform(5, 60, n),
    }
    kinds = {"item_ids": pa.int64()} | {name: kind for name, (kind, _) in OPTIONAL.items()}
    columns = {
        name: pa.array([made(n).tolist() for n in lengths], pa.list_(kinds[name]))
        for name, made in of_events.items()
    }
    known = served.recommender.features.user_id_U[: len(lengths)].tolist()
    users = pa.array((known + [None] * len(lengths))[: len(lengths)], pa.int64())
    return pa.table({**columns, "user_id": users})


def _require_same_answers(place: Path, what: str) -> None:
    """Ask the program that was registered beside the weights, and the code of now, the same."""
    served = ServedRecommender.from_files({n: place / "artifacts" / n for n in MODEL_FILES})
    pq.write_table(requests := _probes(served), place / "probe.parquet")
    options = ["--top-n", str(PROBED), "--beams", str(PROBED)]
    command = [str(place / n) for n in ("artifacts", "probe.parquet", "told.parquet")]
    for _ in run_program(place / "code", [*command, *options], place / "program.log"):
        pass
    told = pq.read_table(place / "told.parquet")["scores"].to_pylist()
    ours = served.recommend(requests, top_n=PROBED, beams=PROBED)["scores"].to_pylist()
    for theirs, found in zip(told, ours, strict=True):
        if len(theirs) != len(found) or not np.allclose(theirs, found, atol=SAME_WITHIN):
            raise StageError(
                "the code of now answers otherwise than the code it was registered with",
                where=what,
                remedy="serve it from the commit it was registered at, or register a model anew: "
                "reelflow run recommend",
            )
