"""The HTTP server: accepts, keeps the clock for all connections, ends in order.

An ``Application`` answers. Without a web framework because every request of the
balancer passes here: no per-request scope, queues or middleware.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from email.utils import formatdate

from pdserve.http.incoming import Application, IncomingRequest
from pdserve.http.limits import ServerLimits
from pdserve.http.server_connection import ServerConnection, ServerState
from pdserve.http.sockets import BACKLOG

logger = logging.getLogger(__name__)

INTERNAL = "internal error of the server; its log has the details"
SWEEP_S = 1.0
"""Granularity of every time limit on clients."""


class HttpServer:
    """``await start(socket)``, later ``await close(grace_s)``; ``announce_end()`` before it, for clients."""

    def __init__(
        self, application: Application, limits: ServerLimits, tls: ssl.SSLContext | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._state = ServerState(
            application, limits, self._loop.time, self._admit, self._forget, self._start, self._check_finished
        )
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._connections: set[ServerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._is_finished = asyncio.Event()

    @property
    def num_connections(self) -> int:
        """Clients that are connected now."""
        return len(self._connections)

    @property
    def num_serving(self) -> int:
        """Requests being served now."""
        return len(self._tasks)

    async def start(self, listener: socket.socket) -> None:
        """Accept on a bound socket."""
        self._sweep()
        self._server = await self._loop.create_server(
            lambda: ServerConnection(self._state), sock=listener, backlog=BACKLOG, ssl=self._tls
        )

    def announce_end(self) -> None:
        """Serve on, new connections too, but let every answer from now on end its connection."""
        self._state.is_leaving = True
        for connection in self._connections:
            connection.announce_end()

    def stop_accepting(self) -> None:
        """Close the port and every connection between two requests."""
        self._state.is_leaving = self._state.is_closing = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.wind_up()

    def close_at_once(self) -> None:
        """Close the port and every connection; what was written still leaves."""
        self.stop_accepting()
        for connection in list(self._connections):
            connection.close()
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def finish_requests(self, limit_s: float) -> None:
        """After ``stop_accepting``: wait until no request is being read or answered, ``limit_s`` at most."""
        self._check_finished()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._is_finished.wait()

    async def close(self, grace_s: float) -> None:
        """Stop accepting, let answers reach their clients for ``grace_s``, break the rest."""
        self.stop_accepting()
        try:
            async with asyncio.timeout(grace_s):
                await self._is_empty.wait()
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()  # those cancelled before their first step
        if self._sweeper is not None:
            self._sweeper.cancel()

    # -- for connections ---------------------------------------------------------------------

    def _admit(self, connection: ServerConnection) -> bool:
        self._connections.add(connection)
        self._is_empty.clear()
        state = self._state
        return len(self._connections) <= state.limits.max_connections and not state.is_closing

    def _forget(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._is_empty.set()
        if self._state.is_closing:
            self._check_finished()

    def _check_finished(self) -> None:
        if all(connection.is_idle for connection in self._connections):
            self._is_finished.set()

    def _start(self, client: IncomingRequest) -> None:
        client.task = self._loop.create_task(self._serve(client))
        self._tasks.add(client.task)

    async def _serve(self, client: IncomingRequest) -> None:
        application = self._state.application
        try:
            if client.refusal is not None:
                await client.answer(client.refusal)
            else:
                await application.serve(client)
        except Exception:
            logger.exception("%s %s failed", client.method, client.path)
            if not client.has_begun:
                await client.answer(application.error(client, 500, INTERNAL))
        finally:
            self._tasks.discard(client.task)
            if not client.has_finished:
                client.break_off()

    def _sweep(self) -> None:
        self._state.date_line = b"date: %b\r\n" % formatdate(usegmt=True).encode()
        now_s = self._loop.time()
        for connection in list(self._connections):
            if connection.deadline_s <= now_s:
                connection.expire()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
