"""The last changes of the fleet that an operator cares about, for the state document and the log."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

from pdserve.balancer.fleet.worker import Worker

logger = logging.getLogger(__name__)

NUM_EVENTS = 64


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """One change an operator cares about; ``time_s`` is wall clock."""

    time_s: float
    event: str
    worker: str
    detail: str


class EventLog:
    """Remembers the last ``NUM_EVENTS`` and logs each."""

    def __init__(self) -> None:
        self.events: deque[FleetEvent] = deque(maxlen=NUM_EVENTS)

    def count(self, event: str, worker: Worker, detail: str) -> None:
        """It happened once more: of several in a row to one worker their number and the last detail stay."""
        number, last = 1, self.events[-1] if self.events else None
        if last is not None and (last.event, last.worker) == (event, worker.worker_id):
            number = int(last.detail.partition(" ")[0]) + 1
            self.events.pop()
        self.events.append(FleetEvent(time.time(), event, worker.worker_id, f"{number} {detail}"))

    def note(self, event: str, worker: Worker, detail: str) -> None:
        """Something happened to ``worker``."""
        self.events.append(FleetEvent(time.time(), event, worker.worker_id, detail))
        logger.info("%s worker=%s %s", event, worker.worker_id, detail)
