"""One keep-alive connection to a worker: writes a request, parses the response as it arrives.

Knows HTTP framing only. Who gets the connection next is its ``Home``'s business.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

import httptools

from pdserve.errors import WorkerUnreachable
from pdserve.http.client_response import ClientResponse, Headers
from pdserve.http.sockets import tune

STALE_WINDOW_S = 1.0
"""A kept connection that the worker had already closed breaks within a round trip of the next
request. One that breaks later was at work on it."""
JOIN_BYTES = 65536
"""Up to here one write of head + body is cheaper than two; above it the copy costs more."""


class Home(Protocol):
    """Where a connection comes from."""

    num_heard: int
    """Grows with each piece of an answer to a client's request."""

    def put_back(self, connection: ClientConnection) -> None:
        """The response is complete and the connection can take another request."""
        ...

    def forget(self, connection: ClientConnection) -> None:
        """The connection is closed."""
        ...

    def send_again(self, response: ClientResponse) -> None:
        """The worker had closed the kept connection: use a fresh one."""
        ...


class ClientConnection(asyncio.Protocol):
    """Speaks HTTP/1.1 as a client, one exchange at a time."""

    def __init__(self, home: Home) -> None:
        self.idle_since_s = 0.0
        self.num_served = 0
        self._home = home
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
        response.on_sent(self, now_s)

    def pause(self) -> None:
        """Stop reading; TCP holds the worker up."""
        if self.is_usable:
            cast(asyncio.Transport, self._transport).pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.is_usable:
            cast(asyncio.Transport, self._transport).resume_reading()

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
        self._home.forget(self)
        response, self._response = self._response, None
        if response is None:
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
        if response is None:
            self.drop()  # bytes nobody asked for: the connection cannot be trusted
            return
        if not response.can_resend:
            self._home.num_heard += 1
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
        self._home.put_back(self)
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
        if was_paused:
            self.resume()
        if self._keep_alive:
            self._home.put_back(self)
        else:
            cast(asyncio.Transport, self._transport).close()

    def _lost_before_answer(self, response: ClientResponse, exc: Exception | None) -> None:
        age_s = asyncio.get_running_loop().time() - response.sent_s
        is_stale = self.num_served > 0 and response.attempts == 1 and age_s < STALE_WINDOW_S
        if is_stale and response.can_resend:
            self._home.send_again(response)
            return
        error = WorkerUnreachable(response.url, f"closed the connection without an answer{_why(exc)}")
        error.is_stale = is_stale
        response.fail(error)


def _ends_with_connection(headers: Headers) -> bool:
    """True if the body has no other end than the connection's (HTTP/1.0 style)."""
    return not any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in headers)


def _why(exc: Exception | None) -> str:
    return f": {exc}" if exc is not None else ""
