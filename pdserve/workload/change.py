"""What is done to a trace before it is replayed. Each function returns a new list; draws repeat by seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from pdserve.errors import ConfigError
from pdserve.workload.request import TracedRequest

_COPY = 2**40
_SECOND = 2**56
"""What is added to block ids of a trace's copy, or of a second trace: so they share no prefix."""


def from_zero(requests: Iterable[TracedRequest]) -> list[TracedRequest]:
    """In order of arrival, the first at 0 s; there must be one."""
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    start_s = ordered[0].arrival_s
    if start_s == 0:
        return ordered
    return [replace(request, arrival_s=request.arrival_s - start_s) for request in ordered]


def rate_of(trace: Sequence[TracedRequest]) -> float:
    """Mean arrivals per second; 0 for fewer than two requests or if all come at once."""
    span_s = trace[-1].arrival_s - trace[0].arrival_s if trace else 0.0
    return (len(trace) - 1) / span_s if span_s > 0 else 0.0


def scaled(trace: Sequence[TracedRequest], rate: float) -> list[TracedRequest]:
    """The same requests with the gaps stretched or shrunk so that ``rate`` come per second on average.

    Raises:
        ConfigError: for a rate that is not positive.
    """
    if not rate > 0:
        raise ConfigError(f"rate: expected a positive number of requests per second, got {rate}")
    factor = rate_of(trace) / rate
    return [replace(request, arrival_s=request.arrival_s * factor) for request in trace]


def spread(trace: Sequence[TracedRequest], seed: int) -> list[TracedRequest]:
    """Spread requests of one time stamp evenly at random over the gap to the next stamp.

    Mooncake's stamps step by about 3 s: replayed as they are they come in bursts that no
    user sent. The order of requests is kept.
    """
    draw = random.Random(seed)
    stamps = sorted({request.arrival_s for request in trace})
    if len(stamps) < 2:
        return list(trace)
    gap = {left: right - left for left, right in pairwise(stamps)}
    gap[stamps[-1]] = sorted(gap.values())[len(gap) // 2]
    shares: dict[float, list[float]] = {}
    for request in trace:
        shares.setdefault(request.arrival_s, []).append(draw.random())
    turns = {stamp: iter(sorted(values)) for stamp, values in shares.items()}
    return [
        replace(
            request, arrival_s=request.arrival_s + next(turns[request.arrival_s]) * gap[request.arrival_s]
        )
        for request in trace
    ]


def cut(
    trace: Sequence[TracedRequest], *, requests: int | None = None, seconds: float | None = None
) -> list[TracedRequest]:
    """The first so many requests, or those of the first so many seconds, or whichever is fewer."""
    kept = trace if requests is None else trace[:requests]
    return [request for request in kept if seconds is None or request.arrival_s <= seconds]


def rearrived(trace: Sequence[TracedRequest], rate: float, seed: int, cv: float = 1.0) -> list[TracedRequest]:
    """The same requests in the same order at new arrival times: gamma gaps of that coefficient of
    variation, 1 being Poisson. What one seed's run differs in from another's."""
    draw = random.Random(seed)
    at_s, shape, arrived = 0.0, 1.0 / (cv * cv), []
    for request in trace:
        arrived.append(replace(request, arrival_s=at_s))
        at_s += draw.gammavariate(shape, 1.0 / (shape * rate))
    return arrived


def sampled(trace: Sequence[TracedRequest], count: int, seed: int) -> list[TracedRequest]:
    """A run of ``count`` consecutive requests that begins at a place drawn by ``seed``.

    Consecutive, because neighbours share prefixes and come in bursts. At the trace's end it
    goes on from the beginning, with prefixes nobody has seen.
    """
    start = random.Random(seed).randrange(len(trace))
    rate = rate_of(trace)
    lap_s = trace[-1].arrival_s + (1.0 / rate if rate else 1.0)
    picked = []
    for index in range(start, start + count):
        lap, place = divmod(index, len(trace))
        picked.append(_copy(trace[place], lap * lap_s, lap))
    return from_zero(picked)


def overlaid(trace: Sequence[TracedRequest], copies: int, seed: int) -> list[TracedRequest]:
    """``copies`` of a trace at once, each begun at another place and with prefixes of its own.

    A larger fleet's traffic: more users, not the same users in more of a hurry.
    """
    if copies <= 1:
        return list(trace)
    draw = random.Random(seed)
    lap_s = trace[-1].arrival_s + 1e-6
    merged = []
    for copy in range(copies):
        turn_s = draw.random() * lap_s if copy else 0.0
        merged += [_copy(each, (each.arrival_s + turn_s) % lap_s - each.arrival_s, copy) for each in trace]
    return from_zero(merged)


def _copy(request: TracedRequest, later_s: float, copy: int) -> TracedRequest:
    if not copy:
        return replace(request, arrival_s=request.arrival_s + later_s)
    ids = request.block_ids
    return replace(
        request,
        arrival_s=request.arrival_s + later_s,
        block_ids=None if ids is None else tuple(each + copy * _COPY for each in ids),
        user=f"{request.user}/{copy}" if request.user else "",
        serial=request.serial + copy * _COPY,
    )


def shifted(
    first: Sequence[TracedRequest], second: Sequence[TracedRequest], at: float
) -> list[TracedRequest]:
    """``first`` until ``at`` seconds, then ``second`` from its beginning; they share no prefix."""
    kept = [request for request in first if request.arrival_s < at]
    moved = [
        replace(
            request,
            arrival_s=request.arrival_s + at,
            block_ids=None if request.block_ids is None else tuple(i + _SECOND for i in request.block_ids),
            serial=request.serial + _SECOND,
        )
        for request in second
    ]
    return kept + moved
