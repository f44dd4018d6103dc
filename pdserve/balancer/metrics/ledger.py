"""Counts, latencies and the last 64 of all requests. Pure.

Every request opened is closed once, so total = inflight + completed + failed + aborted + shed.
Latencies are taken at the close: stages of every request that reached them, but time per token and
the whole time of completed ones only. Gaps within streams come while they run, by the meter.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from pdserve.balancer.metrics.pairs import PairTraffic
from pdserve.balancer.metrics.record import Outcome, RequestRecord
from pdserve.balancer.metrics.windows import Amounts, LatencyWindow, RollingWindow
from pdserve.balancer.request.request import Route
from pdserve.state.document import RequestCounts
from pdserve.telemetry import RequestTimeline

NUM_RECENT = 64
_OBSERVED = ("ttft_s", "tpot_s", "e2e_s", "queue_s", "prefill_s", "transfer_s")
"""Latencies taken when a request ends, in the order in which ``_observe`` passes them."""


class StreamMeter(msgspec.Struct, eq=False):
    """Counts the events of one request's streams into the rolling figures while they are relayed."""

    rolling: RollingWindow
    gaps: LatencyWindow
    num_events: int = 0

    def passed(self, num_events: int, gap_s: float | None) -> None:
        """So many events more have gone by; ``gap_s`` between two of them, if it was measured."""
        self.num_events += num_events
        self.rolling.live.output_tokens += num_events
        if gap_s is not None:
            self.gaps.observe(gap_s)


@dataclass(slots=True)
class RequestLedger:
    """Counts, latencies and recent rows of all requests. ``clock`` gives seconds that never go back."""

    clock: Callable[[], float] = time.monotonic
    total: int = 0
    inflight: int = 0
    retried: int = 0
    resumed: int = 0
    moved: int = 0
    deflected: int = 0
    """Attempts with a decode worker that prefilled the request itself."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Of requests that ended."""
    counts: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    """Ended requests by route, outcome and whether they streamed."""
    recent: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    traffic: PairTraffic = field(default_factory=PairTraffic)
    rolling: RollingWindow = field(init=False)
    _gaps: LatencyWindow = field(init=False)

    def __post_init__(self) -> None:
        self.rolling = RollingWindow(self.clock())
        self._gaps = self.rolling.latencies["itl_s"]

    def open(self, route: Route) -> RequestRecord:
        """A request arrived."""
        now_s = self.clock()
        if now_s >= self.rolling.end_s:
            self.advance(now_s)
        self.total += 1
        self.inflight += 1
        self.rolling.live.requests += 1
        meter = StreamMeter(self.rolling, self._gaps)
        return RequestRecord(route, RequestTimeline(received_s=now_s, meter=meter))

    def close(self, record: RequestRecord, outcome: Outcome) -> None:
        """The request ended. Only the first call counts.

        It comes before the last byte is sent: a client that has its answer is in the state document.
        """
        timeline = record.timeline
        if timeline.finished_s is not None:
            return
        timeline.finished_s = now_s = self.clock()
        if now_s >= self.rolling.end_s:
            self.advance(now_s)
        self.inflight -= 1
        # By plain strings: hashing a member of an enum costs as much as the rest of this.
        how = outcome._value_
        self.counts[record.route._value_, how, record.is_stream] += 1
        if not record.finish:
            record.finish = how
        self.recent.append(record)
        self._observe(record, outcome, now_s)

    def went_on_after(self, gap_s: float, *, is_moved: bool) -> None:
        """An answer goes on on another pair, after so many seconds without a frame; ``is_moved``: though its
        server had not failed."""
        if is_moved:
            self.moved += 1
        else:
            self.resumed += 1
        self.rolling.latencies["move_gap_s" if is_moved else "resume_gap_s"].observe(gap_s)

    def advance(self, now_s: float) -> None:
        """Close the steps of the rolling figures that are over."""
        if now_s >= self.rolling.end_s:
            self.rolling.advance(now_s)
            self.traffic.mark(now_s)

    def _observe(self, record: RequestRecord, outcome: Outcome, now_s: float) -> None:
        """Add the latencies of the stages that the request reached to their windows."""
        timeline, step = record.timeline, self.rolling.live
        received_s, paired_s, first_s = timeline.received_s, timeline.paired_s, timeline.first_token_s
        whole_s = token_s = prefill_s = transfer_s = None
        if outcome is Outcome.COMPLETED:
            step.completed += 1
            whole_s = now_s - received_s
            if first_s is not None and timeline.completion_tokens > 1:
                token_s = (now_s - first_s) / (timeline.completion_tokens - 1)
            self._count_tokens(record, step)
        elif outcome is Outcome.FAILED:
            step.failed += 1
        if timeline.prefill_done_s is not None:
            prefill_s, transfer_s = timeline.prefill_s, timeline.transfer_s
            if prefill_s is not None and record.pair is not None:
                self.traffic.carried(record.pair, record.prompt_tokens, transfer_s, now_s)
        ttft_s = None if first_s is None else first_s - received_s
        queued_s = None if paired_s is None else paired_s - received_s
        seen = (ttft_s, token_s, whole_s, queued_s, prefill_s, transfer_s)
        for name, seconds in zip(_OBSERVED, seen, strict=True):
            if seconds is not None:
                self.rolling.latencies[name].observe(seconds)

    def _count_tokens(self, record: RequestRecord, step: Amounts) -> None:
        timeline = record.timeline
        tokens, meter = timeline.completion_tokens, timeline.meter
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += tokens
        step.prompt_tokens += record.prompt_tokens
        # What its meter has counted while it ran is there already.
        seen = meter.num_events if isinstance(meter, StreamMeter) else 0
        if tokens > seen:
            step.output_tokens += tokens - seen

    def ended(self, outcome: Outcome) -> int:
        """How many ended with that outcome."""
        return sum(number for (_, how, _), number in self.counts.items() if how == outcome._value_)

    def request_counts(self) -> RequestCounts:
        """Counts since the start."""
        return RequestCounts(
            total=self.total,
            inflight=self.inflight,
            completed=self.ended(Outcome.COMPLETED),
            failed=self.ended(Outcome.FAILED),
            aborted=self.ended(Outcome.ABORTED),
            shed=self.ended(Outcome.SHED),
            retried=self.retried,
            resumed=self.resumed,
            moved=self.moved,
            deflected=self.deflected,
        )
