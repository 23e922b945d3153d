"""One line of what `reelflow doctor` says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at, one or two words.
        text: what was found.
        remedy: what to do about it; empty if nothing is wrong.
        broken: whether the platform cannot work like this.
    """

    subject: str
    text: str
    remedy: str = ""
    broken: bool = False

    @property
    def mark(self) -> str:
        """✓ fine, ! works but deserves a look, ✗ broken."""
        return "✗" if self.broken else ("!" if self.remedy else "✓")

    def as_json(self) -> dict[str, str]:
        """For scripts; ``state`` is ``fine``, ``look`` or ``broken``."""
        state = {"✓": "fine", "!": "look", "✗": "broken"}[self.mark]
        return {
            "subject": self.subject,
            "state": state,
            "text": self.text,
            "remedy": self.remedy,
        }
