"""The rows of a state document as the lists show them. Pure.

Workers, pairs and requests are the document's own structs; events are those of the fleet and of the regime.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pdserve.state.document import EventEntry, RegimeChange, RequestEntry, StateDocument
from pdserve.state.workers import PairEntry, WorkerEntry


@dataclass(frozen=True)
class EventRow:
    """One change of the fleet; ``ago_s`` before the document was made."""

    key: str
    ago_s: float | None
    event: str
    worker: str
    detail: str


AnyRow = WorkerEntry | PairEntry | RequestEntry | EventRow


def key_of(row: AnyRow) -> str:
    """What a row is found again by in the next document."""
    match row:
        case WorkerEntry():
            return row.instance_id or row.worker_id
        case PairEntry():
            return row.label
        case RequestEntry():
            return row.rid or f"room {row.room}"
    return row.key


class Snapshot:
    """One state document and the rows made from it. ``now_s``: wall clock, for a document without one."""

    def __init__(self, state: StateDocument, now_s: float | None = None) -> None:
        self.state = state
        self.listed: dict[object, list[Any]] = {}
        """Sorted and filtered rows, kept by whoever made them: a frame needs them more than once."""
        self.now_s = state.now_s or now_s

    @cached_property
    def pair_roles(self) -> tuple[list[str], list[str]]:
        """The prefill and the decode workers that pairs name."""
        pairs = self.state.pairs
        return list({pair.prefill: None for pair in pairs}), list({pair.decode: None for pair in pairs})

    @cached_property
    def requests(self) -> list[RequestEntry]:
        """The newest first."""
        return self.state.recent[::-1]

    @cached_property
    def events(self) -> list[EventRow]:
        """Changes of the fleet and of the regime, the newest first."""
        regime = self.state.regime
        found = [_event(event, self.now_s) for event in self.state.events]
        found += [_regime_change(change) for change in (regime.changes if regime else ())]
        found.reverse()
        return sorted(found, key=lambda row: float("inf") if row.ago_s is None else row.ago_s)


def _event(event: EventEntry, now_s: float | None) -> EventRow:
    key = f"{event.time_s}/{event.event}/{event.worker}"
    ago_s = None if now_s is None else max(0.0, now_s - event.time_s)
    return EventRow(key, ago_s, event.event, event.worker, event.detail)


def _regime_change(change: RegimeChange) -> EventRow:
    scores = f"prefill score {change.prefill_score:.2f}, decode score {change.decode_score:.2f}"
    key = f"regime/{change.from_}/{change.to}/{scores}"
    return EventRow(key, change.ago_s, "regime", "", f"{change.from_} → {change.to} ({scores})")
