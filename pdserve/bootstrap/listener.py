"""An ASGI application on one socket, served by uvicorn's protocol without uvicorn's server loop.

The bootstrap service opens and closes a port per prefill instance; a whole
uvicorn.Server for each would tick ten times a second for nothing. What uvicorn
leaves to a proxy in front of it is added here: limits on the head of a request
and on the time it takes to arrive.
"""

from __future__ import annotations

import asyncio
import json
import socket
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

KEEP_ALIVE_S = 75
REQUEST_S = 20.0
"""A request must have arrived whole this long after the connection, or its first byte, did."""
MAX_HEAD_BYTES = 64 * 2**10
FINISH_S = 0.5


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection that does not wait for ever, nor for a head without end."""

    _deadline: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected; its first request is due within REQUEST_S."""
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a head that ends within this read is never too long."""
        self._expect_request()
        self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"head of the request is over {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """The head is in; a body may follow."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is in: from here on the time is ours, not the client's."""
        self._in_head, self._head_bytes = True, 0
        self._forget_deadline()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection ended, by whoever."""
        self._forget_deadline()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are not HTTP."""
        self._refuse(400, msg)

    def _expect_request(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self._on_slow)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self._refuse(408, f"request did not arrive within {REQUEST_S:g} s")

    def _refuse(self, status: int, message: str) -> None:
        # In the midst of an answer, more bytes would only garble it.
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            code = HTTPStatus(status).name.lower()
            body = json.dumps({"code": code, "message": message}).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


class RouteListener:
    """Serves ``app`` on ``host:port`` between ``start`` and ``stop``. Port 0 takes a free one."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._app = app
        self.host = host
        self.port = port
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind and listen. Raises OSError if the port is taken."""
        sock = bind(self.host, self.port)
        try:
            config = uvicorn.Config(
                self._app,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
            config.load()
            self._server = await asyncio.get_running_loop().create_server(
                lambda: GuardedProtocol(config=config, server_state=self._state, app_state={}), sock=sock
            )
        except BaseException:
            sock.close()
            raise
        self.port = sock.getsockname()[1]

    async def finish(self) -> None:
        """Stop, but let the requests that are being answered end first, for FINISH_S at most."""
        if self._server is not None:
            self._server.close()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=FINISH_S)
        self.stop()

    def stop(self) -> None:
        """Stop listening and close every connection, so that a peer on keep-alive notices now."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket; SO_REUSEADDR lets a restarted service take its former ports back."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
