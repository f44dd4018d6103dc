"""Bearer-token authentication for client and admin routes, and what web pages may ask. Pure.

The rules of keys are SGLang's own (utils/auth.py): the admin key, where there is one, is the only
key of control routes; the client key opens everything else. Web pages are told what Starlette's
CORSMiddleware tells them with SGLang's arguments (all origins, credentials, methods and headers).
"""

from __future__ import annotations

import enum
from hmac import compare_digest

from pdserve.http.answer import Answer, json_answer

EXPOSED = (b"access-control-expose-headers", b"x-request-id, retry-after")
"""Headers of an answer that a page's script may read, besides the few that every script may."""
ANY_ORIGIN = ((b"access-control-allow-origin", b"*"), EXPOSED)
"""For an answer to a request whose head, and so its origin, was not read."""
_CREDENTIALS = (b"access-control-allow-credentials", b"true")
_METHODS = b"DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, QUERY"
_MIRRORED = b"access-control-request-headers"


class Access(enum.Enum):
    """Who may use an endpoint."""

    PUBLIC = enum.auto()
    CLIENT = enum.auto()
    ADMIN = enum.auto()


class KeyRing:
    """The keys that endpoints ask for; an empty key means that anyone may ask."""

    def __init__(self, api_key: str = "", control_key: str = "") -> None:
        self._keys = {Access.CLIENT: api_key.encode(), Access.ADMIN: control_key.encode()}

    def lets_pages_ask(self, access: Access) -> bool:
        """False for a control route without a key: any page an operator opens could read the state."""
        return access is not Access.ADMIN or bool(self._keys[access])

    def refuse(self, access: Access, headers: dict[bytes, bytes]) -> Answer | None:
        """401 as SGLang words it, or None if the request may pass."""
        if access is Access.PUBLIC:
            return None
        key = self._keys[access]
        if not key or _is_bearer(headers.get(b"authorization", b""), key):
            return None
        if access is Access.CLIENT and compare_digest(headers.get(b"x-api-key", b""), key):
            return None  # Anthropic's clients know no other header
        return json_answer({"error": "Unauthorized"}, 401).with_headers((b"www-authenticate", b"Bearer"))


def _is_bearer(value: bytes, key: bytes) -> bool:
    scheme, _, given = value.partition(b" ")
    return scheme.lower() == b"bearer" and compare_digest(given, key)


def cross_origin_lines(origin: bytes) -> bytes:
    """Header lines that let a page of ``origin`` read the answer."""
    lines = ((b"access-control-allow-origin", origin), _CREDENTIALS, EXPOSED, (b"vary", b"Origin"))
    return b"".join([b"%b: %b\r\n" % line for line in lines])


def answer_preflight(method: str, headers: dict[bytes, bytes]) -> Answer | None:
    """The answer to a browser that asks before its page's request; None if that is not what it does.

    It grants all methods: the page then reads a 405 itself.
    """
    if method != "OPTIONS" or b"access-control-request-method" not in headers:
        return None
    granted = [(b"content-type", b"text/plain"), (b"access-control-allow-methods", _METHODS)]
    if _MIRRORED in headers:
        granted.append((b"access-control-allow-headers", headers[_MIRRORED]))
    return Answer(200, b"OK", (*granted, (b"access-control-max-age", b"600")))
