"""Virtual time: what happens next, and one request on its way through the servers."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from pdserve.workload import TracedRequest

if TYPE_CHECKING:
    from pdserve.scheduling.queue import Waiter
    from pdserve.scheduling.reservation import Reservation
    from pdserve.types import RequestShape


class Clock:
    """A heap of what is to happen. What falls on one moment happens in the order in which it was planned."""

    __slots__ = ("_heap", "_turn", "now_s", "num_events")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._turn = 0

    def time(self) -> float:
        """Seconds since the start: the clock given to the balancer's objects."""
        return self.now_s

    def at(self, when_s: float, act: Callable[[Any], None], subject: Any = None) -> None:
        """Call ``act(subject)`` at that time, or now if it is past."""
        self._turn += 1
        heappush(self._heap, (when_s, self._turn, act, subject))

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap = self._heap
        while heap:
            when_s, _, act, subject = heappop(heap)
            if when_s > self.now_s:
                self.now_s = when_s
            self.num_events += 1
            act(subject)


class SimRequest:
    """A request in flight: what it is, where it went and when. Times are -1 until they are known.

    ``prompt_tokens`` in, ``output_tokens`` out of which ``num_generated`` are there. ``cached_tokens`` were
    in prefill's cache, ``decode_cached_tokens`` in decode's. ``sent_tokens`` of the prompt have
    been handed to the link, ``done_tokens`` computed or matched.
    """

    __slots__ = (
        "arrival_s",
        "block_ids",
        "block_tokens",
        "cached_tokens",
        "decode",
        "decode_cached_tokens",
        "done_tokens",
        "error",
        "finish_step",
        "finished_s",
        "first_token_s",
        "index",
        "kv_ready_s",
        "num_generated",
        "num_retracted",
        "output_tokens",
        "paired_s",
        "pins",
        "prefill",
        "prefill_end_s",
        "prompt_tokens",
        "reservation",
        "sent_tokens",
        "shape",
        "traced",
        "waiter",
        "waiting_tokens",
    )

    def __init__(self, index: int, traced: TracedRequest, shape: RequestShape) -> None:
        self.index = index
        self.traced = traced
        self.shape = shape
        self.arrival_s = traced.arrival_s
        self.prompt_tokens = traced.input_tokens
        self.output_tokens = traced.output_tokens
        self.block_ids = traced.block_ids or ()
        self.block_tokens = traced.block_tokens
        self.error = ""
        self.paired_s = self.prefill_end_s = -1.0
        self.kv_ready_s = self.first_token_s = self.finished_s = -1.0
        self.cached_tokens = self.decode_cached_tokens = 0
        self.done_tokens = self.sent_tokens = self.waiting_tokens = 0
        self.num_generated = self.finish_step = self.num_retracted = 0
        self.prefill = self.decode = -1
        self.pins: list[tuple[int, ...]] = [(), ()]
        self.reservation: Reservation | None = None
        self.waiter: Waiter | None = None
