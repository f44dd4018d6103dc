"""A whole HTTP response that was made here, and its JSON form."""

from __future__ import annotations

import msgspec

Headers = tuple[tuple[bytes, bytes], ...]

JSON_TYPE = (b"content-type", b"application/json")


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
