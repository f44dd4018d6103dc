"""The quick look at a plain request: typed fields only, everything else skipped, the prompt not decoded.

Whatever is not plain (several prompts or samples, fields that are ours, an odd
type, anything that changes how answers are merged) is left to rewrite.py.
"""

from __future__ import annotations

import msgspec

from pdserve.balancer.request import DEFAULT_NEW_TOKENS, ParsedRequest, Route
from pdserve.types import RequestShape

BYTES_PER_TOKEN = 4
"""A rule of thumb for English text; the policy needs the magnitude only."""

_NOT_PLAIN = (
    b'"return_',
    b'"logprobs"',
    b'"echo"',
    b'"top_logprobs',
    b";base64,",
    b'"base64"',
    b'"input_audio"',
)
"""What may need prefill's answer too, and media, whose bytes are no tokens. A prompt that happens to contain
one only costs time."""

_ABSENT = msgspec.Raw(b"")


class _Sampling(msgspec.Struct):
    n: int | None = None
    max_new_tokens: int | None = None


class _Plain(msgspec.Struct):
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
    stream: bool | None = False
    sampling_params: _Sampling | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    priority: int | None = None


_DECODER = msgspec.json.Decoder(_Plain)
_PROMPT_FIELDS = {
    Route.CHAT: "messages",
    Route.INVOCATIONS: "messages",
    Route.MESSAGES: "messages",
    Route.COMPLETIONS: "prompt",
    Route.RESPONSES: "input",
}
_OURS = ("rid", "request_id", "previous_response_id", "input_embeds")
_OURS += ("bootstrap_host", "bootstrap_port", "bootstrap_room")


def glance(route: Route, body: bytes, wants_prompt: bool) -> ParsedRequest | None:
    """The request if it is plain, else None. Never raises for what a client may send."""
    if route is Route.VERTEX or any(mark in body for mark in _NOT_PLAIN):
        return None
    try:
        plain = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    sampling = plain.sampling_params
    if plain.n not in (None, 1) or (sampling is not None and sampling.n not in (None, 1)):
        return None
    if any(getattr(plain, name) is not _ABSENT for name in _OURS):
        return None
    prompt = _prompt(route, plain)
    if prompt is None:
        return None
    limits = (sampling and sampling.max_new_tokens, plain.max_completion_tokens, plain.max_tokens)
    new_tokens = next((n for n in (*limits, plain.max_output_tokens) if n is not None), DEFAULT_NEW_TOKENS)
    shape = RequestShape(
        prompt_tokens=_magnitude(prompt),
        max_new_tokens=max(0, new_tokens),
        prompt=bytes(prompt) if wants_prompt else b"",
        priority=plain.priority or 0,
    )
    return ParsedRequest(route, shape, plain.stream is True, raw=body)


def _prompt(route: Route, plain: _Plain) -> memoryview | None:
    """The one prompt as it stands in the body; None if there is none or there are several."""
    name = _PROMPT_FIELDS.get(route)
    if name is not None:
        raw = memoryview(getattr(plain, name))
    elif plain.text is not _ABSENT:
        raw = memoryview(plain.text)
    else:
        raw = memoryview(plain.input_ids)
    if not raw:
        return None
    if name in ("messages", "input"):
        return raw
    return raw if raw[0] == 0x22 or _is_ids(raw) else None  # a string, or one prompt's token ids


def _is_ids(raw: memoryview) -> bool:
    return raw[0] == 0x5B and bytes(raw[1:32]).lstrip()[:1].isdigit()


def _magnitude(prompt: memoryview) -> int:
    """About how many tokens: a list of ids has one more than commas, text a quarter of its bytes."""
    if prompt[0] == 0x5B and _is_ids(prompt):
        return bytes(prompt).count(b",") + 1
    return max(1, len(prompt) // BYTES_PER_TOKEN)
