"""Runs checks, each with its own limit; one that crashes or hangs becomes an error that says so.

A check runs in a daemon thread, which cannot be stopped: one that hangs is left
behind and ends with the process. What may really hang is therefore put into a
child process (children.py), and the limit here is only the last resort.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.doctor.finding import Finding, Section, error

MAX_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Check:
    """One check: ``run`` looks and judges. ``limit_s`` is its longest time, in seconds."""

    name: str
    run: Callable[[], list[Finding]]
    limit_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Group:
    """Checks under one heading, run side by side unless ``in_turn``."""

    title: str
    checks: tuple[Check, ...]
    in_turn: bool = False


def run_groups(groups: Sequence[Group]) -> tuple[Section, ...]:
    """Run everything, group by group, and keep the order of the checks."""
    return tuple(Section(group.title, tuple(_run_group(group))) for group in groups)


def _run_group(group: Group) -> list[Finding]:
    found: list[Finding] = []
    step = 1 if group.in_turn else MAX_AT_ONCE
    for first in range(0, len(group.checks), step):
        batch = group.checks[first : first + step]
        for check, answers in [(check, _start(check)) for check in batch]:
            found += _collect(check, answers)
    return found


@dataclass(frozen=True, slots=True)
class _Started:
    answers: queue.SimpleQueue[list[Finding]]
    at_s: float


def _start(check: Check) -> _Started:
    answers: queue.SimpleQueue[list[Finding]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(check.run())
        except Exception as exc:
            answers.put([_crashed(check.name, exc)])

    threading.Thread(target=work, name=f"doctor-{check.name}", daemon=True).start()
    return _Started(answers, time.monotonic())


def _collect(check: Check, started: _Started) -> list[Finding]:
    left_s = max(0.0, started.at_s + check.limit_s - time.monotonic())
    try:
        return started.answers.get(timeout=left_s)
    except queue.Empty:
        return [
            error(
                check.name,
                f"the check did not end within {check.limit_s:g} s",
                "what it looks at hangs; a server that needs it would hang too",
                "look at that part of the machine by hand, then run the doctor again",
            )
        ]


def _crashed(name: str, exc: Exception) -> Finding:
    place = traceback.extract_tb(exc.__traceback__)[-1]
    return error(
        name,
        f"the check itself failed: {type(exc).__name__}: {exc} ({place.name}, line {place.lineno})",
        "nothing is known of what it should have looked at",
        "report this line as a bug of pdserve",
    )
