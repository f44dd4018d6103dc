"""One answer from two: what only the prefill server knows is put into decode's answer.

    prefill's answer ─┐
    decode's answer ──┴─► merge_whole ─► what one plain server would have said
    decode's stream ────► stream_merger(…) ──► the same, event by event

A decode server has no logprobs of the prompt, and not those of chosen ids for
the first token; samples made of copies count the prompt once each. The rest of
decode's answer is complete (disaggregation/decode.py, _commit_transfer_to_req),
so most requests are not merged at all. Pure: no sockets, no clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import msgspec

from pdserve.balancer.request.merge_native import NativeRules
from pdserve.balancer.request.merge_openai import OpenAIRules
from pdserve.balancer.request.request import ParsedRequest, Route
from pdserve.http.sse import EVENT_END, split_data, split_events

logger = logging.getLogger(__name__)

_NATIVE = (Route.GENERATE, Route.VERTEX)
_BROKEN = (msgspec.MsgspecError, ValueError, TypeError, AttributeError)
"""What a body that is not the expected JSON raises: base64 and UTF-8 errors are ValueErrors."""


def needs_prefill_answer(route: Route, fields: dict[str, Any]) -> bool:
    """True where the answer takes something from prefill's, which must then be whole before the first byte.

    Args:
        route: where the request was sent.
        fields: its fields; for /vertex_generate the ``parameters``.

    These are: logprobs of the prompt (/generate with a ``logprob_start_len``,
    completions with ``echo`` and ``logprobs``), logprobs of chosen ids, which
    decode lacks for the first token, experts of a mixture (``return_routed_experts``),
    and a request for no token at all, where decode reports a logprob too many.
    """
    if fields.get("return_routed_experts"):
        return True
    if route in _NATIVE:
        if not _any(fields.get("return_logprob")):
            return False
        starts = fields.get("logprob_start_len")
        has_start = any(
            start not in (None, -1) for start in (starts if isinstance(starts, list) else [starts])
        )
        return has_start or bool(fields.get("token_ids_logprob")) or _asks_for_nothing(fields)
    return route is Route.COMPLETIONS and bool(fields.get("echo")) and bool(fields.get("logprobs"))


def merge_whole(request: ParsedRequest, decode_body: bytes, prefill_body: bytes) -> bytes:
    """Decode's answer completed from prefill's; as it is if either is not what was expected."""
    try:
        return _rules(request, prefill_body).merge_body(decode_body)
    except _BROKEN as exc:
        logger.warning("answers not merged route=%s: %s", request.route, exc)
        return decode_body


def stream_merger(request: ParsedRequest, prefill_body: bytes) -> Callable[[bytes], bytes] | None:
    """Return what rewrites whole events of decode's stream; None if they may go out untouched.

    Args:
        request: what was asked.
        prefill_body: prefill's whole answer, a stream of one event per prompt.
    """
    try:
        rules = _rules(request, prefill_body)
    except _BROKEN as exc:
        logger.warning("streams not merged route=%s: %s", request.route, exc)
        return None
    return partial(_merge_events, rules) if rules.is_needed else None


class Rules(Protocol):
    """How the answers of one family of routes are merged."""

    @property
    def is_needed(self) -> bool:
        """False if no event of a stream would be changed."""
        ...

    def merge_body(self, body: bytes) -> bytes:
        """Decode's whole answer, completed."""
        ...

    def merge_event(self, payload: bytes) -> bytes:
        """The data of one event of decode's stream, completed."""
        ...


def _merge_events(rules: Rules, events: bytes) -> bytes:
    return b"".join(_merge_event(rules, event) + EVENT_END for event in split_events(events))


def _merge_event(rules: Rules, event: bytes) -> bytes:
    head, payload = split_data(event)
    if not payload.startswith(b"{"):
        return event
    try:
        return head + rules.merge_event(payload)
    except _BROKEN as exc:
        logger.warning("event not merged: %s", exc)
        return event


def _rules(request: ParsedRequest, prefill_body: bytes) -> Rules:
    if not request.needs_prefill_answer:
        prefill_body = b""  # nobody waited for it: it may be cut off anywhere
    if request.route in _NATIVE:
        return NativeRules(prefill_body, is_stream=request.is_stream)
    return OpenAIRules(prefill_body, is_stream=request.is_stream, num_samples=request.num_samples)


def _any(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def _asks_for_nothing(fields: dict[str, Any]) -> bool:
    sampling = fields.get("sampling_params")
    items = sampling if isinstance(sampling, list) else [sampling]
    return any(isinstance(item, dict) and item.get("max_new_tokens") == 0 for item in items)
