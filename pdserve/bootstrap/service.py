"""The bootstrap service: one process that knows who is alive and introduces decode to prefill.

    main port      /fleet/*                      workers register, balancers watch
    port per prefill instance  /route /health …  SGLang's bootstrap protocol

A new prefill instance always gets a new port, so a decode server can never
take it for its predecessor; when an instance ends its port closes and its
connections break, which is how decode servers notice at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal

from pdserve.bootstrap.main_api import main_api
from pdserve.bootstrap.membership import FleetMembership
from pdserve.bootstrap.web import RouteListener
from pdserve.config.launch import BootstrapConfig
from pdserve.errors import ConfigError

logger = logging.getLogger(__name__)

EXPIRY_CHECK_S = 0.5
STALL_S = 1.0
"""A loop later than this was stopped or starved: nobody's silence in that time counts."""


class BootstrapService(FleetMembership):
    """The service in this process's event loop; ``run_bootstrap`` wraps it for a process of its own."""

    def __init__(self, config: BootstrapConfig) -> None:
        super().__init__(config)
        self.listener = RouteListener(main_api(self), config.host, config.port)
        self._expiry: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Main port; the real one after ``start`` if 0 was asked."""
        return self.listener.port

    @property
    def url(self) -> str:
        """``http://host:port`` of the main port."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Listen. Raises ConfigError if the port is taken or the host is not ours."""
        try:
            await self.listener.start()
        except OSError as exc:
            is_host = exc.errno == errno.EADDRNOTAVAIL or exc.errno is None or exc.errno < 0  # gaierror < 0
            advice = "give an address of this machine with" if is_host else "choose another port with"
            raise ConfigError(
                f"bootstrap service cannot listen on {self.config.host}:{self.config.port} "
                f"({exc.strerror}); {advice} {'--host' if is_host else '--port'}"
            ) from exc
        self.begin()
        self._expiry = asyncio.get_running_loop().create_task(self._expire_leases())
        logger.info("bootstrap service listening on %s epoch=%s", self.url, self.fleet.epoch)

    async def stop(self) -> None:
        """Close every port; members re-register with the next service by themselves."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
        self.end_polls()
        await self.listener.finish()
        self.close_ports()

    async def _expire_leases(self) -> None:
        while True:
            planned = self.now() + EXPIRY_CHECK_S
            await asyncio.sleep(EXPIRY_CHECK_S)
            late_s = self.now() - planned
            if late_s > STALL_S:
                logger.warning("bootstrap service stood still for %.1f s; all leases are extended", late_s)
            self.expire(late_s if late_s > STALL_S else 0.0)


def run_bootstrap(config: BootstrapConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError if the port is taken."""
    asyncio.run(_serve(config))


async def _serve(config: BootstrapConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    service = BootstrapService(config)
    await service.start()
    try:
        await stop.wait()
    finally:
        await service.stop()
