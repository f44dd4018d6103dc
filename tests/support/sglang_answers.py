"""What SGLang's routes answer, in small: one event of a stream, a whole body, the ends of an abort. Pure."""

from __future__ import annotations

from typing import Any

GENERATE_PATHS = (
    "/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/invocations",
    "/vertex_generate",
)
LENGTH = {"type": "length", "length": 3}


def options_of(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Where a route keeps rid and rooms."""
    parameters = request.get("parameters")
    return parameters if path == "/vertex_generate" and isinstance(parameters, dict) else request


def rids_of(path: str, request: dict[str, Any]) -> list[str]:
    """The request ids by which it can be aborted; none where the route has no field for them."""
    options = options_of(path, request)
    found = options.get("request_id" if path == "/v1/responses" else "rid")
    return [str(rid) for rid in found] if isinstance(found, list) else [str(found)] if found else []


def is_list_of_prompts(path: str, request: dict[str, Any]) -> bool:
    """True for a batch, also of one."""
    return isinstance(options_of(path, request).get("bootstrap_room"), list)


def rooms_of(path: str, request: dict[str, Any]) -> list[int]:
    """The rooms of all its prompts."""
    found = options_of(path, request).get("bootstrap_room")
    return list(found) if isinstance(found, list) else [found] if isinstance(found, int) else []


def event_of(
    path: str,
    rid: str,
    tokens: int,
    *,
    finish: dict[str, Any] | None = None,
    padding_bytes: int = 0,
    message: str = "message",
) -> dict[str, Any]:
    """One event (a chat's with a ``delta`` as ``message``), or the whole answer to one prompt."""
    reason = finish or LENGTH
    text = " tok" * tokens + "x" * padding_bytes
    usage = {"prompt_tokens": 4, "completion_tokens": tokens, "total_tokens": 4 + tokens}
    if path in ("/generate", "/vertex_generate"):
        meta = {"id": rid, "finish_reason": reason, "prompt_tokens": 4, "completion_tokens": tokens}
        return {"text": text, "output_ids": list(range(tokens)), "meta_info": meta}
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason["type"]}
    choice |= {"text": text} if path == "/v1/completions" else {message: {"content": text}}
    return {"id": rid, "object": "fake", "choices": [choice], "usage": usage}


def body_of(
    path: str, request: dict[str, Any], tokens: int, *,
    finish: dict[str, Any], padding_bytes: int, is_prefill: bool,
) -> Any:  # fmt: skip
    """The whole answer to a request; to a batch a list, or one document with a choice per prompt."""
    rids = rids_of(path, request) or [""]
    is_batch = is_list_of_prompts(path, request)
    answers = [event_of(path, rid, tokens, finish=finish, padding_bytes=padding_bytes) for rid in rids]
    if request.get("return_logprob") and path == "/generate":
        for answer in answers:
            answer["meta_info"] |= _logprobs(tokens, is_prefill)
    if path == "/vertex_generate":
        return {"predictions": answers}
    if path == "/generate":
        return answers if is_batch else answers[0]
    choices = [{**answer["choices"][0], "index": index} for index, answer in enumerate(answers)]
    usage = {name: count * len(answers) for name, count in answers[0]["usage"].items()}
    return {**answers[0], "choices": choices, "usage": usage}


def abort_event(path: str, rid: str) -> dict[str, Any]:
    """How a request ends that ``/abort_request`` has ended."""
    return event_of(path, rid, 0, finish={"type": "abort", "message": "aborted"})


def error_event(path: str, rid: str) -> dict[str, Any]:
    """How a stream ends whose KV was lost on the way: by its first event, with status 200."""
    if path == "/generate":
        finish = {"type": "abort", "message": "KV transfer failed", "status_code": 500}
        return event_of(path, rid, 0, finish=finish)
    return {
        "error": {
            "object": "error",
            "message": "KV transfer failed",
            "type": "InternalServerError",
            "code": 500,
        }
    }


def _logprobs(tokens: int, is_prefill: bool) -> dict[str, Any]:
    """Prefill knows the prompt's, decode the output's, as in SGLang."""
    return {
        "input_token_logprobs": [[None, 5, None], [-0.5, 6, None]] if is_prefill else [],
        "output_token_logprobs": [[-0.25, 7, None]] * tokens,
    }
