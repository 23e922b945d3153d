"""What the first bytes of a file show it to be, where that is not what its name says."""

from __future__ import annotations

#: First bytes → what the file is, and what its owner can do. In lower case: all are matched so.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the data it points to",
        "fetch the data with `git lfs pull`",
    ),
    *(
        (start, "a web page", "download the file again: this is what the server answered instead")
        for start in (b"<!doctype html", b"<html", b"<?xml")
    ),
    (b"\x1f\x8b", "compressed by gzip", "decompress it: gunzip"),
    (b"pk\x03\x04", "a zip archive", "unpack it: unzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it: unzstd"),
    (b"bzh", "compressed by bzip2", "decompress it: bunzip2"),
    (b"\xfd7zxz", "compressed by xz", "decompress it: unxz"),
    (b"par1", "a parquet file", "name it .parquet, or write it as text"),
    (b"pare", "an encrypted parquet file", "write it without encryption"),
    (b"arrow1", "an Arrow IPC file", "write it again in the format that its name says"),
    (b"sqlite format 3", "an SQLite database", "export its tables"),
    (b"\xff\xfe", "text in UTF-16", "write it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "write it as UTF-8"),
)


def foreign(start: bytes, *, expected: bytes = b"") -> tuple[str, str] | None:
    """What a file that begins with ``start`` is instead of data, and a remedy; None if it may be.

    Args:
        start: the first bytes, a few hundred of them.
        expected: the first bytes that would be right.
    """
    if start and not start.strip(b"\x00"):
        return "nothing but zero bytes", "copy it again: its content never reached the disk"
    if expected and start.startswith(expected):
        return None
    low = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next(((what, remedy) for sign, what, remedy in _STARTS if low.startswith(sign)), None)


def first_line(start: bytes) -> str | None:
    """The first line of what looks like text, shortened; None for other bytes."""
    line = start.splitlines()[0] if start.splitlines() else b""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    return text[:60] if text.isprintable() else None
