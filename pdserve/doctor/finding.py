"""What a check found: one line of fact, why it matters, what to do. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Level(enum.StrEnum):
    """How bad it is. Only errors make ``pdserve doctor`` fail."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of one check. ``values`` are its figures for scripts, units in their names."""

    check: str
    level: Level
    what: str
    why: str = ""
    what_to_do: str = ""
    values: Mapping[str, object] = field(default_factory=dict)


def ok(check: str, what: str, **values: object) -> Finding:
    """Nothing is wrong."""
    return Finding(check, Level.OK, what, values=values)


def note(check: str, what: str, why: str = "", what_to_do: str = "", **values: object) -> Finding:
    """Worth knowing, nothing to repair."""
    return Finding(check, Level.NOTE, what, why, what_to_do, values)


def warning(check: str, what: str, why: str, what_to_do: str, **values: object) -> Finding:
    """Something works, but slower or less safely than it could."""
    return Finding(check, Level.WARNING, what, why, what_to_do, values)


def error(check: str, what: str, why: str, what_to_do: str, **values: object) -> Finding:
    """Something will not work."""
    return Finding(check, Level.ERROR, what, why, what_to_do, values)


@dataclass(frozen=True, slots=True)
class Section:
    """Findings that belong together, in the order of their checks."""

    title: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found. ``took_s``: the whole run, seconds."""

    sections: tuple[Section, ...]
    took_s: float

    @property
    def findings(self) -> list[Finding]:
        """Of all sections."""
        return [finding for section in self.sections for finding in section.findings]

    def count(self, level: Level) -> int:
        """Findings of one level."""
        return sum(finding.level is level for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """1 if there is an error, else 0."""
        return 1 if self.count(Level.ERROR) else 0
