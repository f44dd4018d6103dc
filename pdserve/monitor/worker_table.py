"""The list of workers: state, queues, KV pool, speed, breaker; sums by role where not all are shown. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import structs

from pdserve.monitor.figures import bar, format_age, format_percent, format_rate, format_short
from pdserve.monitor.lines import Cell, Column, Table, choose_columns, fit, longest
from pdserve.monitor.listing import Area, Shown, body
from pdserve.monitor.panels import BAD, DIM, GOOD, WARN
from pdserve.state.problems import KV_FULL
from pdserve.state.workers import WorkerEntry, WorkerQueues

_WORKER_STATES = {
    "ready": ("●", "ready", ""),
    "joining": ("○", "joining", WARN),
    "suspect": ("▲", "suspect", BAD),
    "paused": ("▽", "paused", WARN),
    "draining": ("▽", "drain", WARN),
    "leaving": ("▽", "leaving", WARN),
}
_BREAKERS = {"closed": ("ok", ""), "open": ("open", BAD), "half_open": ("half", WARN)}


def _state_cell(row: WorkerEntry) -> Cell:
    if not row.instance_id:  # the sum of a role
        return row.state, ""
    state = row.condition
    symbol, word, style = _WORKER_STATES.get(state, ("?", state or "-", DIM))
    return f"{symbol} {word}", style


def _kv_cell(width: int) -> Callable[[WorkerEntry], Cell]:
    def cell(row: WorkerEntry) -> Cell:
        style = WARN if (row.kv_usage or 0.0) >= KV_FULL else GOOD
        return bar(row.kv_usage, width) + fit(format_percent(row.kv_usage), 5, is_right=True), style

    return cell


def _breaker_cell(row: WorkerEntry) -> Cell:
    return _BREAKERS.get(row.breaker, (row.breaker or "-", ""))


def _length_cell(value: int | None) -> Cell:
    """A number of requests; 0 is dim, so that other figures stand out."""
    return format_short(value), "" if value else DIM


def _queue(
    title: str, width: int, length: Callable[[WorkerQueues], int], role: str = "", rank: int = 0
) -> Column[WorkerEntry]:
    """A column of one queue's lengths; unknown for workers of another role than ``role``."""

    def cell(row: WorkerEntry) -> Cell:
        is_known = row.queues is not None and role in ("", row.role)
        return _length_cell(length(row.queues) if row.queues is not None and is_known else None)

    return Column(title, width, cell, rank=rank)


def _errors_cell(row: WorkerEntry) -> Cell:
    return format_short(row.errors), WARN if row.errors else DIM


def _worker_columns(area: Area, name_width: int) -> list[Column[WorkerEntry]]:
    is_wide = area.is_wide
    boot = [_queue("boot", 4, lambda q: q.bootstrap + q.prealloc)]  # a worker has one of the two
    if is_wide:
        boot = [
            _queue("boot", 5, lambda q: q.bootstrap, "prefill"),
            _queue("preall", 6, lambda q: q.prealloc, "decode"),
        ]
    extra = 1 if is_wide else 0
    role: Column[WorkerEntry] = Column("P/D", 3, lambda r: r.role[:1].upper(), is_right=False)
    if is_wide:
        role = Column("role", 7, lambda r: r.role, is_right=False)
    bar_width = 3 if not is_wide else 5 if area.width < 112 else 10
    return [
        Column("worker", 9, lambda r: r.worker_id, is_right=False, most=name_width),
        role,
        Column("state", 9, _state_cell, is_right=False),
        Column("age", 5, lambda r: format_age(r.age_s), rank=4),
        *boot,
        _queue("wait", 4 + extra, lambda q: q.waiting),
        _queue("xfer", 4 + extra, lambda q: q.inflight_or_transfer),
        _queue("run", 4 + extra, lambda q: q.running),
        *([_queue("retr", 5, lambda q: q.retracted, rank=6)] if is_wide else []),
        Column("KV used", bar_width + 5, _kv_cell(bar_width)),
        Column("tok/s", 5 + extra, lambda r: format_rate(r.tokens_s)),
        Column("infl", 4 + extra, lambda r: _length_cell(r.inflight), rank=2),
        Column("brk", 4, _breaker_cell, rank=3, is_right=False),
        Column("err", 4, _errors_cell, rank=1),
    ]


def worker_lines(rows: Sequence[WorkerEntry], area: Area) -> Shown:
    """Heading and rows; above a part of a long list stands each role's sum."""
    name_width = longest((row.worker_id for row in rows), 28)
    columns = choose_columns(_worker_columns(area, name_width), area.width)
    table = Table(columns, area.sorted_by)
    above = [table.heading()]
    if len(rows) + 1 > area.height >= 6:
        roles = [role for role in ("prefill", "decode") if _of(role, rows)]
        above += [table.row(_sum_of(role, rows), style="bold") for role in roles]
    return body(table, rows, area, "none has joined yet", above)


def _of(role: str, rows: Sequence[WorkerEntry]) -> list[WorkerEntry]:
    return [row for row in rows if row.role == role]


def _sum_of(role: str, rows: Sequence[WorkerEntry]) -> WorkerEntry:
    """All workers of a role as one row: sums, and the mean of KV usage."""
    own = _of(role, rows)
    ready = sum(row.state == "ready" for row in own)

    usages = [row.kv_usage for row in own if row.kv_usage is not None]
    speeds = [row.tokens_s for row in own if row.tokens_s is not None]
    queues = [structs.astuple(row.queues) for row in own if row.queues is not None]
    return WorkerEntry(
        worker_id=f"all {len(own)}",
        role=role,
        state=f"{ready} ready",
        queues=_summed(queues) if queues else None,
        kv_usage=sum(usages) / len(usages) if usages else None,
        tokens_s=sum(speeds) if speeds else None,
        inflight=sum(row.inflight for row in own),
        errors=sum(row.errors for row in own),
    )


def _summed(queues: Sequence[tuple[int, ...]]) -> WorkerQueues:
    sums = map(sum, zip(*queues, strict=True))
    return WorkerQueues(**dict(zip(WorkerQueues.__struct_fields__, sums, strict=True)))
