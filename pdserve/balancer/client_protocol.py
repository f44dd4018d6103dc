"""uvicorn's HTTP protocol with one system call per turn of the loop, and JSON for what is not HTTP.

    ASGI start ─┐
    ASGI body  ─┴─► CoalescedTransport ── end of this turn ──► socket

ASGI makes the head and the body of an answer two writes; as two system calls
they cost the balancer a tenth of its time and the client a second wake-up.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pdserve.balancer.http_errors import error_answer
from pdserve.balancer.sockets import tune


class CoalescedTransport:
    """A transport whose writes within one turn of the loop leave together, in order."""

    __slots__ = ("_loop", "_pending", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send ``data`` before this turn of the loop is over."""
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)

    def close(self) -> None:
        """Close after everything written has left."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close now."""
        self._pending.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        """True once it will send nothing more."""
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        """As asyncio.Transport."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """As asyncio.Transport."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As asyncio.Transport."""
        return self._transport.get_extra_info(name, default)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if pending and not self._transport.is_closing():
            self._transport.write(pending[0] if len(pending) == 1 else b"".join(pending))


class ClientProtocol(HttpToolsProtocol):
    """One client connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        tune(transport)
        coalesced = CoalescedTransport(cast(asyncio.Transport, transport))
        super().connection_made(cast(asyncio.Transport, coalesced))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are not HTTP."""
        body = error_answer(400, msg).body
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()
