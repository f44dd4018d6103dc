"""The client's side of one exchange: a request that is wholly here, and how far its answer got.

Knows HTTP, not SGLang. Everything sent carries the headers in ``extra``. What the
client must be told goes through its ``Line``, the connection it came by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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
    """The balancer ended the request; the client is still there."""


class Line(Protocol):
    """The connection as an answer needs it."""

    @property
    def date_line(self) -> bytes:
        """The ``date`` header of now, with its line end."""
        ...

    @property
    def is_write_paused(self) -> bool:
        """True while the client reads more slowly than we write."""
        ...

    def send(self, data: bytes) -> None:
        """Write; nothing happens if the client has left."""
        ...

    async def drained(self) -> None:
        """Wait until the client has read enough, or has left."""
        ...

    def finished(self, *, keep_alive: bool) -> None:
        """The answer is complete."""
        ...

    def abort(self) -> None:
        """Close now, in the middle of an answer if need be."""
        ...


class IncomingRequest:
    """One request and its answer.

    Exactly one of ``answer`` (whole) or ``begin`` … ``write`` … ``finish`` (as it
    comes) is used. ``has_begun`` means bytes are out: the status cannot change.
    ``endpoint`` and ``refusal`` are the application's notes from its first look,
    ``request_id`` is the client's own name for the request, if it gave one. ``lines``
    are further header lines of the answer, each with its end.
    """

    __slots__ = (
        "_is_chunked",
        "_line",
        "body",
        "endpoint",
        "extra",
        "has_begun",
        "has_finished",
        "has_left",
        "headers",
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
        self, line: Line, method: str, target: bytes, headers: dict[bytes, bytes], *, keep_alive: bool,
        is_http_1_0: bool = False,
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
        self._is_chunked = not is_http_1_0
        self._line = line

    def identify(self, rid: str) -> None:
        """Name the request in its answer, unless its client did; the last attempt's name stays."""
        if not self.request_id:
            self.extra = ((b"x-request-id", rid.encode()),)

    # -- answering ---------------------------------------------------------------------------

    async def answer(self, answer: Answer) -> None:
        """Send a whole answer."""
        self.has_begun = self.has_finished = True
        line = self._line
        rest = line.date_line + self.lines if self.keep_alive else line.date_line + self.lines + CLOSE_LINE
        line.send(render_answer(answer, self.extra, rest=rest, has_body=self.method != "HEAD"))
        line.finished(keep_alive=self.keep_alive)
        if line.is_write_paused:
            await line.drained()

    def begin(self, status: int, headers: Headers) -> None:
        """Send the head of an answer whose length is not known."""
        self.has_begun = True
        if not self._is_chunked:
            self.keep_alive = False  # its end is the connection's
        rest = self._line.date_line + self.lines
        if not self.keep_alive:
            rest += CLOSE_LINE
        if self._is_chunked:
            rest += CHUNKED_LINE
        self._line.send(render_head(status, (*headers, *self.extra), rest=rest))

    def push(self, data: bytes) -> bool:
        """Send one piece, as it is; False if the next should wait for ``on_writable``."""
        if data:
            self._line.send(render_chunk(data) if self._is_chunked else data)
        return not self._line.is_write_paused

    async def write(self, data: bytes) -> None:
        """Send one piece, and wait if the client does not keep up."""
        if not self.push(data):
            await self._line.drained()

    async def finish(self, last: bytes = b"") -> None:
        """End the answer."""
        self.push(last)
        self.has_finished = True
        if self._is_chunked:
            self._line.send(LAST_CHUNK)
        self._line.finished(keep_alive=self.keep_alive)

    def break_off(self) -> None:
        """End the connection instead of the answer: the client must not take it for complete."""
        self.has_begun = self.has_finished = True
        self._line.abort()

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
