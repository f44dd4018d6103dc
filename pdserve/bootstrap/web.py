"""Reading JSON with a limit and answering every error as JSON; shared by the service's apps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

MAX_BODY_BYTES = 2**20
T = TypeVar("T")


async def read_json(request: Request, type_: type[T]) -> T:
    """The body as ``type_``.

    Raises:
        HTTPException: 413 above 1 MiB.
        msgspec.DecodeError: if it is not JSON of that type.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"body is over {MAX_BODY_BYTES} bytes")
    return msgspec.json.decode(bytes(body), type=type_)


def json_answer(value: Any, status: int = 200) -> Response:
    """A msgspec struct, or anything msgspec encodes, as a JSON response."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def json_errors() -> Mapping[Any, Any]:
    """Exception handlers for Starlette: no HTML, no bare text."""

    async def on_http(_: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(exc.status_code, "error")
        return JSONResponse({"code": code, "message": exc.detail}, exc.status_code, dict(exc.headers or {}))

    async def on_bug(_: Request, exc: Exception) -> Response:
        return JSONResponse({"code": "internal", "message": f"{type(exc).__name__}: {exc}"}, 500)

    return {HTTPException: on_http, Exception: on_bug}
