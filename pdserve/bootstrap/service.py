"""The bootstrap service: one process that knows who is alive and introduces decode to prefill.

    main port      /fleet/*                      workers register, balancers watch
    port per prefill instance  /route /health …  SGLang's bootstrap protocol

A new prefill instance always gets a new port, so a decode server can never
take it for its predecessor; when an instance ends its port closes and its
connections break, which is how decode servers notice at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from dataclasses import dataclass

import msgspec

from pdserve.bootstrap.fleet_api import fleet_app
from pdserve.bootstrap.listener import Listener
from pdserve.bootstrap.messages import FleetView, Lease, Register
from pdserve.bootstrap.prefill_api import prefill_app
from pdserve.bootstrap.registry import Refused, Registry
from pdserve.bootstrap.routes import RouteTable
from pdserve.config import BootstrapConfig
from pdserve.errors import ConfigError
from pdserve.types import InstanceId, Role

logger = logging.getLogger(__name__)

EXPIRY_CHECK_S = 0.5
DEFAULT_PORTS = range(20_000, 30_000)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    table: RouteTable
    listener: Listener


class BootstrapService:
    """The service in this process's event loop; ``run_bootstrap`` wraps it for a process of its own."""

    def __init__(self, config: BootstrapConfig) -> None:
        self.config = config
        self.registry = Registry(on_gone=self._close_endpoint)
        self._endpoints: dict[InstanceId, _Endpoint] = {}
        self._listener = Listener(fleet_app(self), config.host, config.port)
        self._changed = asyncio.Event()
        self._started_s = time.monotonic()
        self._expiry: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Main port; the real one after ``start`` if 0 was asked."""
        return self._listener.port

    @property
    def url(self) -> str:
        """``http://host:port`` of the main port."""
        return f"http://{self.config.host}:{self.port}"

    def now(self) -> float:
        """Seconds on the service's clock."""
        return time.monotonic()

    async def start(self) -> None:
        """Listen. Raises ConfigError if the port is taken."""
        try:
            await self._listener.start()
        except OSError as exc:
            raise ConfigError(
                f"bootstrap service cannot listen on {self.config.host}:{self.config.port} "
                f"({exc.strerror}); choose another port with --port"
            ) from exc
        self._expiry = asyncio.get_running_loop().create_task(self._expire_leases())
        logger.info("bootstrap service listening on %s epoch=%s", self.url, self.registry.epoch)

    async def stop(self) -> None:
        """Close every port; members re-register with the next service by themselves."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
        for instance_id in list(self._endpoints):
            self._close_endpoint(instance_id)
        self._listener.stop()

    async def register(self, request: Register) -> Lease:
        """Admit the worker; a prefill instance gets its own port first. Raises Refused."""
        request = msgspec.structs.replace(request, lease_s=min(request.lease_s, self.config.lease_s))
        lease = self.registry.register(request, self.now())
        instance_id = lease.worker.instance_id
        if lease.worker.role is Role.PREFILL:
            try:
                endpoint = await self._open_endpoint(lease, request.worker.bootstrap_port)
            except (OSError, Refused):
                self.registry.deregister(instance_id, "no bootstrap port")
                raise
            self.registry.set_address(instance_id, self._public_host(), endpoint.listener.port)
            lease = self.registry.lease(instance_id)
        self._notify()
        return lease

    def deregister(self, instance_id: InstanceId, reason: str) -> bool:
        """Forget the instance now; True if it was known."""
        known = self.registry.deregister(instance_id, reason)
        self._notify()
        return known

    def table(self, instance_id: InstanceId) -> RouteTable | None:
        """Route table of a registered prefill instance."""
        endpoint = self._endpoints.get(instance_id)
        return None if endpoint is None else endpoint.table

    async def wait_view(self, epoch: str, after: int, wait_s: float) -> FleetView:
        """The view: at once if it is news after version ``after`` of ``epoch``, else within ``wait_s``."""
        deadline = self.now() + wait_s
        while epoch == self.registry.epoch and after >= self.registry.version:
            left = deadline - self.now()
            if left <= 0:
                break
            changed = self._changed
            try:
                async with asyncio.timeout(left):
                    await changed.wait()
            except TimeoutError:
                break
        return self.registry.view(self.now() - self._started_s)

    async def _open_endpoint(self, lease: Lease, asked_port: int | None) -> _Endpoint:
        instance_id = lease.worker.instance_id
        rows = [rank.route for rank in lease.ranks if rank.route is not None]
        existing = self._endpoints.get(instance_id)
        if existing is not None:
            existing.table.replace(rows)
            return existing
        table = RouteTable()
        table.replace(rows)
        app = prefill_app(table, lambda: self.registry.get(instance_id) is not None)
        for port in self._candidate_ports(asked_port):
            listener = Listener(app, self.config.host, port)
            try:
                await listener.start()
            except OSError:
                continue
            if asked_port and listener.port != asked_port:
                logger.warning(
                    "worker=%s: former bootstrap port %d is taken, now %d; requests in hand over it may fail",
                    lease.worker.worker_id, asked_port, listener.port,
                )  # fmt: skip
            self._endpoints[instance_id] = _Endpoint(table, listener)
            return self._endpoints[instance_id]
        low, high = self.config.port_range
        raise Refused("no_port", f"no free port left in {low}-{high} for {lease.worker.worker_id}")

    def _candidate_ports(self, asked_port: int | None) -> list[int]:
        low, high = self.config.port_range
        # Below the ephemeral range: after a restart no outgoing connection can sit on a member's port.
        ports = list(range(low, high + 1)) if high else [*random.sample(DEFAULT_PORTS, 32), 0]
        return [asked_port, *ports] if asked_port else ports

    def _public_host(self) -> str:
        if self.config.host not in ("0.0.0.0", "::"):
            return self.config.host
        return self.config.advertise_host or "127.0.0.1"

    def _close_endpoint(self, instance_id: InstanceId) -> None:
        endpoint = self._endpoints.pop(instance_id, None)
        if endpoint is not None:
            endpoint.listener.stop()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_CHECK_S)
            if self.registry.expire(self.now()):
                self._notify()


def run_bootstrap(config: BootstrapConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError if the port is taken."""
    asyncio.run(_serve(config))


async def _serve(config: BootstrapConfig) -> None:
    service = BootstrapService(config)
    await service.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    try:
        await stop.wait()
    finally:
        await service.stop()
