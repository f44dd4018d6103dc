"""The table of a starting fleet, and the plain lines where there is no terminal."""

from __future__ import annotations

import io
import json
import logging
import shlex

from rich.console import Console

from pdserve.cluster.local import Display
from pdserve.monitor.progress import LaunchView, ProcessRow, ProgressDisplay, format_ready, render


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _plain(**options: object) -> tuple[ProgressDisplay, io.StringIO, Clock]:
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, width=120, **options)  # type: ignore[arg-type]
    return ProgressDisplay(console, clock), file, clock


def _step(display: Display, name: str, stage: str) -> None:
    display.stage(name, role="prefill", url="http://127.0.0.1:31000", stage=stage, log_file="/l/p.log")


def test_render_shows_every_column() -> None:
    row = ProcessRow(
        "prefill-0", "prefill", "http://127.0.0.1:31000", "loading weights", "/l/prefill-0.log", 3.0
    )
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(render(LaunchView({"prefill-0": row}, started_s=0.0, now_s=10.0)))
    text = console.export_text()
    assert "starting: 0 of 1 ready, 10 s" in text
    line = next(line for line in text.splitlines() if line.startswith("prefill-0"))
    assert line.split() == [
        "prefill-0",
        "prefill",
        "http://127.0.0.1:31000",
        "loading",
        "weights",
        "7",
        "prefill-0.log",
    ]


def test_without_a_terminal_one_line_per_change() -> None:
    display, file, clock = _plain(force_terminal=False)
    _step(display, "prefill-0", "starting")
    clock.now_s += 2.5
    _step(display, "prefill-0", "ready")
    display.tick()
    assert file.getvalue().splitlines() == ["[   0.0 s] prefill-0: starting", "[   2.5 s] prefill-0: ready"]


def test_ready_says_how_to_use_and_stop_it() -> None:
    display, file, clock = _plain(force_terminal=False)
    clock.now_s += 12.3
    display.ready(url="http://127.0.0.1:30000", model="it's", log_dir="/logs/1")
    text = file.getvalue()
    assert text == format_ready("http://127.0.0.1:30000", "it's", "/logs/1", 12.3) + "\n"
    assert "ready after 12.3 s" in text and "/logs/1" in text and "Ctrl-C stops" in text
    command = shlex.split(text.splitlines()[1])
    assert command[:2] == ["curl", "http://127.0.0.1:30000/v1/chat/completions"]
    assert json.loads(command[-1])["model"] == "it's"


def test_after_ready_only_recoveries_and_events_are_shown() -> None:
    display, file, _ = _plain(force_terminal=False)
    _step(display, "prefill-0", "ready")
    display.ready(url="http://x", model="m", log_dir="/l")
    file.truncate(0)
    file.seek(0)
    display.event(logging.WARNING, "prefill-0 ended: exit status 1; restart 1 in 0.5 s")
    _step(display, "prefill-0", "starting")
    _step(display, "prefill-0", "loading weights")
    _step(display, "prefill-0", "ready")
    assert file.getvalue().splitlines() == [
        "warning: prefill-0 ended: exit status 1; restart 1 in 0.5 s",
        "prefill-0 is ready again",
    ]


def test_terminal_draws_a_table_and_stops() -> None:
    display, file, _ = _plain(force_terminal=True)
    _step(display, "prefill-0", "loading weights")
    assert "loading weights" in file.getvalue()
    display.ready(url="http://x", model="m", log_dir="/l")
    display.close()
    assert "Ctrl-C stops" in file.getvalue()
