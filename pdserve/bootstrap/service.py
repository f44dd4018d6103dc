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
import time
from dataclasses import dataclass

import msgspec

from pdserve.bootstrap.listener import RouteListener
from pdserve.bootstrap.main_api import fleet_app
from pdserve.bootstrap.messages import FleetView, Lease, Register
from pdserve.bootstrap.ports import PortPlan
from pdserve.bootstrap.prefill_api import prefill_app
from pdserve.bootstrap.registry import Instance, MemberRegistry, Refused
from pdserve.bootstrap.route_table import RouteError, RouteTable
from pdserve.config.launch import BootstrapConfig
from pdserve.errors import ConfigError
from pdserve.types import InstanceId, Role

logger = logging.getLogger(__name__)

EXPIRY_CHECK_S = 0.5
STALL_S = 1.0
"""A loop later than this was stopped or starved: nobody's silence in that time counts."""


@dataclass(frozen=True, slots=True)
class _Endpoint:
    table: RouteTable
    listener: RouteListener


class BootstrapService:
    """The service in this process's event loop; ``run_bootstrap`` wraps it for a process of its own."""

    def __init__(self, config: BootstrapConfig) -> None:
        if config.lease_s <= 0:
            raise ConfigError(f"lease_s must be above 0, got {config.lease_s:g}")
        self.config = config
        self.fleet = MemberRegistry(on_gone=self._close_endpoint)
        self._ports = PortPlan(config.port_range)
        self._endpoints: dict[InstanceId, _Endpoint] = {}
        self._listener = RouteListener(fleet_app(self), config.host, config.port)
        self._joining = asyncio.Lock()  # one at a time: a client that retries must not get two ports
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._started_s = time.monotonic()
        self._expiry: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Main port; the real one after ``start`` if 0 was asked."""
        return self._listener.port

    @property
    def url(self) -> str:
        """``http://host:port`` of the main port."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}"

    def now(self) -> float:
        """Seconds on the service's clock."""
        return time.monotonic()

    async def start(self) -> None:
        """Listen. Raises ConfigError if the port is taken or the host is not ours."""
        try:
            await self._listener.start()
        except OSError as exc:
            is_host = exc.errno == errno.EADDRNOTAVAIL or exc.errno is None or exc.errno < 0  # gaierror < 0
            advice = "give an address of this machine with" if is_host else "choose another port with"
            raise ConfigError(
                f"bootstrap service cannot listen on {self.config.host}:{self.config.port} "
                f"({exc.strerror}); {advice} {'--host' if is_host else '--port'}"
            ) from exc
        self._started_s = self.now()
        self._expiry = asyncio.get_running_loop().create_task(self._expire_leases())
        logger.info("bootstrap service listening on %s epoch=%s", self.url, self.fleet.epoch)

    async def stop(self) -> None:
        """Close every port; members re-register with the next service by themselves."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
        self._is_stopping = True
        self._notify()  # long polls end with the view as it is
        await self._listener.finish()
        for instance_id in list(self._endpoints):
            self._close_endpoint(instance_id)

    async def register(self, request: Register, reached_at: str = "") -> Lease:
        """Admit the worker; a prefill instance becomes a member together with a port of its own.

        Args:
            request: what the worker says.
            reached_at: address of this machine over which it said so.
        Raises:
            Refused: with what to answer.
        """
        request = msgspec.structs.replace(request, lease_s=min(request.lease_s, self.config.lease_s))
        async with self._joining:
            instance = self.fleet.admit(request, self.now())
            if request.worker.role is Role.DECODE:
                lease = self.fleet.register(request, self.now())
            else:
                endpoint = await self._endpoint(instance, request)
                host = self._public_host(reached_at)
                try:
                    lease = self.fleet.register(request, self.now(), host, endpoint.listener.port)
                except Refused:  # the fleet changed while the port was being opened
                    self._close_endpoint(instance.instance_id)
                    raise
        self._notify()
        return lease

    def deregister(self, instance_id: InstanceId, reason: str) -> bool:
        """Forget the instance now; True if it was known."""
        known = self.fleet.deregister(instance_id, reason)
        self._notify()
        return known

    def table(self, instance_id: InstanceId) -> RouteTable | None:
        """Route table of a registered prefill instance."""
        endpoint = self._endpoints.get(instance_id)
        return None if endpoint is None else endpoint.table

    async def wait_view(self, epoch: str, after: int, wait_s: float) -> FleetView:
        """The view: at once if it is news after version ``after`` of ``epoch``, else within ``wait_s``."""
        deadline = self.now() + wait_s
        while epoch == self.fleet.epoch and after >= self.fleet.version and not self._is_stopping:
            left = deadline - self.now()
            if left <= 0:
                break
            changed = self._changed
            try:
                async with asyncio.timeout(left):
                    await changed.wait()
            except TimeoutError:
                break
        return self.fleet.view(self.now() - self._started_s)

    async def _endpoint(self, instance: Instance, request: Register) -> _Endpoint:
        """The instance's port, open and up to date with its ranks."""
        endpoint = self._endpoints.get(instance.instance_id)
        table = RouteTable() if endpoint is None else endpoint.table
        try:
            table.replace(rank.route for rank in instance.ranks.values() if rank.route is not None)
        except RouteError as exc:
            raise Refused("bad_request", str(exc)) from exc
        if endpoint is not None:
            return endpoint
        listener = await self._open_port(instance.instance_id, table, request)
        if listener is None and self.fleet.supersede(request.worker):  # take over the predecessor's port
            listener = await self._open_port(instance.instance_id, table, request)
        if listener is None:
            raise Refused("no_port", f"no free port left in {self._ports} for {request.worker.worker_id}")
        self._endpoints[instance.instance_id] = _Endpoint(table, listener)
        return self._endpoints[instance.instance_id]

    async def _open_port(
        self, instance_id: InstanceId, table: RouteTable, request: Register
    ) -> RouteListener | None:
        """Listen on the best free port. The predecessor's is still open, so it cannot be that one."""
        name, former = request.worker.worker_id, request.worker.bootstrap_port
        app = prefill_app(table, lambda: self.fleet.get(instance_id) is not None)
        for port in self._ports.candidates(former, self.now()):
            listener = RouteListener(app, self.config.host, port)
            try:
                await listener.start()
            except OSError:
                continue
            if former and listener.port != former:
                logger.warning(
                    "worker=%s: former bootstrap port %d is taken, now %d; requests in hand over it may fail",
                    name, former, listener.port,
                )  # fmt: skip
            elif not former and self._ports.is_recent(listener.port, self.now()):
                logger.warning(
                    "worker=%s: no fresh port in %s, reusing %d; decode servers may fail requests until they "
                    "notice. Give --port-range a few more ports than prefill servers",
                    name, self._ports, listener.port,
                )  # fmt: skip
            return listener
        return None

    def _public_host(self, reached_at: str) -> str:
        if self.config.advertise_host:
            return self.config.advertise_host
        is_wildcard = self.config.host in ("0.0.0.0", "::", "")
        return (reached_at or "127.0.0.1") if is_wildcard else self.config.host

    def _close_endpoint(self, instance_id: InstanceId) -> None:
        endpoint = self._endpoints.pop(instance_id, None)
        if endpoint is not None:
            endpoint.listener.stop()
            self._ports.released(endpoint.listener.port, self.now())

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _expire_leases(self) -> None:
        while True:
            planned = self.now() + EXPIRY_CHECK_S
            await asyncio.sleep(EXPIRY_CHECK_S)
            late_s = self.now() - planned
            if late_s > STALL_S:
                logger.warning("bootstrap service stood still for %.1f s; all leases are extended", late_s)
                self.fleet.forgive(late_s)
            if self.fleet.expire(self.now()):
                self._notify()


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
