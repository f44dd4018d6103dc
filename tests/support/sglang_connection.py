"""The HTTP side of a fake worker: one accepted connection, and every way to end an answer badly.

    socket ─► httptools ─► Worker.answer(connection, method, path, body) in a task
           ◄── respond / begin_stream, chunk, end_stream / reset, fin, garbage ◄──┘

Knows nothing of prompts. Notices the peer that leaves before its answer was complete.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Protocol, cast

import httptools

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
NOT_HTTP = b"\x16\x03\x01\x02\x00SSH-2.0-not-http\r\n\r\n"


class Worker(Protocol):
    """What a connection needs of its server."""

    is_write_paused: bool
    reset_on_accept: int
    """Connections to reset as soon as they are accepted."""

    def connected(self, connection: FakeConnection) -> None:
        """Accepted."""
        ...

    def disconnected(self, connection: FakeConnection, *, in_answer: bool) -> None:
        """Closed; ``in_answer``: by the peer, before the response had ended."""
        ...

    def is_muted(self, num_served: int) -> bool:
        """True if the connection must break at this request, before any answer."""
        ...

    def called(self, method: str, target: bytes, headers: dict[str, str]) -> None:
        """A request has come, whatever it is for."""
        ...

    async def answer(self, connection: FakeConnection, method: str, path: str, body: bytes) -> None:
        """Serve one request."""
        ...

    def answered(self, connection: FakeConnection) -> None:
        """A response is complete."""
        ...


class FakeConnection(asyncio.Protocol):
    """One accepted connection: parses requests, runs one at a time."""

    def __init__(self, worker: Worker) -> None:
        self.rid = ""
        self.headers: dict[str, str] = {}
        self.task: asyncio.Task[None] | None = None
        self.is_answered = True
        self.is_streaming = False
        self.has_head = False
        """Part of the answer is out."""
        self.writable = asyncio.Event()
        self.writable.set()
        self._worker = worker
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = bytearray()
        self._num_served = 0
        self._transport: asyncio.Transport | None = None

    # -- asyncio.Protocol --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._worker.connected(self)
        if self._worker.reset_on_accept > 0:
            self._worker.reset_on_accept -= 1
            self.reset()

    def connection_lost(self, exc: Exception | None) -> None:
        self._worker.disconnected(self, in_answer=not self.is_answered)
        self.is_answered = True
        self.writable.set()
        if self.task is not None and not self.task.done():
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        self.writable.clear()
        self._worker.is_write_paused = True

    def resume_writing(self) -> None:
        self.writable.set()
        self._worker.is_write_paused = False

    # -- httptools ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url, self._body, self.headers = b"", bytearray(), {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.is_answered, self.is_streaming, self.has_head, self.rid = False, False, False, ""
        self._num_served += 1
        if self._worker.is_muted(self._num_served):
            self.abort()
            return
        method = self._parser.get_method().decode()
        path = self._url.decode("latin-1").partition("?")[0]
        work = self._worker.answer(self, method, path, bytes(self._body))
        self._worker.called(method, self._url, self.headers)
        self.task = asyncio.get_running_loop().create_task(work, name="fake-answer")

    # -- answering ---------------------------------------------------------------------------

    def respond(
        self, status: int, body: bytes, content_type: str = "application/json", length: int | None = None
    ) -> None:
        """A whole response; ``length`` announces another size than is sent."""
        size = len(body) if length is None else length
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {size}\r\n\r\n"
        self.write(head.encode() + body)
        if length is None:
            self._answered()

    def begin_stream(self) -> None:
        """The head of an event stream."""
        self.is_streaming = True
        self.write(STREAM_HEAD)

    def chunk(self, data: bytes) -> None:
        """One chunk of a stream."""
        self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        """The terminating chunk."""
        self.write(b"0\r\n\r\n")
        self._answered()

    def write(self, data: bytes) -> None:
        """Bytes as they are."""
        if self._transport is not None and not self._transport.is_closing():
            self.has_head = True
            self._transport.write(data)

    # -- ending ------------------------------------------------------------------------------

    def close(self) -> None:
        """FIN after what was written."""
        if self._transport is not None:
            self._transport.close()

    def fin(self) -> None:
        """FIN in the middle of a response, after what was written has left; our doing, not the peer's."""
        self.is_answered = True
        self.close()

    def abort(self) -> None:
        """Close now; whether the peer sees a reset is up to the kernel, as when a process is killed."""
        self.is_answered = True
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """RST, whatever was read or written."""
        if self._transport is not None and not self._transport.is_closing():
            sock = cast(socket.socket, self._transport.get_extra_info("socket"))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def garble(self) -> None:
        """Bytes that are not HTTP, nor part of a chunked body; then nothing."""
        self.write(NOT_HTTP)

    def _answered(self) -> None:
        self.is_answered = True
        self._worker.answered(self)
