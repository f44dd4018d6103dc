"""Requests of /v1/responses, /v1/messages and the routes that take no prompt, for the conformance test."""

from __future__ import annotations

from typing import Any

from tests.engine.conformance import SERVED, Case
from tests.engine.conformance_native import words
from tests.engine.conformance_openai import MODEL

_TALK = [{"role": "user", "content": "abc"}]


def _response(name: str, **fields: Any) -> Case:
    body = {"model": SERVED, "input": words(f"r {name}"), "temperature": 0, "max_output_tokens": 8, **fields}
    return Case(f"response {name}", "/v1/responses", body)


RESPONSES = [
    _response("text"),
    _response("messages", input=[{"role": "user", "content": words("r messages")}]),
    _response("instructions", instructions="Be brief."),
    _response("streamed", stream=True),
    _response("not stored", store=False),
    _response("metadata and user", metadata={"a": "b"}, user="me"),
    _response("logprobs", top_logprobs=2, include=["message.output_text.logprobs"]),
    _response("logprobs, streamed", top_logprobs=1, include=["message.output_text.logprobs"], stream=True),
    _response("stop", stop=["a", "e", "o", "Q"], max_output_tokens=30),
    _response("request_id", request_id="resp_of_mine"),
    _response("another model", model="no-such-model"),
    _response("empty input", input=""),
    _response("input is a number", input=5),
    _response("max_output_tokens is a word", max_output_tokens="many"),
    _response("too long", input="a" * 5000),
    _response("too long, streamed", input="a" * 5000, stream=True),
    Case("response no fields", "/v1/responses", {}),
    Case("response broken JSON", "/v1/responses", b"{"),
    Case("response as text", "/v1/responses", {"input": "a"}, headers={"Content-Type": "text/plain"}),
    Case("response by PUT", "/v1/responses", {}, method="PUT"),
    Case("response unknown", "/v1/responses/resp_none", method="GET"),
    Case("response unknown, cancelled", "/v1/responses/resp_none/cancel"),
]


def _message(name: str, **fields: Any) -> Case:
    messages = [{"role": "user", "content": words(f"m {name}")}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    return Case(f"message {name}", "/v1/messages", body)


MESSAGES = [
    _message("user"),
    _message("system", system="Be brief."),
    _message("blocks", messages=[{"role": "user", "content": [{"type": "text", "text": words("m blocks")}]}]),
    _message("streamed", stream=True),
    _message("stop_sequences", stop_sequences=["a", "e", "o", "Q"], max_tokens=30),
    _message("stop_sequences, streamed", stop_sequences=["a", "e", "o", "Q"], max_tokens=30, stream=True),
    _message("metadata", metadata={"user_id": "me"}),
    _message("tools", tools=[{"name": "weather", "input_schema": {"type": "object"}}]),
    _message("no messages", messages=[]),
    _message("max_tokens 0", max_tokens=0),
    _message("max_tokens is a word", max_tokens="many"),
    _message("too long", messages=[{"role": "user", "content": "a" * 5000}]),
    _message("too long, streamed", messages=[{"role": "user", "content": "a" * 5000}], stream=True),
    _message("unknown role", messages=[{"role": "wizard", "content": "hi"}]),
    Case("message no fields", "/v1/messages", {}),
    Case("message broken JSON", "/v1/messages", b"{"),
    Case("message as text", "/v1/messages", {}, headers={"Content-Type": "text/plain"}),
    Case("message by GET", "/v1/messages", method="GET"),
    Case("message count", "/v1/messages/count_tokens", {"model": MODEL, "messages": _TALK}),
    Case("message count no fields", "/v1/messages/count_tokens", {}),
]  # fmt: skip

ASKED_OF_ONE = [
    Case("tokenize", "/tokenize", {"model": MODEL, "prompt": "abc def"}),
    Case("tokenize by v1", "/v1/tokenize", {"model": MODEL, "prompt": "abc def"}),
    Case("tokenize texts", "/tokenize", {"model": MODEL, "prompt": ["abc", "defg"]}),
    Case("tokenize without specials", "/tokenize", {"prompt": "abc", "add_special_tokens": False}),
    Case("tokenize messages", "/tokenize", {"model": MODEL, "messages": _TALK}),
    Case("tokenize no fields", "/tokenize", {}),
    Case("tokenize a number", "/tokenize", {"prompt": 5}),
    Case("tokenize by GET", "/tokenize", method="GET"),
    Case("detokenize", "/detokenize", {"model": MODEL, "tokens": [97, 98, 99]}),
    Case("detokenize by v1", "/v1/detokenize", {"model": MODEL, "tokens": [97, 98, 99]}),
    Case("detokenize lists", "/detokenize", {"tokens": [[97], [98, 99]]}),
    Case("detokenize words", "/detokenize", {"tokens": ["a"]}),
    Case("detokenize no fields", "/detokenize", {}),
    Case("models", "/v1/models", method="GET"),
    Case("models by POST", "/v1/models", {}),
    Case("model unknown", "/v1/models/no-such-model", method="GET"),
    Case("model info", "/model_info", method="GET"),
    Case("get model info", "/get_model_info", method="GET"),
    Case("root", "/", method="GET"),
    Case("root by HEAD", "/", method="HEAD"),
    Case("ping", "/ping", method="GET"),
    Case("health", "/health", method="GET"),
    Case("unknown path", "/no/such/path", method="GET"),
    Case("unknown path by POST", "/v1/no-such-path", {}),
    Case("unknown path below a known one", "/generate/more", {}),
    Case("known path with a slash", "/generate/", {}),
    Case("abort of an unknown request", "/abort_request", {"rid": "no such request"}),
    Case("separate_reasoning", "/separate_reasoning", {"text": "a", "reasoning_parser": "qwen3"}),
    Case("ollama tags by POST", "/api/tags", {}),
]

CASES = [*RESPONSES, *MESSAGES, *ASKED_OF_ONE]
