"""HTTP/1.1 as bytes: response heads, chunks, and the few whole answers the server gives by itself. Pure."""

from __future__ import annotations

from http import HTTPStatus

from pdserve.http.answer import Answer, Headers

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus
}
CLOSE_LINE = b"connection: close\r\n"
CHUNKED_LINE = b"transfer-encoding: chunked\r\n"


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
