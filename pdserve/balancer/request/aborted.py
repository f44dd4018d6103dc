"""The answer to a request that was aborted while no worker had it. Pure.

It ends as SGLang ends one in its own waiting queue (tokenizer_manager.py, _handle_abort_req): status 200, no
token, finish reason ``abort``; a response has failed, and a message says ``end_turn``, having no such reason.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from pdserve.balancer.request.options import lax_bool
from pdserve.balancer.request.request import ParsedRequest, Route
from pdserve.balancer.request.transforms import names_of
from pdserve.http.answer import JSON_TYPE, Answer
from pdserve.http.sse import DONE_EVENT, render_event

MESSAGE = "Abort in waiting queue"
_SSE_TYPE = (b"content-type", b"text/event-stream; charset=utf-8")
_COUNTS = {"prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": None}
_USAGE = {**_COUNTS, "reasoning_tokens": 0, "completion_tokens_details": None}
_RESPONSE_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 0,
}
_RESPONSE_DEFAULTS: dict[str, Any] = {
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "instructions": None,
    "max_output_tokens": None, "previous_response_id": None, "reasoning": {"effort": None, "summary": None},
    "store": True, "temperature": None, "text": None, "top_p": None, "truncation": "disabled", "user": None,
    "metadata": {},
}  # fmt: skip

_Document = dict[str, Any]


def aborted_answer(request: ParsedRequest, rid: str = "") -> Answer:
    """The whole answer, or a whole stream as its body, to one request; of a chat's samples, to one.

    ``rid`` is the name under which the client may know it, unless it gave one itself.
    """
    fields: _Document = request.fields if request.fields is not None else msgspec.json.decode(request.raw)
    rids = names_of(request) or [rid or _new_rid(request.route) for _ in range(request.num_prompts or 1)]
    match request.route:
        case Route.GENERATE | Route.VERTEX:
            whole, events = _native(request, fields, rids)
        case Route.COMPLETIONS:
            whole, events = _completions(fields, rids)
        case Route.RESPONSES:
            whole, events = _response(fields, rids[0])
        case Route.MESSAGES:
            whole, events = _message(fields)
        case Route.CHAT | Route.INVOCATIONS:
            whole, events = _chat(fields, rids[0])
    if not request.is_stream:
        return Answer(200, msgspec.json.encode(whole), (JSON_TYPE,))
    return Answer(200, b"".join(map(_rendered, events)) + _end(request.route, fields, events), (_SSE_TYPE,))


def _new_rid(route: Route) -> str:
    return route.rid_prefix + uuid.uuid4().hex


def _rendered(event: _Document) -> bytes:
    """With a name where the route's events have one, which is their ``type``."""
    return render_event(msgspec.json.encode(event), event.get("type", "").encode())


def _end(route: Route, fields: _Document, events: list[_Document]) -> bytes:
    if route in (Route.RESPONSES, Route.MESSAGES):
        return b""
    options = fields.get("stream_options")
    wants_usage = isinstance(options, dict) and lax_bool(options.get("include_usage"))
    if not (route.is_openai and wants_usage):
        return DONE_EVENT
    return _rendered({**events[-1], "choices": [], "usage": _USAGE}) + DONE_EVENT


def _native(request: ParsedRequest, fields: _Document, rids: list[str]) -> tuple[Any, list[_Document]]:
    reason = {"type": "abort", "message": MESSAGE}
    rest: _Document = {"finish_reason": reason, "completion_tokens": 0}
    if fields.get("parameters", fields).get("return_logprob"):
        rest |= {"input_token_logprobs": [], "output_token_logprobs": [], "output_token_logprobs_length": 0}
    metas = [{"id": rid, **rest} for rid in rids]
    items: list[_Document] = [{"text": "", "output_ids": [], "meta_info": meta} for meta in metas]
    if request.num_prompts is None:
        return {"predictions": items[0]} if request.route is Route.VERTEX else items[0], items
    events = [{**item, "index": index} for index, item in enumerate(items)]
    return {"predictions": items} if request.route is Route.VERTEX else items, events


def _completions(fields: _Document, rids: list[str]) -> tuple[_Document, list[_Document]]:
    prompt = fields.get("prompt")
    prompts = prompt if isinstance(prompt, list) and len(prompt) == len(rids) else [prompt] * len(rids)
    echoed = [text if isinstance(text, str) and lax_bool(fields.get("echo")) else "" for text in prompts]
    head = {"object": "text_completion", "created": int(time.time()), "model": fields.get("model", "default")}
    end = {"logprobs": None, "finish_reason": "abort", "matched_stop": None}
    choices = [{"index": index, "text": text, **end} for index, text in enumerate(echoed)]
    whole = {"id": rids[0], **head, "choices": choices, "usage": _USAGE}
    events = [
        {"id": rid, **head, "choices": [choice], "usage": None}
        for rid, choice in zip(rids, choices, strict=False)
    ]
    return whole, events


def _chat(fields: _Document, rid: str) -> tuple[_Document, list[_Document]]:
    head = {"id": rid, "object": "chat.completion", "created": int(time.time())}
    head["model"] = fields.get("model", "default")
    begun = {"index": 0, "logprobs": None, "finish_reason": None, "matched_stop": None}
    ended = {**begun, "finish_reason": "abort"}
    message = {"role": "assistant", "content": "", "reasoning_content": None}
    chunk = {**head, "object": "chat.completion.chunk"}
    events = [
        {**chunk, "choices": [{**begun, "delta": message}]},
        {**chunk, "choices": [{**ended, "delta": {"reasoning_content": None}}]},
    ]
    return {**head, "choices": [{**ended, "message": message}], "usage": _USAGE}, events


def _response(fields: _Document, rid: str) -> tuple[_Document, list[_Document]]:
    whole = {"id": rid, "object": "response", "created_at": int(time.time()), "model": fields.get("model")}
    whole |= {"output": [], "status": "in_progress", "usage": None, "error": None, "incomplete_details": None}
    whole |= {name: fields.get(name, default) for name, default in _RESPONSE_DEFAULTS.items()}
    error = {"code": "server_error", "message": MESSAGE}
    failed = {**whole, "status": "failed", "usage": _RESPONSE_USAGE, "error": error}
    kinds = {"created": whole, "in_progress": whole, "failed": failed}
    events = [
        {"type": f"response.{kind}", "response": response, "sequence_number": number}
        for number, (kind, response) in enumerate(kinds.items())
    ]
    return failed, events


def _message(fields: _Document) -> tuple[_Document, list[_Document]]:
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
    usage = {"input_tokens": 0, "output_tokens": 0}
    rest = {"model": fields.get("model"), "usage": usage}
    whole = {**head, "content": [{"type": "text", "text": ""}], **rest, "stop_reason": "end_turn"}
    events: list[_Document] = [
        {"type": "message_start", "message": {**head, "content": [], **rest}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 0}},
        {"type": "message_stop"},
    ]
    return whole, events
