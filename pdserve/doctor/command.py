"""``pdserve doctor``: run the checks, print what they found, return the exit code."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass

from pdserve import __version__
from pdserve.config.launch import DEVICES, check_port
from pdserve.config.setting import FLEET, KEYS, MODEL, OUTPUT, RUN, check_choices, setting
from pdserve.doctor.finding import Finding, Level, Report
from pdserve.doctor.machine import MachineQuestion, machine_groups
from pdserve.doctor.runner import run_groups
from pdserve.errors import ConfigError

MAX_SERVERS = 1024
MARKS = {Level.OK: "✓", Level.NOTE: "·", Level.WARNING: "!", Level.ERROR: "✗"}
PLAIN_MARKS = {Level.OK: "+", Level.NOTE: "-", Level.WARNING: "!", Level.ERROR: "x"}
MIN_WIDTH, MAX_WIDTH = 60, 120


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What ``pdserve doctor`` was asked: the servers that are to run here, and a fleet that runs already."""

    url: str = setting("", "Balancer of a running fleet to check as well.", "URL", "URL")
    model: str = setting(
        "", "As MODEL of pdserve launch.", "name or path", "--model", panel=MODEL, empty="embedded"
    )
    device: str = setting("auto", "Where servers will run.", "name", "--device", panel=FLEET, choices=DEVICES)
    prefill: int = setting(1, "Prefill workers.", "count", "-p --prefill")
    decode: int = setting(1, "Decode workers.", "count", "-d --decode")
    port: int = setting(30000, "Port of the service.", "port", "--port")
    as_json: bool = setting(False, "Findings as JSON.", "flag", "--json/--text", panel=OUTPUT)
    deep: bool = setting(
        False, "Import SGLang and apply our hooks, 30 s.", "flag", "--deep/--no-deep", panel=RUN
    )
    api_key: str = setting(
        "",
        "Admin key of the fleet; or PDSERVE_ADMIN_API_KEY, PDSERVE_API_KEY.",
        "text",
        "--api-key KEY",
        panel=KEYS,
    )

    def __post_init__(self) -> None:
        check_port("--port", self.port)
        check_choices(self)
        for option, count in (("-p", self.prefill), ("-d", self.decode)):
            if not 1 <= count <= MAX_SERVERS:
                raise ConfigError(f"{option} must be 1..{MAX_SERVERS}, got {count}")


def run_doctor(options: DoctorOptions) -> int:
    """Check this machine and, with ``options.url``, the fleet whose balancer is there; print the report.

    Returns:
        0 if nothing is worse than a warning, 1 if there is an error.
    """
    started_s = time.monotonic()
    groups = machine_groups(
        MachineQuestion(
            options.model,
            options.device,
            options.prefill,
            options.decode,
            options.port,
            options.deep,
            is_serving=bool(options.url),
        )
    )
    if options.url:
        from pdserve.doctor.fleet import fleet_groups

        groups += fleet_groups(options.url, options.api_key)
    report = Report(run_groups(groups), time.monotonic() - started_s)
    _print(report, options.as_json)
    return report.exit_code


def _print(report: Report, as_json: bool) -> None:
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    width = shutil.get_terminal_size((100, 24)).columns
    sys.stdout.write(render_json(report) if as_json else render_text(report, width, is_unicode=is_unicode))
    sys.stdout.flush()


# -- the report ---------------------------------------------------------------------------------


def render_text(report: Report, width: int, *, is_unicode: bool = True) -> str:
    """Sections with one line per finding, reasons and remedies below what is not fine, a summary last.

    The level stands there as a word, not only as a mark or colour.
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
