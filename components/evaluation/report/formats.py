"""Numbers, sizes, durations and names in the words of a reader.

Every function takes a plain value and gives a plain string; nothing here knows of HTML.
"""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import UTC, date, datetime

MINUS = "−"
#: Keeps a number and its unit on one line.
JOIN = "\u00a0"
_LABELS = {
    "onerec": "OneRec",
    "sasrec": "SASRec",
    "bigram": "Last-item bigram",
    "popularity": "Popularity",
}
_ACRONYMS = {"ndcg": "NDCG", "hr": "HR", "mrr": "MRR", "mse": "MSE"}
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


def count(value: float) -> str:
    """A whole number with separators: ``1,234,567``."""
    return f"{round(value):,}".replace("-", MINUS)


def score(value: float) -> str:
    """A metric between 0 and 1 to four decimals: ``0.0421``."""
    return f"{value:.4f}".replace("-", MINUS) if math.isfinite(value) else "–"


def signed(value: float) -> str:
    """A difference of metrics with its sign: ``+0.0021``, ``−0.0003``."""
    return f"{value:+.4f}".replace("-", MINUS) if math.isfinite(value) else "–"


def share(value: float) -> str:
    """A fraction as per cent, never rounding something to nothing: ``12.3 %``, ``< 0.1 %``."""
    percent = value * 100
    if 0 < percent < 0.1:
        return f"< 0.1{JOIN}%"
    if 99.9 < percent < 100:
        return f"> 99.9{JOIN}%"
    return f"{percent:.0f}{JOIN}%" if percent in (0, 100) else f"{percent:.1f}{JOIN}%"


def compact(value: float) -> str:
    """Any real number in at most four significant digits: ``1234``, ``0.0021``, ``3e-05``."""
    if not math.isfinite(value):
        return "–"
    whole = 1e4 <= abs(value) < 1e9
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", MINUS)


def duration(seconds: float) -> str:
    """Seconds as one reads a clock: ``0.04 s``, ``9.3 s``, ``1 min 12 s``, ``2 h 05 min``."""
    if seconds < 0.1:
        return f"{seconds:.2f}{JOIN}s"
    if seconds < 59.95:
        return f"{seconds:.1f}{JOIN}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{JOIN}min {whole % 60:02d}{JOIN}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}{JOIN}h {minutes % 60:02d}{JOIN}min"
    return f"{minutes // 1440}{JOIN}d {minutes % 1440 // 60}{JOIN}h"


def size(num_bytes: float) -> str:
    """Bytes in binary units: ``812 B``, ``1.21 GiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5:
            return f"{value:.0f}{JOIN}{unit}" if unit == "B" else f"{value:.3g}{JOIN}{unit}"
        value /= 1024
    return f"{value:.3g}{JOIN}TiB"


def label(name: str) -> str:
    """The name of a method as its paper writes it; an unknown one stays as it is."""
    return _LABELS.get(name, name)


def metric_label(name: str) -> str:
    """``ndcg_at_10`` → ``NDCG@10``; other metrics lose only their underscores."""
    stem, at, cutoff = name.partition("_at_")
    if at and cutoff.isdigit():
        return f"{_ACRONYMS.get(stem, stem)}@{cutoff}"
    return " ".join(_ACRONYMS.get(word, word) for word in name.split("_"))


def day(date: date) -> str:
    """A day without its weekday: ``1 May 2022``."""
    return f"{date.day} {date:%B %Y}"


def moment(when: datetime) -> str:
    """A time that needs no script to be read: ``24 November 2025, 02:07 UTC``."""
    utc = when.astimezone(UTC)
    return f"{utc.day} {utc:%B %Y, %H:%M} UTC"


def clip(text: str, limit: int) -> str:
    """Text of a data set on one line of at most ``limit`` characters.

    Control characters (which HTML forbids or which break lines) become spaces; a cut never
    leaves half a joined emoji or an accent without its letter at the end.
    """
    flat = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    flat = " ".join(flat.split())
    if len(flat) <= limit:
        return flat
    end = limit - 1
    while end > 0 and (_joins(flat[end]) or flat[end - 1] == "\u200d"):
        end -= 1
    return flat[: end or limit - 1].rstrip() + "…"


def visible(text: str) -> bool:
    """Whether a reader sees anything of it: more than spaces, controls and format characters."""
    return any(unicodedata.category(char) not in _INVISIBLE for char in text)


def _joins(char: str) -> bool:
    skin_tone = "\U0001f3fb" <= char <= "\U0001f3ff"
    return skin_tone or char in "\u200d\ufe0f" or unicodedata.combining(char) > 0


def without_credentials(uri: str) -> str:
    """An address without user, password or query, so that a report can be passed on."""
    return _CREDENTIALS.sub("", uri.split("?", 1)[0])
