"""The balancer process: one event loop, one port, a fleet to watch and requests to serve.

Order of death: say so (readiness 503, connections end with their answer) and serve on, stop
accepting, let requests in flight end, abort the rest on their workers, then stop watching the
fleet and close the connections.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import ssl
from typing import TYPE_CHECKING

import uvloop

from pdserve.balancer.api.auth import KeyRing
from pdserve.balancer.api.forward import WorkerAsker
from pdserve.balancer.api.health import HealthControl
from pdserve.balancer.api.routes import BalancerApi, DataPlane, build_routes
from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.balancer.proxy.dispatcher import PairDispatcher
from pdserve.bootstrap.watch import FleetWatcher
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.http import sockets
from pdserve.http.client import HttpClient
from pdserve.http.limits import ServerLimits
from pdserve.http.server import HttpServer

if TYPE_CHECKING:
    from pdserve.balancer.tracing.export import Tracing

logger = logging.getLogger(__name__)

SPARE_FILES = 256
"""Open files kept back from clients: listening, logs, idle connections to workers."""
FILES_PER_REQUEST = 3
"""A client's connection and one to each worker of its pair."""
GC_THRESHOLD = (20_000, 20, 50)
"""Requests make few cycles; collecting as often as by default costs 8 % of the balancer's time."""
LOOK_S = 1.0
"""How often the workers' counters and the queue are looked at."""
LAST_WORDS_S = 5.0
"""How long clients may take to read the end of answers that were cut off at shutdown."""


class Balancer:
    """A balancer in this event loop; ``run_balancer`` wraps it for a process of its own.

    ``membership`` replaces the watch of ``config.bootstrap_url``; for tests.

    Raises:
        ConfigError: if traces are asked for and cannot be sent.
    """

    def __init__(self, config: BalancerConfig, membership: FleetWatcher | None = None) -> None:
        self.config = config
        self.pool = HttpClient(connect_s=config.connect_s)
        self.metrics = WorkerMetrics()
        self.fleet = WorkerFleet(config, self.pool, membership, self.metrics)
        self._tracing = _open_tracing(config)
        self.dispatcher = PairDispatcher(config, self.fleet, self.pool, self._tracing)
        self._asker = WorkerAsker(self.fleet, self.pool, config)
        self._health = HealthControl(self._asker, self.dispatcher.ledger, self.metrics)
        self._socket: socket.socket | None = None
        self._server: HttpServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        """The real port after ``start``, if 0 was asked."""
        return self.config.port if self._socket is None else int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """``http://host:port``, or https."""
        scheme = "https" if self.config.tls_cert_path else "http"
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"{scheme}://{host}:{self.port}"

    async def start(self) -> None:
        """Listen and begin to watch the fleet; returns once connections are accepted.

        Raises:
            ConfigError: if the address cannot be listened on.
        """
        config = self.config
        tls = tls_context(config.tls_cert_path, config.tls_key_path)
        self._socket = bind(config.host, config.port)
        dispatcher = self.dispatcher
        plane = DataPlane(dispatcher.dispatch, dispatcher.abort, dispatcher.abort_all, dispatcher.ledger)
        routes = build_routes(self._asker, plane, self.metrics, self._health)
        app = BalancerApi(routes, KeyRing(config.api_key, config.control_key))
        await self.fleet.start()
        self._tasks = [
            asyncio.create_task(self._look(), name="worker-metrics"),
            asyncio.create_task(dispatcher.mover.run(), name="moves"),
        ]
        self._server = HttpServer(app, _limits(config), tls)
        await self._server.start(self._socket)
        logger.info("balancer listening on %s", self.url)

    async def stop(
        self, drain_s: float = 0.0, hurry: asyncio.Event | None = None, *, delay_s: float = 0.0
    ) -> None:
        """Serve on for ``delay_s``, give requests in flight ``drain_s`` to end, end everything.

        While it serves on readiness is 503 and each answer ends its connection. ``hurry`` ends both times.
        """
        ending = asyncio.create_task(self._end_requests(delay_s, drain_s))
        if hurry is not None and await _is_first(hurry, ending):
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)
            ending = asyncio.create_task(self._end_requests())
        await ending
        if self._server is not None:
            await self._server.close(LAST_WORDS_S)
        for task in self._tasks:
            task.cancel()
        await self.fleet.stop()
        await self.pool.close()
        if self._tracing is not None:
            await self._tracing.close()
        logger.info("balancer stopped")

    async def _end_requests(self, delay_s: float = 0.0, drain_s: float = 0.0) -> None:
        self._health.is_leaving = True
        if self._server is not None:
            self._server.announce_end()
        await asyncio.sleep(delay_s)
        if self._server is not None:
            self._server.stop_accepting()
            await self._server.finish_requests(drain_s)  # also those that are half here
        await self.dispatcher.close()

    async def _look(self) -> None:
        while True:
            self.metrics.look(
                self.fleet.workers(), self.fleet.scheduler.table, self.fleet.scheduler.num_waiting
            )
            await asyncio.sleep(LOOK_S)


def run_balancer(config: BalancerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Before that SIGTERM gives load balancers ``shutdown_delay_s`` to turn elsewhere; who presses Ctrl-C has
    none.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: BalancerConfig) -> None:
    loop = asyncio.get_running_loop()
    first: asyncio.Future[int] = loop.create_future()
    hurry = asyncio.Event()

    def on_signal(number: int) -> None:
        if first.done():
            hurry.set()
        else:
            first.set_result(number)

    raise_file_limit()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, on_signal, sig)
    balancer = Balancer(config)
    await balancer.start()
    delay_s = config.shutdown_delay_s if await first == signal.SIGTERM else 0.0
    logger.info(
        "balancer leaving: serves on for %g s, then draining for up to %g s; a second signal ends at once",
        delay_s, config.drain_s,
    )  # fmt: skip
    await balancer.stop(config.drain_s, hurry, delay_s=delay_s)


def bind(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket, so that a taken port is known before anything else starts.

    Raises:
        ConfigError: if the address cannot be had.
    """
    try:
        return sockets.bind(host, port)
    except socket.gaierror as exc:
        raise ConfigError(f"balancer cannot listen on {host!r}: {exc.strerror}; check --host") from exc
    except OSError as exc:
        raise ConfigError(
            f"balancer cannot listen on {host}:{port} ({exc.strerror}); choose another with --port"
        ) from exc


def tls_context(cert_path: str, key_path: str) -> ssl.SSLContext | None:
    """What clients are spoken to with; None: plain HTTP.

    Raises:
        ConfigError: if only one of the two files is named, or they are not a certificate and its key.
    """
    if not cert_path and not key_path:
        return None
    if not (cert_path and key_path):
        raise ConfigError("TLS needs both --tls-cert-path and --tls-key-path")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert_path, key_path)
    except (OSError, ssl.SSLError) as exc:
        why = exc.strerror or exc
        raise ConfigError(f"cannot use {cert_path} with {key_path} for TLS: {why}") from exc
    return context


def raise_file_limit() -> None:
    """Let this process open as many files as it may: each streamed request takes three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _limits(config: BalancerConfig) -> ServerLimits:
    return ServerLimits(
        max_body_bytes=config.max_body_bytes,
        max_header_bytes=config.max_header_bytes,
        header_s=config.header_s,
        body_s=config.body_s,
        write_s=config.write_s,
        max_connections=config.max_connections or _max_connections(),
    )


def _max_connections() -> int:
    """Clients that the limit on open files has room for, with their workers' connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(SPARE_FILES, (soft - SPARE_FILES) // FILES_PER_REQUEST)


def _open_tracing(config: BalancerConfig) -> Tracing | None:
    if not config.otlp_endpoint:
        return None
    try:
        from pdserve.balancer.tracing.export import open_tracing
    except ImportError as exc:
        raise ConfigError(
            f"traces need OpenTelemetry: pip install 'pdserve[otel]', or leave out --otlp-endpoint ({exc})"
        ) from exc
    return open_tracing(config.otlp_endpoint, config.otlp_sample)


async def _is_first(event: asyncio.Event, task: asyncio.Task[None]) -> bool:
    """Wait for either; True if ``event`` is set while ``task`` still runs."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return not task.done()
