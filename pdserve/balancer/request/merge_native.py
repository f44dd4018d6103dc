"""Merging answers of /generate and /vertex_generate: the prompt's side of ``meta_info``.

Values are moved as the bytes they came in, so numbers keep every digit. A stream
repeats the prompt's logprobs in every event (tokenizer_manager.py,
add_logprob_to_meta_info), so every event gets them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from pdserve.balancer.request.merge_parts import encode, event_payloads, experts, fields_of, items_of

_CHOSEN = "output_token_ids_logprobs"
_NULL, _EMPTY, _ZERO = b"null", Raw(b"[]"), Raw(b"0")


class NativeRules:
    """What prefill said about each prompt of one request; an empty body says nothing."""

    def __init__(self, prefill_body: bytes, *, is_stream: bool) -> None:
        self._prompts: dict[int, dict[str, Raw]] = {}
        if is_stream:
            for payload in event_payloads(prefill_body):
                item = fields_of(payload)
                self._learn(_index(item), item)
        elif prefill_body:
            for index, raw in enumerate(_items(prefill_body)[0]):
                self._learn(index, fields_of(raw))

    @property
    def is_needed(self) -> bool:
        """False if prefill said nothing of use: it refused the request, as decode does too."""
        return bool(self._prompts)

    def merge_body(self, body: bytes) -> bytes:
        """A whole answer: an object, a list of them, or Vertex's predictions."""
        if not self._prompts:
            return body
        items, shape = _items(body)
        merged = [Raw(self._merged(index, fields_of(raw))) for index, raw in enumerate(items)]
        if shape == "one":
            return bytes(merged[0])
        return encode({"predictions": merged} if shape == "predictions" else merged)

    def merge_event(self, payload: bytes) -> bytes:
        """One event: an object, with its prompt's number if there are several."""
        item = fields_of(payload)
        return self._merged(_index(item), item)

    def _learn(self, index: int, item: dict[str, Raw]) -> None:
        if "meta_info" in item:
            self._prompts[index] = fields_of(item["meta_info"])

    def _merged(self, index: int, item: dict[str, Raw]) -> bytes:
        theirs = self._prompts.get(index)
        if theirs is None or "meta_info" not in item:
            return encode(item)
        ours = fields_of(item["meta_info"])
        merge_meta(ours, theirs)
        return encode({**item, "meta_info": ours})


def merge_meta(ours: dict[str, Raw], theirs: dict[str, Raw]) -> None:
    """Complete decode's ``meta_info`` from prefill's, in place."""
    for name, value in theirs.items():
        if name.startswith("input_") and name in ours:
            ours[name] = value
    if _CHOSEN in ours and _CHOSEN in theirs:
        ours[_CHOSEN] = _with_first(ours[_CHOSEN], theirs[_CHOSEN])
    if "output_token_logprobs" in ours and bytes(ours.get("completion_tokens", b"")) == b"0":
        # Decode lists the token it was handed even where none was asked for.
        ours["output_token_logprobs"], ours["output_token_logprobs_length"] = _EMPTY, _ZERO
    if "routed_experts" in ours and "routed_experts" in theirs:
        ours["routed_experts"] = experts(ours["routed_experts"], theirs["routed_experts"])


def _with_first(ours: Raw, theirs: Raw) -> Raw:
    """Rows of chosen ids with the first token's, which stays on the prefill server."""
    rows = msgspec.json.decode(ours, type=list[Raw] | None) or []
    first = msgspec.json.decode(theirs, type=list[Raw] | None) or []
    if not rows or not first or bytes(rows[0]) != _NULL:
        return ours
    return Raw(encode([first[0], *rows[1:]]))


def _items(body: bytes) -> tuple[list[Raw], str]:
    """The answers in a whole body and how it holds them: one, list or predictions."""
    document: Any = msgspec.json.decode(body, type=list[Raw] | dict[str, Raw])
    if isinstance(document, list):
        return document, "list"
    if "predictions" in document:
        return items_of(document["predictions"]), "predictions"
    return [Raw(body)], "one"


def _index(item: dict[str, Raw]) -> int:
    return msgspec.json.decode(item["index"], type=int) if "index" in item else 0
