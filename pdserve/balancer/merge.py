"""Placeholder until the merge rules are written; see stream.py."""

from __future__ import annotations

from typing import Any

from pdserve.balancer.outlet import Transform
from pdserve.balancer.request import ParsedRequest, Route
from pdserve.balancer.stream import merge_prompt_logprobs


def needs_prefill_answer(route: Route, fields: dict[str, Any]) -> bool:
    """True where the answer takes something from prefill's."""
    value = fields.get("return_logprob")
    return route is Route.GENERATE and (any(value) if isinstance(value, list) else bool(value))


def merge_whole(request: ParsedRequest, decode_body: bytes, prefill_body: bytes) -> bytes:
    """Both answers as one."""
    return merge_prompt_logprobs(decode_body, prefill_body)


def stream_merger(request: ParsedRequest, prefill_body: bytes) -> Transform | None:
    """None: the stream passes as it is."""
    return None
