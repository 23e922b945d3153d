"""Every error a user can meet: the place, the remedy, the exit code of the command line.

Standard library only: a method that is lifted out of the platform keeps its errors.
"""

from __future__ import annotations


class ReelflowError(Exception):
    """Base of all errors that are shown without a traceback.

    Args:
        what: what is wrong, one sentence.
        where: the place: ``file row 17 column 'watch_time_s'``, ``params.yaml split.protocol``.
        remedy: what the reader can do about it.
    """

    exit_code = 4

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f"\n  remedy: {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}{remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (Ray, Prefect); keyword arguments would be lost otherwise.
        return (_rebuild, (type(self), self.what, self.where, self.remedy))


def _rebuild(
    kind: type[ReelflowError], what: str, where: str | None, remedy: str | None
) -> ReelflowError:
    return kind(what, where=where, remedy=remedy)


class UsageError(ReelflowError):
    """The call is wrong: unknown flow, stage, option or a value that cannot be."""

    exit_code = 2


class ParamsError(UsageError):
    """A parameter is unknown, of the wrong type or out of range."""


class HardwareError(UsageError):
    """The settings ask for hardware that this machine or cluster lacks."""


class DataContractError(ReelflowError):
    """A table breaks its contract: missing column, wrong type, unreadable file, broken rule."""

    exit_code = 3


class StageError(ReelflowError):
    """A stage failed while it ran."""


class StageDied(StageError):
    """The process of a stage ended without a word: killed, out of memory, a crash in native code.

    The next attempt goes on from the stage's last checkpoint.
    """


class StageTimeout(StageDied, TimeoutError):
    """A stage took longer than it may, and its process was ended."""

    def __repr__(self) -> str:
        # Prefect shows every `TimeoutError` so; a person reads it on the page of the run.
        return str(self)


class StorageError(ReelflowError):
    """The artifact store could not be read or written."""


class CorruptArtifactError(StorageError):
    """A published artifact does not match the digests of its manifest."""
