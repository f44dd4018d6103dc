"""Malformed HTTP by a seeded generator: bytes for one connection, and what may come back. Pure.

    http_case(seed, number) ─► Case(family, chunks, must_refuse)

Every case ends with a well-formed request that asks to close, so the connection
ends in time whatever the server made of the rest; an incomplete one ends by a time limit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

CRLF = b"\r\n"
BODY = json.dumps({"text": "hi"}).encode()
LAST = b"GET /liveness HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n"
SMUGGLED = b"POST /generate HTTP/1.1\r\nhost: t\r\ncontent-length: 19\r\n\r\n" + b'{"text":"SMUGGLED"}'
PATHS = (
    b"/generate", b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages",
    b"/invocations",
    b"/vertex_generate", b"/health", b"/v1/models", b"/workers", b"/pdserve/state", b"/nowhere", b"/",
)  # fmt: skip
METHODS = (
    b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"DELETE", b"PATCH", b"PRI",
    b"PROPFIND",
    b"get", b"BREW", b"", b"G\x00T", b"P\xc3\x96ST", b"X" * 300, b"M-SEARCH", b"POST POST",
)  # fmt: skip
TARGETS = (
    b"/generate?", b"/generate?a=%00&b=%zz", b"/generate#top", b"/generate/", b"//generate", b"/./generate",
    b"/a/../generate", b"/%67enerate", b"/generate%00", b"/%ff%fe", b"/%", b"/%2", b"/%u0041", b"*", b"",
    b"http://other/generate", b"https://user:pw@other:99/generate", b"other:80", b"/\xc3\xa9", b"/a b",
    b"/\x7f",
    b"generate", b"?x", b"/v1/models/a%0d%0ax-evil:%201%0d%0a", b"/v1/models/%2e%2e/%2e%2e/workers",
    b"/v1/models/../../abort_request", b"/workers/%0d%0a%0d%0aGET%20/x", b"/v1/responses/%20",
    b"/" + b"a" * 70_000,
)  # fmt: skip
VERSIONS = (
    b"HTTP/1.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/3", b"HTTP/11", b"http/1.1", b"HTTP/1.1 x",
    b"",
    b"HTTP/1.", b"HTTP/-1.1", b"ICE/1.0", b"RTSP/1.0", b"HTTP/9.9", b"HTTP/1.1\t",
)  # fmt: skip
LENGTHS = (
    b"-1", b"+14", b"0x0e", b"14.0", b"1e1", b" 14 14", b"14, 14", b"14, 15", b"9223372036854775808",
    b"18446744073709551616", b"99999999999999999999999", b"", b"abc", b"\xd9\xa1\xd9\xa4", b"014", b"14\x0b",
    b"1 4",
)  # fmt: skip
ENCODINGS = (
    b"identity", b"gzip", b"chunked, gzip", b"gzip, chunked", b"xchunked", b"chunkedx", b"chunked\x0b",
    b"chunked, chunked",
    b"\tchunked", b"CHUNKED", b"\"chunked\"", b"chunked;q=1", b"", b",", b"chunked\x00", b"trailers, deflate",
)  # fmt: skip
NAMES = (
    b"x-a", b"", b"x a", b"x-a ", b" x-a", b"x\x00a", b"x\xc3\xa9", b"x:a", b"(x)", b"content-length",
    b"host",
    b"transfer-encoding", b"authorization", b"x-request-id", b"connection", b"expect", b"upgrade",
    b"x" * 5000,
    b"__proto__", b"content-type", b"x-override-bootstrap-room", b"x-smg-routing-key", b"traceparent",
    b"cookie",
)  # fmt: skip
VALUES = (
    b"1", b"", b"\xff\xfe", b"a\x00b", b"a\rb", b"a\nb", b"\t", b"close", b"keep-alive, Upgrade", b"chunked",
    b"7",
    b"x" * 3000, b"\xe2\x80\xae", b"Bearer ", b"100-continue", b"h2c", b"websocket", b"\"", b"a, b",
    b"application/json",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One connection's bytes. ``must_refuse``: its framing is ambiguous, so one 4xx and the end is all."""

    family: str
    chunks: tuple[bytes, ...]
    must_refuse: bool = False

    @property
    def data(self) -> bytes:
        """All of it."""
        return b"".join(self.chunks)


def request(
    *, method: bytes = b"POST", target: bytes = b"/generate", version: bytes = b"HTTP/1.1",
    headers: list[tuple[bytes, bytes]] | None = None, body: bytes = BODY,
) -> bytes:  # fmt: skip
    """A request with its length; ``headers`` come before it."""
    lines = [(b"host", b"t"), *(headers or []), (b"content-length", b"%d" % len(body))]
    head = b" ".join((method, target, version)) + CRLF
    return head + b"".join(name + b": " + value + CRLF for name, value in lines) + CRLF + body


def _head(target: bytes) -> Case:
    """Its answer has a length and no body: nothing may follow it, or a parser could not tell."""
    return Case(
        "head", (request(method=b"HEAD", target=target, headers=[(b"connection", b"close")], body=b""),)
    )


def _request_line(rng: random.Random) -> Case:
    method = rng.choice(METHODS) if rng.random() < 0.5 else b"POST"
    target = rng.choice(TARGETS) if rng.random() < 0.6 else rng.choice(PATHS)
    version = rng.choice(VERSIONS) if rng.random() < 0.4 else b"HTTP/1.1"
    if method == b"HEAD":
        return _head(target)
    data = request(method=method, target=target, version=version)
    if rng.random() < 0.2:
        data = data.replace(CRLF, rng.choice((b"\n", b"\r", b"\r\r\n", b"\n\r")), rng.randrange(1, 5))
    return Case("request-line", (data, LAST))


def _headers(rng: random.Random) -> Case:
    count = rng.choice((1, 1, 2, 3, 8))
    headers = [(rng.choice(NAMES), rng.choice(VALUES)) for _ in range(count)]
    data = request(headers=headers)
    match rng.randrange(6):
        case 0:
            data = data.replace(
                b": ", rng.choice((b":", b" : ", b"", b"\t:\t", b":\r\n ", b"::")), 1 + rng.randrange(3)
            )
        case 1:
            data = data.replace(b"host: t", b"host: t\r\n folded\r\n\tagain", 1)
        case 2:
            data = request(headers=[(b"x-%d" % index, b"y" * rng.randrange(200)) for index in range(1000)])
    return Case("headers", (data, LAST))


def _framing(rng: random.Random) -> Case:
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    length, encoding = rng.choice(LENGTHS), rng.choice(ENCODINGS)
    head = b"POST /generate HTTP/1.1\r\nhost: t\r\n"
    match rng.randrange(5):
        case 0:
            data = head + b"content-length: %b\r\n\r\n%b" % (length, BODY)
        case 1:
            data = head + b"transfer-encoding: %b\r\n\r\n%b" % (encoding, chunked)
        case 2:
            lines = [
                b"content-length: %d\r\n" % rng.choice((len(BODY), 0, 3)),
                b"transfer-encoding: chunked\r\n",
            ]
            rng.shuffle(lines)
            return Case(
                "framing", (head + b"".join(lines) + CRLF + chunked + SMUGGLED, LAST), must_refuse=True
            )
        case 3:
            lengths = b"content-length: %d\r\ncontent-length: %d\r\n" % (len(BODY), rng.choice((3, 30)))
            return Case("framing", (head + lengths + CRLF + BODY + SMUGGLED, LAST), must_refuse=True)
        case _:
            lines = [b"transfer-encoding: %b\r\n" % rng.choice((encoding, b"chunked")) for _ in range(2)]
            data = head + b"".join(lines) + CRLF + chunked + request()
    return Case("framing", (data, LAST))


def _chunked(rng: random.Random) -> Case:
    sizes = (
        b"", b"-1", b"0xe", b"e;ext=1", b"e ;", b" e", b"e\t", b"ffffffffffffffff", b"fffffffffffffffff",
        b"0", b"00e",
        b"E", b"1", b"ff", b"zz", b"e;" + b"x" * 9000, b"\xff", b"e\x00", b"e\n",
    )  # fmt: skip
    trailers = (
        b"", b"x-t: 1\r\n", b"content-length: 3\r\n", b"transfer-encoding: chunked\r\n",
        b"authorization: Bearer x\r\n",
        b"bad\r\n", b": 1\r\n", b"x-t: " + b"y" * 70_000 + CRLF, b"x: 1\r\n" * 3000, b"\x00\r\n",
    )  # fmt: skip
    end = rng.choice((CRLF, CRLF, CRLF, b"\n", b"", b"\r", b"\r\n\r\n"))
    size = rng.choice(sizes) if rng.random() < 0.6 else b"%x" % len(BODY)
    body = size + end + BODY + CRLF + b"0\r\n" + rng.choice(trailers) + CRLF
    head = b"POST /generate HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n"
    return Case("chunked", (head, body, LAST))


def _pipelined(rng: random.Random) -> Case:
    parts = [
        rng.choice(
            (request(), request(method=b"GET", target=b"/health", body=b""), request(target=b"/nowhere"))
        )
        for _ in range(rng.randrange(2, 8))
    ]
    if rng.random() < 0.5:
        parts.insert(rng.randrange(len(parts)), rng.choice((b"\r\n\r\n", b"junk\r\n\r\n", b"\x00", b"GET")))
    data = b"".join(parts)
    return Case("pipelined", (data, LAST) if rng.random() < 0.5 else (data + LAST,))


def _partial(rng: random.Random) -> Case:
    data = request(headers=[(b"x-a", b"y" * rng.randrange(50))])
    return Case("partial", (data[: rng.randrange(len(data))],))


def _slow(rng: random.Random) -> Case:
    data = request(target=rng.choice(PATHS), headers=[(rng.choice(NAMES), rng.choice(VALUES))]) + LAST
    chunks, at = [], 0
    while at < len(data) and len(chunks) < 60:
        step = rng.choice((1, 1, 2, 5, 20))
        chunks.append(data[at : at + step])
        at += step
    return Case("slow", (*chunks, data[at:]))


def _expect(rng: random.Random) -> Case:
    wish = rng.choice((b"100-continue", b"100-Continue", b"200-ok", b"", b"100-continue, x", b"nothing"))
    data = request(target=rng.choice(PATHS), headers=[(b"expect", wish)])
    head, _, body = data.partition(b"\r\n\r\n")
    return Case("expect", (head + b"\r\n\r\n", body, LAST))


def _foreign(rng: random.Random) -> Case:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(64)
    upgrade = [
        (b"connection", b"Upgrade, HTTP2-Settings"),
        (b"upgrade", b"h2c"),
        (b"http2-settings", b"AAMAAABk"),
    ]
    socket = [
        (b"connection", b"Upgrade"),
        (b"upgrade", b"websocket"),
        (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
    ]
    data = rng.choice(
        (
            hello, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), b"SSH-2.0-OpenSSH_9\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"EHLO x\r\n", bytes(64), rng.randbytes(rng.randrange(1, 400)), request(headers=upgrade),
            request(method=b"GET", target=b"/v1/realtime", headers=socket, body=b""), b"\r\n" * 50, b"{}",
            b"\xef\xbb\xbf" + request(),
            b"CONNECT other:443 HTTP/1.1\r\nhost: other\r\n\r\n" + hello, request(headers=socket),
            b" " + request(), b"GET /health\r\n\r\n",
        )
    )  # fmt: skip
    return Case("foreign", (data, LAST))


def _mutated(rng: random.Random) -> Case:
    data = bytearray(
        request(target=rng.choice(PATHS), headers=[(b"authorization", b"Bearer x"), (b"x-request-id", b"r")])
    )
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at]
            case 2:
                data.insert(at, rng.choice(b"\x00\r\n :\xff\t,"))
            case _:
                data[at:at] = data[at : at + rng.randrange(30)]
    return Case("mutated", (bytes(data), LAST))


def _matched(rng: random.Random) -> Case:
    """Right HTTP on every path and method: the wrong one must be told so."""
    method, path = (
        rng.choice((b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE")),
        rng.choice(PATHS),
    )
    if method == b"HEAD":
        return _head(path)
    kind = rng.choice(
        (b"application/json", b"text/plain", b"multipart/form-data", b"", b"application/json; charset=utf-16")
    )
    return Case("matched", (request(method=method, target=path, headers=[(b"content-type", kind)]), LAST))


FAMILIES: tuple[Callable[[random.Random], Case], ...] = (
    _request_line, _headers, _framing, _chunked, _pipelined, _partial, _slow, _expect, _foreign, _mutated,
    _matched,
)  # fmt: skip


def http_case(seed: int, number: int) -> Case:
    """The case of this number; families take turns."""
    rng = random.Random(f"http-{seed}-{number}")
    return FAMILIES[number % len(FAMILIES)](rng)
