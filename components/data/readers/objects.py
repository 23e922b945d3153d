"""An object of a bucket as a file that Arrow reads, with the patience of everything in the store.

Arrow's own reader of S3 gives up within seconds, and what it says then looks like damage of the
file. Here each read is a request for a range, begun again as ``components.pipeline.s3`` does, and a
store that stays away is a ``StorageError``, which Arrow passes on as it is.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

from components.pipeline.s3 import ObjectInfo, S3Folder
from components.pipeline.storage import storage_error

#: The least that is asked for: small files come whole, and their footer with their pages.
READ_AHEAD = 1 << 18


class ObjectFile:
    """One object, opened to be read.

    Args:
        file: the object as it was listed; a newer one of that name is refused.
        where: its place for messages.
        per_thread: for random access. Arrow's threads share the file, and each seeks before it
            reads. Streams are read in order by whichever thread comes.
    """

    def __init__(self, folder: S3Folder, file: ObjectInfo, where: str, *, per_thread: bool) -> None:
        self._folder, self._file, self._where = folder, file, where
        self._place: threading.local | SimpleNamespace = (
            threading.local() if per_thread else SimpleNamespace()
        )
        self._block = (0, b"")
        self.closed = False

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self.tell(), 2: self._file.size}[whence]
        self._place.at = base + offset
        return self.tell()

    def tell(self) -> int:
        return getattr(self._place, "at", 0)

    def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes, fewer at the end.

        Raises:
            StorageError: the store did not answer, or the object is no longer there.
        """
        at = self.tell()
        size = min(size if size >= 0 else self._file.size, max(0, self._file.size - at))
        start, block = self._block
        if not start <= at <= at + size <= start + len(block):
            start, block = at, self._request(at, max(size, READ_AHEAD))
            self._block = (start, block)
        self._place.at = at + size
        return block[at - start : at - start + size]

    def _request(self, at: int, size: int) -> bytes:
        try:
            return self._folder.read_range(self._file, at, size)
        except OSError as error:
            raise storage_error("read", self._where, error) from error

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
