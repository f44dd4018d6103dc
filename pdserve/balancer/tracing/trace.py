"""What is noted of a request that is traced, while it runs. Imports nothing of OpenTelemetry.

    Tracing.begin ─► RequestTrace ─ one RunTrace per sample ─ one AttemptTrace per pair tried
                          └─ finish ─► SpanSink: a thread of its own makes the spans (tracing/export.py)

Spans of legs exist from the start, as ids: workers hear of them in ``traceparent``.
Stages are the stamps of the request's timeline; nothing else is measured.
"""

from __future__ import annotations

import random
import re
import time
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import msgspec

from pdserve.balancer.proxy.relay import LegFailed
from pdserve.balancer.request.headers import TraceParent, parse_parent, without_context
from pdserve.errors import ConfigError, WorkerError, WorkerRejected
from pdserve.types import Role

if TYPE_CHECKING:
    from pdserve.balancer.metrics.ledger import Outcome, RequestRecord
    from pdserve.balancer.proxy.attempts import Run
    from pdserve.balancer.proxy.relay import PairRelay, Relayed
    from pdserve.telemetry import RequestTimeline
    from pdserve.types import Pair

MISSING = "traces need OpenTelemetry: pip install 'pdserve[otel]', or leave out --otlp-endpoint"
GRPC_PORT = 4317
_CACHED = re.compile(rb'"cached_tokens":\s*(\d+)')


class SpanSink(Protocol):
    """Takes what has ended; ``put`` returns at once."""

    def put(self, trace: RequestTrace, record: RequestRecord, outcome: Outcome) -> None:
        """A traced request is over."""
        ...

    async def close(self) -> None:
        """Send what is left, for a bounded time."""
        ...


class LegFailure(msgspec.Struct, frozen=True):
    """Whose leg failed (None: either's) and how; not the exception, which would hold on to whole prompts.

    ``status`` is the worker's HTTP status, 0 without one; ``is_prefill_done``: its leg had ended well.
    """

    role: Role | None
    why: str
    status: int
    is_prefill_done: bool

    @classmethod
    def of(cls, role: Role | None, error: WorkerError, *, is_prefill_done: bool) -> LegFailure:
        """What there is to tell of ``error``."""
        status = error.status if isinstance(error, WorkerRejected) else 0
        return cls(role, str(error), status, is_prefill_done)


class AttemptTrace(msgspec.Struct, eq=False):
    """One pair tried. ``prefill_id``, ``decode_id``: span ids of its legs. Times as in the timeline.

    ``status`` is that of decode's answer. With neither it nor a failure the attempt was broken off, for its
    client left or another sample failed. With both decode has answered, and prefill did not end well.
    """

    pair: Pair
    rid: str
    room: int
    queued_s: float
    started_s: float
    prefill_id: int
    decode_id: int
    prefill_done_s: float | None = None
    first_s: float | None = None
    ended_s: float | None = None
    status: int = 0
    failure: LegFailure | None = None


class RunTrace(msgspec.Struct, eq=False):
    """One run: the request, or one sample of a chat. ``waiting_s``: since when it waits for a pair."""

    request: RequestTrace
    timeline: RequestTimeline
    waiting_s: float | None
    attempts: list[AttemptTrace] = []
    cached_tokens: int | None = None

    async def carry(self, relay: PairRelay, body: bytes, run: Run) -> Relayed:
        """``relay.run`` as an attempt of its own, each leg under its own span."""
        attempt = self._begin(run)
        self.attempts.append(attempt)
        try:
            prefill, decode = self.request.child(attempt.prefill_id), self.request.child(attempt.decode_id)
            lines = run.lines + prefill.lines(), run.lines + decode.lines()
            relayed = await relay.run(body, lines, run.sink)
            attempt.status = relayed.status
            if relayed.prefill_error is not None:
                attempt.failure = LegFailure.of(Role.PREFILL, relayed.prefill_error, is_prefill_done=False)
            self.cached_tokens = cached_tokens(relay.prefill_answer)
            return relayed
        except LegFailed as exc:
            attempt.failure = LegFailure.of(exc.role, exc.error, is_prefill_done=exc.is_prefill_done)
            raise
        finally:
            self._end(attempt)

    def _begin(self, run: Run) -> AttemptTrace:
        record, now_s = run.record, time.monotonic()
        started_s = now_s if record.timeline.paired_s is None else record.timeline.paired_s
        queued_s = started_s if self.waiting_s is None else self.waiting_s
        self.waiting_s = None
        assert record.pair is not None, "an attempt has a pair"
        return AttemptTrace(record.pair, record.rid, record.room, queued_s, started_s, new_id(64), new_id(64))

    def _end(self, attempt: AttemptTrace) -> None:
        done_s, timeline = self.timeline.prefill_done_s, self.timeline
        attempt.ended_s = time.monotonic()
        attempt.prefill_done_s = done_s if done_s is not None and done_s >= attempt.started_s else None
        attempt.first_s = timeline.first_token_s


class RequestTrace(msgspec.Struct, eq=False):
    """One request. ``parent`` is its client's span; ``wall_ns`` is unix time at ``begun_s``."""

    trace_id: int
    span_id: int
    parent: TraceParent | None
    sink: SpanSink
    begun_s: float
    wall_ns: int
    runs: list[RunTrace] = []

    def waits(self, run: Run) -> None:
        """``run`` asks for a pair, for the first time or again."""
        timeline = run.record.timeline
        if run.trace is None:
            is_first = not self.runs
            since_s = timeline.received_s if is_first else time.monotonic()
            run.trace = RunTrace(self, timeline, since_s)
            self.runs.append(run.trace)
        else:
            run.trace.waiting_s = time.monotonic()

    def child(self, span_id: int) -> TraceParent:
        """The context of a span of this trace."""
        return TraceParent(self.trace_id, span_id, state=self.parent.state if self.parent else b"")

    def finish(self, record: RequestRecord, outcome: Outcome) -> None:
        """The request is over."""
        record.trace = None  # the record stays, among the last ones
        self.sink.put(self, record, outcome)

    def unix_ns(self, at_s: float) -> int:
        """A time of the timeline on the clock of the world."""
        return self.wall_ns + int((at_s - self.begun_s) * 1e9)


class Tracing:
    """Which requests are traced, and under which ids. ``sample``: of those whose client left it to us."""

    def __init__(self, sink: SpanSink, sample: float) -> None:
        self._sink = sink
        self._sample = sample

    def begin(self, headers: dict[bytes, bytes]) -> RequestTrace | None:
        """A request came; None if it is not to be traced."""
        parent = parse_parent(headers) if b"traceparent" in headers else None
        if not (random.random() < self._sample if parent is None else parent.is_sampled):
            return None
        trace_id = new_id(128) if parent is None else parent.trace_id
        return RequestTrace(trace_id, new_id(64), parent, self._sink, time.monotonic(), time.time_ns())

    def forwarded(self, headers: dict[bytes, bytes], record: RequestRecord) -> dict[bytes, bytes]:
        """A client's headers as the workers are to have them, but for what each leg adds.

        Workers must not make traces of their own of a request that was left out.
        """
        if record.trace is not None:
            return without_context(headers)
        if b"traceparent" in headers and parse_parent(headers) is not None:
            return headers
        nobody = TraceParent(new_id(128), new_id(64), is_sampled=False)
        return without_context(headers) | {b"traceparent": nobody.value()}

    async def close(self) -> None:
        """Send what is left, for a bounded time."""
        await self._sink.close()


def new_id(bits: int) -> int:
    """A random id; 0 means none to W3C."""
    return random.getrandbits(bits) or 1


def cached_tokens(answer: bytes) -> int | None:
    """Prompt tokens that prefill had cached, by its own answer; a stream's events repeat themselves."""
    found = _CACHED.findall(answer)
    if not found:
        return None
    return int(found[-1]) if answer.startswith(b"data:") else sum(int(number) for number in found)


def traces_url(endpoint: str) -> str:
    """Where spans are posted: ``endpoint`` as it is if it has a path, else its ``/v1/traces``.

    Raises:
        ConfigError: if it is no http address, or its port is by custom gRPC's.
    """
    try:
        parts = urlsplit(endpoint)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise ConfigError(f"--otlp-endpoint is no address: {endpoint!r}") from None
    if not host or parts.scheme not in ("http", "https"):
        raise ConfigError(f"--otlp-endpoint must be like http://127.0.0.1:4318, got {endpoint!r}")
    if port == GRPC_PORT:
        raise ConfigError(
            f"traces are sent by OTLP/HTTP, which collectors take on port 4318, not {GRPC_PORT}"
        )
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def open_tracing(endpoint: str, sample: float) -> Tracing:
    """Begin to send traces to ``endpoint``, an address of OTLP/HTTP.

    Raises:
        ConfigError: for a wrong address or share, or without the extra ``otel``.
    """
    if not 0.0 <= sample <= 1.0:
        raise ConfigError(f"otlp_sample must be between 0 and 1, got {sample:g}")
    url = traces_url(endpoint)
    try:
        from pdserve.balancer.tracing.export import OtlpSink
    except ImportError as exc:
        raise ConfigError(f"{MISSING} ({exc})") from exc
    return Tracing(OtlpSink(url), sample)
