"""The membership half of the service over HTTP; see messages.py for every body."""

from __future__ import annotations

from math import isfinite

from pdserve.bootstrap.membership import FleetMembership
from pdserve.bootstrap.messages import Deregister, Heartbeat, RankRoute, Register
from pdserve.bootstrap.prefill_api import RoomRank, take_dp_rank
from pdserve.bootstrap.registry import Refused
from pdserve.bootstrap.web import Handler, JsonApi, Rejection, error_answer, query_of, read_json
from pdserve.http.answer import Answer, json_answer
from pdserve.http.incoming import IncomingRequest
from pdserve.types import InstanceId

MAX_WAIT_S = 30.0


def main_api(membership: FleetMembership) -> JsonApi:
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
        message = read_json(client, Heartbeat)
        return json_answer(self._membership.fleet.heartbeat(message.instance_id, self._membership.now()))

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
