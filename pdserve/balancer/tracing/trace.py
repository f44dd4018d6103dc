"""What is noted of a traced request while it runs. Imports nothing of OpenTelemetry, calls nobody.

    RequestTrace ─ one RunTrace per sample ─ one AttemptTrace per pair tried ──► spans.py, when it is over

Span ids of legs are drawn when the attempt begins: workers are sent them in ``traceparent``.
Stages are the times of the request's timeline; nothing else is measured.
"""

from __future__ import annotations

import random
import re
import time
from urllib.parse import urlsplit

import msgspec

from pdserve.balancer.metrics.record import RequestRecord
from pdserve.balancer.request.headers import TraceParent
from pdserve.errors import ConfigError, WorkerError, WorkerRejected
from pdserve.telemetry import RequestTimeline
from pdserve.types import Pair, Role

GRPC_PORT = 4317
_CACHED = re.compile(rb'"cached_tokens":\s*(\d+)')


class LegFailure(msgspec.Struct, frozen=True):
    """Whose leg failed (None: either's) and how; not the exception, which would keep whole prompts alive.

    ``status`` is the worker's HTTP status, 0 without one; ``is_prefill_done``: its leg had ended well.
    """

    role: Role | None
    why: str
    status: int
    is_prefill_done: bool


class AttemptTrace(msgspec.Struct, eq=False):
    """One pair tried. ``prefill_id``, ``decode_id``: span ids of its legs. Times as in the timeline.

    ``status`` is that of decode's answer. With neither it nor a failure the attempt was broken off: its
    client left or another sample failed. With both, decode has answered and prefill did not end well.
    ``is_resumed``: it went on with an answer that its client has a part of; ``is_moved``: another one did, by
    somebody's wish.
    """

    run: RunTrace
    pair: Pair
    rid: str
    room: int
    queued_s: float
    started_s: float
    prefill_id: int
    decode_id: int
    timeline: RequestTimeline
    is_resumed: bool = False
    is_moved: bool = False
    prefill_done_s: float | None = None
    first_s: float | None = None
    ended_s: float | None = None
    status: int = 0
    failure: LegFailure | None = None

    def leg_lines(self, lines: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        """Header lines of the prefill and the decode leg: ``lines``, and that leg's span as parent."""
        child = self.run.request.child
        return lines[0] + child(self.prefill_id).lines(), lines[1] + child(self.decode_id).lines()

    def answered(self, status: int, prefill_error: WorkerError | None, prefill_answer: bytes) -> None:
        """Decode answered with ``status``; prefill with ``prefill_answer``, or it failed."""
        self.status = status
        if prefill_error is not None:
            self.failed(Role.PREFILL, prefill_error, is_prefill_done=False)
        self.run.cached_tokens = cached_tokens(prefill_answer)

    def failed(self, role: Role | None, error: WorkerError, *, is_prefill_done: bool) -> None:
        """A leg failed; ``role`` None: either may be the cause."""
        status = error.status if isinstance(error, WorkerRejected) else 0
        self.failure = LegFailure(role, str(error), status, is_prefill_done)

    def end(self) -> None:
        """Both legs are over."""
        timeline = self.timeline
        done_s = timeline.prefill_done_s
        self.ended_s = time.monotonic()
        self.prefill_done_s = done_s if done_s is not None and done_s >= self.started_s else None
        self.first_s = timeline.first_token_s


class RunTrace(msgspec.Struct, eq=False):
    """One run: the request, or one sample of a chat. ``waiting_s``: since when it waits for a pair."""

    request: RequestTrace
    first_wait_s: float
    waiting_s: float | None = None
    attempts: list[AttemptTrace] = []
    cached_tokens: int | None = None

    def waits(self) -> None:
        """The run asks for a pair, for the first time or again."""
        self.waiting_s = time.monotonic() if self.attempts else self.first_wait_s

    def begin_attempt(self, record: RequestRecord, timeline: RequestTimeline) -> AttemptTrace:
        """The run holds the pair that ``record`` names. ``timeline`` is the attempt's: the request's own, or
        another if it goes on with an answer."""
        started_s = time.monotonic() if timeline.paired_s is None else timeline.paired_s
        queued_s = started_s if self.waiting_s is None else self.waiting_s
        self.waiting_s = None
        assert record.pair is not None, "an attempt has a pair"
        attempt = AttemptTrace(
            self, record.pair, record.rid, record.room, queued_s, started_s, new_id(64), new_id(64),
            timeline, timeline is not record.timeline,
        )  # fmt: skip
        self.attempts.append(attempt)
        return attempt


class RequestTrace(msgspec.Struct, eq=False):
    """One request. ``parent`` is its client's span; ``wall_ns`` is unix time at ``begun_s``."""

    trace_id: int
    span_id: int
    parent: TraceParent | None
    begun_s: float
    wall_ns: int
    runs: list[RunTrace] = []

    def begin_run(self, timeline: RequestTimeline) -> RunTrace:
        """The request starts, or one more of its samples; the first one has waited since its receipt."""
        run = RunTrace(self, time.monotonic() if self.runs else timeline.received_s)
        self.runs.append(run)
        return run

    def child(self, span_id: int) -> TraceParent:
        """The context of a span of this trace."""
        return TraceParent(self.trace_id, span_id, state=self.parent.state if self.parent else b"")

    def unix_ns(self, at_s: float) -> int:
        """A time of the timeline as Unix time in nanoseconds."""
        return self.wall_ns + int((at_s - self.begun_s) * 1e9)


def new_id(bits: int) -> int:
    """A random id; W3C reserves 0 for none."""
    return random.getrandbits(bits) or 1


def cached_tokens(answer: bytes) -> int | None:
    """Prompt tokens that prefill had cached, by its answer; each event of a stream repeats the number."""
    found = _CACHED.findall(answer)
    if not found:
        return None
    return int(found[-1]) if answer.startswith(b"data:") else sum(int(number) for number in found)


def traces_url(endpoint: str) -> str:
    """Where spans are posted: ``endpoint`` unchanged if it has a path, else its ``/v1/traces``.

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
