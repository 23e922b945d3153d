"""What registered models need of a store, said in the store itself.

A model registry names the results that its versions were made from, but a gc that works for another
registry cannot ask it. So whoever registers a model leaves a *reference* in the store first:
``references/<registry>/<model>-<digest of the model>.json``, a small object that names keys and
digests. Only the registry that it is of tells when it can go: its version is not there any more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from components.pipeline.errors import CorruptArtifactError
from components.pipeline.manifest import Store
from components.pipeline.settings import Settings

FOLDER, FORMAT = "references", 1
#: The tag of a version that says what it is; it has no number yet when it is referred to.
MODEL_DIGEST = "model_digest"


@dataclass(frozen=True)
class Reference:
    """What one version of one registry needs.

    Attributes:
        file: its name in the store.
        registry: identity of the registry.
        needs: manifest keys and output digests.
    """

    file: str
    registry: str
    model: str
    model_digest: str
    needs: frozenset[str]


def registry_identity(settings: Settings, client: Any) -> str:
    """What tells a registry from others, whatever its address is here: its first experiment.

    A database and the server in front of it are one registry; a server at ``127.0.0.1`` is another
    one on every machine.
    """
    from mlflow.exceptions import MlflowException

    from components.pipeline.credentials import without_credentials

    try:
        first = client.get_experiment("0")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return without_credentials(settings.tracking)
    return f"{first.creation_time} {first.artifact_location}"


def refer(store: Store, registry: str, model: str, model_digest: str, needs: Iterable[str]) -> None:
    """Keep what ``model`` is made of from every gc; call before its version is made.

    Raises:
        StorageError: the store cannot be written.
    """
    body = {
        "format": FORMAT,
        "registry": registry,
        "model": model,
        "model_digest": model_digest,
        "needs": sorted(needs),
    }
    folder = hashlib.sha256(registry.encode()).hexdigest()[:16]
    name = f"{FOLDER}/{folder}/{model}-{model_digest[:32]}.json"
    store.folder.put(name, json.dumps(body, indent=1).encode(), replace=True)


def read_references(store: Store) -> list[Reference]:
    """All references in the store, of every registry.

    Raises:
        CorruptArtifactError: one cannot be read, so that nobody knows what it needs.
        StorageError: the store does not answer.
    """
    found = []
    for name in store.folder.names(FOLDER, ".json"):
        data = store.folder.read(name)
        if data is None:
            continue
        try:
            body = json.loads(data)
            if body["format"] != FORMAT:
                raise ValueError(f"format {body['format']}")
            reference = Reference(
                name,
                registry=str(body["registry"]),
                model=str(body["model"]),
                model_digest=str(body["model_digest"]),
                needs=frozenset(map(str, body["needs"])),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(
                "what a registered model needs is not readable",
                where=store.folder.address(name),
                remedy="if no registry has that model any more, remove this file",
            ) from error
        found.append(reference)
    return found
