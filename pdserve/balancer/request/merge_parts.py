"""Parts of answers that are moved without being understood. Pure.

``msgspec.Raw`` keeps a value as the bytes it came in: nothing is rounded, and a
list of a thousand logprobs costs one copy.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

import msgspec
from msgspec import Raw

_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_LIST = msgspec.json.Decoder(list[Raw])
_DATA = b"data: "
encode = msgspec.json.Encoder().encode


def fields_of(body: bytes | Raw) -> dict[str, Raw]:
    """The fields of an object, each as it came."""
    return _OBJECT.decode(body)


def items_of(body: bytes | Raw) -> list[Raw]:
    """The items of a list, each as it came."""
    return _LIST.decode(body)


def event_payloads(stream: bytes) -> Iterator[bytes]:
    """The JSON objects of a whole stream of server-sent events."""
    for event in stream.split(b"\n\n"):
        payload = split_event(event)[1]
        if payload:
            yield payload


def split_event(event: bytes) -> tuple[bytes, bytes]:
    """What stands before an event's JSON object, and the object; it is empty if there is none.

    JSON text has no line breaks, so only the first of a line is the field's name.
    """
    mark = 0 if event.startswith(_DATA) else event.find(b"\n" + _DATA) + 1
    start = mark + len(_DATA)
    has_object = event.startswith(_DATA, mark) and event.startswith(b"{", start)
    return (event[:start], event[start:]) if has_object else (event, b"")


def experts(ours: Raw, theirs: Raw) -> Raw:
    """Routed experts of every token: prefill saw the prompt, decode's bytes for it mean nothing.

    Both are base64 of int32 rows from the same start, one per token (state_capturer/routed_experts.py).
    """
    mine, prompt = (msgspec.json.decode(raw, type=bytes | None) for raw in (ours, theirs))
    if mine is None or prompt is None:
        return ours
    return Raw(b'"' + base64.b64encode(prompt + mine[len(prompt) :]) + b'"')
