"""Keys: from a terminal's bytes to names, and from a name to what it changes. Pure.

bytes ──KeyReader──► "down", "enter", "q" ──press──► the next ViewState, or None to leave
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pdserve.monitor.snapshot import Snapshot, key_of
from pdserve.monitor.view_state import ORDERS, ROLES, Pane, ViewState, listed, selected_index, selected_row

ESCAPE = 0x1B
PAGE = 10
HELP = (
    ("q", "leave (Ctrl-C too)"),
    ("? h", "this page"),
    ("tab, shift-tab", "next or previous list"),
    ("1 2 3 4", "workers, pairs, requests, events"),
    ("up down, k j", "select a row, or scroll a page of details"),
    ("pgup pgdn, home end", "select ten rows further, first or last"),
    ("enter", "details of the selected row"),
    ("esc", "back"),
    ("s S", "sort the list by the next or the previous column"),
    ("r", "workers of all roles, prefill only, decode only"),
    ("Ctrl-L", "draw everything again"),
    ("p space", "pause and go on; nothing is asked of the balancer meanwhile"),
)

_SEQUENCES = {
    b"[A": "up", b"OA": "up", b"[B": "down", b"OB": "down", b"[5~": "pgup", b"[6~": "pgdn",
    b"[H": "home", b"OH": "home", b"[1~": "home", b"[F": "end", b"OF": "end", b"[4~": "end", b"[Z": "backtab",
}  # fmt: skip
_BYTES = {0x09: "tab", 0x0D: "enter", 0x0A: "enter", 0x20: "space", 0x7F: "esc", 0x08: "esc", 0x03: "q"}
_ALIASES = {"h": "?", "k": "up", "j": "down", "space": "p", "G": "end", "g": "home"}
_STEPS = {"up": -1, "down": 1, "pgup": -PAGE, "pgdn": PAGE, "home": -1_000_000, "end": 1_000_000}


class KeyReader:
    """Cuts what a terminal sends into keys. A lone escape may begin an arrow: see ``flush``."""

    def __init__(self) -> None:
        self._held = b""

    @property
    def is_waiting(self) -> bool:
        """True after the beginning of a sequence; if nothing follows soon, it was the escape key."""
        return bool(self._held)

    def feed(self, data: bytes) -> Iterator[str]:
        """The keys in ``data``; sequences that mean nothing here are dropped."""
        data, self._held = self._held + data, b""
        at = 0
        while at < len(data):
            if data[at] != ESCAPE:
                yield _BYTES.get(data[at]) or chr(data[at])
                at += 1
                continue
            end = _sequence_end(data, at + 1)
            if end is None:
                self._held = data[at:][:32]
                return
            yield _SEQUENCES.get(data[at + 1 : end], "") if end > at + 1 else "esc"
            at = end

    def flush(self) -> Iterator[str]:
        """Nothing more came: a lone escape was the key."""
        held, self._held = self._held, b""
        if held == b"\x1b":
            yield "esc"


def _sequence_end(data: bytes, at: int) -> int | None:
    """Where the sequence ends whose first byte after the escape is at ``at``; None if it goes on."""
    if at >= len(data):
        return None
    if data[at] not in b"[O":
        return at  # escape followed by another key
    for end in range(at + 1, len(data)):
        if 0x40 <= data[end] <= 0x7E:
            return end + 1
    return None


def press(key: str, view: ViewState, snapshot: Snapshot) -> ViewState | None:
    """What ``key`` makes of ``view``; None if the user wants to leave. Other keys change nothing."""
    key = _ALIASES.get(key, key)
    if key == "q":
        return None
    if key == "?":
        return replace(view, is_help=not view.is_help, scroll=0)
    if key == "p":
        return replace(view, is_paused=not view.is_paused)
    if key == "esc":
        is_top = view.is_help
        return replace(view, is_help=False, is_detailed=view.is_detailed and is_top, scroll=0)
    if view.is_help or view.is_detailed:
        return replace(view, scroll=max(0, view.scroll + _STEPS.get(key, 0)))
    return _press_list(key, view, snapshot)


def _press_list(key: str, view: ViewState, snapshot: Snapshot) -> ViewState:
    panes = list(Pane)
    if key in _STEPS:
        return _select(view, snapshot, _STEPS[key])
    if key in ("1", "2", "3", "4"):
        return replace(view, pane=panes[int(key) - 1])
    match key:
        case "tab":
            return replace(view, pane=panes[(panes.index(view.pane) + 1) % len(panes)])
        case "backtab":
            return replace(view, pane=panes[panes.index(view.pane) - 1])
        case "enter":
            row = selected_row(snapshot, view, view.pane)
            return replace(view, is_detailed=row is not None, pinned=row, scroll=0)
        case "r":
            return replace(view, role=ROLES[(ROLES.index(view.role) + 1) % len(ROLES)])
        case "s" | "S":
            step = 1 if key == "s" else -1
            place = (view.sorts.get(view.pane, 0) + step) % len(ORDERS[view.pane])
            return replace(view, sorts={**view.sorts, view.pane: place})
    return view


def _select(view: ViewState, snapshot: Snapshot, step: int) -> ViewState:
    rows = listed(snapshot, view, view.pane)
    if not rows:
        return view
    index = max(0, min(len(rows) - 1, selected_index(rows, view, view.pane) + step))
    return view.with_selection(key_of(rows[index]), index)
