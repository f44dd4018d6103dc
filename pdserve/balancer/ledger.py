"""The books of the data plane: how many requests went how, and the last 64 of them. Pure.

Every request opened is closed once, so total = inflight + completed + failed + aborted + shed.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from dataclasses import dataclass, field

import msgspec

from pdserve.balancer.request import Route
from pdserve.telemetry import RequestTimeline
from pdserve.types import Pair

NUM_RECENT = 64


class Outcome(enum.StrEnum):
    """How a request ended for its client."""

    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"
    SHED = "shed"


class RequestRecord(msgspec.Struct, eq=False):
    """One request as the state document shows it; filled in as it goes.

    ``pair``, ``room``, ``rid`` are the last attempt's; ``reason`` is why the
    policy chose that pair, put into words when it is read; ``error`` says what went wrong, for the operator.
    """

    route: Route
    timeline: RequestTimeline
    rid: str = ""
    pair: Pair | None = None
    room: int = 0
    is_stream: bool = False
    status: int = 0
    reason: object = ""
    prompt_tokens: int = 0
    finish: str = ""
    error: str = ""

    def render(self) -> dict[str, object]:
        """The row of the state document."""
        timeline = self.timeline
        return {
            "rid": self.rid,
            "pair": self.pair.label if self.pair else "",
            "room": self.room,
            "route": str(self.route),
            "stream": self.is_stream,
            "status": self.status,
            "reason": str(self.reason),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": timeline.completion_tokens,
            "ttft_s": timeline.ttft_s,
            "e2e_s": timeline.e2e_s,
            "tpot_s": timeline.tpot_s,
            "finish": self.finish,
            "error": self.error,
        }


@dataclass(slots=True)
class RequestLedger:
    """Counts and recent rows of all requests."""

    total: int = 0
    inflight: int = 0
    retried: int = 0
    ended: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    recent: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))

    def open(self, route: Route) -> RequestRecord:
        """A request arrived."""
        self.total += 1
        self.inflight += 1
        return RequestRecord(route, RequestTimeline(received_s=time.monotonic()))

    def close(self, record: RequestRecord, outcome: Outcome) -> None:
        """It ended. The first close counts: it comes before the last byte, so a client finds itself."""
        if record.timeline.finished_s is not None:
            return
        record.timeline.finished_s = time.monotonic()
        self.inflight -= 1
        self.ended[outcome] += 1
        if not record.finish:
            record.finish = str(outcome)
        self.recent.append(record)

    def snapshot(self) -> dict[str, object]:
        """``requests`` and ``recent`` (oldest first) of the state document."""
        counts = {str(outcome): number for outcome, number in self.ended.items()}
        return {
            "requests": {
                "total": self.total,
                "inflight": self.inflight,
                **counts,
                "retried": self.retried,
            },
            "recent": [record.render() for record in self.recent],
        }
