"""Free disk safely: what no manifest names, and results that nothing newer or registered needs.

What is always kept: the newest result of every stage, whatever a kept result was made from, and
whatever a registered model version refers to, also of a registry that only other homes know
(``references``). A manifest is removed before its files, so that a reader sees a whole artifact or
none.

Runs announce themselves (``presence``), on this machine and on others that share the store. While
one runs, results, scratch folders and fetched copies are left alone and only files go that were
written before it began; a run that starts meanwhile waits until gc is done. A stage that is called
without an announcement is still seen by its lock, and files that no manifest names are left alone
for an hour, or for a day in a store that others may write.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from components.pipeline.errors import (
    CorruptArtifactError,
    ParamsError,
    ReelflowError,
    StorageError,
)
from components.pipeline.lineage import registered_models
from components.pipeline.manifest import Manifest, Store
from components.pipeline.presence import Sweep, sweeping
from components.pipeline.ray_sessions import dead_sessions
from components.pipeline.references import (
    MODEL_DIGEST,
    Reference,
    read_references,
    registry_identity,
)
from components.pipeline.runner import open_store
from components.pipeline.settings import Settings
from components.pipeline.storage import exclusive, is_held
from components.pipeline.tracking import connect

HOUR_S = 3600.0
UNITS_S = {"h": HOUR_S, "d": 24 * HOUR_S, "w": 7 * 24 * HOUR_S}

#: How long files that no manifest names may belong to a run that is still writing them.
GRACE_S = HOUR_S
GRACE_ELSEWHERE_S = 24 * HOUR_S

#: A digest written shorter than this by someone else is not taken for a reference.
SHORTEST_REFERENCE = 12


@dataclass(frozen=True)
class Entry:
    """Files below one folder of the store: bytes, and when the newest was written (Unix time)."""

    size: int
    written: float


def collect(settings: Settings, older_than: str, delete: bool) -> Iterator[str]:
    """Say, line by line, what can go and how much that frees; remove it only with ``delete``.

    Args:
        older_than: age of results, scratch folders and fetched copies: ``12h``, ``7d``, ``4w``.

    Raises:
        ParamsError: the age cannot be read.
        StorageError: the store cannot be read or written.
    """
    limit = time.time() - parse_age(older_than)
    store = open_store(settings)
    freed = 0
    with sweeping(settings, store, hold=delete) as sweep:
        for garbage in _garbage(settings, store, sweep, limit):
            if isinstance(garbage, str):
                yield f"  {garbage}"
                continue
            if delete:
                sweep.require_hold()
                garbage.remove()
            freed += garbage.size
            yield f"  {garbage.kind:<12} {garbage.name:<58} {_size(garbage.size):>10}"
    yield f"{_size(freed)} freed" if delete else f"{_size(freed)} would be freed; --yes does it"


def _garbage(
    settings: Settings, store: Store, sweep: Sweep, limit: float
) -> Iterator[Garbage | str]:
    # In this order: a stage that publishes meanwhile is seen as running or by its manifest.
    attempts = _attempts(store)
    stages = running_stages(settings)
    manifests, unreadable = _manifests(store)
    users = sorted({str(use) for use in sweep.all} | (set() if sweep.all else stages))
    # Object stores tell times in whole seconds.
    begun = min((use.since - 1 for use in sweep.all), default=time.time())

    yield from _unpublished(settings, store, attempts, manifests, stages | unreadable, begun)
    yield from _results(settings, store, attempts, manifests, users, unreadable, limit)
    if not sweep.here:
        yield from _scratch(settings, limit)
        yield from _stored_scratch(store, limit)
        yield from _unfinished_uploads(store)
        if not stages:
            yield from _fetched(settings, limit)
    yield from _stale_locks(settings)
    yield from _ray_sessions(settings, limit)


@dataclass(frozen=True)
class Garbage:
    """Something that can go."""

    kind: str
    name: str
    size: int
    remove: Callable[[], None]


def _unpublished(
    settings: Settings,
    store: Store,
    attempts: dict[str, Entry],
    manifests: list[Manifest],
    untouchable: set[str],
    begun: float,
) -> Iterator[Garbage]:
    """Files of killed, failed or replaced executions; none written since ``begun`` (Unix time)."""
    seen_locks = _is_below(store, settings.home)
    since = min(begun, time.time() - (GRACE_S if seen_locks else GRACE_ELSEWHERE_S))
    published = {_attempt_of(manifest) for manifest in manifests}
    for name, entry in sorted(attempts.items()):
        if name in published or name.split("/")[1] in untouchable or entry.written > since:
            continue
        remove = functools.partial(store.folder.delete_folder, name)
        yield Garbage("unpublished", name, entry.size, remove)
    if store.folder.is_local:
        for file in Path(store.folder.path("manifests")).rglob(".*.tmp"):
            status = file.stat()
            if status.st_mtime < since:
                yield Garbage("unpublished", file.name, status.st_size, file.unlink)


def _results(
    settings: Settings,
    store: Store,
    attempts: dict[str, Entry],
    manifests: list[Manifest],
    users: list[str],
    unreadable: set[str],
    limit: float,
) -> Iterator[Garbage | str]:
    """Old results, or a line that says why they are left alone."""
    if users:
        are = "is" if len(users) == 1 else "are"
        yield f"results are left alone: {', '.join(users)} {are} running"
        return
    if unreadable:
        # It may be of a newer version of this program, and nobody here can say what it needs.
        stages = ", ".join(sorted(unreadable))
        yield f"results are left alone: a manifest of {stages} is not readable"
        yield "  remedy: run that stage with --force, or remove its file below manifests/"
        return
    if not unneeded(manifests, set(), limit):
        return
    try:
        references, gone = referenced(settings, store)
    except ReelflowError as error:
        yield f"results are left alone: {error}"
        return

    def remove(manifest: Manifest, files: str | None) -> None:
        store.folder.delete(f"manifests/{manifest.stage}/{manifest.key}.json")
        if files is not None:
            store.folder.delete_folder(files)

    for reference in gone:
        remove_it = functools.partial(store.folder.delete, reference.file)
        yield Garbage("reference", f"{reference.model}, whose version is gone", 0, remove_it)
    for manifest in unneeded(manifests, references, limit):
        files = _attempt_of(manifest)
        size = attempts[files].size if files in attempts else 0
        name = f"{manifest.stage} {manifest.key} of {str(manifest.body['created_at'])[:10]}"
        yield Garbage("result", name, size, functools.partial(remove, manifest, files))


def _scratch(settings: Settings, limit: float) -> Iterator[Garbage]:
    """Checkpoints and half-finished work that nobody came back for."""

    def remove(folder: Path) -> None:
        # Under the lock: a stage that starts now must not lose its folder while it writes.
        with suppress(BlockingIOError), exclusive(_lock_of(settings, folder), _give_up):
            shutil.rmtree(folder, ignore_errors=True)

    for folder, size in _old(settings.scratch.glob("*/*"), limit):
        if not is_held(_lock_of(settings, folder)):
            name = folder.relative_to(settings.scratch).as_posix()
            yield Garbage("scratch", name, size, functools.partial(remove, folder))


def _stored_scratch(store: Store, limit: float) -> Iterator[Garbage]:
    """The same in an object store, where a running stage renews its lease every few seconds."""
    if store.folder.is_local:
        return
    found: dict[str, Entry] = {}
    for file in store.folder.files("scratch"):
        name = "/".join(file.name.split("/")[:3])
        known = found.get(name, Entry(0, 0.0))
        written = max(known.written, file.written.timestamp())
        found[name] = Entry(known.size + file.size, written)
    for name, entry in found.items():
        if entry.written < limit:
            remove = functools.partial(store.folder.delete_folder, name)
            yield Garbage("scratch", name.removeprefix("scratch/"), entry.size, remove)


def _unfinished_uploads(store: Store) -> Iterator[Garbage]:
    """Parts of files that a killed process was uploading; a listing does not show them."""
    for upload in store.folder.unfinished_uploads(""):
        if upload.begun.timestamp() < time.time() - GRACE_ELSEWHERE_S:
            remove = functools.partial(store.folder.abort, upload)
            yield Garbage("unfinished", f"upload of {upload.name}", 0, remove)


def _fetched(settings: Settings, limit: float) -> Iterator[Garbage]:
    """Local copies of artifacts of an object store; they are fetched again when needed."""
    for folder, size in _old(settings.fetched.glob("*"), limit):
        remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
        yield Garbage("fetched copy", folder.name[:32], size, remove)


def _stale_locks(settings: Settings) -> Iterator[Garbage]:
    """Lock files of killed processes; they are empty, but they would pile up."""
    locks = settings.home / "locks"
    for file in sorted([*locks.glob("*-*"), *locks.glob("*/*")]):
        if file.is_file() and not is_held(file):
            # By taking and leaving it: whoever waits for it starts anew with the next one.
            yield Garbage("lock", file.name[:58], 0, functools.partial(_take, file))


def _take(lock: Path) -> None:
    with suppress(BlockingIOError), exclusive(lock, _give_up):
        pass


def _give_up() -> None:
    raise BlockingIOError


def _ray_sessions(settings: Settings, limit: float) -> Iterator[Garbage]:
    """Logs of Ray clusters that runs of this home started, of which no process is left."""
    for folder, size in _old(dead_sessions(settings.home), limit):
        remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
        yield Garbage("ray session", folder.name, size, remove)


def parse_age(text: str) -> float:
    """Seconds of an age such as ``12h``, ``7d`` or ``4w``.

    Raises:
        ParamsError: not such a text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdw])", text.strip())
    if match is None:
        raise ParamsError(
            f"cannot read the age '{text}'",
            where="--older-than",
            remedy="give a number and h (hours), d (days) or w (weeks): 12h, 7d, 4w",
        )
    return float(match[1]) * UNITS_S[match[2]]


def unneeded(manifests: list[Manifest], references: set[str], limit: float) -> list[Manifest]:
    """Results made before ``limit`` (Unix time) that no kept result and no reference needs.

    Args:
        manifests: all of the store, newest first.
        references: manifest keys and (starts of) output digests that somebody refers to.
    """
    producers: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        for record in manifest.body["outputs"].values():
            producers.setdefault(record["digest"], []).append(manifest)
    newest = {manifest.stage: manifest for manifest in reversed(manifests)}

    waiting = [
        manifest
        for manifest in manifests
        if manifest is newest[manifest.stage]
        or _made(manifest) >= limit
        or _is_referenced(manifest, references)
    ]
    kept: set[int] = set()
    while waiting:
        manifest = waiting.pop()
        if id(manifest) in kept:
            continue
        kept.add(id(manifest))
        for digest in manifest.body["inputs"].values():
            made = producers.get(digest, [])
            # Several executions may have given the same bytes; the one it was made from is the
            # newest before it (or, if that was run again by force, any).
            before = [m for m in made if _made(m) <= _made(manifest)]
            waiting += (before or made)[:1]
    return [manifest for manifest in manifests if id(manifest) not in kept]


def _made(manifest: Manifest) -> float:
    return dt.datetime.fromisoformat(manifest.body["created_at"]).timestamp()


def _is_referenced(manifest: Manifest, references: set[str]) -> bool:
    own = [manifest.key, *(r["digest"] for r in manifest.body["outputs"].values())]
    return any(
        len(reference) >= SHORTEST_REFERENCE and name.startswith(reference)
        for reference in references
        for name in own
    )


def referenced(settings: Settings, store: Store) -> tuple[set[str], list[Reference]]:
    """What registered versions name, of every registry, and the references that none needs now.

    Raises:
        ReelflowError: a reference cannot be read, or the registry in force cannot be asked.
    """
    told = read_references(store)
    # After the references: what is registered meanwhile is not taken for gone.
    models = registered_models(settings)
    names = {value for model in models for value in model.tags.values()}
    ours = ""
    database = settings.tracking_database
    if told and (database is None or database.is_file()):
        ours = registry_identity(settings, connect(settings).MlflowClient())
    there = {(model.name, model.tags.get(MODEL_DIGEST)) for model in models}
    gone = [r for r in told if r.registry == ours and (r.model, r.model_digest) not in there]
    return names.union(*(r.needs for r in told if r not in gone)), gone


def running_stages(settings: Settings) -> set[str]:
    """Names of the stages that a process of this machine executes, by the locks it holds."""
    locks = (settings.home / "locks").glob("*-*")
    return {lock.name.rpartition("-")[0] for lock in locks if is_held(lock)}


def _lock_of(settings: Settings, scratch: Path) -> Path:
    return settings.home / "locks" / f"{scratch.parent.name}-{scratch.name}"


def _manifests(store: Store) -> tuple[list[Manifest], set[str]]:
    """All manifests, newest first, and the stages that have one which is not readable."""
    found: list[Manifest] = []
    unreadable: set[str] = set()
    for name in store.folder.names("manifests", ".json"):
        data, stage = store.folder.read(name), name.split("/")[1]
        try:
            if data is not None:
                found.append(Manifest.from_bytes(data, stage, name))
        except CorruptArtifactError:
            unreadable.add(stage)
    return sorted(found, key=_made, reverse=True), unreadable


def _attempt_of(manifest: Manifest) -> str | None:
    """The folder ``data/<stage>/<attempt>`` that holds all outputs of one execution."""
    for record in manifest.body["outputs"].values():
        return "/".join(record["path"].split("/")[:3])
    return None


def _attempts(store: Store) -> dict[str, Entry]:
    """Every folder ``data/<stage>/<attempt>`` of the store, published or not."""
    from pyarrow.fs import FileSelector

    folder = store.folder
    selector = FileSelector(folder.path("data"), allow_not_found=True, recursive=True)
    try:
        infos = folder.fs.get_file_info(selector)
    except OSError as error:
        remedy = "check the address and the credentials: reelflow doctor"
        raise StorageError(f"cannot list: {error}", where=store.uri, remedy=remedy) from error
    found: dict[str, Entry] = {}
    for info in infos:
        parts = info.path[len(folder.root) + 1 :].split("/")
        if len(parts) < 3:
            continue
        name = "/".join(parts[:3])
        # An object store keeps no times of folders, only of the files in them.
        written = info.mtime.timestamp() if info.mtime else 0.0
        known = found.get(name, Entry(0, 0.0))
        found[name] = Entry(known.size + (info.size or 0), max(known.written, written))
    return found


def _is_below(store: Store, home: Path) -> bool:
    return store.folder.is_local and Path(store.folder.root).resolve().is_relative_to(
        home.resolve()
    )


def _old(folders: Iterable[Path], limit: float) -> Iterator[tuple[Path, int]]:
    """The folders in which nothing was written since ``limit``, and their bytes."""
    for folder in sorted(folders):
        size, written = 0, folder.stat().st_mtime
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                status = path.lstat()
                written = max(written, status.st_mtime)
                size += status.st_size if path.is_file() else 0
        if written < limit:
            yield folder, size


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
