"""Which of a client's headers the workers get, and W3C trace contexts as header lines. Pure.

Trace contexts and what SGLang itself reads (``x-sglext-*``, ``x-smg-routing-key``,
custom labels, data-parallel rank) go on. ``x-override-*`` must not: a server that
allows it would take rooms and hosts from it, past our own. Nor ``x-pdserve-*``, by which
workers know us (docs/resume.md).
"""

from __future__ import annotations

import re

import msgspec

JSON_LINE = b"content-type: application/json\r\n"
_NAMES = frozenset((b"authorization", b"traceparent", b"tracestate", b"baggage", b"b3"))
CONTEXT_HEADERS = frozenset((b"traceparent", b"tracestate"))
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NOT = (
    b"x-override-", b"x-pdserve-", b"x-forwarded-", b"x-stainless-", b"x-request-id", b"x-real-ip",
    b"x-api-key",
)  # fmt: skip


def forwarded_headers(headers: dict[bytes, bytes], request_id: str, worker_key: str) -> bytes:
    """Header lines that both legs are sent; ``worker_key`` takes the place of the client's own."""
    lines = JSON_LINE
    for name, value in headers.items():
        if name in _NAMES or (name[:2] == b"x-" and not name.startswith(_NOT)):
            if worker_key and name == b"authorization":
                continue
            lines += b"%b: %b\r\n" % (name, value)
    if worker_key:
        lines += b"authorization: Bearer %b\r\n" % worker_key.encode()
    if request_id:
        lines += b"x-request-id: %b\r\n" % request_id.encode("latin-1")
    return lines


class TraceParent(msgspec.Struct, frozen=True):
    """A span that others hang below: a client's, or one of ours. ``state`` is ``tracestate``, as it came."""

    trace_id: int
    span_id: int
    is_sampled: bool = True
    state: bytes = b""

    def value(self) -> bytes:
        """As ``traceparent`` says it."""
        return b"00-%032x-%016x-%02x" % (self.trace_id, self.span_id, self.is_sampled)

    def lines(self) -> bytes:
        """Header lines by which a worker's spans become children of this one."""
        state = b"tracestate: %b\r\n" % self.state if self.state else b""
        return b"traceparent: %b\r\n%b" % (self.value(), state)


def parse_parent(headers: dict[bytes, bytes]) -> TraceParent | None:
    """The context a request came with; None without one, or with one that W3C says to disregard."""
    found = _PARENT.fullmatch(headers.get(b"traceparent", b"").strip())
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    is_known = version != b"ff" and (rest is None or version != b"00")
    if not is_known or not int(trace_id, 16) or not int(span_id, 16):
        return None
    is_sampled = bool(int(flags, 16) & 1)
    return TraceParent(int(trace_id, 16), int(span_id, 16), is_sampled, headers.get(b"tracestate", b""))


def without_context(headers: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """The headers but for the trace context, which legs are given one by one."""
    return {name: value for name, value in headers.items() if name not in CONTEXT_HEADERS}
