"""HTTP/1.1 as bytes: request targets, response heads and chunks. Pure."""

from __future__ import annotations

import re
from http import HTTPStatus

from pdserve.http.answer import Answer, Headers

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus
}
CLOSE_LINE = b"connection: close\r\n"
CHUNKED_LINE = b"transfer-encoding: chunked\r\n"

HERE = Answer(200, b"", ((b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),))
"""The answer to ``OPTIONS *``."""
UPGRADE = (b"upgrade", b"http2-settings")
"""Headers of an offer to change the protocol; they concern this connection alone."""
_ABSOLUTE = re.compile(rb"https?://((?:\[[0-9a-f:.]+\]|[^][:/?@]+)(?::\d*)?)(/[^?]*)?(\?.*)?", re.I | re.S)


def read_target(method: str, target: bytes) -> tuple[bytes, bytes]:
    """Return the authority that a request target names (empty: none) and its path with the query.

    The path is ``*`` where the server as a whole is asked.

    Raises:
        ValueError: unless it is one of the forms of RFC 9112 §3.2 that ``method`` may have.
    """
    if method == "CONNECT":
        raise ValueError("this server is no proxy: it opens no tunnel")
    if target.startswith(b"/"):
        return b"", target
    if target == b"*" and method == "OPTIONS":
        return b"", target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        shown = target[:200].decode("latin-1")
        raise ValueError(f"the request target must be /path, http://host/path, or * of OPTIONS, got {shown}")
    authority, path, query = absolute.groups()
    if path is None and query is None and method == "OPTIONS":
        return authority, b"*"
    return authority, (path or b"/") + (query or b"")


def without_upgrade(
    method: bytes, target: bytes, version: str, headers: dict[bytes, bytes], *, keep_alive: bool
) -> bytes:
    """The head of a request as it would be without its offer to upgrade."""
    kept = [(name, value) for name, value in headers.items() if name not in UPGRADE and name != b"connection"]
    kept.append((b"connection", b"keep-alive" if keep_alive else b"close"))
    lines = b"".join([b"%b: %b\r\n" % header for header in kept])
    return b"%b %b HTTP/%b\r\n%b\r\n" % (method, target, version.encode(), lines)


def render_head(status: int, headers: Headers, *, rest: bytes) -> bytes:
    """Status line, headers, ``rest`` (further header lines, each with its line end), empty line."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    lines = [b"%b: %b\r\n" % header for header in headers]
    return b"%b%b%b\r\n" % (line, b"".join(lines), rest)


def render_answer(answer: Answer, more: Headers, *, rest: bytes, has_body: bool = True) -> bytes:
    """A whole response; without its body, but with its length, for HEAD."""
    body = answer.body
    line = _STATUS_LINES.get(answer.status) or b"HTTP/1.1 %d \r\n" % answer.status
    lines = b""
    for header in answer.headers:
        lines += b"%b: %b\r\n" % header
    for header in more:
        lines += b"%b: %b\r\n" % header
    sent = body if has_body else b""
    return b"%b%bcontent-length: %d\r\n%b\r\n%b" % (line, lines, len(body), rest, sent)


def render_chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; ``data`` must not be empty, that would end it."""
    return b"%x\r\n%b\r\n" % (len(data), data)
