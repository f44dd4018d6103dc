"""The balancer process: one event loop, one port, a fleet to watch and requests to serve.

Order of death: stop accepting, let requests in flight end, abort the rest on
their workers, then stop watching the fleet and close the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn
import uvloop

from pdserve.balancer.aggregate import ControlPlane
from pdserve.balancer.client_protocol import ClientProtocol
from pdserve.balancer.dispatch import PairDispatcher
from pdserve.balancer.fleet import Fleet, Membership
from pdserve.balancer.routes import App
from pdserve.balancer.upstream import UpstreamPool
from pdserve.config import BalancerConfig
from pdserve.errors import ConfigError

logger = logging.getLogger(__name__)

DRAIN_S = 30.0
BACKLOG = 2048
KEEP_ALIVE_S = 75  # nginx's default: longer than clients keep idle connections
GC_THRESHOLD = (20_000, 20, 50)
"""Requests make few cycles; collecting as often as by default costs 8 % of the balancer's time."""
LAST_WORDS_S = 5.0
"""How long clients may take to read the end of answers that were cut off at shutdown."""


class Balancer:
    """A balancer in this event loop; ``run_balancer`` wraps it for a process of its own.

    ``membership`` replaces the watch of ``config.bootstrap_url``; for tests.
    """

    def __init__(self, config: BalancerConfig, membership: Membership | None = None) -> None:
        self.config = config
        self.pool = UpstreamPool(connect_s=config.connect_s)
        self.fleet = Fleet(config, self.pool, membership)
        self.dispatcher = PairDispatcher(config, self.fleet, self.pool)
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The real port after ``start``, if 0 was asked."""
        return self.config.port if self._socket is None else int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """``http://host:port``."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Listen and begin to watch the fleet; returns once connections are accepted.

        Raises:
            ConfigError: if the address cannot be listened on.
        """
        self._socket = bind(self.config.host, self.config.port)
        url = self.url
        app = App(
            ControlPlane(self.fleet, self.pool, self.dispatcher), self.dispatcher, self.config.max_body_bytes
        )
        await self.fleet.start()
        self._server = _Server(_uvicorn_config(app))
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="balancer-http")
        await self._server.is_up.wait()
        logger.info("balancer listening on %s", url)

    async def stop(self, drain_s: float = 0.0, hurry: asyncio.Event | None = None) -> None:
        """Stop accepting, give requests in flight ``drain_s`` to end (until ``hurry``), end everything."""
        if self._server is None or self._serving is None:
            await self.fleet.stop()
            await self.pool.close()
            return
        self._server.should_exit = True
        closing = asyncio.create_task(self.dispatcher.close(drain_s))
        if hurry is not None:
            await _first_of(closing, hurry)
            if not closing.done():
                await self.dispatcher.close()
        await closing
        await asyncio.wait({self._serving}, timeout=LAST_WORDS_S)
        self._server.force_exit = True
        await self._serving
        await self.fleet.stop()
        await self.pool.close()
        logger.info("balancer stopped")


def run_balancer(config: BalancerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: BalancerConfig) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, on_signal)
    balancer = Balancer(config)
    await balancer.start()
    await stop.wait()
    logger.info("balancer draining for up to %g s; a second signal ends at once", DRAIN_S)
    await balancer.stop(DRAIN_S, hurry)


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket, so that a taken port is known before anything else starts.

    Raises:
        ConfigError: if the address cannot be had.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as exc:
        raise ConfigError(f"balancer cannot listen on {host!r}: {exc.strerror}; check --host") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise ConfigError(
            f"balancer cannot listen on {host}:{port} ({exc.strerror}); choose another with --port"
        ) from exc
    listener.setblocking(False)
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers; tells when it accepts."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.is_up.set()


def _uvicorn_config(app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=ClientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
    )


async def _first_of(closing: asyncio.Task[None], hurry: asyncio.Event) -> None:
    signalled = asyncio.create_task(hurry.wait())
    await asyncio.wait({closing, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
