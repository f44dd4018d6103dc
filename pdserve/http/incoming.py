"""One request of a client, wholly received, and its answer, whole or as a stream.

Every answer carries the headers in ``extra``. It leaves by the ``ResponseWriter`` of the
connection that the request came by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import unquote

from pdserve.errors import PdserveError
from pdserve.http.answer import Answer, Headers
from pdserve.http.wire import (
    CHUNKED_LINE,
    CLOSE_LINE,
    LAST_CHUNK,
    render_answer,
    render_chunk,
    render_head,
)


class ClientLeft(PdserveError):
    """The client closed its connection before the answer was complete."""


class Interrupted(PdserveError):
    """The server ended the request; the client is still there."""


class ResponseWriter:
    """The writing half of one client connection; requests on it share it, one after the other.

    ``date_line`` returns the ``date`` header of now, with its line end; ``on_finished`` is called at
    the end of each answer and is told whether the connection may be kept.
    """

    __slots__ = ("_can_resume", "date_line", "is_paused", "on_finished", "transport")

    def __init__(self, date_line: Callable[[], bytes], on_finished: Callable[[bool], None]) -> None:
        self.date_line = date_line
        self.on_finished = on_finished
        self.transport: asyncio.Transport | None = None
        self.is_paused = False
        self._can_resume: asyncio.Future[None] | None = None

    def send(self, data: bytes) -> None:
        """Write; nothing happens if the client has left."""
        if self.transport is not None:
            self.transport.write(data)

    async def drained(self) -> None:
        """Wait until the client has read enough, or has left."""
        if self.is_paused:
            self._can_resume = asyncio.get_running_loop().create_future()
            await self._can_resume

    def resume(self) -> None:
        """End the wait of ``drained``: the client has read enough, or has left."""
        self.is_paused = False
        if self._can_resume is not None and not self._can_resume.done():
            self._can_resume.set_result(None)

    def abort(self) -> None:
        """Close the connection now, in the middle of an answer if need be."""
        if self.transport is not None:
            self.transport.abort()


class IncomingRequest:
    """One request and its answer.

    Exactly one of ``answer`` (whole) or ``begin`` … ``write`` … ``finish`` (as it
    comes) is used. ``has_begun`` means bytes are out: the status cannot change.
    ``endpoint`` and ``refusal`` are the application's notes from its first look,
    ``request_id`` is the client's own name for the request, if it gave one. ``lines``
    are further header lines of the answer, each with its end.
    """

    __slots__ = (
        "_writer",
        "body",
        "endpoint",
        "extra",
        "has_begun",
        "has_finished",
        "has_left",
        "headers",
        "is_http_1_0",
        "keep_alive",
        "lines",
        "method",
        "on_left",
        "on_writable",
        "path",
        "query",
        "refusal",
        "request_id",
        "task",
    )

    def __init__(
        self, writer: ResponseWriter, method: str, target: bytes, headers: dict[bytes, bytes], *,
        keep_alive: bool, is_http_1_0: bool = False,
    ) -> None:  # fmt: skip
        path, _, self.query = target.partition(b"?")
        name = path.decode("latin-1")
        self.method = method
        self.path = unquote(name) if "%" in name else name
        self.headers = headers
        self.body = b""
        self.extra: Headers = ()
        self.request_id = ""
        self.lines = b""
        self.task: Any = None
        self.endpoint: Any = None
        self.refusal: Answer | None = None
        self.keep_alive = keep_alive and not is_http_1_0
        self.has_begun = False
        self.has_finished = False
        self.has_left = False
        self.on_left: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self.is_http_1_0 = is_http_1_0
        self._writer = writer

    @property
    def local_host(self) -> str:
        """This machine's address as the client reached it; empty if the client has left."""
        transport = self._writer.transport
        name = transport.get_extra_info("sockname") if transport is not None else None
        return str(name[0]) if name else ""

    def identify(self, rid: str) -> None:
        """Name the request in its answer, unless its client did; the last attempt's name stays."""
        if not self.request_id:
            self.extra = ((b"x-request-id", rid.encode()),)

    # -- answering ---------------------------------------------------------------------------

    async def answer(self, answer: Answer) -> None:
        """Send a whole answer."""
        self.has_begun = self.has_finished = True
        writer = self._writer
        rest = writer.date_line() + self.lines
        if not self.keep_alive:
            rest += CLOSE_LINE
        writer.send(render_answer(answer, self.extra, rest=rest, has_body=self.method != "HEAD"))
        writer.on_finished(self.keep_alive)
        if writer.is_paused:
            await writer.drained()

    def begin(self, status: int, headers: Headers) -> None:
        """Send the head of an answer whose length is not known."""
        self.has_begun = True
        if self.is_http_1_0:
            self.keep_alive = False  # its end is the connection's
        rest = self._writer.date_line() + self.lines
        if not self.keep_alive:
            rest += CLOSE_LINE
        if not self.is_http_1_0:
            rest += CHUNKED_LINE
        self._writer.send(render_head(status, (*headers, *self.extra), rest=rest))

    def push(self, data: bytes) -> bool:
        """Send one piece, as it is; False if the next should wait for ``on_writable``."""
        if data:
            self._writer.send(data if self.is_http_1_0 else render_chunk(data))
        return not self._writer.is_paused

    async def write(self, data: bytes) -> None:
        """Send one piece, and wait if the client does not keep up."""
        if not self.push(data):
            await self._writer.drained()

    async def finish(self, last: bytes = b"") -> None:
        """End the answer."""
        self.push(last)
        self.has_finished = True
        if not self.is_http_1_0:
            self._writer.send(LAST_CHUNK)
        self._writer.on_finished(self.keep_alive)

    def break_off(self) -> None:
        """End the connection instead of the answer: the client must not take it for complete."""
        self.has_begun = self.has_finished = True
        self._writer.abort()

    # -- for the connection ------------------------------------------------------------------

    def leave(self) -> None:
        """The client is gone."""
        self.has_left = True
        if self.on_left is not None:
            self.on_left()

    def can_take_more(self) -> None:
        """The client has read what was held up."""
        if self.on_writable is not None:
            self.on_writable()


class Application(Protocol):
    """Answers requests; implemented outside of this package."""

    def refuse(self, client: IncomingRequest) -> Answer | None:
        """Return an error, or None to go on; called once the head is there and before the body."""
        ...

    def error(self, client: IncomingRequest | None, status: int, message: str) -> Answer:
        """Return an error of HTTP itself, as ``client`` expects it; None: its head was not read."""
        ...

    def serve(self, client: IncomingRequest) -> Awaitable[object]:
        """Answer the whole request, unless the client leaves."""
        ...


class CancelOnDisconnect:
    """Cancels the task that serves ``client`` when the client has left, or on ``interrupt``.

    ``with presence:`` goes around the serving, in that task; it raises ClientLeft
    or Interrupted in place of the CancelledError that it caused. It causes at most
    one, so a foreign cancellation is told apart and stays what it is.
    """

    __slots__ = ("_client", "_has_left", "_is_interrupted", "_task")

    def __init__(self, client: IncomingRequest) -> None:
        self._client = client
        self._has_left = False
        self._is_interrupted = False
        self._task: asyncio.Task[Any] | None = None

    def interrupt(self) -> None:
        """End the serving, for a reason other than the client's."""
        if self._task is not None and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def __enter__(self) -> None:
        if self._client.has_left:
            raise ClientLeft("the client left")
        self._task = asyncio.current_task()
        self._client.on_left = self._leave

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        task, self._task = self._task, None
        self._client.on_left = None
        if kind is not asyncio.CancelledError or not self._is_interrupted or task is None:
            return
        if task.uncancel() == 0:
            if self._has_left:
                raise ClientLeft("the client left") from None
            raise Interrupted("the balancer is stopping") from None

    def _leave(self) -> None:
        if not self._client.has_finished:
            self._has_left = True
            self.interrupt()
