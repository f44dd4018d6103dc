"""A request body read: by a glance if it is plain, decoded and rewritten if not. Pure."""

from __future__ import annotations

from pdserve.balancer.glance import glance
from pdserve.balancer.request import ParsedRequest, Route
from pdserve.balancer.rewrite import rewrite


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
    return glance(route, body, wants_prompt) or rewrite(route, body, wants_prompt)
