"""SGLang's bootstrap protocol over HTTP for one prefill instance: what decode servers talk to."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pdserve.bootstrap.route_table import RouteError, RouteTable
from pdserve.bootstrap.web import json_answer, json_errors, read_json

_INDICES = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")


class RoomRank(msgspec.Struct, frozen=True):
    """Body of ``POST /register_dp_rank``: which DP rank of the prefill server serves a room."""

    bootstrap_room: int
    dp_rank: int


class RoomQuery(msgspec.Struct, frozen=True):
    """Body of ``POST /query_dp_ranks``."""

    bootstrap_rooms: list[int]


def prefill_app(table: RouteTable, is_live: Callable[[], bool]) -> Starlette:
    """ASGI app over ``table``; ``/health`` answers 200 only while ``is_live()`` and the table is complete."""

    async def route(request: Request) -> Response:
        if request.method == "PUT":
            table.put(await read_json(request, dict[str, Any]))
            return PlainTextResponse("OK")
        indices = _indices(request)
        answer = table.topology() if all(i == -1 for i in indices) else table.rank(*indices)
        return JSONResponse(answer)

    async def register_dp_rank(request: Request) -> Response:
        take_dp_rank(table, await read_json(request, RoomRank, strict=False))
        return PlainTextResponse("OK")

    async def query_dp_ranks(request: Request) -> Response:
        query = await read_json(request, RoomQuery, strict=False)
        return JSONResponse(table.query_dp_ranks(query.bootstrap_rooms, time.monotonic()))

    async def health(_: Request) -> Response:
        if not is_live():
            reason = {"code": "lease_ended", "message": "this prefill server has no live lease"}
        elif not table.is_complete:
            reason = {"code": "ranks_pending", "message": table.describe_missing()}
        else:
            return PlainTextResponse("OK")
        return json_answer(reason, 503)

    return Starlette(
        routes=[
            Route("/route", _translated(route), methods=["GET", "PUT"]),
            Route("/register_dp_rank", register_dp_rank, methods=["POST"]),
            Route("/query_dp_ranks", query_dp_ranks, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers=json_errors(),
    )


def take_dp_rank(table: RouteTable, message: RoomRank) -> None:
    """A prefill rank says which DP rank serves a room."""
    table.register_dp_rank(message.bootstrap_room, message.dp_rank, time.monotonic())


def _indices(request: Request) -> tuple[int, int, int, int]:
    try:
        dp, cp, tp, pp = (int(request.query_params[name]) for name in _INDICES)
    except (KeyError, ValueError) as exc:
        raise RouteError(400, f"expected the query parameters {', '.join(_INDICES)} as numbers") from exc
    return dp, cp, tp, pp


def _translated(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def call(request: Request) -> Response:
        try:
            return await handler(request)
        except RouteError as exc:
            # SGLang logs the text of a refusal; keep it readable there.
            return PlainTextResponse(str(exc), exc.status)

    return call
