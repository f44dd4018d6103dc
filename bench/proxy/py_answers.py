"""What a SGLang server would answer, as answers.hpp makes it: bytes with a place for a time stamp."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

STAMP_DIGITS = 16
STAMP = "@" + "0" * STAMP_DIGITS
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 02 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def respond(document: object, status: str = "200 OK") -> bytes:
    """A whole response; ``None`` has an empty body."""
    body = b"" if document is None else _compact(document)
    head = f"HTTP/1.1 {status}\r\ndate: Mon, 02 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
    return f"{head}content-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n".encode() + body


def chunk(data: bytes) -> bytes:
    """Chunked framing."""
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_TAIL = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@cache
def event(is_chat: bool, done: int, total: int) -> tuple[bytes, bytes]:
    """The event after ``done`` tokens of ``total``, framed; cut where the stamp belongs."""
    document = _chunk_document(done == total) if is_chat else _generated(done, is_last=done == total)
    return _cut(chunk(b"data: " + _compact(document) + b"\n\n"))


@cache
def whole(is_chat: bool, total: int) -> tuple[bytes, bytes]:
    """The answer that does not stream; cut where the stamp belongs."""
    return _cut(respond(_completion(total) if is_chat else _generated(total, is_last=True)))


def stamp(parts: tuple[bytes, bytes]) -> bytes:
    """Put the time in: the monotonic clock all processes share, in ns."""
    return b"%b%016d%b" % (parts[0], time.monotonic_ns(), parts[1])


def loads(num_running: int, num_served: int) -> dict[str, Any]:
    """``/v1/loads`` of a worker so large that admission never holds a request back; the counts are true."""
    used = num_running * 32
    return {
        "version": "0.5.23", "dp_rank_count": 1,
        "loads": [{
            "dp_rank": 0, "num_running_reqs": num_running, "num_waiting_reqs": 0,
            "num_total_reqs": num_running, "num_used_tokens": used, "num_total_tokens": used,
            "num_waiting_uncached_tokens": 0,
            "max_total_num_tokens": 8388608, "token_usage": 0.0, "gen_throughput": 0.0, "cache_hit_rate": 0.0,
            "max_running_requests": 4096, "total_prefill_uncached_tokens": num_served * 16,
            "total_prefill_busy_us": num_served * 20,
        }],
    }  # fmt: skip


def control(path: str, mode: str) -> object:
    """Documents of the other routes; raises KeyError for an unknown one."""
    info = {
        "model_path": "mock", "tokenizer_path": "mock", "is_generation": True, "weight_version": "default",
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "disaggregation_mode": mode,
    }  # fmt: skip
    server = {
        "model_path": "mock", "served_model_name": "mock", "tokenizer_path": "mock",
        "tp_size": 1, "dp_size": 1, "version": "0.5.23",
        "max_running_requests": 4096, "max_total_num_tokens": 8388608, "page_size": 16,
        "internal_states": [{"max_running_requests": 4096}], "disaggregation_mode": mode,
    }  # fmt: skip
    model = {"id": "mock", "object": "model", "owned_by": "sglang", "max_model_len": 131072}
    empty = dict.fromkeys(("/health", "/ping", "/health_generate", "/abort_request", "/flush_cache"))
    documents: dict[str, object] = {
        **empty, "/v1/models": {"object": "list", "data": [model]},
        "/model_info": info, "/get_model_info": info, "/server_info": server, "/get_server_info": server,
    }  # fmt: skip
    return documents[path]


def _compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _cut(message: bytes) -> tuple[bytes, bytes]:
    before, _, after = message.partition(b"@" + b"0" * STAMP_DIGITS)
    return before + b"@", after


def _generated(done: int, *, is_last: bool) -> dict[str, Any]:
    meta = {
        "id": "mock", "finish_reason": {"type": "length", "length": done} if is_last else None,
        "prompt_tokens": 16, "weight_version": "default", "total_retractions": 0, "completion_tokens": done,
        "cached_tokens": 0, "cached_tokens_details": None, "dp_rank": None, "e2e_latency": 0.01,
    }  # fmt: skip
    text = " tok" * (done - 1) + " " + STAMP
    return {"text": text, "output_ids": list(range(1000, 1000 + done)), "meta_info": meta}


def _chunk_document(is_last: bool) -> dict[str, Any]:
    delta = {"role": None, "content": " " + STAMP, "reasoning_content": None, "tool_calls": None}
    reason = "length" if is_last else None
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, "matched_stop": None}
    return {
        "id": "mock", "object": "chat.completion.chunk", "created": 1793613600, "model": "mock",
        "choices": [choice], "usage": None,
    }  # fmt: skip


def _completion(done: int) -> dict[str, Any]:
    text = " tok" * (done - 1) + " " + STAMP
    message = {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": None}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": "length",
        "matched_stop": None,
    }
    usage = {
        "prompt_tokens": 16, "total_tokens": 16 + done, "completion_tokens": done,
        "prompt_tokens_details": None, "reasoning_tokens": 0,
    }  # fmt: skip
    return {
        "id": "mock", "object": "chat.completion", "created": 1793613600, "model": "mock",
        "choices": [choice], "usage": usage, "metadata": {"weight_version": "default"},
    }  # fmt: skip
