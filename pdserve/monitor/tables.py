"""The lists of the screen: title, heading, rows around the selected one; requests and events. Pure.

title rule ── what, how many, how sorted, what the figures mean ── which part is shown
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pdserve.monitor.figures import format_age, format_bytes, format_seconds, format_short
from pdserve.monitor.lines import Cell, Column, Line, Table, choose_columns, longest
from pdserve.monitor.listing import Area, Shown, body
from pdserve.monitor.pair_table import FULL_CELL, matrix_cell, pair_lines, short_pair
from pdserve.monitor.panels import BAD, DIM, WARN, Part, joined
from pdserve.monitor.snapshot import EventRow, Snapshot
from pdserve.monitor.view_state import Pane, ViewState, listed, order_of, selected_index
from pdserve.monitor.worker_table import worker_lines
from pdserve.state.client import clean
from pdserve.state.document import RequestEntry

_BAD_EVENTS = {"suspect", "gone", "pair_failed", "wedged"}


def pane_lines(pane: Pane, snapshot: Snapshot, view: ViewState, size: tuple[int, int]) -> list[Line]:
    """``pane`` in at most ``size`` = (columns, rows): a title, a heading, rows."""
    rows = listed(snapshot, view, pane)
    area = Area(snapshot, view, pane, size[0], size[1] - 1, selected_index(rows, view, pane))
    build: dict[Pane, Callable[[list[Any], Area], Shown]] = {
        Pane.WORKERS: worker_lines,
        Pane.PAIRS: pair_lines,
        Pane.REQUESTS: _requests,
        Pane.EVENTS: _events,
    }
    lines, shown = build[pane](rows, area) if area.height > 0 else ([], "")
    return [_rule(area, len(rows), shown), *lines][: size[1]]


def wanted_rows(pane: Pane, snapshot: Snapshot, view: ViewState, width: int) -> int:
    """How many lines ``pane`` would take to show everything."""
    num = len(listed(snapshot, view, pane))
    if pane is Pane.PAIRS and matrix_cell(snapshot, view, width):
        num = len(snapshot.pair_roles[0])
    return max(num, 1) + (1 if pane is Pane.EVENTS else 2)


def _rule(area: Area, num_rows: int, shown: str) -> Line:
    pane, view, width = area.pane, area.view, area.width
    is_focus = area.marked is not None
    line = Line("▶ " if is_focus else "─ ", "bold" if is_focus else DIM)
    line.add(f"{pane} {num_rows}", "bold reverse" if is_focus else "bold").add(" · ", DIM)
    parts: list[Part] = [(told, "", rank) for rank, told in enumerate(_about(area), 1)]
    if is_focus:
        parts.insert(0, (f"by {order_of(view, pane).name}", "", 0))
    if view.role and pane in (Pane.WORKERS, Pane.EVENTS):
        parts.insert(0, (f"{view.role} only", WARN, 0))
    tail = f" {shown} " if shown else ""
    line.extend(joined(parts, max(0, width - line.width - len(tail) - 3)))
    line.add(" ")
    return line.pad(width - len(tail) - 1, "─", DIM).add(tail).pad(width, "─", DIM)


def _about(area: Area) -> list[str]:
    snapshot = area.snapshot
    match area.pane:
        case Pane.WORKERS:
            legend = "tok/s over 10 s: prompt (P), generated (D)"
            return [_roles(snapshot), legend, "queues in requests", "boot: bootstrap or prealloc"]
        case Pane.PAIRS:
            return _about_pairs(area)
        case Pane.REQUESTS:
            return ["time in each stage", "first tok, done: since arrival"]
        case Pane.EVENTS:
            return ["joins, deaths, breaker, regime"]


def _about_pairs(area: Area) -> list[str]:
    pairs = area.snapshot.state.pairs
    total = sum(pair.kv_bytes_s or 0.0 for pair in pairs)
    ready = sum(pair.state == "ready" for pair in pairs)
    told = f"{ready} ready" + (f", KV {format_bytes(total, 'B/s')} in all" if total else "")
    cell = matrix_cell(area.snapshot, area.view, area.width)
    if 0 < cell < FULL_CELL:
        return [told, "d direct, p packed, m mixed", "KV rate over 1 min"]
    legend = "KV rate over 1 min, path, median transfer"
    if cell or not total:
        return [told, legend]
    busiest = max(pairs, key=lambda pair: pair.kv_bytes_s or 0.0)
    return [told, f"busiest {short_pair(busiest.label)} {format_bytes(busiest.kv_bytes_s, 'B/s')}", legend]


def _roles(snapshot: Snapshot) -> str:
    told = []
    for role in ("prefill", "decode"):
        workers = [worker for worker in snapshot.state.workers if worker.role == role]
        ready = sum(worker.state == "ready" for worker in workers)
        told.append(f"{ready}/{len(workers)} {role} ready" if ready < len(workers) else f"{ready} {role}")
    return ", ".join(told)


# -- requests and events -----------------------------------------------------------------------


def _ended_cell(row: RequestEntry) -> tuple[str, str]:
    word = row.finish or (str(row.status) if row.status else "-")
    if row.is_good:
        return word, ""
    return f"× {row.status or ''} {word}".replace("  ", " "), BAD


def _requests(rows: Sequence[RequestEntry], area: Area) -> Shown:
    label = str if area.is_wide else short_pair
    pair_width = longest((label(row.pair) for row in rows), 24)
    ended_width = longest((_ended_cell(row)[0] for row in rows), 14)
    columns: list[Column[RequestEntry]] = [
        Column("request", 8, lambda r: r.rid[-8:] or "-", is_right=False),
        Column("pair", 8, lambda r: label(r.pair) or "-", is_right=False, most=pair_width),
        Column("in", 5, lambda r: format_short(r.prompt_tokens), rank=2),
        Column("out", 5, lambda r: format_short(r.completion_tokens), rank=3),
        Column("queued", 6, lambda r: format_seconds(r.queued_s)),
        Column("prefill", 7, lambda r: format_seconds(r.prefill_s)),
        Column("transfer", 8, lambda r: format_seconds(r.transfer_s)),
        Column("first tok", 9, lambda r: format_seconds(r.first_token_s)),
        Column("done", 6, lambda r: format_seconds(r.done_s)),
        Column("TPOT", 6, lambda r: format_seconds(r.tpot_s), rank=4),
        Column("ended", 9, _ended_cell, is_right=False, most=ended_width),
        Column("error", 12, lambda r: (r.error, BAD), rank=5, is_right=False, most=200),
    ]
    table = Table(choose_columns(columns, area.width), area.sorted_by)
    return body(table, rows, area, "none has ended yet", [table.heading()])


def _events(rows: Sequence[EventRow], area: Area) -> Shown:
    columns: list[Column[EventRow]] = [
        Column("ago", 9, _ago_cell),
        Column("event", 13, _event_cell, is_right=False),
        Column("worker", 10, lambda r: r.worker, is_right=False, most=longest((r.worker for r in rows), 20)),
        Column("detail", 10, lambda r: r.detail, rank=1, is_right=False, most=400),
    ]
    notes = [Line(f"  launcher {clean(note)}", WARN) for note in area.view.notes[-2:]]
    return body(Table(choose_columns(columns, area.width)), rows, area, "none yet", notes[: area.height])


def _ago_cell(row: EventRow) -> Cell:
    return ("-" if row.ago_s is None else f"{format_age(row.ago_s)} ago"), DIM


def _event_cell(row: EventRow) -> Cell:
    is_bad = row.event in _BAD_EVENTS
    return (f"▲ {row.event}" if is_bad else f"  {row.event}"), BAD if is_bad else ""
