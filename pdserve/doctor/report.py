"""A report as text for people and as JSON for scripts. Pure."""

from __future__ import annotations

import json
import textwrap

from pdserve import __version__
from pdserve.doctor.finding import Finding, Level, Report

MARKS = {Level.OK: "✓", Level.NOTE: "·", Level.WARNING: "!", Level.ERROR: "✗"}
PLAIN_MARKS = {Level.OK: "+", Level.NOTE: "-", Level.WARNING: "!", Level.ERROR: "x"}
MIN_WIDTH, MAX_WIDTH = 60, 120


def render_text(report: Report, width: int, *, is_unicode: bool = True) -> str:
    """Sections with one line per finding, reasons and remedies below what is not fine, a summary last.

    The level is told by a word, not by the mark or a colour alone.
    """
    width = max(MIN_WIDTH, min(width, MAX_WIDTH))
    marks = MARKS if is_unicode else PLAIN_MARKS
    column = max((len(finding.check) for finding in report.findings), default=0)
    blocks = []
    for section in report.sections:
        lines = [line for finding in section.findings for line in _lines(finding, column, width, marks)]
        blocks.append("\n".join([section.title, *lines]))
    return "\n\n".join([*blocks, "\n".join(_wrap(summary(report), "", width))]) + "\n"


def _lines(finding: Finding, column: int, width: int, marks: dict[Level, str]) -> list[str]:
    word = finding.level.upper() if finding.level in (Level.WARNING, Level.ERROR) else str(finding.level)
    head = f"  {marks[finding.level]} {word:<7}  {finding.check:<{column}}  "
    lines = _wrap(finding.what, head, width)
    if finding.level is not Level.OK:
        indent = " " * len(head)
        for label, text in (("why: ", finding.why), ("do:  ", finding.what_to_do)):
            if text:
                lines += _wrap(text, indent + label, width)
    return lines


def _wrap(text: str, head: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(
        " ".join(text.split()),
        max(width, len(head) + 24),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
    )
    return wrapped or [head.rstrip()]


def summary(report: Report) -> str:
    """``2 errors, 1 warning, 1 note, 20 ok in 4.1 s``, and which checks the errors are."""
    errors, warnings, notes = (report.count(level) for level in (Level.ERROR, Level.WARNING, Level.NOTE))
    parts = [_count(errors, "error"), _count(warnings, "warning"), _count(notes, "note")]
    line = f"{', '.join(parts)}, {report.count(Level.OK)} ok in {report.took_s:.1f} s"
    if not errors:
        return line
    names = dict.fromkeys(finding.check for finding in report.findings if finding.level is Level.ERROR)
    return f"{line}; to repair: {', '.join(names)}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def render_json(report: Report) -> str:
    """One JSON document, indented: ``ok``, ``counts`` by level, ``findings`` with section and values."""
    document = {
        "version": __version__,
        "ok": report.exit_code == 0,
        "took_s": round(report.took_s, 3),
        "counts": {str(level): report.count(level) for level in Level},
        "findings": [
            {
                "section": section.title,
                "check": finding.check,
                "level": str(finding.level),
                "what": finding.what,
                "why": finding.why,
                "what_to_do": finding.what_to_do,
                "values": dict(finding.values),
            }
            for section in report.sections
            for finding in section.findings
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
