"""Request parsing: typed fields only for a plain request, whose prompt stays raw bytes. Pure.

What is not plain (several prompts or samples, fields that are ours, an odd type,
anything that changes how answers are merged) is decoded whole by rewrite.py.
"""

from __future__ import annotations

import msgspec

from pdserve.balancer.request.prompt import ABSENT as _ABSENT
from pdserve.balancer.request.prompt import PromptHead, head_of
from pdserve.balancer.request.request import (
    BYTES_PER_TOKEN,
    DEFAULT_NEW_TOKENS,
    MAX_NEW_TOKENS,
    ParsedRequest,
    RequestRefused,
    Route,
)
from pdserve.balancer.request.rewrite import rewrite
from pdserve.types import RequestShape

LONG_BYTES = 4096
"""Below it a picture would be counted as a thousand tokens at most, which is about what it is."""


class _Sampling(msgspec.Struct):
    n: int | None = None
    max_new_tokens: int | None = None


class _Plain(PromptHead):
    text: msgspec.Raw = _ABSENT
    input_ids: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT
    input_embeds: msgspec.Raw = _ABSENT
    rid: msgspec.Raw = _ABSENT
    request_id: msgspec.Raw = _ABSENT
    previous_response_id: msgspec.Raw = _ABSENT
    bootstrap_host: msgspec.Raw = _ABSENT
    bootstrap_port: msgspec.Raw = _ABSENT
    bootstrap_room: msgspec.Raw = _ABSENT
    return_logprob: msgspec.Raw = _ABSENT
    logprobs: msgspec.Raw = _ABSENT
    top_logprobs: msgspec.Raw = _ABSENT
    echo: msgspec.Raw = _ABSENT
    return_routed_experts: msgspec.Raw = _ABSENT
    stream: bool | None = False
    sampling_params: _Sampling | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    priority: int | None = None
    user: str | None = None


_DECODER = msgspec.json.Decoder(_Plain)
_PROMPT_FIELDS = {
    Route.CHAT: "messages",
    Route.INVOCATIONS: "messages",
    Route.MESSAGES: "messages",
    Route.COMPLETIONS: "prompt",
    Route.RESPONSES: "input",
}


def parse_plain(route: Route, body: bytes, wants_prompt: bool) -> ParsedRequest | None:
    """The request if it is plain, else None. Never raises for what a client may send."""
    if route is Route.VERTEX:
        return None
    try:
        if not body.isascii():
            body.decode()  # what is skipped below is not checked, and must not reach a worker
        plain = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    sampling = plain.sampling_params
    if plain.n not in (None, 1) or (sampling is not None and sampling.n not in (None, 1)):
        return None
    if not (_is_unnamed(plain) and _is_decodes_own(plain)):
        return None
    prompt = _prompt(route, plain)
    if prompt is None:
        return None
    head, head_tokens = head_of(route, plain)
    shape = RequestShape(
        prompt_tokens=_magnitude(prompt) + head_tokens,
        max_new_tokens=_limit(route, plain),
        prompt=head + prompt if wants_prompt else b"",
        priority=plain.priority,
        route=route,
        user=plain.user or "",
    )
    return ParsedRequest(route, shape, plain.stream is True, raw=body)


def _limit(route: Route, plain: _Plain) -> int:
    """The limit that the route's model has a field for."""
    if route is Route.GENERATE:
        limit = None if plain.sampling_params is None else plain.sampling_params.max_new_tokens
    elif route is Route.RESPONSES:
        limit = plain.max_output_tokens
    elif route is Route.CHAT or route is Route.INVOCATIONS:
        limit = plain.max_completion_tokens or plain.max_tokens or None  # a chat's 0 is no limit
    else:
        limit = plain.max_tokens
    return DEFAULT_NEW_TOKENS if limit is None or limit < 0 else min(limit, MAX_NEW_TOKENS)


def _is_unnamed(plain: _Plain) -> bool:
    """True if the client left to us what is ours: ids, rooms. Spelled out: a loop costs four times more."""
    return (
        plain.rid is _ABSENT
        and plain.request_id is _ABSENT
        and plain.previous_response_id is _ABSENT
        and plain.input_embeds is _ABSENT
        and plain.bootstrap_host is _ABSENT
        and plain.bootstrap_port is _ABSENT
        and plain.bootstrap_room is _ABSENT
    )


def _is_decodes_own(plain: _Plain) -> bool:
    """True if nothing is asked for that prefill must answer (merge.py) or has a limit on (rewrite.py)."""
    return (
        plain.return_logprob is _ABSENT
        and plain.logprobs is _ABSENT
        and plain.top_logprobs is _ABSENT
        and plain.echo is _ABSENT
        and plain.return_routed_experts is _ABSENT
    )


def _prompt(route: Route, plain: _Plain) -> memoryview | None:
    """The one prompt as it stands in the body; None if there is none or there are several."""
    name = _PROMPT_FIELDS.get(route)
    if plain.input_ids is not _ABSENT and route.is_chat:
        return None
    if name is not None:
        raw = memoryview(getattr(plain, name))
    elif plain.text is not _ABSENT:
        raw = memoryview(plain.text)
    else:
        raw = memoryview(plain.input_ids)
    if not raw:
        return None
    if name in ("messages", "input"):
        return None if len(raw) > LONG_BYTES and _has_media(raw) else raw
    is_text = raw[0] == 0x22 and len(raw) > 2
    return raw if is_text or _is_ids(raw) else None


def _has_media(raw: memoryview) -> bool:
    """True if there may be pictures or sound in it, whose bytes are no tokens."""
    text = bytes(raw)
    return b";base64," in text or b'"base64"' in text or b'"input_audio"' in text


def _is_ids(raw: memoryview) -> bool:
    return raw[0] == 0x5B and bytes(raw[1:32]).lstrip()[:1].isdigit()


def _magnitude(prompt: memoryview) -> int:
    """About how many tokens: a list of ids has one more than commas, text a quarter of its bytes."""
    if prompt[0] == 0x5B and _is_ids(prompt):
        return bytes(prompt).count(b",") + 1
    return max(1, len(prompt) // BYTES_PER_TOKEN)


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
