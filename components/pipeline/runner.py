"""Runs stages: decides from manifests what is done, executes the rest, publishes the results.

The cache key of a stage is a digest of the code it can reach, the parameters it reads, the
digests of its inputs and, for stages that read outside data, the digest of that data. The same
key means the same result, so the same command given again *is* the resume, whatever ended the
last one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from components.pipeline import code_digest
from components.pipeline.artifacts import Input, Inputs, Outputs
from components.pipeline.checkpoints import LocalCheckpoints, StoredCheckpoints
from components.pipeline.console import say
from components.pipeline.errors import ReelflowError, StageError, StorageError, UsageError
from components.pipeline.explain import describe_changes, nearest_execution
from components.pipeline.flow import Flow
from components.pipeline.manifest import Manifest, Store, digest_json
from components.pipeline.orphans import end_orphans
from components.pipeline.profiler import Cost
from components.pipeline.refusals import refusal
from components.pipeline.run import Sink, StageRun
from components.pipeline.settings import Settings
from components.pipeline.stage import REGISTRY, Stage, producer_of
from components.pipeline.stage_lease import lease
from components.pipeline.storage import exclusive

Status = Literal["cached", "run", "waits"]


@dataclass(frozen=True)
class Identity:
    """Everything that decides the result of one execution of a stage; ``key`` digests it."""

    stage: str
    code: dict[str, str]
    params: dict[str, Any]
    inputs: dict[str, str]
    external: str | None
    seed: int

    @property
    def code_digest(self) -> str:
        return code_digest.combined_digest(self.code)

    @property
    def key(self) -> str:
        return digest_json([self.stage, self.code_digest, self.params, self.inputs, self.external])[
            :32
        ]


@dataclass(frozen=True)
class Step:
    """What would happen to one stage.

    Attributes:
        status: ``cached`` (published already), ``run``, or ``waits`` (its key is not known before
            the stages above it have run).
        reason: why, in words.
    """

    stage: Stage
    status: Status
    reason: str
    manifest: Manifest | None = None
    identity: Identity | None = None


@dataclass
class Runner:
    """Executes stages against one store with one set of parameters.

    Attributes:
        settings: addresses in force.
        store: the artifact store.
        params: validated parameters by stage name.
        done: manifests of this run by stage name, in the order they were resolved.
    """

    settings: Settings
    store: Store
    params: Mapping[str, BaseModel]
    done: dict[str, Manifest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.params.keys() & REGISTRY.keys():
            code_in_force(REGISTRY[name].module)

    def identify(self, stage: Stage) -> Identity:
        """The identity of ``stage``; its upstream stages must be in ``done``.

        Raises:
            ReelflowError: the data outside the store cannot be read.
        """
        params = self.params[stage.name]
        return Identity(
            stage=stage.name,
            code=code_in_force(stage.module),
            params=params.model_dump(mode="json"),
            inputs={
                name: self.done[producer_of(name).name].output_digest(name) for name in stage.inputs
            },
            external=external_digest(stage, params),
            seed=int(getattr(params, "seed", 0)),
        )

    def plan(self, stages: list[Stage], forced: frozenset[str] = frozenset()) -> list[Step]:
        """What running ``stages`` in this order would do; runs nothing, writes nothing."""
        steps: list[Step] = []
        pending: set[str] = set()
        for stage in stages:
            blockers = [
                name
                for name in dict.fromkeys(producer_of(a).name for a in stage.inputs)
                if name in pending
            ]
            if blockers:
                pending.add(stage.name)
                reason = f"after {', '.join(blockers)}; cached if their outputs stay the same"
                steps.append(Step(stage, "waits", reason))
                continue
            self._require_upstream(stage)
            identity = self.identify(stage)
            # A forced stage mends a manifest that cannot be read; so nobody reads it here.
            is_forced = stage.name in forced
            manifest = None if is_forced else self.store.manifest(stage.name, identity.key)
            if manifest is not None:
                self.done[stage.name] = manifest
                steps.append(
                    Step(stage, "cached", "same code, params and inputs", manifest, identity)
                )
                continue
            pending.add(stage.name)
            reason = "forced" if is_forced else self.why(identity)
            steps.append(Step(stage, "run", reason, None, identity))
        return steps

    def cached(self, stage: Stage) -> Manifest | None:
        """The published manifest of ``stage`` for what is in force, or None."""
        self._require_upstream(stage)
        manifest = self.store.manifest(stage.name, self.identify(stage).key)
        if manifest is not None:
            self.done[stage.name] = manifest
        return manifest

    def execute(
        self, stage: Stage, *, force: bool = False, sinks: tuple[Sink, ...] | None = None
    ) -> tuple[Manifest, bool]:
        """Run one stage unless it is published already.

        Args:
            sinks: who is told what the stage does; the console alone unless given.

        Returns:
            Its manifest and whether it was cached.

        Raises:
            ReelflowError: as the stage raised it.
            StageError: the stage broke with any other exception.
        """
        self._require_upstream(stage)
        identity = self.identify(stage)

        def say_that_it_waits() -> None:
            say(f"{stage.name}: another process runs it; waiting for it")

        # Two processes on one machine never execute the same key at once.
        lock = self.settings.home / "locks" / f"{stage.name}-{identity.key}"
        with exclusive(lock, say_that_it_waits), self._lease(identity):
            published = None if force else self.store.manifest(stage.name, identity.key)
            if published is None:
                end_orphans(f"{self.settings.home}:{stage.name}-{identity.key}")
            manifest = published or self._run(stage, identity, force, sinks)
            self.done[stage.name] = manifest
            return manifest, published is not None

    def _lease(self, identity: Identity) -> contextlib.AbstractContextManager[None]:
        """Machines that share an object store take turns too."""
        if self.store.folder.is_local:
            return contextlib.nullcontext()

        def say_that_it_waits() -> None:
            say(f"{identity.stage}: another machine runs it; waiting for it")

        place = f"{stored_scratch(identity)}/lease"
        return lease(self.store.folder, place, self.settings.home, say_that_it_waits)

    def _checkpoints(self, identity: Identity, work: Path) -> LocalCheckpoints | StoredCheckpoints:
        if self.store.folder.is_local:
            return LocalCheckpoints(work)
        place = f"{stored_scratch(identity)}/checkpoints"
        return StoredCheckpoints(self.store.folder, place, work / "checkpoints")

    def resolve_upstream(self, stage: Stage) -> None:
        """Fill ``done`` with the published manifests of all stages above ``stage``.

        Raises:
            UsageError: one is not published for the parameters and code in force.
        """
        for artifact in stage.inputs:
            above = producer_of(artifact)
            if above.name in self.done:
                continue
            self.resolve_upstream(above)
            identity = self.identify(above)
            manifest = self.store.manifest(above.name, identity.key)
            if manifest is None:
                raise UsageError(
                    f"'{stage.name}' reads '{artifact}' of stage '{above.name}', which is not "
                    f"there for these params and this code ({self.why(identity)})",
                    where=self.store.uri,
                    remedy=f"run it first: reelflow stage {above.name}, with the same options",
                )
            self.done[above.name] = manifest

    def why(self, identity: Identity) -> str:
        """What changed since the newest published execution of the stage, in words."""
        earlier = self.store.manifests(identity.stage)
        if not earlier:
            return "never ran in this store"
        return "; ".join(describe_changes(identity, nearest_execution(identity, earlier)))

    def inputs_of(self, stage: Stage) -> Inputs:
        """Handles of the input artifacts of ``stage``; its upstream must be in ``done``."""
        handles = {
            name: Input(self.store, name, self.done[producer_of(name).name])
            for name in stage.inputs
        }
        return Inputs(handles, self._lineage(stage))

    def outputs_of(self, stage: Stage) -> dict[str, Input]:
        """Handles of the published outputs of ``stage``, which must be in ``done``."""
        return {name: Input(self.store, name, self.done[stage.name]) for name in stage.outputs}

    def _lineage(self, stage: Stage) -> list[Manifest]:
        found: dict[str, Manifest] = {}

        def visit(current: Stage) -> None:
            for artifact in current.inputs:
                above = producer_of(artifact)
                if above.name not in found:
                    visit(above)
                    found[above.name] = self.done[above.name]

        visit(stage)
        return list(found.values())

    def _require_upstream(self, stage: Stage) -> None:
        if any(producer_of(a).name not in self.done for a in stage.inputs):
            self.resolve_upstream(stage)

    def _run(
        self, stage: Stage, identity: Identity, force: bool, sinks: tuple[Sink, ...] | None
    ) -> Manifest:
        _requirecode_in_force(stage)
        work = scratch_path(self.settings, identity)
        staging = work.with_name("outputs")
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make a folder for stage '{stage.name}': {error}",
                remedy="check the rights and the free space, or give REELFLOW_HOME another folder",
            ) from error
        outputs = Outputs(self.store, stage.name, stage.outputs, staging)
        checkpoints = self._checkpoints(identity, work)
        run = StageRun(stage.name, identity.seed, work, sinks, checkpoints)
        try:
            with Cost() as cost:
                metrics = stage.function(
                    self.params[stage.name], self.inputs_of(stage), outputs, run
                )
            metrics = {name: float(value) for name, value in metrics.items()}
            _requirecode_in_force(stage)
            sealed = outputs.seal()
        except Exception as error:
            # Before anything is given back: afterwards the disk may look as if it had space.
            refused = refusal(error, f"stage '{stage.name}' cannot go on", self.settings)
            outputs.discard()
            # Other errors of ours name their place already.
            if refused is not None and (type(error) is StageError or not _is_ours(error)):
                raise refused from error
            if _is_ours(error):
                raise
            raise StageError(
                f"stage '{stage.name}' failed: {type(error).__name__}: {error}",
                remedy="the traceback is above; the same command resumes from the last "
                "published stage once the cause is mended",
            ) from error
        except BaseException:
            # Interrupted: checkpoints in `work` stay for the resume, unpublished outputs do not.
            outputs.discard()
            raise
        body = {
            "stage": stage.name,
            "key": identity.key,
            "code": identity.code,
            "code_digest": identity.code_digest,
            "params": identity.params,
            "params_digest": digest_json(identity.params),
            "inputs": identity.inputs,
            "external": identity.external,
            "outputs": sealed,
            "metrics": metrics,
            "created_at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "seconds": round(cost.seconds, 3),
            "peak_rss_bytes": cost.peak_bytes,
            "seed": identity.seed,
            "environment": environment(),
        }
        manifest = self.store.publish(Manifest(body), replace=force)
        if manifest.body["outputs"] != sealed:
            outputs.discard()
        outputs.clean_staging()
        checkpoints.clear()
        shutil.rmtree(work.parent, ignore_errors=True)
        return manifest


def _is_ours(error: Exception) -> bool:
    return isinstance(error, ReelflowError)


@functools.cache
def code_in_force(module: str) -> dict[str, str]:
    """The code that this process executes: as it was when the process first looked.

    Modules stay in memory when their files are edited; a result must bear the digest of what
    made it.
    """
    return code_digest.closure_digests(module)


def _requirecode_in_force(stage: Stage) -> None:
    before, now = code_in_force(stage.module), code_digest.closure_digests(stage.module)
    edited = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
    if edited:
        raise StageError(
            f"{', '.join(edited)} changed while this process ran, so that nobody could say which "
            f"code a result of '{stage.name}' comes from",
            remedy="give the same command again; what is published is not run again, and with the "
            "edit undone an unfinished stage goes on from its checkpoint",
        )


def external_digest(stage: Stage, params: BaseModel) -> str | None:
    """Digest of what ``stage`` reads from outside the store; None if it reads nothing there.

    Raises:
        ReelflowError: the data cannot be looked at.
    """
    try:
        told = stage.external(params) if stage.external else None
        # Digested once more: an address that a stage gives may hold a password.
        return None if told is None else digest_json(told)
    except ReelflowError:
        raise
    except Exception as error:
        raise StageError(
            f"the data that stage '{stage.name}' reads cannot be looked at: "
            f"{type(error).__name__}: {error}"
        ) from error


def environment() -> dict[str, str]:
    """Versions that a later reader needs to judge a result."""
    packages = ("torch", "numpy", "pyarrow", "ray", "mlflow", "prefect", "scikit-learn")
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": str(_cpus()),
        **versions,
    }


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slice_flow(flow: Flow, start: str | None, until: str | None) -> list[Stage]:
    """The stages of ``flow`` from ``start`` to ``until``, both included.

    Raises:
        UsageError: a name is not in the flow, or the order is the wrong way round.
    """
    stages = flow.resolve()
    names = [s.name for s in stages]
    for option, name in (("--from", start), ("--until", until)):
        if name is not None and name not in names:
            raise UsageError(
                f"'{name}' is not a stage of flow '{flow.name}'",
                where=option,
                remedy="stages: " + ", ".join(names),
            )
    first = names.index(start) if start else 0
    last = names.index(until) if until else len(names) - 1
    if first > last:
        raise UsageError(f"'{start}' comes after '{until}'", where="--from / --until")
    return stages[first : last + 1]


def open_store(settings: Settings) -> Store:
    """The artifact store that the settings name."""
    return Store(settings.store, settings.fetched)


def stored_scratch(identity: Identity) -> str:
    """Folder of an object store with the checkpoints and the lease of an unfinished execution."""
    return f"scratch/{identity.stage}/{identity.key}"


def scratch_path(settings: Settings, identity: Identity) -> Path:
    """Folder where an unfinished execution keeps its checkpoints."""
    return settings.scratch / identity.stage / identity.key / "work"
