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
from math import isfinite

from pdserve.bootstrap.membership import FleetMembership
from pdserve.bootstrap.messages import Deregister, Heartbeat, RankRoute, Register
from pdserve.bootstrap.prefill_api import RoomRank, take_dp_rank
from pdserve.bootstrap.registry import Refused
from pdserve.bootstrap.web import (
    Handler,
    JsonApi,
    Rejection,
    RouteListener,
    error_answer,
    query_of,
    read_json,
)
from pdserve.config.launch import BootstrapConfig
from pdserve.errors import ConfigError
from pdserve.http.answer import Answer, json_answer
from pdserve.http.incoming import IncomingRequest
from pdserve.types import InstanceId

logger = logging.getLogger(__name__)

MAX_WAIT_S = 30.0
"""Longest long poll."""
EXPIRY_CHECK_S = 0.5
STALL_S = 1.0
"""A loop later than this was stopped or starved: nobody's silence in that time counts."""


class BootstrapService(FleetMembership):
    """The service in this process's event loop; ``run_bootstrap`` wraps it for a process of its own."""

    def __init__(self, config: BootstrapConfig) -> None:
        super().__init__(config)
        self.listener = RouteListener(_main_api(self), config.host, config.port)
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


def _main_api(membership: FleetMembership) -> JsonApi:
    """Return the API of the service's main port."""
    api = _MainApi(membership)
    return JsonApi(
        {
            "/fleet/register": {"POST": _refusing(api.register)},
            "/fleet/heartbeat": {"POST": _refusing(api.heartbeat)},
            "/fleet/deregister": {"POST": api.deregister},
            "/fleet/instances/{}/ranks": {"PUT": _refusing(api.report_rank)},
            "/fleet/instances/{}/dp_rank": {"POST": _refusing(api.report_dp_rank)},
            "/fleet/view": {"GET": api.view},
            "/health": {"GET": api.health},
        }
    )


class _MainApi:
    def __init__(self, membership: FleetMembership) -> None:
        self._membership = membership

    async def register(self, client: IncomingRequest) -> Answer:
        message = read_json(client, Register)
        reached_at = client.local_host.removeprefix("::ffff:")  # an IPv4 address on a dual-stack socket
        return json_answer(await self._membership.register(message, reached_at))

    async def heartbeat(self, client: IncomingRequest) -> Answer:
        return json_answer(self._membership.heartbeat(read_json(client, Heartbeat)))

    async def deregister(self, client: IncomingRequest) -> Answer:
        message = read_json(client, Deregister)
        return json_answer({"known": self._membership.deregister(message.instance_id, message.reason)})

    async def report_rank(self, client: IncomingRequest) -> Answer:
        report = read_json(client, RankRoute)
        instance = self._membership.fleet.report_rank(_instance_id(client), report, self._membership.now())
        return json_answer({"ranks": len(instance.ranks)})

    async def report_dp_rank(self, client: IncomingRequest) -> Answer:
        table = self._membership.table(_instance_id(client))
        if table is None:
            raise Refused("unknown_instance", "this instance is not registered as a prefill server")
        take_dp_rank(table, read_json(client, RoomRank, strict=False))
        return json_answer({"ok": True})

    async def view(self, client: IncomingRequest) -> Answer:
        query = query_of(client)
        try:
            after, wait_s = int(query.get("after", "-1")), float(query.get("wait_s", "0"))
        except ValueError as exc:
            message = "after must be an integer and wait_s a number of seconds"
            raise Rejection(error_answer(400, message)) from exc
        wait_s = min(max(wait_s, 0.0), MAX_WAIT_S) if isfinite(wait_s) else 0.0
        return json_answer(await self._membership.wait_view(query.get("epoch", ""), after, wait_s))

    async def health(self, client: IncomingRequest) -> Answer:
        fleet = self._membership.fleet
        return json_answer({"status": "ok", "epoch": fleet.epoch, "workers": len(fleet.members())})


def _instance_id(client: IncomingRequest) -> InstanceId:
    """The third part of ``/fleet/instances/{}/…``."""
    return InstanceId(client.path.split("/")[3])


def _refusing(handler: Handler) -> Handler:
    async def call(client: IncomingRequest) -> Answer:
        try:
            return await handler(client)
        except Refused as exc:
            raise Rejection(json_answer(exc.refusal, exc.status)) from exc

    return call


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
