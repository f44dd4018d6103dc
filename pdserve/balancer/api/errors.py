"""The shape of an error by the path it was asked on: each family of SGLang's routes has its own.

    /v1/messages…   {"type":"error","error":{"type","message"}}            Anthropic
    /v1/responses…  {"error":{"message","type","param","code"}}            OpenAI, nested
    other /v1/…     {"object":"error","message","type","param","code"}     OpenAI, SGLang's flat form
    everything else {"error":{"message"}}

In a stream that has begun it is an event:

    /v1/messages    event: error, the same document
    /v1/responses   event: error, {"type":"error","sequence_number","code","message","param"}
    other /v1/…     data: {"error":{"object":"error","message","type","param","code"}}
    everything else data: {"error":{"message","type","code"}}

Pure. Source: the exception handlers of sglang/srt/entrypoints/http_server.py.
"""

from __future__ import annotations

import math
import re

import msgspec

from pdserve.errors import NoWorkerError, WorkerError, WorkerTimeout
from pdserve.http.answer import Answer, json_answer
from pdserve.http.sse import render_event

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    431: "RequestHeaderFieldsTooLargeError",
    501: "NotImplementedError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def route_error(path: str, status: int, message: str, *, param: str | None = None) -> Answer:
    """An error as the clients of ``path`` expect it."""
    if _is_under(path, "/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return json_answer({"type": "error", "error": {"type": kind, "message": message}}, status)
    if _is_under(path, "/v1/responses"):
        kind = "invalid_request_error" if status < 500 else error_type(status)
        error = {"message": message, "type": kind, "param": param, "code": status}
        return json_answer({"error": error}, status)
    return error_answer(status, message, is_openai=path.startswith("/v1/"))


def unreadable_error(path: str, status: int, message: str) -> Answer:
    """An error about a body that is no JSON object; SGLang has one form for it on nearly every route."""
    if _is_under(path, "/v1/messages"):
        return route_error(path, status, message)
    error = {"message": message, "type": "Bad Request", "param": None, "code": status}
    if _is_under(path, "/v1/responses"):
        return json_answer({"error": error}, status)
    return json_answer({"object": "error", **error}, status)


def _is_under(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")


_OURS = re.compile(
    rb"(?:, )?'bootstrap_(?:host|port|room)': (?:\[[^\]]*\]|'[^']*'|\d+|None)"
    rb"|(?:, )?'(?:rid|request_id)': (?:\['[^\]]*'\]|'(?:resp_)?[0-9a-f]{32}')"
)


_LEFT_OVER = re.compile(rb"(?:, )?'parameters': \{\}|(?<=\{), ")
"""A comma whose neighbour is gone, and the place for our fields in a Vertex request that had none."""


def scrubbed(body: bytes) -> bytes:
    """The same without our fields; as it is if it has none."""
    return _LEFT_OVER.sub(b"", _OURS.sub(b"", body)) if b"'bootstrap_" in body else body


def error_type(status: int) -> str:
    """The name OpenAI clients see for a status: ``BadRequestError``."""
    return _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")


def error_answer(status: int, message: str, *, is_openai: bool = False) -> Answer:
    """An error in the shape of its route."""
    if not is_openai:
        return json_answer({"error": {"message": message}}, status)
    fields = {"object": "error", "message": message, "type": error_type(status), "param": None}
    return json_answer({**fields, "code": status}, status)


def retry_after(error: NoWorkerError) -> tuple[bytes, bytes]:
    """The header that says when to come back."""
    return b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()


def worker_error_status(error: WorkerError) -> int:
    """504 for a silent worker, 502 for any other failed one."""
    return 504 if isinstance(error, WorkerTimeout) else 502


def error_event(path: str, status: int, message: str, sequence_number: int = 0) -> bytes:
    """The last SSE event of a stream that broke, as the SDKs of its dialect take one; nothing follows it.

    ``sequence_number`` is the event's own, on ``/v1/responses``.
    """
    if _is_under(path, "/v1/messages"):
        return render_event(route_error(path, status, message).body, b"error")
    if _is_under(path, "/v1/responses"):
        code = "invalid_request_error" if status < 500 else "server_error"
        fields = {"type": "error", "sequence_number": sequence_number, "code": code, "message": message}
        return render_event(msgspec.json.encode({**fields, "param": None}), b"error")
    error: dict[str, object] = {"message": message, "type": error_type(status), "code": status}
    if path.startswith("/v1/") or path == "/invocations":
        error |= {"object": "error", "param": None}
    return render_event(msgspec.json.encode({"error": error}))
