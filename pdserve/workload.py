"""Requests to replay: public traces, synthetic arrivals, and what is done to them before a run.

A request is an arrival time, two lengths and, where a trace tells it, ids of prompt blocks: equal
leading ids are an equal prompt prefix. Pure data; nothing here knows of workers. Two formats are
told apart by content: Mooncake jsonl (timestamp in ms, hash_ids of 512 tokens) and Azure csv
(TIMESTAMP, ContextTokens, GeneratedTokens).
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from math import log, sqrt
from pathlib import Path

import msgspec

from pdserve.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens of one hash id (Mooncake FAST25 release, README of its traces)."""
BYTES_PER_TOKEN = 4
"""Length of the text that stands for a token: about that of English text."""
_COPY = 2**40
_SECOND = 2**56
"""What is added to block ids of a trace's copy, or of a second trace: so they share no prefix."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request: when it comes, tokens in and out, and the ids of its prompt's blocks.

    ``block_ids``: one per ``block_tokens`` tokens, the last may be partly filled; an id stands for its block
    and everything before it. None: the prompt is like no other. ``max_new_tokens`` 0: the
    trace does not tell the limit the client set. ``user``: who asked, if known.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] | None = None
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    max_new_tokens: int = 0
    user: str = ""
    serial: int = 0
    """Tells prompts without block ids apart."""


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


# -- reading --------------------------------------------------------------------------------


def read_trace(path: str | Path) -> list[TracedRequest]:
    """Read a trace file, earliest request first, the first at 0 s.

    Raises:
        ConfigError: if the file is not there, empty, of neither format, or a row is malformed.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(
            f"trace {path}: no such file; expected a Mooncake .jsonl (kvcache-ai/Mooncake, "
            "FAST25-release/traces) or an Azure .csv (Azure/AzurePublicDataset, data)"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"trace {path}: cannot be read: {exc}") from exc
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        requests = _read_mooncake(path, lines)
    elif first.lstrip("\ufeff").startswith("TIMESTAMP"):
        requests = _read_azure(path, lines)
    else:
        raise ConfigError(
            f"trace {path}: expected Mooncake jsonl (rows like {{'timestamp': 0, ...}}) or Azure csv "
            f"(header TIMESTAMP,ContextTokens,GeneratedTokens), got {first[:60]!r}"
        )
    if not requests:
        raise ConfigError(f"trace {path}: has no request in it")
    return _from_zero(requests)


def _read_mooncake(path: Path, lines: Sequence[str]) -> list[TracedRequest]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, ValueError) as exc:
            raise ConfigError(
                f"trace {path}, row {number}: expected timestamp, input_length, output_length and "
                f"hash_ids: {exc}"
            ) from exc
        blocks = -(-row.input_length // MOONCAKE_BLOCK_TOKENS)
        if row.input_length < 1 or row.output_length < 0 or len(row.hash_ids) != blocks:
            raise ConfigError(
                f"trace {path}, row {number}: expected input_length >= 1, output_length >= 0 and one hash id "
                f"per {MOONCAKE_BLOCK_TOKENS} tokens ({blocks}), got {row.input_length}, "
                f"{row.output_length} and {len(row.hash_ids)} ids"
            )
        ids = tuple(row.hash_ids)
        requests.append(
            TracedRequest(
                row.timestamp / 1e3, row.input_length, max(1, row.output_length), ids, serial=number
            )
        )
    return requests


def _read_azure(path: Path, lines: Sequence[str]) -> list[TracedRequest]:
    requests, start = [], None
    rows = csv.reader(lines)
    header = [name.strip("\ufeff ") for name in next(rows)]
    if header != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        raise ConfigError(
            f"trace {path}: expected header TIMESTAMP,ContextTokens,GeneratedTokens, got {header}"
        )
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            stamp, prompt, answer = row
            when = datetime.fromisoformat(stamp[:26])
            prompt_tokens, answer_tokens = int(prompt), int(answer)
        except ValueError as exc:
            raise ConfigError(
                f"trace {path}, row {number}: expected a time, context tokens and generated tokens, "
                f"got {row}: {exc}"
            ) from exc
        if prompt_tokens < 1 or answer_tokens < 0:
            raise ConfigError(f"trace {path}, row {number}: expected positive lengths, got {row}")
        start = start or when
        at_s = (when - start) / timedelta(seconds=1)
        requests.append(TracedRequest(at_s, prompt_tokens, max(1, answer_tokens), serial=number))
    return requests


def _from_zero(requests: Iterable[TracedRequest]) -> list[TracedRequest]:
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    start_s = ordered[0].arrival_s
    if start_s == 0:
        return ordered
    return [replace(request, arrival_s=request.arrival_s - start_s) for request in ordered]


# -- what is done to a trace ------------------------------------------------------------------


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
    return _from_zero(picked)


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
    return _from_zero(merged)


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


# -- synthetic arrivals -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens: ``fixed`` (mean), ``uniform`` (low..high) or ``lognormal``
    (mean, and ``cv``, the standard deviation over the mean), cut to low..high."""

    kind: str = "fixed"
    mean: float = 1024.0
    cv: float = 1.0
    low: int = 1
    high: int = 131_072

    def draw(self, draw: random.Random) -> int:
        """One length.

        Raises:
            ConfigError: for an unknown kind.
        """
        if self.kind == "fixed":
            value = self.mean
        elif self.kind == "uniform":
            return draw.randint(self.low, self.high)
        elif self.kind == "lognormal":
            variance = log(1 + self.cv * self.cv)
            value = draw.lognormvariate(log(self.mean) - variance / 2, sqrt(variance))
        else:
            raise ConfigError(f"lengths: expected fixed, uniform or lognormal, got {self.kind!r}")
        return min(self.high, max(self.low, round(value)))


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Arrivals that no trace has. ``cv`` of the gaps: 1 is Poisson. ``num_prefixes`` > 0: each session begins
    with one of so many shared prefixes of ``prefix_tokens``. ``turns``: requests per session, each with the
    conversation so far in front, ``think_s`` after the last on average."""

    rate: float
    requests: int
    inputs: Lengths = Lengths()
    outputs: Lengths = Lengths(mean=256)
    cv: float = 1.0
    num_prefixes: int = 0
    prefix_tokens: int = 0
    turns: int = 1
    think_s: float = 30.0
    max_new_tokens: int = 0


def synthetic(plan: Synthetic, seed: int) -> list[TracedRequest]:
    """Draw a workload; equal seeds give equal ones.

    Raises:
        ConfigError: for a rate, count or number of turns that is not positive.
    """
    if plan.rate <= 0 or plan.requests < 1 or plan.turns < 1 or plan.cv <= 0:
        raise ConfigError(
            f"synthetic: expected positive rate, requests, turns and cv, got {plan.rate}, {plan.requests}, "
            f"{plan.turns}, {plan.cv}"
        )
    draw = random.Random(seed)
    gap = 1.0 / (plan.cv * plan.cv)
    mean_s = plan.turns / plan.rate
    requests: list[TracedRequest] = []
    at_s, session = 0.0, 0
    while len(requests) < plan.requests:
        session += 1
        requests.extend(_session(plan, draw, at_s, session))
        at_s += draw.gammavariate(gap, mean_s / gap)
    return _from_zero(requests[: plan.requests])


def _session(plan: Synthetic, draw: random.Random, at_s: float, session: int) -> list[TracedRequest]:
    size = MOONCAKE_BLOCK_TOKENS
    prefix = draw.randrange(plan.num_prefixes) if plan.num_prefixes else -1
    shared = plan.prefix_tokens // size if plan.num_prefixes else 0
    ids = [-(prefix * 10_000 + block) - 1 for block in range(shared)]
    tokens, turns = shared * size, []
    for turn in range(plan.turns):
        tokens += plan.inputs.draw(draw)
        answer = plan.outputs.draw(draw)
        whole = tokens // size
        ids += [(session << 20) + block for block in range(len(ids), whole)]
        tail = [(session << 20) + (turn + 1) * 32_768] if tokens % size else []
        turns.append(
            TracedRequest(
                at_s,
                tokens,
                answer,
                tuple(ids + tail) if plan.num_prefixes or plan.turns > 1 else None,
                max_new_tokens=plan.max_new_tokens,
                user=f"session-{session}" if plan.turns > 1 else "",
                serial=(session << 10) + turn,
            )
        )
        tokens += answer
        at_s += draw.expovariate(1.0 / plan.think_s) if plan.think_s > 0 else 0.0
    return turns


# -- the text of a prompt -------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def _block_text(block_id: int, block_tokens: int) -> bytes:
    word = b"%016x" % (block_id & (2**64 - 1))
    size = block_tokens * BYTES_PER_TOKEN
    return (word * (size // len(word) + 1))[:size]


def prompt_bytes(request: TracedRequest) -> bytes:
    """Text that stands for the prompt, ``BYTES_PER_TOKEN`` per token: equal leading block ids give equal
    leading text, and nothing else does. About 5 us for 12 000 tokens once the blocks were seen."""
    size = request.block_tokens
    length = request.input_tokens * BYTES_PER_TOKEN
    ids = request.block_ids
    if ids is None:
        return _block_text(-1 - request.serial, size)[: min(length, 256)].ljust(length, b".")
    return b"".join([_block_text(each, size) for each in ids])[:length]
