"""SGLang's bootstrap protocol over HTTP for one prefill instance: what decode servers talk to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from pdserve.bootstrap.route_table import RouteError, RouteTable
from pdserve.bootstrap.web import OK, Handler, JsonApi, Rejection, query_of, read_json
from pdserve.http.answer import Answer, json_answer
from pdserve.http.incoming import IncomingRequest

_INDICES = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")


class RoomRank(msgspec.Struct, frozen=True):
    """Body of ``POST /register_dp_rank``: which DP rank of the prefill server serves a room."""

    bootstrap_room: int
    dp_rank: int


class RoomQuery(msgspec.Struct, frozen=True):
    """Body of ``POST /query_dp_ranks``."""

    bootstrap_rooms: list[int]


def prefill_api(table: RouteTable, is_live: Callable[[], bool]) -> JsonApi:
    """Return the API over ``table``; ``/health`` is 200 while ``is_live()`` and the table is complete."""

    async def get_route(client: IncomingRequest) -> Answer:
        indices = _indices(query_of(client))
        return json_answer(table.topology() if all(i == -1 for i in indices) else table.rank(*indices))

    async def put_route(client: IncomingRequest) -> Answer:
        table.put(read_json(client, dict[str, Any]))
        return OK

    async def register_dp_rank(client: IncomingRequest) -> Answer:
        take_dp_rank(table, read_json(client, RoomRank, strict=False))
        return OK

    async def query_dp_ranks(client: IncomingRequest) -> Answer:
        query = read_json(client, RoomQuery, strict=False)
        return json_answer(table.query_dp_ranks(query.bootstrap_rooms, time.monotonic()))

    async def health(client: IncomingRequest) -> Answer:
        if not is_live():
            reason = {"code": "lease_ended", "message": "this prefill server has no live lease"}
        elif not table.is_complete:
            reason = {"code": "ranks_pending", "message": table.describe_missing()}
        else:
            return OK
        return json_answer(reason, 503)

    return JsonApi(
        {
            "/route": {"GET": _translated(get_route), "PUT": _translated(put_route)},
            "/register_dp_rank": {"POST": register_dp_rank},
            "/query_dp_ranks": {"POST": query_dp_ranks},
            "/health": {"GET": health},
        }
    )


def take_dp_rank(table: RouteTable, message: RoomRank) -> None:
    """Take a prefill rank's report of which DP rank serves a room."""
    table.register_dp_rank(message.bootstrap_room, message.dp_rank, time.monotonic())


def _indices(query: dict[str, str]) -> tuple[int, int, int, int]:
    try:
        dp, cp, tp, pp = (int(query[name]) for name in _INDICES)
    except (KeyError, ValueError) as exc:
        raise RouteError(400, f"expected the query parameters {', '.join(_INDICES)} as numbers") from exc
    return dp, cp, tp, pp


def _translated(handler: Handler) -> Handler:
    async def call(client: IncomingRequest) -> Answer:
        try:
            return await handler(client)
        except RouteError as exc:
            # SGLang logs the text of a refusal; keep it readable there.
            raise Rejection(Answer(exc.status, str(exc).encode(), OK.headers)) from exc

    return call
