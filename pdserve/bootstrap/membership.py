"""Members of the fleet and the port of each prefill instance: joining, leaving, what watchers see."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from pdserve.bootstrap.messages import FleetView, Heartbeat, Lease, Register
from pdserve.bootstrap.prefill_api import prefill_api
from pdserve.bootstrap.registry import Instance, MemberRegistry, Refused
from pdserve.bootstrap.route_table import RouteError, RouteTable
from pdserve.bootstrap.web import RouteListener
from pdserve.config.launch import BootstrapConfig
from pdserve.errors import ConfigError
from pdserve.types import InstanceId, Role

logger = logging.getLogger(__name__)

DEFAULT_PORTS = range(20_000, 30_000)
"""Below the ephemeral range: after a restart no outgoing connection can sit on a member's port."""

QUARANTINE_S = 30.0
"""SGLang drops a prefill after two missed heartbeats 5 s apart, each with up to 5 s of time-out."""

_NUM_TRIES = 64


class PortPlan:
    """Chooses ports for new prefill instances; ``(0, 0)`` means any. Pure: binding is the caller's.

    A decode server keys all it knows of a prefill server by ``host:port`` and takes up to two
    heartbeats to notice an end, so a port must not pass from a dead instance to another one
    while its memory is fresh.
    """

    def __init__(self, port_range: tuple[int, int]) -> None:
        low, high = port_range
        if (low, high) != (0, 0) and not 1 <= low <= high <= 65535:
            raise ConfigError(f"port_range must be LOW-HIGH within 1-65535, or 0-0 for any, got {low}-{high}")
        self._range = range(low, high + 1) if high else None
        self._released: dict[int, float] = {}  # oldest first

    def __str__(self) -> str:
        return "any" if self._range is None else f"{self._range.start}-{self._range.stop - 1}"

    def candidates(self, former: int | None, now: float) -> Iterator[int]:
        """Its own former port, then fresh ones, then those released longest ago; 0 stands for any."""
        if former is not None and 1 <= former <= 65535:
            yield former
        recent = [port for port in self._released if self.is_recent(port, now)]
        if self._range is None:
            tries = random.sample(DEFAULT_PORTS, _NUM_TRIES)
            yield from (port for port in tries if port not in recent)
            yield 0
            return
        yield from (port for port in self._range if port not in recent)
        yield from (port for port in recent if port in self._range)

    def released(self, port: int, now: float) -> None:
        """An instance's listener on ``port`` was closed."""
        self._released = {p: t for p, t in self._released.items() if p != port and now - t < QUARANTINE_S}
        self._released[port] = now

    def is_recent(self, port: int, now: float) -> bool:
        """True while a decode server may still take ``port`` for the instance that had it."""
        released = self._released.get(port)
        return released is not None and now - released < QUARANTINE_S


@dataclass(frozen=True, slots=True)
class _Endpoint:
    table: RouteTable
    listener: RouteListener


class FleetMembership:
    """The registry, and a listener per registered prefill instance. One per event loop."""

    def __init__(self, config: BootstrapConfig) -> None:
        if config.lease_s <= 0:
            raise ConfigError(f"lease_s must be above 0, got {config.lease_s:g}")
        self.config = config
        self.fleet = MemberRegistry(on_gone=self._close_endpoint)
        self._ports = PortPlan(config.port_range)
        self._endpoints: dict[InstanceId, _Endpoint] = {}
        self._joining = asyncio.Lock()  # one at a time: a client that retries must not get two ports
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._started_s = time.monotonic()

    def now(self) -> float:
        """Seconds on the service's clock."""
        return time.monotonic()

    def begin(self) -> None:
        """Count the service's uptime from now on."""
        self._started_s = self.now()

    def end_polls(self) -> None:
        """End long polls with the view as it is, those to come too."""
        self._is_stopping = True
        self._notify()

    def close_ports(self) -> None:
        """Close the port of every prefill instance."""
        for instance_id in list(self._endpoints):
            self._close_endpoint(instance_id)

    def expire(self, late_s: float = 0.0) -> None:
        """Drop members whose lease has run out, after extending every lease by ``late_s``."""
        if late_s:
            self.fleet.forgive(late_s)
        if self.fleet.expire(self.now()):
            self._notify()

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

    def heartbeat(self, message: Heartbeat) -> Lease:
        """Renew a lease. Raises Refused as the registry's."""
        version = self.fleet.version
        lease = self.fleet.heartbeat(message.instance_id, self.now(), is_leaving=message.is_leaving)
        if self.fleet.version != version:
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
        api = prefill_api(table, lambda: self.fleet.get(instance_id) is not None)
        for port in self._ports.candidates(former, self.now()):
            listener = RouteListener(api, self.config.host, port)
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
