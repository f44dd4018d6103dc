"""The balancer's application: which path is whose, who may use it, and errors of HTTP itself, always JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping

from pdserve.balancer.auth import Access, KeyRing
from pdserve.balancer.http_errors import Answer
from pdserve.balancer.proxy import Client
from pdserve.balancer.route_errors import route_error
from pdserve.balancer.surface import Endpoint, Surface


class App:
    """What ``HttpServer`` asks: ``refuse`` at the head of a request, ``serve`` once it is whole."""

    def __init__(self, surface: Surface, keys: KeyRing) -> None:
        self._surface = surface
        self._keys = keys

    def refuse(self, client: Client) -> Answer | None:
        """An error if the path, the method or the key is wrong; nobody's body is read for nothing."""
        methods = self._surface.find(client.path)
        if methods is None:
            return route_error(client.path, 404, f"there is no {client.path} here")
        if b"origin" in client.headers and (answer := _cross_origin(client, methods)):
            return answer
        endpoint = methods.get(client.method) or _as_get(methods, client.method)
        if endpoint is None:
            allowed = ", ".join(methods)
            answer = route_error(client.path, 405, f"{client.path} takes {allowed}, not {client.method}")
            return answer.with_headers((b"allow", allowed.encode()))
        client.endpoint = endpoint
        return self._keys.refuse(endpoint.access, client.headers)

    def error(self, path: str, status: int, message: str) -> Answer:
        """An error of HTTP itself."""
        return route_error(path, status, message)

    def serve(self, client: Client) -> Awaitable[object]:
        """Answer one request."""
        endpoint: Endpoint = client.endpoint
        handling = endpoint.handle(client, client.body)
        return handling if endpoint.answers else _answered(client, handling)


async def _answered(client: Client, handling: Awaitable[Answer | None]) -> None:
    answer = await handling
    if answer is not None:
        await client.answer(answer)


def _cross_origin(client: Client, methods: Mapping[str, Endpoint]) -> Answer | None:
    """Let web pages ask what clients may, as SGLang does, and no control route; the answer to a preflight."""
    if any(endpoint.access is Access.ADMIN for endpoint in methods.values()):
        return None
    client.lines = b"access-control-allow-origin: *\r\n"
    if client.method != "OPTIONS" or b"access-control-request-method" not in client.headers:
        return None
    wanted = client.headers.get(b"access-control-request-headers", b"*")
    allowed = (
        (b"access-control-allow-methods", ", ".join(methods).encode()),
        (b"access-control-allow-headers", wanted),
        (b"access-control-max-age", b"600"),
    )
    return Answer(200, b"", allowed)


def _as_get(methods: Mapping[str, Endpoint], method: str) -> Endpoint | None:
    return methods.get("GET") if method == "HEAD" else None
