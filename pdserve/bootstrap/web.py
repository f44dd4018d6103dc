"""Reading JSON with a limit and answering every error as JSON; shared by the service's apps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

MAX_BODY_BYTES = 2**20
T = TypeVar("T")

_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


async def read_json(request: Request, type_: type[T], strict: bool = True) -> T:
    """The body as ``type_``; not ``strict`` takes numbers written as text, too.

    Raises:
        HTTPException: 413 above 1 MiB, 400 if it is not JSON of that type or the client left.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"body is over {MAX_BODY_BYTES} bytes")
        return msgspec.json.decode(bytes(body), type=type_, strict=strict)
    except ClientDisconnect as exc:
        raise HTTPException(400, "client left before its body was complete") from exc
    except (ValueError, RecursionError) as exc:  # ValueError: malformed, of another type, or not UTF-8
        raise HTTPException(400, f"body is not the expected JSON: {exc}") from exc


def json_answer(value: Any, status: int = 200) -> Response:
    """A msgspec struct, or anything msgspec encodes, as a JSON response."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def json_errors() -> Mapping[Any, Any]:
    """Exception handlers for Starlette: no HTML, no bare text."""

    async def on_http(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        code = _CODES.get(exc.status_code, "error")
        return JSONResponse({"code": code, "message": exc.detail}, exc.status_code, dict(exc.headers or {}))

    async def on_bug(_: Request, exc: Exception) -> Response:
        return JSONResponse({"code": "internal", "message": f"{type(exc).__name__}: {exc}"}, 500)

    return {HTTPException: on_http, Exception: on_bug}
