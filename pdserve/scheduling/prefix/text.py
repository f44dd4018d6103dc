"""A prompt as one text that grows only at its end, from the JSON in which it was sent. Pure.

A conversation's JSON has many dresses (order of keys, blanks, escapes, content as a string or as parts)
and closes its brackets behind the last message. Its canonical text has one, in the order in which chat
templates lay messages out, and a turn's text is the beginning of the next turn's:

    [{"role":"user","content":"Hi"}]                 ─►  user\\nHi\\0
    [{"role":"user", ...}, {"role":"assistant", ...  ─►  user\\nHi\\0assistant\\n...

It is no rendering of the template: it costs 7 µs for 5 kB of messages, and as many template tokens as
it lacks are the same few for every message. Prompts that are no conversation are left as they are.
"""

from __future__ import annotations

from typing import Any

import msgspec

_ODD = (msgspec.MsgspecError, ValueError, TypeError, RecursionError)
_ABSENT = msgspec.Raw(b"")


class _Part(msgspec.Struct):
    text: str


class _Message(msgspec.Struct):
    """A message as nearly all are. Anything else in it is for ``_odd_message`` to look at."""

    role: str
    content: str | list[_Part] | None = None
    tool_calls: msgspec.Raw = _ABSENT
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None


_DECODER = msgspec.json.Decoder(list[_Message])
_SORTED = msgspec.json.Encoder(order="sorted")


def canonical_text(prompt: bytes) -> bytes:
    """The text whose prefixes are the prompt's prefixes. Never raises.

    ``prompt`` is JSON: a string, token ids, or a conversation. What stands before its messages in the
    template (tools, a salt) precedes it, closed by a zero byte, which JSON cannot contain.
    """
    head, mark, conversation = prompt.rpartition(b"\0")
    if mark:
        return head + mark + canonical_text(conversation)
    start = prompt[:64].lstrip()
    if start[:1] == b"[" and start[1:].lstrip()[:1] == b"{":
        try:
            return _conversation(prompt).encode()
        except _ODD:
            pass
    return prompt


def _conversation(prompt: bytes) -> str:
    try:
        messages = _DECODER.decode(prompt)
    except msgspec.ValidationError:
        return "".join([_odd_message(message) for message in msgspec.json.decode(prompt)])
    pieces: list[str] = []
    for message in messages:
        content = message.content
        if content is None or message.tool_calls is not _ABSENT:
            return "".join([_odd_message(message) for message in msgspec.json.decode(prompt)])
        if isinstance(content, list):
            content = " ".join([part.text for part in content])
        if message.tool_call_id is None and message.name is None and message.reasoning_content is None:
            pieces += (message.role, "\n", content, "\0")
        else:
            rest = [message.name, message.tool_call_id, message.reasoning_content]
            pieces.append(_rendered(message.role, content, rest))
    return "".join(pieces)


def _rendered(role: str, content: str, rest: list[Any]) -> str:
    """One message; ``rest`` is what else the template may show."""
    if any(value is not None for value in rest):
        return f"{role}\n{_json(rest)}{content}\0"
    return f"{role}\n{content}\0"


def _odd_message(message: Any) -> str:
    """The same text for a plain message as the quick way has, and some text for any other."""
    if not isinstance(message, dict):
        return f"{_json(message)}\0"
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and _is_text(p.get("text")) for p in content):
        content = " ".join([part["text"] for part in content])
    calls = message.get("tool_calls")
    if content is None and calls:
        content = ""
    if not (isinstance(role, str) and isinstance(content, str)):
        return f"{_json(_without_marks(message))}\0"
    rest = [message.get("name"), message.get("tool_call_id"), message.get("reasoning_content")]
    return _rendered(role, content, [*rest, calls] if calls else rest)


def _without_marks(message: dict[str, Any]) -> dict[str, Any]:
    """Anthropic's clients move their ``cache_control`` to the last message with each turn."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [
        {name: value for name, value in part.items() if name != "cache_control"}
        if isinstance(part, dict)
        else part
        for part in content
    ]
    return {**message, "content": parts}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _json(value: Any) -> str:
    return _SORTED.encode(value).decode()
