"""The list of workers: state, queues, KV pool, speed, breaker; sums by role where not all are shown. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pdserve.monitor.figures import bar, format_age, format_percent, format_rate, format_short
from pdserve.monitor.lines import Cell, Column, Table, choose_columns, fit, longest
from pdserve.monitor.listing import Area, Shown, body
from pdserve.monitor.panels import BAD, DIM, GOOD, KV_FULL, WARN
from pdserve.monitor.snapshot import WorkerRow

_WORKER_STATES = {
    "ready": ("●", "ready", ""),
    "joining": ("○", "joining", WARN),
    "suspect": ("▲", "suspect", BAD),
    "draining": ("▽", "drain", WARN),
    "leaving": ("▽", "leaving", WARN),
}
_BREAKERS = {"closed": ("ok", ""), "open": ("open", BAD), "half_open": ("half", WARN)}


def _state_cell(row: WorkerRow) -> Cell:
    if not row.key:  # the sum of a role
        return row.state, ""
    symbol, word, style = _WORKER_STATES.get(row.state, ("?", row.state or "-", DIM))
    return f"{symbol} {word}", style


def _kv_cell(width: int) -> Callable[[WorkerRow], Cell]:
    def cell(row: WorkerRow) -> Cell:
        style = WARN if (row.kv_usage or 0.0) >= KV_FULL else GOOD
        return bar(row.kv_usage, width) + fit(format_percent(row.kv_usage), 5, is_right=True), style

    return cell


def _breaker_cell(row: WorkerRow) -> Cell:
    return _BREAKERS.get(row.breaker, (row.breaker or "-", ""))


def _queue_cell(figure: Callable[[WorkerRow], float | None]) -> Callable[[WorkerRow], Cell]:
    """A queue's length; an empty one is dim, so that the full ones stand out."""

    def cell(row: WorkerRow) -> Cell:
        value = figure(row)
        return format_short(value), "" if value else DIM

    return cell


def _errors_cell(row: WorkerRow) -> Cell:
    return format_short(row.errors), WARN if row.errors else DIM


def _worker_columns(area: Area, name_width: int) -> list[Column[WorkerRow]]:
    is_wide = area.is_wide
    entry: list[Column[WorkerRow]] = [Column("boot", 4, _queue_cell(lambda r: r.entry))]
    if is_wide:
        entry = [
            Column("boot", 5, _queue_cell(lambda r: r.bootstrap)),
            Column("preall", 6, _queue_cell(lambda r: r.prealloc)),
        ]
    extra = 1 if is_wide else 0
    role: Column[WorkerRow] = Column("P/D", 3, lambda r: r.role[:1].upper(), is_right=False)
    if is_wide:
        role = Column("role", 7, lambda r: r.role, is_right=False)
    bar_width = 3 if not is_wide else 5 if area.width < 112 else 10
    return [
        Column("worker", 9, lambda r: r.name, is_right=False, most=name_width),
        role,
        Column("state", 9, _state_cell, is_right=False),
        Column("age", 5, lambda r: format_age(r.age_s), rank=4),
        *entry,
        Column("wait", 4 + extra, _queue_cell(lambda r: r.waiting)),
        Column("xfer", 4 + extra, _queue_cell(lambda r: r.transfer)),
        Column("run", 4 + extra, _queue_cell(lambda r: r.running)),
        *([Column("retr", 5, _queue_cell(lambda r: r.retracted), rank=6)] if is_wide else []),
        Column("KV used", bar_width + 5, _kv_cell(bar_width)),
        Column("tok/s", 5 + extra, lambda r: format_rate(r.tokens_s)),
        Column("infl", 4 + extra, _queue_cell(lambda r: r.inflight), rank=2),
        Column("brk", 4, _breaker_cell, rank=3, is_right=False),
        Column("err", 4, _errors_cell, rank=1),
    ]


def worker_lines(rows: Sequence[WorkerRow], area: Area) -> Shown:
    """Heading and rows; above a part of a long list stands each role's sum."""
    name_width = longest((row.name for row in rows), 28)
    columns = choose_columns(_worker_columns(area, name_width), area.width)
    table = Table(columns, area.sorted_by)
    above = [table.heading()]
    if len(rows) + 1 > area.height >= 6:
        roles = [role for role in ("prefill", "decode") if _of(role, rows)]
        above += [table.row(_sum_of(role, rows), style="bold") for role in roles]
    return body(table, rows, area, "none has joined yet", above)


def _of(role: str, rows: Sequence[WorkerRow]) -> list[WorkerRow]:
    return [row for row in rows if row.role == role]


def _sum_of(role: str, rows: Sequence[WorkerRow]) -> WorkerRow:
    """All workers of a role as one row: sums, and the mean of KV usage."""
    own = _of(role, rows)
    ready = sum(row.state == "ready" for row in own)

    def total(figure: Callable[[WorkerRow], float | None]) -> Any:
        known = [value for row in own if (value := figure(row)) is not None]
        return sum(known) if known else None

    usage = total(lambda r: r.kv_usage)
    known_usage = sum(row.kv_usage is not None for row in own)
    return WorkerRow(
        key="", name=f"all {len(own)}", role=role, state=f"{ready} ready", age_s=None,
        bootstrap=total(lambda r: r.bootstrap), prealloc=total(lambda r: r.prealloc),
        waiting=total(lambda r: r.waiting), transfer=total(lambda r: r.transfer),
        running=total(lambda r: r.running), retracted=total(lambda r: r.retracted),
        kv_usage=usage / known_usage if known_usage else None, tokens_s=total(lambda r: r.tokens_s),
        inflight=total(lambda r: r.inflight), breaker="", errors=total(lambda r: r.errors),
        last_error="", source={},
    )  # fmt: skip
