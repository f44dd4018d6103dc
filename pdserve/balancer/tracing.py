"""Which of a client's headers the workers get. Pure.

Trace contexts and what SGLang itself reads (``x-sglext-*``, ``x-smg-routing-key``,
custom labels, data-parallel rank) go on. ``x-override-*`` must not: a server that
allows it would take rooms and hosts from it, past our own.
"""

from __future__ import annotations

from pdserve.balancer.http_errors import JSON_TYPE, Headers

_NAMES = frozenset((b"authorization", b"traceparent", b"tracestate", b"baggage", b"b3"))
_NOT = (b"x-override-", b"x-forwarded-", b"x-stainless-", b"x-request-id", b"x-real-ip", b"x-api-key")


def forwarded_headers(headers: dict[bytes, bytes], request_id: str, worker_key: str) -> Headers:
    """What both legs are sent besides the body; ``worker_key`` takes the place of the client's own."""
    kept = [JSON_TYPE]
    for item in headers.items():
        name = item[0]
        if name in _NAMES or (name[:2] == b"x-" and not name.startswith(_NOT)):
            kept.append(item)
    if worker_key:
        kept = [item for item in kept if item[0] != b"authorization"]
        kept.append((b"authorization", b"Bearer " + worker_key.encode()))
    if request_id:
        kept.append((b"x-request-id", request_id.encode("latin-1")))
    return tuple(kept)
