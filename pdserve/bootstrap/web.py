"""JSON over HTTP for the service's ports: a small route table, limits on clients, errors as JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec

from pdserve.errors import PdserveError
from pdserve.http.answer import Answer, json_answer
from pdserve.http.incoming import IncomingRequest
from pdserve.http.limits import ServerLimits
from pdserve.http.server import HttpServer
from pdserve.http.sockets import bind

REQUEST_S = 20.0
"""A request must have arrived whole this long after the connection, or its first byte, did."""
MAX_BODY_BYTES = 2**20
MAX_HEAD_BYTES = 64 * 2**10
MAX_CONNECTIONS = 10_000
FINISH_S = 0.5
_CODES = {413: "too_large", 500: "internal"}
T = TypeVar("T")

Handler = Callable[[IncomingRequest], Awaitable[Answer]]
"""Answers one request; raises ``Rejection`` for an error."""

OK = Answer(200, b"OK", ((b"content-type", b"text/plain; charset=utf-8"),))


class Rejection(PdserveError):
    """A request that is not answered with success; ``answer`` is sent instead."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.body.decode(errors="replace"))
        self.answer = answer


def error_answer(status: int, message: str) -> Answer:
    """Return an error in the form of ``messages.Refusal``."""
    code = _CODES.get(status) or HTTPStatus(status).name.lower()
    return json_answer({"code": code, "message": message}, status)


def read_json(client: IncomingRequest, kind: type[T], *, strict: bool = True) -> T:
    """Return the body as ``kind``; not ``strict`` takes numbers written as text, too.

    Raises:
        Rejection: 400 if it is not JSON of that type.
    """
    try:
        return msgspec.json.decode(client.body, type=kind, strict=strict)
    except (ValueError, RecursionError) as exc:  # ValueError: malformed, of another type, or not UTF-8
        raise Rejection(error_answer(400, f"body is not the expected JSON: {exc}")) from exc


def query_of(client: IncomingRequest) -> dict[str, str]:
    """Return the parameters of the request's query."""
    return dict(parse_qsl(client.query.decode("latin-1"), keep_blank_values=True))


class JsonApi:
    """An ``Application`` over a table of path to handlers by method. ``{}`` in a path stands for one part."""

    def __init__(self, routes: Mapping[str, Mapping[str, Handler]]) -> None:
        self._routes = {tuple(path.split("/")): methods for path, methods in routes.items()}

    def refuse(self, client: IncomingRequest) -> Answer | None:
        """Return 404 or 405 if no handler takes the path and method."""
        parts = client.path.split("/")
        methods = next((found for route, found in self._routes.items() if _matches(route, parts)), None)
        if methods is None:
            return error_answer(404, f"there is no {client.path} here")
        client.endpoint = methods.get("GET" if client.method == "HEAD" else client.method)
        if client.endpoint is None:
            allowed = ", ".join(methods)
            answer = error_answer(405, f"{client.path} takes {allowed}, not {client.method}")
            return answer.with_headers((b"allow", allowed.encode()))
        return None

    def error(self, client: IncomingRequest | None, status: int, message: str) -> Answer:
        """Return an error of HTTP itself."""
        return error_answer(status, message)

    async def serve(self, client: IncomingRequest) -> None:
        """Answer one request."""
        try:
            answer = await client.endpoint(client)
        except Rejection as exc:
            answer = exc.answer
        await client.answer(answer)


def _matches(route: tuple[str, ...], parts: list[str]) -> bool:
    return len(route) == len(parts) and all(
        name == part or (name == "{}" and part) for name, part in zip(route, parts, strict=True)
    )


class RouteListener:
    """Serves ``api`` on ``host:port`` between ``start`` and ``stop``. Port 0 takes a free one."""

    def __init__(self, api: JsonApi, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._api = api
        self._server: HttpServer | None = None

    @property
    def num_serving(self) -> int:
        """Requests being answered now, long polls among them."""
        return self._server.num_serving if self._server is not None else 0

    async def start(self) -> None:
        """Bind and listen. Raises OSError if the port is taken."""
        socket = bind(self.host, self.port)
        limits = ServerLimits(
            max_body_bytes=MAX_BODY_BYTES, max_header_bytes=MAX_HEAD_BYTES, header_s=REQUEST_S,
            body_s=REQUEST_S, write_s=REQUEST_S, max_connections=MAX_CONNECTIONS, request_s=REQUEST_S,
        )  # fmt: skip
        self._server = HttpServer(self._api, limits)
        await self._server.start(socket)
        self.port = socket.getsockname()[1]

    async def finish(self) -> None:
        """Stop, but let the requests that are being answered end first, for FINISH_S at most."""
        if self._server is not None:
            await self._server.close(FINISH_S)

    def stop(self) -> None:
        """Stop listening and close every connection, so that a peer on keep-alive notices now."""
        if self._server is not None:
            self._server.close_at_once()
