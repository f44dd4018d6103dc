"""What the user has chosen to look at, and which rows that lists in which order. Pure.

A selection is remembered by the row's key and its place: it follows the row when
the order changes, and stays at the place when the row is gone.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from pdserve.monitor.snapshot import AnyRow, Snapshot, key_of
from pdserve.state.workers import WorkerEntry, WorkerQueues


class Pane(enum.StrEnum):
    """The lists of the screen, in the order in which tab goes through them."""

    WORKERS = "workers"
    PAIRS = "pairs"
    REQUESTS = "requests"
    EVENTS = "events"


ROLES = ("", "prefill", "decode")
"""What the role filter lets through, in the order of its key; empty: everything."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The balancer does not answer. ``since_s`` is wall clock, ``retry_s`` the delay before the next try."""

    since_s: float
    reason: str
    retry_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Selection:
    """The selected row of a pane: its key, and where it stood."""

    key: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True)
class ViewState:
    """Everything ``render`` needs besides the state document. ``now_s`` is the viewer's wall clock.

    ``received_s``: when the document came, None before the first one. ``notes`` are lines of whoever
    runs the monitor (``pdserve launch``), the newest last. ``pinned`` is the row whose details are open,
    as it was then: busy traffic pushes a request out of the document within seconds.
    """

    url: str = ""
    pane: Pane = Pane.WORKERS
    selections: Mapping[Pane, Selection] = field(default_factory=dict)
    sorts: Mapping[Pane, int] = field(default_factory=dict)
    role: str = ""
    is_detailed: bool = False
    is_help: bool = False
    is_paused: bool = False
    is_ascii: bool = False
    is_interactive: bool = True
    scroll: int = 0
    now_s: float = 0.0
    received_s: float | None = None
    lost: Lost | None = None
    notes: Sequence[str] = ()
    pinned: AnyRow | None = None

    def selection(self, pane: Pane) -> Selection:
        """The selection of ``pane``; at first its first row."""
        return self.selections.get(pane, Selection())

    def with_selection(self, key: str, index: int) -> ViewState:
        """Another row of the pane in focus is selected."""
        return replace(self, selections={**self.selections, self.pane: Selection(key, index)})


@dataclass(frozen=True, slots=True)
class Order:
    """One way to sort a pane. ``title`` is the heading of the column it goes by, if there is one."""

    name: str
    title: str
    key: Callable[[Any], Any]


@lru_cache(maxsize=4096)
def _natural(name: str) -> list[tuple[int, int, str]]:
    """``decode-10`` after ``decode-9``."""
    return [
        (1, int(part[:18]), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)
    ]


def _by_name(row: WorkerEntry) -> Any:
    return (row.role != "prefill", _natural(row.worker_id))


def _most(figure: Callable[[Any], float | None]) -> Callable[[Any], float]:
    """Sorts the highest first and what is not known last."""

    def key(row: Any) -> float:
        value = figure(row)
        return float("inf") if value is None else -value

    return key


def _queued(queues: WorkerQueues | None) -> int:
    """Requests that hold a place in a queue but do not run."""
    if queues is None:
        return 0
    waiting = queues.bootstrap + queues.prealloc + queues.waiting
    return waiting + queues.inflight_or_transfer + queues.retracted


def _as_listed(row: object) -> int:
    return 0


ORDERS: dict[Pane, tuple[Order, ...]] = {
    Pane.WORKERS: (
        Order("name", "worker", _by_name),
        Order("trouble", "state", lambda row: (not row.is_troubled, row.state == "ready", -row.errors)),
        Order("KV use", "KV used", _most(lambda row: row.kv_usage)),
        Order("tok/s", "tok/s", _most(lambda row: row.tokens_s)),
        Order("queued", "wait", _most(lambda row: _queued(row.queues))),
        Order("running", "run", _most(lambda row: row.queues.running if row.queues else None)),
        Order("in flight", "infl", _most(lambda row: row.inflight)),
        Order("errors", "err", _most(lambda row: row.errors)),
        Order("youngest", "age", lambda row: float("inf") if row.age_s is None else row.age_s),
    ),
    Pane.PAIRS: (
        Order("name", "pair", lambda row: (_natural(row.prefill), _natural(row.decode))),
        Order("KV rate", "KV rate", _most(lambda row: row.kv_bytes_s)),
        Order("transfer", "transfer", _most(lambda row: row.transfer_p50_s)),
        Order("requests", "reqs", _most(lambda row: row.requests)),
    ),
    Pane.REQUESTS: (
        Order("newest", "", _as_listed),
        Order("first token", "first tok", _most(lambda row: row.first_token_s)),
        Order("done", "done", _most(lambda row: row.done_s)),
        Order("transfer", "transfer", _most(lambda row: row.transfer_s)),
        Order("trouble", "ended", lambda row: row.is_good),
    ),
    Pane.EVENTS: (
        Order("newest", "", _as_listed),
        Order("worker", "worker", lambda row: _natural(row.worker)),
    ),
}


def order_of(view: ViewState, pane: Pane) -> Order:
    """How ``pane`` is sorted."""
    orders = ORDERS[pane]
    return orders[view.sorts.get(pane, 0) % len(orders)]


def listed(snapshot: Snapshot, view: ViewState, pane: Pane) -> list[Any]:
    """The rows of ``pane`` in their order; the role filter holds for workers and events of workers."""
    order = order_of(view, pane)
    made = (pane, order.name, view.role)
    if made not in snapshot.listed:
        snapshot.listed[made] = sorted(_passed(snapshot, view.role, pane), key=order.key)
    return snapshot.listed[made]


def _passed(snapshot: Snapshot, role: str, pane: Pane) -> Sequence[AnyRow]:
    match pane:
        case Pane.WORKERS:
            return [row for row in snapshot.state.workers if role in ("", row.role)]
        case Pane.PAIRS:
            return snapshot.state.pairs
        case Pane.REQUESTS:
            return snapshot.requests
    names = {row.worker_id for row in snapshot.state.workers if row.role == role}
    return [row for row in snapshot.events if not role or row.worker in names or row.worker.startswith(role)]


def selected_index(rows: Sequence[AnyRow], view: ViewState, pane: Pane) -> int:
    """Where the selected row stands in ``rows``; 0 if there are none."""
    selection = view.selection(pane)
    if selection.key:
        for index, row in enumerate(rows):
            if key_of(row) == selection.key:
                return index
    return max(0, min(selection.index, len(rows) - 1))


def selected_row(snapshot: Snapshot, view: ViewState, pane: Pane) -> AnyRow | None:
    """The selected row of ``pane``, None if it is empty."""
    rows: list[AnyRow] = listed(snapshot, view, pane)
    return rows[selected_index(rows, view, pane)] if rows else None


def detailed_row(snapshot: Snapshot, view: ViewState) -> tuple[AnyRow | None, bool]:
    """The row whose details are open, and whether it is still in the document."""
    rows: Mapping[Pane, Sequence[AnyRow]] = {
        Pane.WORKERS: snapshot.state.workers,
        Pane.PAIRS: snapshot.state.pairs,
        Pane.REQUESTS: snapshot.requests,
        Pane.EVENTS: snapshot.events,
    }
    if view.pinned is None:
        return selected_row(snapshot, view, view.pane), True
    key = key_of(view.pinned)
    found = next((row for row in rows[view.pane] if key_of(row) == key), None)
    return (view.pinned, False) if found is None else (found, True)
