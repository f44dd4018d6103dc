"""Which of a client's headers the workers get. Pure.

Trace contexts and what SGLang itself reads (``x-sglext-*``, ``x-smg-routing-key``,
custom labels, data-parallel rank) go on. ``x-override-*`` must not: a server that
allows it would take rooms and hosts from it, past our own.
"""

from __future__ import annotations

JSON_LINE = b"content-type: application/json\r\n"
_NAMES = frozenset((b"authorization", b"traceparent", b"tracestate", b"baggage", b"b3"))
_NOT = (b"x-override-", b"x-forwarded-", b"x-stainless-", b"x-request-id", b"x-real-ip", b"x-api-key")


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
