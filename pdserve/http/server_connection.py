"""One client connection: requests parsed as they arrive, served one after the other.

    socket ─► httptools ─► IncomingRequest (head, then body) ─► task of Application.serve
           ◄── writes, held up while the client does not read ◄──┘

A request is refused as soon as its head is there (path, key, length), and served
once its body is complete. Pipelined requests wait, and reading stops meanwhile.
Times are kept as one ``deadline_s`` that the server's sweep looks at.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools

from pdserve.http.answer import Answer
from pdserve.http.incoming import Application, IncomingRequest, ResponseWriter
from pdserve.http.limits import KEEP_ALIVE_S, NEVER, ServerLimits
from pdserve.http.sockets import tune
from pdserve.http.wire import CLOSE_LINE, CONTINUE, HERE, read_target, render_answer, without_upgrade

LINGER_S = 2.0
"""How long a refused client may take to stop sending; a reset in its face would eat our answer."""


@dataclass(slots=True)
class ServerState:
    """What the connections of one server share; the server changes the last three.

    ``is_leaving``: each answer ends its connection. ``is_closing``: none is made or kept.

    ``admit`` takes a new connection in, or returns False if there are too many; ``forget`` is called
    when it is closed; ``serve`` runs the application for one request; ``check_finished`` hears of answers.
    """

    application: Application
    limits: ServerLimits
    now: Callable[[], float]
    admit: Callable[[ServerConnection], bool]
    forget: Callable[[ServerConnection], None]
    serve: Callable[[IncomingRequest], None]
    check_finished: Callable[[], None]
    date_line: bytes = b""
    is_leaving: bool = False
    is_closing: bool = False


class ServerConnection(asyncio.Protocol):
    """Speaks HTTP/1.1 (and 1.0) as a server."""

    def __init__(self, server: ServerState) -> None:
        self.deadline_s = server.now() + server.limits.header_s
        self._server = server
        self._limits = server.limits
        self._writer = ResponseWriter(lambda: server.date_line, self._finished)
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._read_bytes = 0
        self._has_begun = False
        self._is_head_open = False
        self._reading: IncomingRequest | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._due_s = NEVER
        self._serving: IncomingRequest | None = None
        self._pipeline: deque[IncomingRequest] = deque()
        self._owes_continue = False
        self._is_deaf = False
        self._is_lingering = False
        self._unread_bytes = 0

    # -- for the server ----------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """True between two requests."""
        return self._serving is None and self._reading is None and not self._is_head_open

    def close(self) -> None:
        """Close once what was written has left."""
        if self._writer.transport is not None:
            self._writer.transport.close()

    def announce_end(self) -> None:
        """Say in the next head of an answer that the connection ends with it, unless more requests wait."""
        serving = self._serving
        if serving is not None and not serving.has_begun and not self._pipeline:
            serving.keep_alive = False

    def wind_up(self) -> None:
        """Close after the answer that is on its way, at once if there is none."""
        if self.is_idle:
            self.close()
        elif self._serving is not None:
            self._serving.keep_alive = False

    def abort(self) -> None:
        """Close now."""
        self._writer.abort()

    def expire(self) -> None:
        """``deadline_s`` has passed."""
        if self._writer.is_paused or self._is_lingering:
            self._expire_unread()
        elif self._is_head_open or self._reading is not None:
            what = "head" if self._is_head_open else "body"
            self._refuse(self._error(408, f"the request's {what} did not arrive in time"))
        elif self.is_idle:
            self.close()

    def _expire_unread(self) -> None:
        """Give up on a client that has read nothing since the deadline was set; a slow reader is allowed."""
        unread = self._writer.transport.get_write_buffer_size() if self._writer.transport is not None else 0
        if not 0 < unread < self._unread_bytes:
            self.abort()
            return
        self._unread_bytes = unread
        self.deadline_s = self._server.now() + self._limits.write_s

    def _finished(self, keep_alive: bool) -> None:
        self._serving = None
        if not keep_alive or self._server.is_closing:
            self._is_deaf = True
            self._linger()
            if self._server.is_closing:
                self._server.check_finished()
        elif self._pipeline:
            self._start(self._pipeline.popleft())
            if not self._pipeline and self._writer.transport is not None:
                self._writer.transport.resume_reading()
        else:
            self.deadline_s = self._server.now() + KEEP_ALIVE_S
            self._tell_to_continue()

    # -- asyncio.Protocol --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._writer.transport = cast(asyncio.Transport, transport)
        tune(transport)
        if not self._server.admit(self):
            self._refuse(self._error(503, "too many connections; try again later"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._server.forget(self)
        self._writer.transport = None
        self.resume_writing()
        self._pipeline.clear()
        if self._serving is not None:
            self._serving.leave()

    def pause_writing(self) -> None:
        """Called by the loop: the client does not read."""
        self._writer.is_paused = True
        self._await_reader()

    def resume_writing(self) -> None:
        """Called by the loop: the client has read."""
        self._restore_deadline()
        self._writer.resume()
        if self._serving is not None:
            self._serving.can_take_more()

    def _restore_deadline(self) -> None:
        """What is waited for, now that it is not the client's reading."""
        now_s, limits = self._server.now(), self._limits
        if self._serving is not None:
            self.deadline_s = NEVER
        elif self._is_head_open:
            self.deadline_s = now_s + limits.header_s
        elif self._reading is not None:
            self.deadline_s = min(now_s + limits.body_s, self._due_s)
        elif not self._is_lingering:
            self.deadline_s = now_s + KEEP_ALIVE_S

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._is_deaf:
            return
        self._read_bytes, self._has_begun = len(data), False
        try:
            self._parse(data)
        except httptools.HttpParserError as exc:
            if not self._is_deaf:
                self._refuse(self._error(400, f"this is not valid HTTP: {exc}"))
        if self._is_head_open and not self._is_deaf:
            # Of a read in which the head began, only a part is head.
            self._head_bytes = self._measure_head() if self._has_begun else self._head_bytes + len(data)
            self._check_head(self._head_bytes)

    def _parse(self, data: bytes | memoryview) -> None:
        """Feed the parser. An offer to upgrade is ignored (RFC 9110 §7.8): its head is read again without.

        Otherwise the parser would take the body for another protocol's bytes.
        """
        while not self._is_deaf:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as exc:
                if self._is_deaf:
                    return
                data = memoryview(data)[exc.args[0] :]
                former, self._parser = self._parser, httptools.HttpRequestParser(self)
                head = without_upgrade(
                    former.get_method(),
                    self._url,
                    former.get_http_version(),
                    self._headers,
                    keep_alive=former.should_keep_alive(),
                )
                self._parser.feed_data(head)

    # -- httptools ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._url, self._headers = b"", {}
        self._head_bytes, self._has_begun = 0, True
        now_s = self._server.now()
        self._due_s = now_s + self._limits.request_s
        if self.is_idle:
            self.deadline_s = now_s + self._limits.header_s
        self._is_head_open = True

    def on_url(self, url: bytes) -> None:
        """Called by the parser, perhaps in pieces."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for trailers: those are dropped, the keys have been checked."""
        if self._is_head_open:
            self._headers[name.lower()] = value
        elif not self._is_deaf:
            self._head_bytes += len(name) + len(value)
            self._check_head(self._head_bytes)

    def on_headers_complete(self) -> None:
        """Called by the parser: refuse, or get ready for the body."""
        self._is_head_open = False
        if self._is_deaf:
            return
        parser, headers = self._parser, self._headers
        method = parser.get_method().decode("latin-1")
        if parser.should_upgrade() and method != "CONNECT":
            return  # it is read again, see _parse
        may_be_long = self._head_bytes + self._read_bytes > self._limits.max_header_bytes
        if may_be_long and not self._check_head(self._measure_head()):
            return
        self._head_bytes = 0
        try:
            authority, target = read_target(method, self._url)
        except ValueError as exc:
            self._refuse(self._error(501 if method == "CONNECT" else 400, str(exc)))
            return
        if authority:
            headers[b"host"] = authority
        self._begin_body(
            IncomingRequest(
                self._writer,
                method,
                target,
                headers,
                keep_alive=parser.should_keep_alive(),
                is_http_1_0=parser.get_http_version() == "1.0",
            )
        )

    def _begin_body(self, client: IncomingRequest) -> None:
        """Refuse a request by its head, or let its body come."""
        headers = client.headers
        self._reading, self._body, self._body_bytes = client, [], 0
        answer = HERE if client.path == "*" else self._server.application.refuse(client)
        answer = answer or self._too_long(headers)
        if answer is not None:
            self._refuse_request(client, answer)
        elif headers.get(b"expect", b"").lower() == b"100-continue" and not client.is_http_1_0:
            self._owes_continue = True
            self._tell_to_continue()

    def _tell_to_continue(self) -> None:
        """Ask for the body that is held back, but not in the middle of the answer before it."""
        if self._owes_continue and self._serving is None:
            self._owes_continue = False
            self._writer.send(CONTINUE)

    def on_body(self, data: bytes) -> None:
        """Called by the parser."""
        if self._reading is None or self._is_deaf:
            return
        self._body.append(data)
        self._body_bytes += len(data)
        self.deadline_s = min(self._server.now() + self._limits.body_s, self._due_s)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse_request(self._reading, self._limit_answer("more"))

    def on_message_complete(self) -> None:
        """Called by the parser: serve the request, or let it wait its turn."""
        client, self._reading = self._reading, None
        if client is None or self._is_deaf:
            return
        self._owes_continue = False
        client.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        if self._serving is None:
            self._start(client)
        else:
            self._pipeline.append(client)
            if self._writer.transport is not None:
                self._writer.transport.pause_reading()

    # -- refusing ----------------------------------------------------------------------------

    def _measure_head(self) -> int:
        """Exactly; what was read may hold a body too."""
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers.items())

    def _check_head(self, size: int) -> bool:
        if size <= self._limits.max_header_bytes:
            return True
        limit = self._limits.max_header_bytes
        self._refuse(self._error(431, f"the request's head is longer than {limit} bytes"))
        return False

    def _too_long(self, headers: dict[bytes, bytes]) -> Answer | None:
        length = headers.get(b"content-length", b"")
        if length.isdigit() and len(length) < 20 and int(length) <= self._limits.max_body_bytes:
            return None
        return self._limit_answer(length.decode("latin-1")) if length else None

    def _limit_answer(self, size: str) -> Answer:
        limit = self._limits.max_body_bytes
        return self._error(413, f"the request body has {size} bytes, the limit is {limit}")

    def _refuse_request(self, client: IncomingRequest, answer: Answer) -> None:
        """Answer before the body; keep the connection only if none comes and it is this one's turn."""
        headers = client.headers
        has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        if has_body or self._serving is not None:
            self._refuse(answer, has_body=client.method != "HEAD")
            return
        client.refusal = answer

    def _refuse(self, answer: Answer, *, has_body: bool = True) -> None:
        """Answer out of turn and close. Nothing may follow on this connection."""
        lines = self._reading.lines if self._reading is not None else b""
        self._reading, self._is_head_open = None, False
        self._stop_reading()
        self._pipeline.clear()
        if self._serving is not None:  # what is on its way ends first, then the connection
            self._serving.keep_alive = False
            return
        rest = self._server.date_line + lines + CLOSE_LINE
        self._writer.send(render_answer(answer, (), rest=rest, has_body=has_body))
        self._linger()

    def _error(self, status: int, message: str) -> Answer:
        return self._server.application.error(self._reading, status, message)

    def _stop_reading(self) -> None:
        self._is_deaf = True
        if self._serving is not None:
            self._serving.keep_alive = False

    def _linger(self) -> None:
        """Say that nothing more comes, and give the client a moment to close first."""
        transport = self._writer.transport
        if transport is None or transport.is_closing():
            return
        self._is_lingering = True
        self._await_reader()
        try:
            if transport.can_write_eof():
                transport.write_eof()
            else:
                transport.close()
        except OSError:  # reset by the client, and the loop has not heard of it yet
            transport.abort()

    def _await_reader(self) -> None:
        """Set the deadline by which the client must have read something."""
        assert self._writer.transport is not None
        self._unread_bytes = self._writer.transport.get_write_buffer_size()
        wait_s = self._limits.write_s if self._unread_bytes else LINGER_S
        self.deadline_s = self._server.now() + wait_s

    def _start(self, client: IncomingRequest) -> None:
        self._serving = client
        self.deadline_s = NEVER
        if self._server.is_leaving:
            self.announce_end()
        self._server.serve(client)
