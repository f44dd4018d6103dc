"""What an answer that passes by tells: tokens, finish reason, a failure in its first event. Pure.

Streams are not parsed on their way; only counted, and their end is looked at.
"""

from __future__ import annotations

import re
import time
from itertools import count
from typing import Any

import msgspec

from pdserve.http.sse import EVENT_END, event_data
from pdserve.telemetry import TokenMeter

TAIL_BYTES = 16384
"""meta_info and usage come last in an event; /generate repeats all text before them."""

SAMPLING = 8
"""A clock read and a bisection for each event would cost more than relaying it."""
END = b"[DONE]\n\n"
"""Of a stream's last event, which is no token."""
_SAMPLED = SAMPLING - 2
_STREAMS = count()

_FINISH = re.compile(rb'"finish_reason":\s*(?:\{"type":\s*)?"(\w+)"')
_COMPLETION = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT = re.compile(rb'"prompt_tokens":\s*(\d+)')


class Usage(msgspec.Struct, frozen=True):
    """What was counted. ``finish`` is SGLang's word: stop, length, abort; empty if it said none."""

    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int = 0


class StreamTally:
    """Counts a stream's events as its chunks pass by.

    ``meter`` hears of every ``SAMPLING``-th gap between two events, and of the events so far. Which ones
    is staggered from stream to stream (``phase``), so that of many streams every place is heard alike.
    """

    __slots__ = ("_gap_at", "_gap_since_s", "_meter", "_num_events", "_phase", "_tail", "_told")

    def __init__(self, meter: TokenMeter | None = None, phase: int | None = None) -> None:
        self._phase = (next(_STREAMS) if phase is None else phase) % SAMPLING
        self._num_events = self._phase
        self._told = self._phase
        self._tail = b""
        self._meter = meter
        self._gap_at = -1
        self._gap_since_s = 0.0

    def add(self, chunk: bytes) -> None:
        """Count one chunk. Events end in an empty line, which JSON text cannot contain."""
        self._num_events = num_events = self._num_events + chunk.count(b"\n\n")
        if not num_events & _SAMPLED:
            self._measure(chunk)
        if len(chunk) >= 512:  # long enough to hold a whole last event but for its text
            self._tail = chunk
        else:
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]

    def usage(self) -> Usage:
        """After the end of the stream; without SGLang's own count each event counts as a token."""
        return _usage_of(self._tail[-TAIL_BYTES:], max(0, self._num_events - self._phase - 1))

    def _measure(self, chunk: bytes) -> None:
        """Called at two events in a row of every ``SAMPLING``: between them lies a gap."""
        meter, num_events = self._meter, self._num_events
        if meter is None or chunk.endswith(END):
            return
        now_s, gap_s = time.monotonic(), None
        if self._gap_at == num_events - 1 and chunk.count(b"\n\n") == 1:
            gap_s = now_s - self._gap_since_s
        self._gap_at, self._gap_since_s = num_events, now_s
        meter.passed(num_events - self._told, gap_s)
        self._told = num_events


class _Reason(msgspec.Struct):
    type: str = ""


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: _Reason | None = None


class _Item(msgspec.Struct):
    meta_info: _Counts | None = None
    usage: _Counts | None = None
    choices: list[_Choice] = []


_ITEMS = msgspec.json.Decoder(_Item | list[_Item])


def usage_of_body(body: bytes) -> Usage:
    """Read a whole answer; sums over a batch. Only what is counted is decoded."""
    try:
        document = _ITEMS.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Usage()
    if isinstance(document, _Item):
        return _usage_of_item(document)
    usages = [_usage_of_item(item) for item in document]
    if not usages:
        return Usage()
    prompt = sum(usage.prompt_tokens or 0 for usage in usages)
    return Usage(usages[-1].finish, prompt, sum(usage.completion_tokens for usage in usages))


def stream_failure(chunk: bytes) -> tuple[int, str] | None:
    """(status, message) if the first event of a 200 stream is the worker's own failure, else None.

    SGLang ends a stream so when a request fails on the server's side (a KV
    transfer that broke): /generate by finish_reason abort with a status_code,
    OpenAI routes by an ``error`` event. An abort without status_code was asked for.
    """
    if b'"abort"' not in chunk and b'"error"' not in chunk:
        return None
    try:
        document = msgspec.json.decode(event_data(chunk.partition(EVENT_END)[0]))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not isinstance(document, dict):
        return None
    reason = _dict(_dict(document.get("meta_info")).get("finish_reason"))
    error = _dict(document.get("error"))
    status = reason.get("status_code") if reason.get("type") == "abort" else error.get("code")
    if not isinstance(status, int) or not 400 <= status < 600:
        return None
    return status, str(reason.get("message") or error.get("message") or "aborted")


def _usage_of(text: bytes, num_events: int) -> Usage:
    finish, completion, prompt = (pattern.findall(text) for pattern in (_FINISH, _COMPLETION, _PROMPT))
    return Usage(
        finish=finish[-1].decode() if finish else "",
        prompt_tokens=int(prompt[-1]) if prompt else None,
        completion_tokens=int(completion[-1]) if completion else num_events,
    )


def _usage_of_item(item: _Item) -> Usage:
    counts = item.meta_info or item.usage
    if counts is None:
        return Usage()
    finish = (item.choices[0].finish_reason or "") if item.choices else ""
    if counts.finish_reason is not None:
        finish = counts.finish_reason.type
    return Usage(finish, counts.prompt_tokens or 0, counts.completion_tokens or 0)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
