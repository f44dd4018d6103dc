"""Parts of answers that are moved without being understood. Pure.

``msgspec.Raw`` keeps a value as the bytes it came in: nothing is rounded, and a
list of a thousand logprobs costs one copy.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

import msgspec
from msgspec import Raw

from pdserve.http.sse import event_data, split_events

_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_LIST = msgspec.json.Decoder(list[Raw])
encode = msgspec.json.Encoder().encode


def fields_of(body: bytes | Raw) -> dict[str, Raw]:
    """The fields of an object, each as it came."""
    return _OBJECT.decode(body)


def items_of(body: bytes | Raw) -> list[Raw]:
    """The items of a list, each as it came."""
    return _LIST.decode(body)


def event_payloads(stream: bytes) -> Iterator[bytes]:
    """The JSON objects of a whole stream of server-sent events."""
    for event in split_events(stream):
        payload = event_data(event)
        if payload.startswith(b"{"):
            yield payload


def experts(ours: Raw, theirs: Raw) -> Raw:
    """Routed experts of every token: prefill saw the prompt, decode's bytes for it mean nothing.

    Both are base64 of int32 rows from the same start, one per token (state_capturer/routed_experts.py).
    """
    mine, prompt = (msgspec.json.decode(raw, type=bytes | None) for raw in (ours, theirs))
    if mine is None or prompt is None:
        return ours
    return Raw(b'"' + base64.b64encode(prompt + mine[len(prompt) :]) + b'"')
