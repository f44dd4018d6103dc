"""What the user sees while a fleet starts, and one line for each later event.

``render`` is pure: a view of the launch becomes a rich table. ``ProgressDisplay``
redraws it on a terminal; without one it prints a plain line per change.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

READY = "ready"
_COLOURS = {READY: "green", "failed": "red", "backing off": "yellow"}
_LABELS = {logging.WARNING: ("warning", "yellow"), logging.ERROR: ("error", "red")}


@dataclass(slots=True)
class ProcessRow:
    """One process. ``since_s``: when it reached ``stage``, on the display's clock."""

    name: str
    role: str
    url: str
    stage: str
    log_file: str
    since_s: float


@dataclass(slots=True)
class LaunchView:
    """Everything ``render`` shows. ``now_s`` and the rows' times are of one clock."""

    rows: dict[str, ProcessRow] = field(default_factory=dict)
    started_s: float = 0.0
    now_s: float = 0.0


def render(view: LaunchView) -> Table:
    """The launch as a table: one row per process, seconds in its present stage."""
    num_ready = sum(row.stage == READY for row in view.rows.values())
    elapsed = max(0.0, view.now_s - view.started_s)
    table = Table(
        title=f"starting: {num_ready} of {len(view.rows)} ready, {elapsed:.0f} s",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("name", "role", "url", "stage", "s", "log"):
        table.add_column(column, justify="right" if column == "s" else "left", no_wrap=column != "stage")
    for row in view.rows.values():
        seconds = f"{max(0.0, view.now_s - row.since_s):.0f}"
        stage = Text(row.stage, style=_COLOURS.get(row.stage, ""))
        table.add_row(row.name, row.role, row.url, stage, seconds, Path(row.log_file).name)
    return table


def format_ready(url: str, model: str, log_dir: str, seconds: float) -> str:
    """What to do with a fleet that is ready."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    quoted = body.replace("'", "'\\''")
    return (
        f"ready after {seconds:.1f} s: {url}\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{quoted}'\n"
        f"  logs: {log_dir}\n"
        "  Ctrl-C stops"
    )


class ProgressDisplay:
    """Shows a launch on ``console``; satisfies ``cluster.local.Display``."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._view = LaunchView(started_s=clock(), now_s=clock())
        self._is_ready = False
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def stage(self, name: str, *, role: str, url: str, stage: str, log_file: str) -> None:
        """Note a change; after the start only what concerns the user is printed."""
        now = self._clock()
        former = self._view.rows.get(name)
        self._view.rows[name] = ProcessRow(name, role, url, stage, log_file, now)
        if self._is_ready:
            if stage == READY and former is not None and former.stage != READY:
                self._print(f"{name} is ready again")
        elif self._live is None:
            self._print(f"[{now - self._view.started_s:6.1f} s] {name}: {stage}")
        else:
            self.tick()

    def tick(self) -> None:
        """Redraw the table."""
        if self._live is not None:
            self._view.now_s = self._clock()
            self._live.update(render(self._view), refresh=True)

    def ready(self, *, url: str, model: str, log_dir: str) -> None:
        """Replace the table by the endpoint and how to use it."""
        self._is_ready = True
        self.close()
        self._print(format_ready(url, model, log_dir, self._clock() - self._view.started_s))

    def event(self, level: int, text: str) -> None:
        """Print one line."""
        label, colour = _LABELS.get(level, ("", ""))
        line = Text(f"{label}: ", style=colour) if label else Text()
        self._console.print(line.append(text, style="default"), soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Stop redrawing; further lines are printed plainly."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True, highlight=False)
