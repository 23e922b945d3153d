"""What the system refuses: a full disk, missing rights, a disk that may only be read, file limits.

Libraries say it in ways of their own (an ``OSError``, SQLite's "database or disk is full", a text
in the error of a Ray worker). Here it is recognised and becomes one message that names the place
and the remedy; a traceback helps nobody who has to free a disk.
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from components.pipeline.errors import StorageError
from components.pipeline.ray_sessions import temporary_folder
from components.pipeline.settings import Settings
from components.pipeline.storage import nearest_existing, parse_uri

FULL, READ_ONLY, DENIED, FILES = (
    "the disk is full",
    "the disk may only be read",
    "the rights are missing",
    "too many files are open",
)
REFUSED = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: READ_ONLY,
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
}
#: Where only a text is left. Missing rights are not among them: a text names no folder.
TEXTS = {
    r"No space left on device|database or disk is full|Disk quota exceeded": FULL,
    r"Read-only file system|attempt to write a readonly database": READ_ONLY,
    r"Too many open files": FILES,
}
RESUMES = "then the same command resumes"
REMEDIES = {
    FULL: "free space there (`reelflow gc` says what can go), or give another folder with "
    f"{{settings}}; {RESUMES}",
    READ_ONLY: f"give another folder with {{settings}}; {RESUMES}",
    DENIED: f"give this user the rights, or another folder with {{settings}}; {RESUMES}",
    FILES: f"raise the limit (ulimit -n 65536); {RESUMES}",
}
#: With less than this free a disk counts as full, whatever little was given back since.
FULL_BELOW_BYTES = 1024**2


def reason(error: BaseException) -> str:
    """What the system refused, in words; empty if it is another kind of error."""
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in REFUSED:
            return REFUSED[one.errno]
    said = "\n".join(str(one) for one in _chain(error))
    return next((what for text, what in TEXTS.items() if re.search(text, said)), "")


def refusal(error: BaseException, doing: str, settings: Settings) -> StorageError | None:
    """The error to show in the place of ``error``; None if the system refused nothing.

    Args:
        doing: what could not be done: ``stage 'split' cannot write``.
    """
    what = reason(error)
    if not what:
        return None
    place = _place(error, what, settings)
    return StorageError(f"{doing}: {what}", where=place, remedy=remedy(what, place, settings))


def remedy(what: str, place: str | Path, settings: Settings) -> str:
    """What to do about what the system refused at ``place``."""
    return REMEDIES[what].format(settings=_settings_of(Path(place), settings))


def _settings_of(place: Path, settings: Settings) -> str:
    """What moves the files that lie at ``place`` to another folder."""
    scheme, store = parse_uri(settings.store)
    ours = [settings.home, *([Path(store)] if scheme == "file" else [])]
    is_ours = any(place.is_relative_to(f) or f.is_relative_to(place) for f in ours)
    temporary = (temporary_folder(), Path(tempfile.gettempdir()))
    if not is_ours and any(place.is_relative_to(folder) for folder in temporary):
        return "RAY_TMPDIR (Ray alone) or TMPDIR (all programs)"
    return "REELFLOW_HOME or --store"


def full_disk(settings: Settings) -> Path | None:
    """The first of the folders in use whose disk has no space left."""
    for folder in _folders(settings):
        with suppress(OSError):
            if shutil.disk_usage(folder).free < FULL_BELOW_BYTES:
                return folder
    return None


def _place(error: BaseException, what: str, settings: Settings) -> str:
    for one in _chain(error):
        if isinstance(one, OSError) and one.filename:
            return str(one.filename)
    if what == FILES:
        return "ulimit -n"
    full = full_disk(settings) if what == FULL else None
    return str(full or settings.home)


def _folders(settings: Settings) -> Iterator[Path]:
    scheme, place = parse_uri(settings.store)
    store = [Path(place)] if scheme == "file" else []
    for folder in (settings.home, *store, Path(tempfile.gettempdir()), Path("/dev/shm")):
        yield nearest_existing(folder)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__
