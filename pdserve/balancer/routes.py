"""The balancer's ASGI application: which path is whose, and errors of HTTP itself, always JSON."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from pdserve.balancer.aggregate import ControlPlane
from pdserve.balancer.dispatch import PairDispatcher
from pdserve.balancer.http_errors import Answer, error_answer
from pdserve.balancer.proxy import BodyTooLarge, Client, ClientLeft, Receive, Scope, Send
from pdserve.balancer.request import Route

logger = logging.getLogger(__name__)

CLOSE = (b"connection", b"close")

Endpoint = Callable[[Client, bytes], Awaitable[Answer | None]]
"""Takes the request with its body; returns the answer, or None if it has answered itself."""


class App:
    """``await app(scope, receive, send)`` for uvicorn."""

    def __init__(self, control: ControlPlane, dispatcher: PairDispatcher, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._dispatcher = dispatcher
        self._table = self._build_table(control)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        assert scope["type"] == "http", scope["type"]
        client = Client(scope, receive, send)
        is_openai = client.path.startswith("/v1/")
        try:
            answer = await self._route(client, is_openai)
        except BodyTooLarge as exc:
            answer = error_answer(413, str(exc), is_openai=is_openai).with_headers(CLOSE)
        except ClientLeft:
            return
        except Exception:
            logger.exception("%s %s failed", client.method, client.path)
            if client.has_begun:
                raise
            answer = error_answer(500, "internal error of the balancer; its log has the details")
        if answer is not None:
            await client.answer(answer)

    async def _route(self, client: Client, is_openai: bool) -> Answer | None:
        methods = self._table.get(client.path)
        if methods is None:
            return error_answer(404, f"there is no {client.path} here", is_openai=is_openai)
        endpoint = methods.get("GET" if client.method == "HEAD" else client.method)
        if endpoint is None:
            allowed = ", ".join(methods)
            message = f"{client.path} takes {allowed}, not {client.method}"
            answer = error_answer(405, message, is_openai=is_openai)
            return answer.with_headers((b"allow", allowed.encode()))
        return await endpoint(client, await client.read_body(self._max_body_bytes))

    def _build_table(self, control: ControlPlane) -> dict[str, dict[str, Endpoint]]:
        get: dict[str, Endpoint] = {
            "/health": control.readiness,
            "/readiness": control.readiness,
            "/liveness": control.liveness,
            "/v1/models": control.any_worker,
            "/model_info": control.any_worker,
            "/get_model_info": control.any_worker,
            "/server_info": control.server_info,
            "/get_server_info": control.server_info,
            "/workers": control.workers,
            "/pdserve/state": control.state,
        }
        table = {path: {"GET": endpoint} for path, endpoint in get.items()}
        table["/flush_cache"] = {"GET": control.flush_cache, "POST": control.flush_cache}
        table["/abort_request"] = {"POST": control.abort_request}
        for route in Route:
            table[route] = {"POST": partial(self._prompt, route)}
        table[Route.GENERATE]["PUT"] = table[Route.GENERATE]["POST"]
        return table

    async def _prompt(self, route: Route, client: Client, body: bytes) -> None:
        await self._dispatcher.dispatch(route, body, client)
