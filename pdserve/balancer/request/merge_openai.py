"""Merging answers of the OpenAI routes: the prompt's logprobs, experts, and usage of samples.

Completions with ``echo`` and ``logprobs`` list the prompt's tokens before the
output's; decode lists the output's only. A stream has them in the first event of
each choice. Values are moved as the bytes they came in.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from pdserve.balancer.request.merge_native import merge_meta
from pdserve.balancer.request.merge_parts import encode, event_payloads, experts, fields_of, items_of

NUM_PREFILL_TOKENS = 1
"""A prefill server makes the first token and ends."""


class OpenAIRules:
    """What prefill said about each choice of one request, and how many samples share a prompt.

    ``num_samples`` of a chat are requests of their own, merged elsewhere: then it is 1.
    """

    def __init__(self, prefill_body: bytes, *, is_stream: bool, num_samples: int = 1) -> None:
        self._num_samples = num_samples
        self._prompts: dict[int, dict[str, list[Raw]]] = {}
        self._meta: dict[int, dict[str, Raw]] = {}
        self._experts: Raw | None = None
        bodies = event_payloads(prefill_body) if is_stream else [prefill_body]
        for body in bodies if prefill_body else []:
            self._learn(fields_of(body))

    @property
    def is_needed(self) -> bool:
        """False if no event would be changed."""
        return self._num_samples > 1 or bool(self._prompts) or self._experts is not None

    def merge_body(self, body: bytes) -> bytes:
        """A whole answer."""
        return self._merged(fields_of(body))

    def merge_event(self, payload: bytes) -> bytes:
        """One event: of a choice, the experts, or the usage at the end."""
        if not self._prompts and b'"choices":[]' not in payload:
            return payload
        return self._merged(fields_of(payload), is_event=True)

    def _learn(self, document: dict[str, Raw]) -> None:
        for choice in _choices(document):
            logprobs = _logprobs(choice)
            if logprobs is not None:
                prompt = {name: values[:-NUM_PREFILL_TOKENS] for name, values in logprobs.items()}
                if any(prompt.values()):
                    self._prompts.setdefault(_index(choice), prompt)
            if "meta_info" in choice:
                self._meta[_index(choice)] = fields_of(choice["meta_info"])
        if self._experts is None:
            self._experts = _sglext(document).get("routed_experts")

    def _merged(self, document: dict[str, Raw], *, is_event: bool = False) -> bytes:
        merged: dict[str, Any] = dict(document)
        if self._prompts or self._meta:
            choices = [self._choice(choice, is_event) for choice in _choices(document)]
            merged["choices"] = choices
        if self._experts is not None and "routed_experts" in (ours := _sglext(document)):
            merged["sglext"] = {**ours, "routed_experts": experts(ours["routed_experts"], self._experts)}
        # An event with a choice may have the usage of that choice alone (continuous_usage_stats).
        counts_all = not is_event or bytes(document.get("choices", b"")) == b"[]"
        if self._num_samples > 1 and counts_all and bytes(document.get("usage", b"null")) != b"null":
            merged["usage"] = usage_of_samples(msgspec.json.decode(document["usage"]), self._num_samples)
        return encode(merged)

    def _choice(self, choice: dict[str, Raw], is_event: bool) -> dict[str, Any]:
        index = _index(choice)
        merged: dict[str, Any] = dict(choice)
        prompt, ours = self._prompts.get(index), _logprobs(choice)
        if prompt is not None and ours is not None:
            merged["logprobs"] = {name: prompt.get(name, []) + values for name, values in ours.items()}
            if is_event:
                del self._prompts[index]  # only the first event of a choice tells of its prompt
        if index in self._meta and "meta_info" in choice:
            meta = fields_of(choice["meta_info"])
            merge_meta(meta, self._meta[index])
            merged["meta_info"] = meta
        return merged


def usage_of_samples(usage: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """Usage in which every prompt was counted once per sample, with prompts counted once.

    As SGLang counts (usage_processor.py): prompt and cached tokens of the first
    sample, completion and reasoning tokens of all.
    """
    details = usage.get("prompt_tokens_details")
    prompt = _share(usage.get("prompt_tokens"), num_samples)
    merged = {**usage, "prompt_tokens": prompt}
    if isinstance(details, dict):
        merged["prompt_tokens_details"] = {
            name: _share(value, num_samples) for name, value in details.items()
        }
    if isinstance(prompt, int) and isinstance(completion := usage.get("completion_tokens"), int):
        merged["total_tokens"] = prompt + completion
    return merged


def _share(value: Any, num_samples: int) -> Any:
    return value // num_samples if isinstance(value, int) else value


def _choices(document: dict[str, Raw]) -> list[dict[str, Raw]]:
    return [fields_of(raw) for raw in items_of(document["choices"])] if "choices" in document else []


def _index(choice: dict[str, Raw]) -> int:
    return msgspec.json.decode(choice["index"], type=int)


def _logprobs(choice: dict[str, Raw]) -> dict[str, list[Raw]] | None:
    """Completions' lists of a value per token; None for none, and for a chat's, which need nothing."""
    raw = choice.get("logprobs")
    if raw is None or "text" not in choice:
        return None
    return msgspec.json.decode(raw, type=dict[str, list[Raw]] | None)


def _sglext(document: dict[str, Raw]) -> dict[str, Raw]:
    raw = document.get("sglext")
    return (msgspec.json.decode(raw, type=dict[str, Raw] | None) or {}) if raw is not None else {}
