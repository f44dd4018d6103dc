"""Answers in each dialect as SGLang 0.5.23 gives them: the events of a stream, and whole bodies. Pure.

Source: sglang/srt/entrypoints/{openai,anthropic}/serving*.py and http_server.py. ``NUM_TOKENS`` tokens to a
prompt of ``NUM_PROMPT``; the text contains what must not be taken for an error or an end.
"""

from __future__ import annotations

import json
from typing import Any

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
DIALECTS = (GENERATE, CHAT, COMPLETIONS, MESSAGES, RESPONSES)
NUM_TOKENS = 40
NUM_PROMPT = 7
TEXT = ' say "error" and "finish_reason":"abort"\n'
DONE = b"data: [DONE]\n\n"


def request_to(path: str, **more: object) -> dict[str, Any]:
    """The smallest request of a route."""
    prompts: dict[str, dict[str, Any]] = {
        GENERATE: {"text": "hi"},
        COMPLETIONS: {"prompt": "hi"},
        RESPONSES: {"input": "hi"},
    }
    return {**prompts.get(path, {"messages": [{"role": "user", "content": "hi"}]}), **more}


def event(document: dict[str, Any], name: str = "") -> bytes:
    """One event; typed ones have a line with their name."""
    data = json.dumps(document, separators=(",", ":")).encode()
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data) if name else b"data: %b\n\n" % data


def typed(document: dict[str, Any]) -> bytes:
    """An event named as its type."""
    return event(document, document["type"])


def preamble(path: str) -> list[bytes]:
    """What precedes the first token."""
    if path == MESSAGES:
        usage = {"input_tokens": NUM_PROMPT - 3, "cache_read_input_tokens": 3, "output_tokens": 0}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "usage": usage}
        return [typed({"type": "message_start", "message": message}), typed({"type": "ping"})]
    if path == RESPONSES:
        response = {
            "id": "resp_1",
            "object": "response",
            "status": "in_progress",
            "usage": None,
            "error": None,
        }
        kinds = ("response.created", "response.in_progress")
        return [
            typed({"type": kind, "sequence_number": number, "response": response})
            for number, kind in enumerate(kinds)
        ]
    return []


def deltas(path: str, num_tokens: int = NUM_TOKENS) -> list[bytes]:
    """One event a token, with what opens the content before the first; nothing ends it."""
    if path == GENERATE:
        return [_native(tokens + 1, None) for tokens in range(num_tokens)]
    if path == CHAT:
        return [_chat({"role": "assistant", "content": ""}), *[_chat({"content": TEXT})] * num_tokens]
    if path == COMPLETIONS:
        return [_completion(TEXT)] * num_tokens
    if path == MESSAGES:
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": TEXT}}
        return [typed(block), *[typed(delta)] * num_tokens]
    item = {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, "item": {}}
    part = {"type": "response.content_part.added", "sequence_number": 3, "output_index": 0, "part": {}}
    text = [
        typed({"type": "response.output_text.delta", "sequence_number": 4 + number, "delta": TEXT})
        for number in range(num_tokens)
    ]
    return [typed(item), typed(part), *text]


def end(
    path: str, finish: str = "length", *, num_tokens: int = NUM_TOKENS, usage: bool = True
) -> list[bytes]:
    """How a stream ends: ``finish`` in SGLang's word; ``usage`` only where it can be left out."""
    counts = {"prompt_tokens": NUM_PROMPT, "completion_tokens": num_tokens, "prompt_tokens_details": None}
    if path == GENERATE:
        return [_native(num_tokens, {"type": finish, "message": "Aborted", "status_code": None}), DONE]
    if path in (CHAT, COMPLETIONS):
        last = _chat({}, finish) if path == CHAT else _completion("", finish)
        counted = event({"id": "1", "object": "chunk", "choices": [], "usage": counts})
        return [last, *([counted] if usage else []), DONE]
    if path == MESSAGES:
        delta = {"stop_reason": _stop_reason(finish)}
        ends: list[dict[str, Any]] = [
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": delta, "usage": {"output_tokens": num_tokens}},
            {"type": "message_stop"},
        ]
        return [typed(document) for document in ends]
    response = response_of(finish, num_tokens)
    kind = f"response.{response['status']}"
    done = {"type": "response.output_text.done", "sequence_number": 98, "text": TEXT * num_tokens}
    return [typed(done), typed({"type": kind, "sequence_number": 99, "response": response})]


def stream(path: str, finish: str = "length", *, usage: bool = True) -> list[bytes]:
    """A whole stream."""
    return [*preamble(path), *deltas(path), *end(path, finish, usage=usage)]


def failure(path: str, message: str = "KV transfer failed", status: int = 500) -> list[bytes]:
    """How a stream tells that its server failed; nothing follows."""
    if path == GENERATE:
        return [_native(3, {"type": "abort", "message": message, "status_code": status}), DONE]
    if path in (CHAT, COMPLETIONS):
        fields = {"object": "error", "message": message, "type": "X", "param": None, "code": status}
        return [event({"error": fields}), DONE]
    if path == MESSAGES:
        kind = "invalid_request_error" if status == 400 else "api_error"
        error = {"type": "error", "error": {"type": kind, "message": message}}
        return [typed(error), typed({"type": "message_stop"})]
    response = {**response_of("abort", 3), "error": {"code": "server_error", "message": message}}
    if status == 400:
        response["usage"] = None  # the code stays that of a server error
    return [typed({"type": "response.failed", "sequence_number": 9, "response": response})]


def response_of(finish: str, num_tokens: int) -> dict[str, Any]:
    """The object of ``/v1/responses``, as in its last event and in its whole answer."""
    status = {"length": "incomplete", "abort": "failed"}.get(finish, "completed")
    usage = {
        "input_tokens": NUM_PROMPT,
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": NUM_PROMPT + num_tokens,
    }
    error = {"code": "server_error", "message": "Aborted"} if finish == "abort" else None
    output = [{"type": "message", "status": "completed", "content": [{"text": TEXT * num_tokens}]}]
    tools = [{"type": "function", "name": "f", "description": "d" * 20_000}]
    head = {"id": "resp_1", "object": "response", "output": output, "status": status, "usage": usage}
    return {**head, "tools": tools, "error": error}


def whole(path: str, finish: str = "length") -> dict[str, Any]:
    """A whole answer."""
    if path == GENERATE:
        return {"text": TEXT, "meta_info": _meta(NUM_TOKENS, {"type": finish})}
    if path == RESPONSES:
        return response_of(finish, NUM_TOKENS)
    if path == MESSAGES:
        usage = {"input_tokens": NUM_PROMPT - 3, "cache_read_input_tokens": 3, "output_tokens": NUM_TOKENS}
        return {"type": "message", "content": [], "stop_reason": _stop_reason(finish), "usage": usage}
    choice = {"index": 0, "finish_reason": finish, "message": {"content": TEXT}, "text": TEXT}
    return {"choices": [choice], "usage": {"prompt_tokens": NUM_PROMPT, "completion_tokens": NUM_TOKENS}}


def _stop_reason(finish: str) -> str:
    return {"length": "max_tokens", "tool_calls": "tool_use"}.get(finish, "end_turn")


def _meta(num_tokens: int, reason: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": "1", "finish_reason": reason, "prompt_tokens": NUM_PROMPT, "completion_tokens": num_tokens}


def _native(num_tokens: int, reason: dict[str, Any] | None) -> bytes:
    return event({"text": TEXT * num_tokens, "output_ids": [], "meta_info": _meta(num_tokens, reason)})


def _chat(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return event(
        {"id": "1", "object": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    )


def _completion(text: str, finish: str | None = None) -> bytes:
    return event({"id": "1", "object": "x", "choices": [{"index": 0, "text": text, "finish_reason": finish}]})
