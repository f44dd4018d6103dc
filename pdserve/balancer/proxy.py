"""The client's side of one exchange: an ASGI connection with a memory of how far its answer got.

Knows HTTP, not SGLang. Everything sent carries the headers in ``extra``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pdserve.balancer.http_errors import Answer, Headers
from pdserve.errors import PdserveError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ClientLeft(PdserveError):
    """The client closed its connection before the answer was complete."""


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


async def run_while_present(client: Client, work: asyncio.Task[None]) -> bool:
    """Await ``work``; if the client leaves before its answer is complete, cancel it.

    Returns only when ``work`` has ended. Being cancelled cancels ``work`` too.

    Returns:
        False if the client left.
    """
    leaving = asyncio.create_task(client.wait_left())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if work.done() or client.has_finished:
            await asyncio.wait({work})
            return True
        work.cancel()
        await asyncio.wait({work})
        return False
    finally:
        leaving.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
