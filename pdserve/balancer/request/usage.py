"""What an answer that passes by comes to: tokens, finish reason, a failure. Pure.

Streams are not parsed on their way: their events are counted, the last ones kept, and read at the end.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from itertools import count, islice

import msgspec

from pdserve.balancer.request.events import Failure, Said, joined, said_in
from pdserve.balancer.request.request import Route
from pdserve.http.sse import EVENT_END, event_data, split_events
from pdserve.telemetry import TokenMeter

SAMPLING = 8
"""A clock read and a bisection for each event would cost more than relaying it."""
_SAMPLED = SAMPLING - 2
_STREAMS = count()

LONG_BYTES = 16384
"""Of a longer chunk only the last events are kept, except where one event may be as long."""

MAX_READ = 16
"""Events that are read, at most, to find how an answer ended."""

_NATIVE = (b'"meta_info"', 2, True)
_CHOICES = (b'"choices"', 8, False)
_DIALECTS: dict[Route, tuple[bytes, int, bool]] = {
    Route.GENERATE: _NATIVE,
    Route.VERTEX: _NATIVE,
    Route.CHAT: _CHOICES,
    Route.INVOCATIONS: _CHOICES,
    Route.COMPLETIONS: _CHOICES,
    Route.MESSAGES: (b'"content_block_delta"', 4, False),
    Route.RESPONSES: (b'.delta"', 2, True),
}
"""What occurs once in each event that carries tokens; in how many chunks, at most, an answer ends (reason,
SGLang's extras, usage, the end's mark); whether its last event repeats all text. Quotes within text are
escaped, so no text has the marks."""

_ENDS = re.compile(rb'"finish_reason":\s*[{"]|"error"')
_LAST = (
    b"event: message_stop", b"event: response.completed", b"event: response.incomplete",
    b"event: response.failed",
)  # fmt: skip
_SEQUENCE = re.compile(rb'"sequence_number":\s*(\d+)')


class Usage(msgspec.Struct, frozen=True):
    """What was counted. ``finish`` is SGLang's word: stop, length, tool_calls, abort; empty if it said none.

    ``failure`` is what the worker itself reported within its 200 answer.
    """

    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    failure: Failure | None = None

    @property
    def is_cut(self) -> bool:
        """True if the answer would have been longer."""
        return self.failure is not None or self.finish in ("length", "abort")


class StreamTally:
    """Counts a stream's events as its chunks, each of whole events, pass by.

    ``meter`` hears of every ``SAMPLING``-th gap between two events, and of the events so far. Which ones
    is staggered from stream to stream (``phase``), so that of many streams every place is heard alike.
    ``prompt_tokens`` is what the stream said of them at its begin.
    """

    __slots__ = (
        "_gap_at",
        "_gap_since_s",
        "_is_long",
        "_kept",
        "_mark",
        "_meter",
        "_num_events",
        "_phase",
        "_told",
        "prompt_tokens",
    )

    def __init__(self, route: Route, meter: TokenMeter | None = None, phase: int | None = None) -> None:
        self.prompt_tokens: int | None = None
        self._phase = (next(_STREAMS) if phase is None else phase) % SAMPLING
        self._num_events = self._phase
        self._told = self._phase
        self._mark, num_kept, self._is_long = _DIALECTS[route]
        self._kept: deque[bytes] = deque(maxlen=num_kept)
        self._meter = meter
        self._gap_at = -1
        self._gap_since_s = 0.0

    def add(self, chunk: bytes) -> None:
        """Count one chunk."""
        self._num_events = num_events = self._num_events + chunk.count(self._mark)
        if not num_events & _SAMPLED:
            self._measure(chunk)
        if len(chunk) > LONG_BYTES and not self._is_long:
            chunk = EVENT_END.join(chunk.rsplit(EVENT_END, MAX_READ + 1)[-MAX_READ - 1 :])
        self._kept.append(chunk)

    def usage(self) -> Usage:
        """After the end of the stream; without SGLang's own count each event counts as a token."""
        found = Said()
        for said in self._last_said():
            found = Said(
                said.finish, found.prompt_tokens or said.prompt_tokens,
                said.completion_tokens if found.completion_tokens is None else found.completion_tokens,
                said.failure,
            )  # fmt: skip
            if found.finish or found.failure is not None:
                break
        num_events = self._num_events - self._phase
        tokens = num_events if found.completion_tokens is None else found.completion_tokens
        return Usage(found.finish, found.prompt_tokens or self.prompt_tokens, tokens, found.failure)

    @property
    def has_end(self) -> bool:
        """True if the last event is the one with which streams of this dialect end."""
        if not self._kept:
            return False
        events = split_events(self._kept[-1])
        return bool(events) and (event_data(events[-1]) == b"[DONE]" or events[-1].startswith(_LAST))

    @property
    def next_sequence_number(self) -> int:
        """The ``sequence_number`` of an event that follows; 0 if no event had one."""
        for chunk in reversed(self._kept):
            if numbers := _SEQUENCE.findall(chunk):
                return int(numbers[-1]) + 1
        return 0

    def _last_said(self) -> Iterator[Said]:
        """What the kept events say, the last one first."""
        events = reversed(split_events(b"".join(self._kept)))
        return (said_in(event_data(event)) for event in islice(events, MAX_READ))

    def _measure(self, chunk: bytes) -> None:
        """Called at two events in a row of every ``SAMPLING``: between them lies a gap."""
        meter, num_events = self._meter, self._num_events
        num_new = chunk.count(self._mark)
        if meter is None or not num_new:
            return
        now_s, gap_s = time.monotonic(), None
        if self._gap_at == num_events - 1 and num_new == 1:
            gap_s = now_s - self._gap_since_s
        self._gap_at, self._gap_since_s = num_events, now_s
        meter.passed(num_events - self._told, gap_s)
        self._told = num_events


class BatchTally(StreamTally):
    """The same for a batch, whose prompts end one by one: what each said last is read as it passes."""

    __slots__ = ("_ended",)

    def __init__(self, route: Route, meter: TokenMeter | None = None) -> None:
        super().__init__(route, meter)
        self._ended: dict[int, Said] = {}

    def add(self, chunk: bytes) -> None:
        """Count one chunk, and read the ends in it."""
        super().add(chunk)
        if not _ENDS.search(chunk):
            return
        for event in split_events(chunk):
            if _ENDS.search(event):
                said = said_in(event_data(event))
                self._ended[said.index] = said

    def usage(self) -> Usage:
        """After the end of the stream, over all prompts."""
        last, ends = super().usage(), joined(self._ended.values())
        if any(said.completion_tokens is None for said in self._ended.values()) or not self._ended:
            tokens, prompt_tokens = last.completion_tokens, last.prompt_tokens
        else:
            tokens, prompt_tokens = ends.completion_tokens or 0, ends.prompt_tokens
        return Usage(ends.finish or last.finish, prompt_tokens, tokens, ends.failure or last.failure)


def usage_of_body(body: bytes) -> Usage:
    """Read a whole answer; sums over a batch."""
    said = said_in(body)
    return Usage(said.finish, said.prompt_tokens, said.completion_tokens or 0, said.failure)
