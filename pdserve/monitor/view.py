"""One frame of the monitor as a pure function of the state document, the user's view and the size.

    header · traffic · latencies         always; shorter where rows are few
    lists of workers, pairs, requests, events      what is in focus gets its rows first
    keys

From 150 columns on the lists stand in two columns. A frame has at most as many rows as the
screen and each is exactly as wide: nothing wraps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pdserve.monitor.details import details_page, help_page
from pdserve.monitor.figures import format_age
from pdserve.monitor.lines import Frame, Line, beside, fit
from pdserve.monitor.panels import DIM, attention, condition, latencies, latency_line, title, traffic
from pdserve.monitor.snapshot import Snapshot
from pdserve.monitor.tables import pane_lines, wanted_rows
from pdserve.monitor.view_state import Pane, ViewState
from pdserve.state.document import StateDocument

MIN_COLUMNS = 40
"""A narrower screen shows the left part of a frame of this width."""
TWO_COLUMNS = 150
TALL = 34
"""Rows from which "needs attention" may take three lines."""
_LEAST = {Pane.WORKERS: 3, Pane.PAIRS: 3, Pane.REQUESTS: 4, Pane.EVENTS: 2}
_SHARE = {Pane.WORKERS: 4, Pane.PAIRS: 2, Pane.REQUESTS: 3, Pane.EVENTS: 2}
_KEYS = (
    ("q", "quit"),
    ("?", "help"),
    ("tab", "next list"),
    ("↑↓", "select"),
    ("enter", "details"),
    ("s", "sort"),
    ("r", "role"),
    ("p", "pause"),
)


def render(state: StateDocument, view: ViewState, size: tuple[int, int]) -> Frame:
    """The state document as one screen of at most ``size`` = (columns, rows) cells."""
    columns, rows = max(1, size[0]), max(1, size[1])
    width = max(columns, MIN_COLUMNS)
    snapshot = Snapshot(state, view.now_s)
    scroll = 0
    if view.is_help or view.is_detailed:
        page = help_page(width) if view.is_help else details_page(snapshot, view, width)
        lines, scroll = _page(page, snapshot, view, (width, rows))
    else:
        lines = _overview(snapshot, view, (width, rows))
    return Frame(lines[:rows], columns, scroll=scroll, is_ascii=view.is_ascii)


def _page(
    page: Sequence[Line], snapshot: Snapshot, view: ViewState, size: tuple[int, int]
) -> tuple[list[Line], int]:
    """A page that is scrolled, under a short header."""
    width, rows = size
    top = [title(snapshot, view, width)]
    if view.lost is not None:
        top += attention(snapshot, view, width)
    room = max(1, rows - len(top) - 2)
    scroll = max(0, min(view.scroll, len(page) - room))
    shown = list(page[scroll : scroll + room])
    part = f" lines {scroll + 1}-{scroll + len(shown)} of {len(page)} " if len(page) > room else ""
    rule = Line("─" * 2, DIM).add(part).pad(width, "─", DIM)
    shown += [Line()] * (room - len(shown))
    keys = Line("esc", "bold").add(" back  ").add("↑↓", "bold").add(" scroll  ").add("q", "bold").add(" quit")
    return [*top, rule, *shown, keys], scroll


def _overview(snapshot: Snapshot, view: ViewState, size: tuple[int, int]) -> list[Line]:
    width, rows = size
    top = _top(snapshot, view, width, rows)
    has_keys = view.is_interactive and rows >= 6
    room = rows - len(top) - has_keys
    body = _panes(snapshot, view, width, room) if room > 0 else []
    if view.is_interactive:
        body += [Line()] * (room - len(body))
    return [*top, *body, *([_footer(snapshot, view, width)] if has_keys else [])]


def _top(snapshot: Snapshot, view: ViewState, width: int, rows: int) -> list[Line]:
    """What stands above the lists, by how many rows there are."""
    first = title(snapshot, view, width)
    alarm = attention(snapshot, view, width, 3 if rows >= TALL else 1)
    if rows < 10:
        return [first, *alarm] if rows >= 5 else alarm if view.lost else [first]
    top = [first, condition(snapshot, width), *alarm]
    if rows < 20:
        return [*top, latency_line(snapshot, width)]
    return [*top, traffic(snapshot, width), *latencies(snapshot, width)]


def _panes(snapshot: Snapshot, view: ViewState, width: int, rows: int) -> list[Line]:
    if width < TWO_COLUMNS:
        return _stack(list(Pane), snapshot, view, width, rows)
    left_width = (width - 3) * 53 // 100
    left = _stack([Pane.WORKERS, Pane.PAIRS], snapshot, view, left_width, rows)
    right = _stack([Pane.REQUESTS, Pane.EVENTS], snapshot, view, width - left_width - 3, rows)
    return beside(left, right, left_width)


def _stack(panes: Sequence[Pane], snapshot: Snapshot, view: ViewState, width: int, rows: int) -> list[Line]:
    wanted = {pane: wanted_rows(pane, snapshot, view, width) for pane in panes}
    if Pane.EVENTS in wanted:
        wanted[Pane.EVENTS] += min(2, len(view.notes))
    heights = allot(wanted, view.pane, rows)
    return [
        line
        for pane in panes
        if heights.get(pane)
        for line in pane_lines(pane, snapshot, view, (width, heights[pane]))
    ]


def allot(wanted: Mapping[Pane, int], focus: Pane, rows: int) -> dict[Pane, int]:
    """How many rows each list gets, none more than it wants; a list that would get too few gets none.

    The one in focus is served first, then by importance; what is left goes round by shares.
    """
    order = sorted(wanted, key=lambda pane: pane is not focus)
    heights: dict[Pane, int] = {}
    for pane in order:
        least = min(wanted[pane], max(_LEAST[pane], rows * 3 // 5 if pane is focus else 0))
        if least <= rows or not heights:
            heights[pane] = min(least, rows)
            rows -= heights[pane]
    while rows > 0 and (hungry := [pane for pane in heights if heights[pane] < wanted[pane]]):
        shares = {pane: _SHARE[pane] * (2 if pane is focus else 1) for pane in hungry}
        for pane in hungry:
            grant = max(1, rows * shares[pane] // (2 * sum(shares.values())))
            grant = min(grant, wanted[pane] - heights[pane], rows)
            heights[pane] += grant
            rows -= grant
    return heights


def _footer(snapshot: Snapshot, view: ViewState, width: int) -> Line:
    line = Line()
    for key, what in _KEYS:
        if line.width + len(key) + len(what) + 3 > width:
            break
        line.add(key, "bold").add(f" {what}  ")
    age = ""
    if view.received_s is not None:
        age = f"document {format_age(view.now_s - view.received_s)} old"
    if age and line.width + len(age) <= width:
        line.pad(width - len(age)).add(age, DIM)
    return Line(fit(line.plain, width)) if line.width > width else line
