"""The membership half of the service over HTTP; see messages.py for every body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import isfinite
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pdserve.bootstrap.messages import Deregister, Heartbeat, RankRoute, Register
from pdserve.bootstrap.prefill_api import RoomRank, take_dp_rank
from pdserve.bootstrap.registry import Refused
from pdserve.bootstrap.web import json_answer, json_errors, read_json
from pdserve.types import InstanceId

if TYPE_CHECKING:
    from pdserve.bootstrap.service import BootstrapService

MAX_WAIT_S = 30.0


def fleet_app(service: BootstrapService) -> Starlette:
    """ASGI app of the service's main port."""
    api = _FleetApi(service)
    return Starlette(
        routes=[
            Route("/fleet/register", _refusing(api.register), methods=["POST"]),
            Route("/fleet/heartbeat", _refusing(api.heartbeat), methods=["POST"]),
            Route("/fleet/deregister", api.deregister, methods=["POST"]),
            Route("/fleet/instances/{instance_id}/ranks", _refusing(api.report_rank), methods=["PUT"]),
            Route("/fleet/instances/{instance_id}/dp_rank", _refusing(api.report_dp_rank), methods=["POST"]),
            Route("/fleet/view", api.view, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
        ],
        exception_handlers=json_errors(),
    )


class _FleetApi:
    def __init__(self, service: BootstrapService) -> None:
        self._service = service

    async def register(self, request: Request) -> Response:
        message = await read_json(request, Register)
        return json_answer(await self._service.register(message, _reached_at(request)))

    async def heartbeat(self, request: Request) -> Response:
        message = await read_json(request, Heartbeat)
        return json_answer(self._service.fleet.heartbeat(message.instance_id, self._service.now()))

    async def deregister(self, request: Request) -> Response:
        message = await read_json(request, Deregister)
        return json_answer({"known": self._service.deregister(message.instance_id, message.reason)})

    async def report_rank(self, request: Request) -> Response:
        report = await read_json(request, RankRoute)
        instance_id = InstanceId(request.path_params["instance_id"])
        instance = self._service.fleet.report_rank(instance_id, report, self._service.now())
        return json_answer({"ranks": len(instance.ranks)})

    async def report_dp_rank(self, request: Request) -> Response:
        table = self._service.table(InstanceId(request.path_params["instance_id"]))
        if table is None:
            raise Refused("unknown_instance", "this instance is not registered as a prefill server")
        take_dp_rank(table, await read_json(request, RoomRank, strict=False))
        return json_answer({"ok": True})

    async def view(self, request: Request) -> Response:
        query = request.query_params
        try:
            after, wait_s = int(query.get("after", "-1")), float(query.get("wait_s", "0"))
        except ValueError as exc:
            raise HTTPException(400, "after must be an integer and wait_s a number of seconds") from exc
        wait_s = min(max(wait_s, 0.0), MAX_WAIT_S) if isfinite(wait_s) else 0.0
        return json_answer(await self._service.wait_view(query.get("epoch", ""), after, wait_s))

    async def health(self, _: Request) -> Response:
        fleet = self._service.fleet
        return json_answer({"status": "ok", "epoch": fleet.epoch, "workers": len(fleet.members())})


def _reached_at(request: Request) -> str:
    """Our own address as this client reached it; an IPv4 one also on a dual-stack socket."""
    host = (request.scope.get("server") or ("", None))[0]
    return str(host).removeprefix("::ffff:")


def _refusing(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def call(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as exc:
            return json_answer(exc.refusal, exc.status)

    return call
