"""Bearer-token authentication for client and admin routes. Pure.

The rules are SGLang's own (utils/auth.py): the admin key, where there is one, is
the only key of control routes; the client key opens everything else.
"""

from __future__ import annotations

import enum
from hmac import compare_digest

from pdserve.http.answer import Answer, json_answer


class Access(enum.Enum):
    """Who may use an endpoint."""

    PUBLIC = enum.auto()
    CLIENT = enum.auto()
    ADMIN = enum.auto()


class KeyRing:
    """The keys that endpoints ask for; an empty key means that anyone may ask."""

    def __init__(self, api_key: str = "", control_key: str = "") -> None:
        self._keys = {Access.CLIENT: api_key.encode(), Access.ADMIN: control_key.encode()}

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
