"""The pairs: a matrix of KV traffic from prefill to decode workers, or a list where there are many. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.monitor.figures import format_bytes, format_seconds, format_short
from pdserve.monitor.lines import Cell, Column, Line, Table, choose_columns, fit, longest
from pdserve.monitor.listing import SELECTED, Area, Shown, body, part_around
from pdserve.monitor.panels import BAD, DIM, WARN
from pdserve.monitor.snapshot import Snapshot
from pdserve.monitor.view_state import Pane, ViewState, order_of
from pdserve.state.workers import PairEntry

LEAST_NAME, MOST_NAME = 12, 24
"""Cells of the names at the left of the matrix."""
FULL_CELL = 23
"""``1.20 GB/s direct  12 ms``"""
SMALL_CELL = 11
"""``1.20 GB/s d``: the path by its first letter."""
MOST_ROWS = 16
_PAIR_STATES = {"ready": ("●", ""), "probing": ("◐", WARN), "untested": ("○", DIM), "failed": ("×", BAD)}


def short_pair(label: str) -> str:
    """``p0>d1`` for ``prefill-0>decode-1``: the launcher's own names, where space is short."""
    return label.replace("prefill-", "p").replace("decode-", "d")


def _pair_cell(pair: PairEntry | None, *, is_small: bool) -> tuple[str, str]:
    if pair is None:
        return "", ""
    symbol, style = _PAIR_STATES.get(pair.state, ("?", DIM))
    if pair.state != "ready":
        return f"{symbol} {pair.state or '-'}", style
    if is_small:
        return f"{format_bytes(pair.kv_bytes_s, 'B/s')} {pair.kv_path[:1]}".rstrip(), style
    rate, transfer = format_bytes(pair.kv_bytes_s, "B/s"), format_seconds(pair.transfer_p50_s)
    return f"{rate:>9} {pair.kv_path or '-':<6} {transfer:>6}", style


def matrix_cell(snapshot: Snapshot, view: ViewState, width: int) -> int:
    """How wide a cell of the matrix may be; 0 if the pairs are better listed."""
    if order_of(view, Pane.PAIRS).name != "name" or not snapshot.state.pairs:
        return 0
    prefills, decodes = snapshot.pair_roles
    room = (width - _name_width(prefills) - 1) // len(decodes) - 2
    if len(prefills) > MOST_ROWS or room < SMALL_CELL:
        return 0
    if room >= FULL_CELL:
        return FULL_CELL
    return SMALL_CELL if longest(decodes, FULL_CELL) <= SMALL_CELL else 0


def _name_width(prefills: Sequence[str]) -> int:
    return max(LEAST_NAME, longest(prefills, MOST_NAME)) + 1


def pair_lines(rows: Sequence[PairEntry], area: Area) -> Shown:
    """A matrix of prefill by decode where it fits and is not sorted otherwise, else a list."""
    cell = matrix_cell(area.snapshot, area.view, area.width)
    return _matrix(rows, area, cell) if cell else _list(rows, area)


def _list(rows: Sequence[PairEntry], area: Area) -> Shown:
    label = str if area.is_wide else short_pair
    names = longest((label(row.label) for row in rows), 40)
    columns: list[Column[PairEntry]] = [
        Column("pair", 18, lambda r: label(r.label), is_right=False, most=names),
        Column("state", 10, _listed_state, is_right=False),
        Column("KV rate", 9, lambda r: format_bytes(r.kv_bytes_s, "B/s")),
        Column("path", 6, lambda r: r.kv_path or "-", is_right=False),
        Column("transfer", 8, lambda r: format_seconds(r.transfer_p50_s)),
        Column("reqs", 5, lambda r: format_short(r.requests), rank=1),
        Column("KV sent", 8, lambda r: format_bytes(r.kv_bytes), rank=2),
        Column("error", 10, lambda r: (r.error, BAD), rank=3, is_right=False, most=200),
    ]
    table = Table(choose_columns(columns, area.width), area.sorted_by)
    return body(table, rows, area, "none: a pair needs a prefill and a decode worker", [table.heading()])


def _listed_state(pair: PairEntry) -> Cell:
    symbol, style = _PAIR_STATES.get(pair.state, ("?", DIM))
    return f"{symbol} {pair.state or '-'}", style


def _matrix(rows: Sequence[PairEntry], area: Area, cell: int) -> Shown:
    """Prefill workers down, decode workers across."""
    selected = rows[area.marked] if area.marked is not None else None
    prefills = list(dict.fromkeys(pair.prefill for pair in rows))
    decodes = list(dict.fromkeys(pair.decode for pair in rows))
    by_names = {(pair.prefill, pair.decode): pair for pair in rows}
    is_small = cell < FULL_CELL
    name_width = _name_width(prefills)
    heading = Line(fit("from \\ to", name_width), "bold")
    for name in decodes:
        heading.add(fit(name, cell, is_right=is_small) + "  ", "bold")
    at = prefills.index(selected.prefill) if selected else 0
    part = part_around(len(prefills), at, max(0, area.height - 1))
    lines = [heading]
    for name in prefills[part.start : part.stop]:
        line = Line(fit(name, name_width - 1) + " ", "bold")
        for decode in decodes:
            pair = by_names.get((name, decode))
            text, style = _pair_cell(pair, is_small=is_small)
            is_selected = pair is not None and pair is selected
            line.add(fit(text, cell, is_right=is_small), SELECTED if is_selected else style).add("  ")
        lines.append(line)
    told = f"{part.start + 1}-{part.stop} of {len(prefills)} prefill" if len(part) < len(prefills) else ""
    return lines, told
