"""The client's side of one exchange: an ASGI connection with a memory of how far its answer got.

Knows HTTP, not SGLang. Everything sent carries the headers in ``extra``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pdserve.balancer.http_errors import Answer, Headers
from pdserve.errors import PdserveError

WATCH_AFTER_S = 0.02
"""When to begin to watch whether the client is still there: shorter requests need no task of their own."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientLeft(PdserveError):
    """The client closed its connection before the answer was complete."""


class Interrupted(PdserveError):
    """The balancer ended the request; the client is still there."""


class BodyTooLarge(PdserveError):
    """The request body is longer than the limit that the message names."""


class Client:
    """One request and its answer.

    Exactly one of ``answer`` (whole) or ``begin`` … ``write`` … ``finish`` (as it
    comes) is used. ``has_begun`` means bytes are out: the status cannot change.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.extra: Headers = ()
        self.has_begun = False
        self.has_finished = False
        self._receive = receive
        self._send = send

    async def read_body(self, limit: int) -> bytes:
        """The whole request body.

        Raises:
            BodyTooLarge: as soon as it is known; before reading if Content-Length says so.
            ClientLeft: if the connection ended within the body.
        """
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise BodyTooLarge(f"the request body has {int(length)} bytes, the limit is {limit}")
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft("the client left while sending its request")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise BodyTooLarge(f"the request body is longer than the limit of {limit} bytes")
            chunks.append(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def wait_left(self) -> None:
        """Return when the client is gone, or its answer is complete. Call after ``read_body``."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the head of an answer whose length is not known."""
        self.has_begun = True
        head = [*headers, *self.extra]
        await self._send({"type": "http.response.start", "status": status, "headers": head})

    async def write(self, chunk: bytes) -> None:
        """Send one piece, as it is."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self, last: bytes = b"") -> None:
        """End the answer."""
        self.has_finished = True
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def answer(self, answer: Answer) -> None:
        """Send a whole answer."""
        length = (b"content-length", str(len(answer.body)).encode())
        await self.begin(answer.status, (*answer.headers, length))
        await self.finish(b"" if self.method == "HEAD" else answer.body)


class Presence:
    """Cancels the task that serves ``client`` when the client has left, or on ``interrupt``.

    ``with presence:`` goes around the serving, in that task; it raises ClientLeft
    or Interrupted in place of the CancelledError that it caused. It causes at most
    one, so a foreign cancellation is told apart and stays what it is.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._has_left = False
        self._is_interrupted = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None

    def interrupt(self) -> None:
        """End the serving, for a reason other than the client's."""
        if self._task is not None and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._start_watch)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if kind is not asyncio.CancelledError or not self._is_interrupted or task is None:
            return
        if task.uncancel() == 0:
            if self._has_left:
                raise ClientLeft("the client left") from None
            raise Interrupted("the balancer is stopping") from None

    def _start_watch(self) -> None:
        self._watch = asyncio.create_task(self._wait_left())

    async def _wait_left(self) -> None:
        await self._client.wait_left()
        if not self._client.has_finished:
            self._has_left = True
            self.interrupt()
