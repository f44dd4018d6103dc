"""How a failure looks to the client: status, type and JSON shape, as SGLang itself would answer.

OpenAI routes: ``{"object":"error","message","type","param":null,"code"}``;
every other route: ``{"error":{"message"}}``. Pure. route_errors.py knows the rest.
"""

from __future__ import annotations

import math

import msgspec

from pdserve.errors import NoWorkerError, WorkerError, WorkerTimeout

Headers = tuple[tuple[bytes, bytes], ...]

JSON_TYPE = (b"content-type", b"application/json")

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


class Answer(msgspec.Struct, frozen=True):
    """One whole response."""

    status: int
    body: bytes
    headers: Headers = (JSON_TYPE,)

    def with_headers(self, *more: tuple[bytes, bytes]) -> Answer:
        """The same answer with further headers."""
        return Answer(self.status, self.body, (*self.headers, *more))


def json_answer(value: object, status: int = 200) -> Answer:
    """An answer that is one JSON document."""
    return Answer(status, msgspec.json.encode(value))


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


def error_event(status: int, message: str) -> bytes:
    """The last SSE event of a stream that broke; no ``[DONE]`` follows it."""
    error = {"message": message, "type": error_type(status), "code": status}
    return b"data: " + msgspec.json.encode({"error": error}) + b"\n\n"
