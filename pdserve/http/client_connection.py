"""Keep-alive connections to a server: each writes a request and parses the response as it arrives.

Knows HTTP framing only. An ``Origin`` holds the connections to one server that wait for a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import cast
from urllib.parse import urlsplit

import httptools

from pdserve.errors import ConfigError, WorkerUnreachable
from pdserve.http.client_response import ClientResponse, Deadlines, Headers
from pdserve.http.sockets import tune

IDLE_S = 4.0
"""SGLang's uvicorn closes a kept connection after 5 s without a request; be first."""
MAX_IDLE = 512
"""Kept connections per server."""
STALE_WINDOW_S = 1.0
"""A kept connection that the server had already closed breaks within a round trip of the next
request. One that breaks later was at work on it."""
JOIN_BYTES = 65536
"""Up to here one write of head + body is cheaper than two; above it the copy costs more."""


class ClientConnection(asyncio.Protocol):
    """Speaks HTTP/1.1 as a client, one exchange at a time."""

    def __init__(self, origin: Origin) -> None:
        self.idle_since_s = 0.0
        self.num_served = 0
        self._origin = origin
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._response: ClientResponse | None = None
        self._headers: Headers = []
        self._keep_alive = True
        self._has_bytes = False

    @property
    def is_usable(self) -> bool:
        """True while another request may be written."""
        return self._transport is not None and not self._transport.is_closing()

    # -- towards the exchange ----------------------------------------------------------------

    def send(self, response: ClientResponse, now_s: float) -> None:
        """Write the exchange's request; its response is pushed as it arrives."""
        transport = self._transport
        assert transport is not None
        assert self._response is None
        self._response = response
        self._has_bytes = False
        if len(response.body) <= JOIN_BYTES:
            transport.write(response.head + response.body)
        else:
            transport.write(response.head)
            transport.write(response.body)
        response.on_sent(transport, now_s)

    def drop(self) -> None:
        """Close the socket without waiting for anything."""
        self._response = None
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)
        tune(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop: end what was under way, or send it again if it was never heard."""
        self._origin.forget(self)
        response, self._response = self._response, None
        if response is None or response.has_ended:
            return
        response.connection = None
        if not self._has_bytes:
            self._lost_before_answer(response, exc)
        elif exc is None and response.status and _ends_with_connection(response.headers):
            response.on_complete()
            response.on_progress()
        else:
            response.fail(
                WorkerUnreachable(response.url, f"broke off in the middle of its answer{_why(exc)}")
            )

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        response = self._response
        if response is None or response.has_ended:
            self.drop()  # bytes nobody asked for: the connection cannot be trusted
            return
        if not response.can_resend:
            self._origin.num_heard += 1
        if not self._has_bytes:
            self._has_bytes = True
            response.body = b""  # it will not be sent again: a long answer must not hold a long prompt
            if self._take_whole(response, data):
                return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            response.fail(WorkerUnreachable(response.url, f"answered with something that is not HTTP: {exc}"))
            return
        response.on_progress()

    def _take_whole(self, response: ClientResponse, data: bytes) -> bool:
        """Take a response that came in one piece with its length, as most do, without the parser.

        Anything unusual (other names' spelling, codings, closing, further bytes) is the parser's.
        """
        end = data.find(b"\r\n\r\n")
        at = data.find(b"\r\ncontent-length: ", 12, end)
        if end < 0 or at < 0 or not data.startswith(b"HTTP/1.1 "):
            return False
        size, status = data[at + 18 : data.find(b"\r\n", at + 18)], data[9:12]
        if not (size.isdigit() and status.isdigit()) or len(data) != end + 4 + int(size):
            return False
        head = data[:end]
        if status < b"200" or b"onnection:" in head or b"ransfer-" in head or head.count(b"ontent-") != 2:
            return False
        self._response, self._keep_alive = None, True
        self.num_served += 1
        response.on_whole(int(status), head, data[end + 4 :])
        response.on_complete()
        self._origin.put_back(self)
        response.on_progress()
        return True

    # -- httptools ---------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        if status >= 200 and self._response is not None:
            self._response.on_head(status, self._headers)
            self._keep_alive = self._parser.should_keep_alive()
        self._headers = []

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        if self._response is not None:
            self._response.on_chunk(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        response = self._response
        if response is None or not response.status:  # an interim response, 1xx
            return
        self._response = None
        self.num_served += 1
        was_paused = response.is_paused
        response.on_complete()
        if was_paused and self.is_usable:
            cast(asyncio.Transport, self._transport).resume_reading()
        if self._keep_alive:
            self._origin.put_back(self)
        else:
            cast(asyncio.Transport, self._transport).close()

    def _lost_before_answer(self, response: ClientResponse, exc: Exception | None) -> None:
        age_s = asyncio.get_running_loop().time() - response.sent_s
        is_stale = self.num_served > 0 and response.attempts == 1 and age_s < STALE_WINDOW_S
        if is_stale and response.can_resend:
            self._origin.send_again(response)
            return
        error = WorkerUnreachable(response.url, f"closed the connection without an answer{_why(exc)}")
        error.is_stale = is_stale
        response.fail(error)


class Origin:
    """One server: its address and its idle connections, last used last.

    ``connections`` are the client's to all servers; ``connect`` sends a response's request over a
    fresh one; ``on_idle`` is called when one becomes idle.
    """

    __slots__ = (
        "_connect",
        "_deadlines",
        "_on_idle",
        "authority",
        "connections",
        "host",
        "idle",
        "is_closed",
        "num_heard",
        "port",
        "tls",
        "url",
    )

    def __init__(
        self,
        url: str,
        deadlines: Deadlines,
        connections: set[ClientConnection],
        connect: Callable[[Origin, ClientResponse], None],
        on_idle: Callable[[], None],
    ) -> None:
        self.url = url
        self.host, self.port, self.tls, self.authority = parse_base_url(url)
        self.connections = connections
        self.idle: deque[ClientConnection] = deque()
        self.is_closed = False
        self.num_heard = 0
        self._deadlines = deadlines
        self._connect = connect
        self._on_idle = on_idle

    def take_idle(self, now_s: float) -> ClientConnection | None:
        """Return a kept connection that the server has most likely not closed yet."""
        while self.idle:
            connection = self.idle.pop()
            if connection.is_usable and now_s - connection.idle_since_s < IDLE_S:
                return connection
            connection.drop()
        return None

    def put_back(self, connection: ClientConnection) -> None:
        """Keep a connection whose response is complete for the next request."""
        if self.is_closed or len(self.idle) >= MAX_IDLE:
            connection.drop()
            return
        connection.idle_since_s = self._deadlines.now()
        self.idle.append(connection)
        self._on_idle()

    def forget(self, connection: ClientConnection) -> None:
        """Drop a connection that is closed from the books."""
        self.connections.discard(connection)
        with contextlib.suppress(ValueError):
            self.idle.remove(connection)

    def send_again(self, response: ClientResponse) -> None:
        """Send over a fresh connection: the server had closed the kept one."""
        self._connect(self, response)

    def drop_older(self, before_s: float) -> None:
        """Close idle connections last used before that time; the oldest are first."""
        while self.idle and self.idle[0].idle_since_s < before_s:
            self.idle.popleft().drop()


def _ends_with_connection(headers: Headers) -> bool:
    """True if the body has no other end than the connection's (HTTP/1.0 style)."""
    return not any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in headers)


def _why(exc: Exception | None) -> str:
    return f": {exc}" if exc is not None else ""


def parse_base_url(url: str) -> tuple[str, int, ssl.SSLContext | None, bytes]:
    """Host, port, TLS context and Host header of a base URL."""
    try:
        parts = urlsplit(url)
        given_port = parts.port
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(url)
    except ValueError:
        raise ConfigError(
            f"a worker's address must be http://host:port or https://host:port, got {url!r}"
        ) from None
    is_tls = parts.scheme == "https"
    port = given_port or (443 if is_tls else 80)
    return parts.hostname, port, _tls_context() if is_tls else None, parts.netloc.rpartition("@")[2].encode()


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()
