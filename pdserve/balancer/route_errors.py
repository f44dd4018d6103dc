"""The shape of an error by the path it was asked on: each family of SGLang's routes has its own.

    /v1/messages…   {"type":"error","error":{"type","message"}}            Anthropic
    /v1/responses…  {"error":{"message","type","param","code"}}            OpenAI, nested
    other /v1/…     {"object":"error","message","type","param","code"}     OpenAI, SGLang's flat form
    everything else {"error":{"message"}}

Pure. Source: the exception handlers of sglang/srt/entrypoints/http_server.py.
"""

from __future__ import annotations

from pdserve.balancer.http_errors import Answer, error_answer, error_type, json_answer

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
