"""A request body read: by a glance if it is plain, decoded and rewritten if not. Pure."""

from __future__ import annotations

from pdserve.balancer.request.fast_parse import parse_plain
from pdserve.balancer.request.request import ParsedRequest, RequestRefused, Route
from pdserve.balancer.request.rewrite import rewrite


def check_content_type(route: Route, headers: dict[bytes, bytes]) -> None:
    """Refuse a body that says it is something other than JSON; one that says nothing is taken for it.

    Raises:
        RequestRefused: as SGLang words it.
    """
    kind = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if kind == b"application/json":
        return
    if not route.startswith("/v1/") and kind.startswith(b"application/") and kind.endswith(b"+json"):
        return
    words = "Unsupported Media Type: Only 'application/json' is allowed"
    if route is Route.MESSAGES:
        raise RequestRefused(f"header.content-type: {words}", is_unreadable=True)
    place = {"loc": ["header", "content-type"], "msg": words, "type": "value_error"}
    raise RequestRefused(f"1 validation error:\n  {place}", is_unreadable=True)


def parse_request(route: Route, body: bytes, *, wants_prompt: bool = False) -> ParsedRequest:
    """Read a request body.

    Args:
        route: where it was sent.
        body: as sent.
        wants_prompt: fill ``shape.prompt``.

    Raises:
        RequestRefused: 400 if it is not a JSON object or contradicts itself, 501
            if it asks for what disaggregation cannot give.
    """
    return parse_plain(route, body, wants_prompt) or rewrite(route, body, wants_prompt)
