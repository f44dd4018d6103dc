"""A request that is over as OpenTelemetry spans, with the ids that its legs were sent. Pure.

POST /generate (server)          child of the client's span
  ├─ queue                       waiting for a pair; one for each attempt
  ├─ prefill leg (client)        the exchange with the prefill worker; its ids went out in traceparent
  ├─ decode leg (client)         the same with the decode worker
  └─ kv transfer                 prefill's end to decode's first byte; streams only
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from pdserve import __version__
from pdserve.balancer.metrics.record import Outcome, RequestRecord
from pdserve.balancer.tracing.trace import AttemptTrace, RequestTrace, RunTrace, new_id
from pdserve.types import Role, WorkerInfo

SCOPE = InstrumentationScope("pdserve.balancer", __version__)
MAX_TEXT = 1024
_MEMBER = re.compile(rb"[a-z][a-z0-9_*/-]{0,255}=[!-+\--<>-~]{1,256}")
_INT64 = 2**63
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)


@dataclass(slots=True)
class _Spec:
    """One span before it is made. Times as in the timeline; empty attributes are left out."""

    name: str
    context: SpanContext
    parent: SpanContext | None
    kind: SpanKind
    start_s: float
    end_s: float
    attributes: dict[str, object]
    status: Status = _UNSET
    events: Sequence[Event] = ()


def spans_of(
    trace: RequestTrace, record: RequestRecord, outcome: Outcome, resource: Resource
) -> list[ReadableSpan]:
    """Every span of one request, the server's first."""
    maker = _Specs(trace)
    ended_s = record.timeline.finished_s
    if ended_s is None:
        ended_s = record.timeline.received_s
    specs = [maker.server(record, outcome, ended_s)]
    for sample, run in enumerate(trace.runs):
        labels: dict[str, object] = {"pdserve.sample": sample} if len(trace.runs) > 1 else {}
        for number, attempt in enumerate(run.attempts):
            specs += maker.attempt(attempt, {**labels, "pdserve.attempt": number}, ended_s)
        if run.waiting_s is not None:
            labels["pdserve.attempt"] = len(run.attempts)
            specs.append(maker.queue(run.waiting_s, ended_s, labels, _error(record.error or str(outcome))))
    return [_span(spec, trace, resource) for spec in specs]


def _span(spec: _Spec, trace: RequestTrace, resource: Resource) -> ReadableSpan:
    return ReadableSpan(
        spec.name,
        spec.context,
        spec.parent,
        resource,
        kind=spec.kind,
        status=spec.status,
        events=spec.events,
        attributes={key: _clean(it) for key, it in spec.attributes.items() if it not in ("", None)},
        start_time=trace.unix_ns(spec.start_s),
        end_time=trace.unix_ns(max(spec.start_s, spec.end_s)),
        instrumentation_scope=SCOPE,
    )


class _Specs:
    """Lists the spans of one trace."""

    def __init__(self, trace: RequestTrace) -> None:
        self._trace = trace
        parent = trace.parent
        self._state = _state(parent.state) if parent else TraceState()
        self._server = self._context(trace.span_id)

    def server(self, record: RequestRecord, outcome: Outcome, ended_s: float) -> _Spec:
        trace, parent = self._trace, self._trace.parent
        firsts = list(_firsts(trace.runs))
        events = [Event("first token", timestamp=trace.unix_ns(min(firsts)))] if firsts else []
        above = None
        if parent is not None:
            above = SpanContext(parent.trace_id, parent.span_id, True, _SAMPLED, self._state)
        name, begun_s = f"POST {record.route}", record.timeline.received_s
        given, status = _attributes(record, outcome, trace), _status(record, outcome)
        return _Spec(name, self._server, above, SpanKind.SERVER, begun_s, ended_s, given, status, events)

    def queue(
        self, start_s: float, end_s: float, labels: dict[str, object], status: Status = _UNSET
    ) -> _Spec:
        context = self._context(new_id(64))
        return _Spec("queue", context, self._server, SpanKind.INTERNAL, start_s, end_s, labels, status)

    def attempt(self, attempt: AttemptTrace, labels: dict[str, object], ended_s: float) -> Iterator[_Spec]:
        start_s, done_s, first_s = attempt.started_s, attempt.prefill_done_s, attempt.first_s
        end_s = ended_s if attempt.ended_s is None else attempt.ended_s
        yield self.queue(attempt.queued_s, start_s, labels)
        if not attempt.pair.is_alone:
            yield self._leg(Role.PREFILL, attempt, labels, end_s if done_s is None else done_s)
        yield self._leg(Role.DECODE, attempt, labels, end_s)
        if done_s is not None and first_s is not None:
            context, begun_s = self._context(new_id(64)), min(done_s, first_s)
            yield _Spec("kv transfer", context, self._server, SpanKind.INTERNAL, begun_s, first_s, labels)

    def _leg(self, role: Role, attempt: AttemptTrace, labels: dict[str, object], end_s: float) -> _Spec:
        is_prefill = role is Role.PREFILL
        worker = attempt.pair.prefill if is_prefill else attempt.pair.decode
        given = _leg_attributes(worker, attempt) | labels
        given["pdserve.resumed"] = attempt.is_resumed or None
        status, how = _leg_end(role, attempt)
        if how:
            given["pdserve.ended"] = how
        given["http.response.status_code"] = _http_status(role, attempt) or None
        context = self._context(attempt.prefill_id if is_prefill else attempt.decode_id)
        kind, start_s = SpanKind.CLIENT, attempt.started_s
        return _Spec(f"{role} leg", context, self._server, kind, start_s, end_s, given, status)

    def _context(self, span_id: int) -> SpanContext:
        return SpanContext(self._trace.trace_id, span_id, False, _SAMPLED, self._state)


def _state(header: bytes) -> TraceState:
    """``tracestate``; empty if any member is malformed, which the SDK would log for each request."""
    members = [member.strip() for member in header.split(b",") if member.strip()]
    if not all(_MEMBER.fullmatch(member) for member in members):
        return TraceState()
    return TraceState.from_header([b",".join(members).decode()])


def _attributes(record: RequestRecord, outcome: Outcome, trace: RequestTrace) -> dict[str, object]:
    timeline, runs = record.timeline, trace.runs
    cached = [run.cached_tokens for run in runs if run.cached_tokens is not None]
    return {
        "http.request.method": "POST",
        "http.route": str(record.route),
        "http.response.status_code": record.status or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens or None,
        "gen_ai.usage.output_tokens": timeline.completion_tokens or None,
        "pdserve.cached_tokens": sum(cached) if cached else None,
        "pdserve.route": str(record.route),
        "pdserve.rid": record.rid,
        "pdserve.request_id": record.request_id,
        "pdserve.room": record.room if record.pair else None,
        "pdserve.pair": record.pair.label if record.pair else "",
        "pdserve.reason": str(record.reason),
        "pdserve.retries": sum(max(0, len(run.attempts) - 1) for run in runs),
        "pdserve.resumes": record.num_resumes or None,
        "pdserve.moves": record.num_moves or None,
        "pdserve.samples": len(runs) if len(runs) > 1 else None,
        "pdserve.stream": record.is_stream,
        "pdserve.outcome": str(outcome),
        "pdserve.finish": record.finish,
        "pdserve.error": record.error,
    }


def _leg_attributes(worker: WorkerInfo, attempt: AttemptTrace) -> dict[str, object]:
    parts = urlsplit(worker.url)
    return {
        "server.address": parts.hostname,
        "server.port": parts.port,
        "pdserve.worker": str(worker.worker_id),
        "pdserve.rid": attempt.rid,
        "pdserve.room": attempt.room,
    }


def _status(record: RequestRecord, outcome: Outcome) -> Status:
    """A 4xx answer is not an error of the server, as in OpenTelemetry's conventions."""
    if outcome is Outcome.COMPLETED or (outcome is Outcome.FAILED and 400 <= record.status < 500):
        return _UNSET
    return _error(f"{outcome}: {record.error}" if record.error else str(outcome))


def _leg_end(role: Role, attempt: AttemptTrace) -> tuple[Status, str]:
    """Status of a leg, and why it ended early if the cause lies elsewhere."""
    failure, is_prefill = attempt.failure, role is Role.PREFILL
    if failure is not None and failure.role in (role, None):
        return _error(failure.why), ""
    if attempt.status or (is_prefill and attempt.prefill_done_s is not None):
        return _UNSET, ""
    if attempt.is_moved:
        return _UNSET, "moved"
    return _UNSET, "aborted" if failure is None else "other leg failed"


def _http_status(role: Role, attempt: AttemptTrace) -> int:
    """The worker's HTTP status; 0 if it is not known."""
    failure = attempt.failure
    if failure is not None and failure.role is role:
        return failure.status
    return attempt.status


def _firsts(runs: list[RunTrace]) -> Iterator[float]:
    for run in runs:
        yield from (attempt.first_s for attempt in run.attempts if attempt.first_s is not None)


def _error(text: str) -> Status:
    return Status(StatusCode.ERROR, str(_clean(text)))


def _clean(value: object) -> str | int | bool | float:
    """The value as OTLP can carry it: one attribute that cannot be encoded loses the whole batch."""
    if isinstance(value, (bool, float)):  # as a union it would be put together at each call
        return value
    if isinstance(value, int) and -_INT64 <= value < _INT64:
        return int(value)
    text = str(value)[:MAX_TEXT]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
