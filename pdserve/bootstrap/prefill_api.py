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

from pdserve.bootstrap.routes import RouteError, RouteTable
from pdserve.bootstrap.web import json_errors, read_json

_INDICES = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")


def prefill_app(table: RouteTable, is_live: Callable[[], bool]) -> Starlette:
    """ASGI app over ``table``; ``/health`` answers 200 only while ``is_live()``."""

    async def route(request: Request) -> Response:
        if request.method == "PUT":
            table.put(await read_json(request, dict[str, Any]))
            return PlainTextResponse("OK")
        indices = _indices(request)
        answer = table.topology() if all(i == -1 for i in indices) else table.rank(*indices)
        return JSONResponse(answer)

    async def register_dp_rank(request: Request) -> Response:
        take_dp_rank(table, await read_json(request, dict[str, Any]))
        return PlainTextResponse("OK")

    async def query_dp_ranks(request: Request) -> Response:
        body = await read_json(request, dict[str, Any])
        try:
            rooms = [int(room) for room in body["bootstrap_rooms"]]
        except (KeyError, TypeError, ValueError) as exc:
            raise RouteError(400, 'expected {"bootstrap_rooms": [room, …]}') from exc
        return JSONResponse(table.query_dp_ranks(rooms))

    async def health(_: Request) -> Response:
        if is_live() and table.is_complete:
            return PlainTextResponse("OK")
        return JSONResponse({"code": "dead", "message": "this prefill server has no live lease"}, 503)

    return Starlette(
        routes=[
            Route("/route", _translated(route), methods=["GET", "PUT"]),
            Route("/register_dp_rank", _translated(register_dp_rank), methods=["POST"]),
            Route("/query_dp_ranks", _translated(query_dp_ranks), methods=["POST"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers=json_errors(),
    )


def take_dp_rank(table: RouteTable, body: dict[str, Any]) -> None:
    """A prefill rank says which DP rank serves a room. Raises RouteError 400."""
    try:
        table.register_dp_rank(int(body["bootstrap_room"]), int(body["dp_rank"]), time.monotonic())
    except (KeyError, TypeError, ValueError) as exc:
        raise RouteError(400, 'expected {"bootstrap_room": …, "dp_rank": …}') from exc


def _indices(request: Request) -> tuple[int, int, int, int]:
    try:
        dp, cp, tp, pp = (int(request.query_params[name]) for name in _INDICES)
    except (KeyError, ValueError) as exc:
        raise RouteError(400, f"expected the query parameters {', '.join(_INDICES)}") from exc
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
        except msgspec.DecodeError as exc:
            return PlainTextResponse(f"body is not the expected JSON: {exc}", 400)

    return call
