"""What a result was made from, and what was made from it: the graph of published executions.

Manifests are the graph: an execution names the digests of its inputs, and another execution names
the same digests as its outputs. Registered model versions hang on it by their tags, which name
keys and digests; the model registry is asked only where a question reaches one.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from components.pipeline import addresses
from components.pipeline.errors import UsageError
from components.pipeline.manifest import Manifest, Store
from components.pipeline.settings import Settings

#: The artifact that says a model was registered.
REGISTRATION = "registration"
#: Shorter starts of a key or digest would mean anything.
SHORTEST = 6
DIGEST = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class Model:
    """A version in the model registry.

    Attributes:
        aliases: those that point to it now.
        tags: among them the keys and digests that it is made of.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]

    @property
    def label(self) -> str:
        alias = f" ({', '.join(self.aliases)})" if self.aliases else ""
        return f"{self.name} version {self.version}{alias}"


@dataclass(frozen=True)
class Missing:
    """An input whose producer is not in the store any more."""

    artifact: str
    digest: str
    read_by: Manifest


@dataclass
class Graph:
    """The published executions of a store.

    Args:
        executions: newest first.
    """

    executions: list[Manifest]
    _makers: dict[tuple[str, str], list[Manifest]] = field(init=False)
    _readers: dict[tuple[str, str], list[Manifest]] = field(init=False)

    def __post_init__(self) -> None:
        self._makers, self._readers = {}, {}
        for execution in self.executions:
            for name in execution.body["outputs"]:
                made = (name, execution.output_digest(name))
                self._makers.setdefault(made, []).append(execution)
            for read in execution.body["inputs"].items():
                self._readers.setdefault(read, []).append(execution)

    def made_from(self, execution: Manifest | Missing) -> list[Manifest | Missing]:
        """The executions that made the inputs, each once, in the order in which they are read."""
        if isinstance(execution, Missing):
            return []
        found: dict[str, Manifest | Missing] = {}
        for artifact, digest in execution.body["inputs"].items():
            made = self._makers.get((artifact, digest), [])
            # Several executions may have given the same bytes: the newest before it, if any.
            before = [m for m in made if m.body["created_at"] <= execution.body["created_at"]]
            maker = next(iter(before or made), None)
            if maker is None:
                found[digest] = Missing(artifact, digest, execution)
            else:
                found[identity(maker)] = maker
        return list(found.values())

    def made_of(self, execution: Manifest | Missing) -> list[Manifest]:
        """The executions that read an output of this one, oldest first."""
        if isinstance(execution, Missing):
            outputs = [(execution.artifact, execution.digest)]
        else:
            outputs = [(name, execution.output_digest(name)) for name in execution.body["outputs"]]
        readers = {identity(m): m for made in outputs for m in self._readers.get(made, [])}
        return sorted(readers.values(), key=lambda m: str(m.body["created_at"]))

    def above(self, executions: Iterable[Manifest | Missing]) -> Iterator[Manifest | Missing]:
        """All that these were made from, nearest first, each once."""
        return _walk(executions, self.made_from)

    def gone(self, asked: str) -> Missing | None:
        """The newest input of that name, or start of a digest, whose producer is not here."""
        is_digest = len(asked) >= SHORTEST and DIGEST.fullmatch(asked)
        for (artifact, digest), readers in self._readers.items():
            is_asked = artifact == asked or (is_digest and digest.startswith(asked))
            if is_asked and (artifact, digest) not in self._makers:
                return Missing(artifact, digest, readers[0])
        return None

    def below(self, executions: Iterable[Manifest | Missing]) -> Iterator[Manifest]:
        """All that was made from these, nearest first, each once."""
        return (m for m in _walk(executions, self.made_of) if isinstance(m, Manifest))


def _walk(start: Iterable[Manifest | Missing], step: Any) -> Iterator[Manifest | Missing]:
    waiting: list[Manifest | Missing] = list(start)
    seen = {identity(m) for m in waiting}
    while waiting:
        node = waiting.pop(0)
        for following in step(node):
            if identity(following) not in seen:
                seen.add(identity(following))
                waiting.append(following)
                yield following


def identity(node: Manifest | Missing) -> str:
    """What tells two nodes of the graph apart."""
    if isinstance(node, Missing):
        return f"{node.artifact}/{node.digest}"
    return f"{node.stage}/{node.key}"


@dataclass
class Lineage:
    """The answer to a question: what was asked for, above it and below it.

    Attributes:
        asked: the words of the question.
        metric: name of the metric that was asked for, or None.
        model: the registered version that was asked for, or None.
        gone: what was asked for, if only those who read it are left.
        executions: those that were asked for, newest first; of a metric all that have it.
        silent: why the model registry could not be asked; empty if it was, or was not needed.
    """

    asked: str
    graph: Graph
    executions: list[Manifest]
    settings: Settings
    metric: str | None = None
    model: Model | None = None
    gone: Missing | None = None
    silent: str = ""

    @property
    def starts(self) -> list[Manifest | Missing]:
        """Where the graph is followed from."""
        return [self.gone] if self.gone is not None else list(self.executions)

    @functools.cached_property
    def models(self) -> list[Model]:
        """Registered versions that something in the answer belongs to."""
        if self.model is not None:
            return [self.model]
        below = [*self.executions, *self.graph.below(self.starts)]
        if not any(REGISTRATION in m.body["outputs"] for m in below):
            return []
        try:
            registered = registered_models(self.settings)
        except UsageError as error:
            self.silent = error.what
            return []
        return [m for m in registered if any(belongs(m, execution) for execution in below)]


def trace(store: Store, settings: Settings, asked: str) -> Lineage:
    """Find what ``asked`` names.

    Args:
        asked: a stage or an artifact (its newest execution), (a start of) a manifest key, of the
            digest of an output or of outside data, a metric (``ndcg_at_10``,
            ``evaluate_recommender.ndcg_at_10``), or a model (``name/3``, ``name@champion``,
            ``models:/name/3``).

    Raises:
        UsageError: nothing of that name is there; near names are in the message.
        StorageError: the store cannot be read.
    """
    graph = Graph(store.manifests())
    if "/" in asked or "@" in asked:
        model = find_model(settings, asked.removeprefix("models:/"))
        return Lineage(asked, graph, _executions_of(model, graph), settings, model=model)
    if not graph.executions:
        raise UsageError(
            "nothing was published here yet",
            where=store.uri,
            remedy="run something first, or name another store: reelflow run recommend",
        )
    for execution in graph.executions:
        if asked == execution.stage or asked in execution.body["outputs"]:
            return Lineage(asked, graph, [execution], settings)
    stage, _, name = asked.rpartition(".")
    having = [m for m in graph.executions if name in m.metrics and stage in ("", m.stage)]
    if having:
        return Lineage(asked, graph, having, settings, metric=name)
    if len(asked) >= SHORTEST and DIGEST.fullmatch(asked):
        found = _by_digest(graph, asked)
        if found:
            return Lineage(asked, graph, found, settings)
    gone = graph.gone(asked)
    if gone is not None:
        return Lineage(asked, graph, [], settings, gone=gone)
    raise UsageError(
        f"there is no stage, artifact, metric or digest '{asked}'",
        where=store.uri,
        remedy=_near(asked, names(graph.executions))
        + f"a digest needs {SHORTEST} characters or more, a model its version: NAME/3 or "
        "NAME@champion",
    )


def names(executions: Iterable[Manifest]) -> list[str]:
    """Stages, artifacts and metrics that can be asked for."""
    found: dict[str, None] = {}
    for execution in executions:
        found |= dict.fromkeys([execution.stage, *execution.body["outputs"]])
        for metric in execution.metrics:
            found |= dict.fromkeys([metric, f"{execution.stage}.{metric}"])
    return list(found)


def _by_digest(graph: Graph, start: str) -> list[Manifest]:
    """Executions with that key or output; else all that read these data from outside."""

    def has(execution: Manifest) -> bool:
        digests = [execution.output_digest(name) for name in execution.body["outputs"]]
        return any(text.startswith(start) for text in (execution.key, *digests))

    def read(execution: Manifest) -> bool:
        return str(execution.body.get("external") or "").startswith(start)

    return [m for m in graph.executions if has(m)] or [m for m in graph.executions if read(m)]


def _near(asked: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(asked, list(known), 3)
    return f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""


# The model registry.


def registered_models(settings: Settings) -> list[Model]:
    """All registered versions, newest first.

    Raises:
        UsageError: the registry cannot be asked.
    """
    database = settings.tracking_database
    if database is not None and not database.exists():
        return []
    looked_at = addresses.tracking(settings)
    if looked_at.broken:
        raise UsageError(
            f"the model registry cannot be asked: {looked_at.text}", remedy=looked_at.remedy
        )
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return _ask_registry(settings)
    except (MlflowException, SQLAlchemyError) as error:
        said = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise UsageError(
            f"the model registry cannot be asked: {said}",
            where="MLFLOW_TRACKING_URI",
            remedy="see what `reelflow doctor` says of it; a damaged database is restored from a "
            "copy",
        ) from error


def _ask_registry(settings: Settings) -> list[Model]:
    from components.pipeline.tracking import connect

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = connect(settings).MlflowClient()
    aliases: dict[tuple[str, str], list[str]] = {}
    for registered in _pages(client.search_registered_models):
        for alias, version in registered.aliases.items():
            aliases.setdefault((registered.name, str(version)), []).append(alias)
    models = [
        Model(
            version.name,
            str(version.version),
            tuple(sorted(aliases.get((version.name, str(version.version)), []))),
            {name: str(value) for name, value in version.tags.items()},
        )
        for version in _pages(client.search_model_versions)
    ]
    return sorted(models, key=lambda m: (m.name, -int(m.version)))


def _pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def find_model(settings: Settings, asked: str) -> Model:
    """The version that ``name/3`` or ``name@alias`` names.

    Raises:
        UsageError: there is none; the message has the ones there are.
    """
    models = registered_models(settings)
    for model in models:
        if asked in [
            f"{model.name}/{model.version}",
            *(f"{model.name}@{a}" for a in model.aliases),
        ]:
            return model
    known = [f"{m.name}/{m.version}" for m in models]
    known += [f"{m.name}@{alias}" for m in models for alias in m.aliases]
    there = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
    raise UsageError(
        f"there is no registered model '{asked}'",
        where=addresses.hide_password(settings.tracking),
        remedy=_near(asked, known) + (f"there is {there}" if known else "none was registered here"),
    )


def belongs(model: Model, execution: Manifest) -> bool:
    """Whether the tags of the version name the execution, or one of its outputs."""
    return any(execution.key == value for value in model.tags.values()) or any(
        model.tags.get(f"{name}_digest") == execution.output_digest(name)
        for name in execution.body["outputs"]
    )


def _executions_of(model: Model, graph: Graph) -> list[Manifest]:
    """The execution that trained the version and the one that measured it, as far as there."""
    own = [m for m in graph.executions if m.key == model.tags.get("manifest_key")]
    measured = [
        m
        for m in graph.executions
        if "evaluation" in m.body["outputs"]
        and m.output_digest("evaluation") == model.tags.get("evaluation_digest")
    ]
    return own[:1] + measured[:1]
