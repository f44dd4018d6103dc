"""Runs what may hang or crash (a driver, UCX, an import) in a process of its own, with a limit.

The child leads a process group: when time is up the whole group dies, with whatever it started.
Our own child modules also die with the doctor (process/parent_death.py), should it be interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MAX_SHOWN = 300
"""Characters of a child's own words in a finding."""


@dataclass(frozen=True, slots=True)
class ChildResult:
    """How a child ended. ``returncode`` is None when it ran out of time, or could not be started."""

    returncode: int | None
    stdout: str = ""
    stderr: str = ""
    is_missing: bool = False
    """There is no such program."""

    @property
    def is_good(self) -> bool:
        """The child ended by itself with status 0."""
        return self.returncode == 0

    def json(self) -> dict[str, Any] | None:
        """The JSON object on its last line; None if there is none, or it did not end well."""
        lines = self.stdout.strip().splitlines()
        if not self.is_good or not lines:
            return None
        try:
            value = json.loads(lines[-1])
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def complaint(self, limit_s: float) -> str:
        """Its last words on why it failed, one line."""
        if self.is_missing:
            return "the program is not there"
        if self.returncode is None:
            return f"no end within {limit_s:g} s"
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        # UCX logs to stdout; what it says is nearer to the cause than the exception that follows
        marked = [line for line in (*self.stdout.splitlines(), *lines) if "UCX  ERROR" in line]
        words = marked[-1].partition("UCX  ERROR")[2] if marked else lines[-1] if lines else ""
        how = f"killed by signal {-self.returncode}" if self.returncode < 0 else f"status {self.returncode}"
        return f"{how}: {' '.join(words.split())[:MAX_SHOWN]}" if words else how


def run_child(argv: Sequence[str], limit_s: float) -> ChildResult:
    """Run a program, its input empty. Never raises for what it does."""
    try:
        process = subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError:
        return ChildResult(None, is_missing=True)
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
        return ChildResult(process.returncode, stdout, stderr)
    except subprocess.TimeoutExpired:
        _end_group(process)
        return ChildResult(None)


def run_module(module: str, *args: str, limit_s: float) -> ChildResult:
    """``python -m module args`` by this interpreter."""
    return run_child([sys.executable, "-m", module, *args], limit_s)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Kill the child and all it started. It has not been waited for, so its group is still its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
