"""An ASGI application on one socket, served by uvicorn's protocol without uvicorn's server loop.

The bootstrap service opens and closes a port per prefill instance; a whole
uvicorn.Server for each would tick ten times a second for nothing.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

KEEP_ALIVE_S = 75


class Listener:
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
        self.port = sock.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http=HttpToolsProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: HttpToolsProtocol(config=config, server_state=self._state, app_state={}), sock=sock
        )

    def stop(self) -> None:
        """Stop listening and close every connection, so that a peer on keep-alive notices now."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._state.tasks):
            task.cancel()  # long polls
        for connection in list(self._state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket; SO_REUSEADDR lets a restarted service take its former ports back."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
