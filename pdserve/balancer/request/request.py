"""A client's request, read once: what it asks for, and the body both legs get.

    bytes ─ parse_request (parse.py) ─► ParsedRequest ─ render_body(host, port, ids) ─► bytes for both legs

Of a plain request only typed fields are decoded (parse.py), and our fields are spliced in
before its last brace: the prompt is never decoded. What must be rewritten
(batches, samples, a client's own rid) is decoded whole. Pure: no sockets, no clock.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from pdserve.balancer.request.ids import RequestIds
from pdserve.errors import PdserveError
from pdserve.types import RequestShape

DEFAULT_NEW_TOKENS = 128
"""SGLang's own default of max_new_tokens."""
MAX_NEW_TOKENS = 2**31
"""More than any model has context: a limit of hundreds of digits is no number to reckon with."""

BYTES_PER_TOKEN = 4
"""A rule of thumb for English text; the policy needs the magnitude only."""


class Route(enum.StrEnum):
    """The paths that take a prompt. The value is the path, here and on the workers."""

    GENERATE = "/generate"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    INVOCATIONS = "/invocations"
    VERTEX = "/vertex_generate"

    @property
    def is_openai(self) -> bool:
        """True where requests, answers and errors have OpenAI's form."""
        return self not in (Route.GENERATE, Route.VERTEX)

    @property
    def is_chat(self) -> bool:
        """True for a ChatCompletionRequest: one conversation, ``n`` samples of its answer."""
        return self is Route.CHAT or self is Route.INVOCATIONS

    @property
    def rid_field(self) -> str:
        """The body's field for the request id; empty where SGLang lets nobody choose it."""
        return _RID_FIELDS.get(self, "rid")

    @property
    def rid_prefix(self) -> str:
        """How SGLang's ids begin on this route: a response can be fetched by its id later."""
        return "resp_" if self is Route.RESPONSES else ""


_RID_FIELDS = {Route.RESPONSES: "request_id", Route.MESSAGES: ""}


class RequestRefused(PdserveError):
    """The client's request cannot be served as it is; ``status`` is 400 or 501, or 500 if servers die of it.

    ``is_unreadable``: it is not even JSON, which SGLang answers in another form.
    """

    def __init__(self, message: str, status: int = 400, *, is_unreadable: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.is_unreadable = is_unreadable


class ParsedRequest(msgspec.Struct, frozen=True):
    """What was asked. (A Struct because one is made per request: five times quicker than a frozen dataclass.)

    Exactly one of ``raw`` (spliced into) and ``fields`` (encoded anew) is used.

    ``num_prompts`` is None for a plain request and a number for a batch, where
    SGLang wants lists even of one; samples of a batch are prompts of it.
    ``num_samples`` is the client's ``n``. ``needs_prefill_answer``: nothing may go
    out before prefill's answer is whole, it is merged into decode's.
    ``client_rid`` is the client's own name for the request, if it gave one.
    """

    route: Route
    shape: RequestShape
    is_stream: bool
    raw: bytes = b""
    fields: dict[str, Any] | None = None
    num_prompts: int | None = None
    num_samples: int = 1
    needs_prefill_answer: bool = False
    client_rid: Any = None

    @property
    def num_requests(self) -> int:
        """Requests that the workers must see: a chat's samples have no form as one."""
        return self.num_samples if self.route.is_chat else 1

    def render_body(self, host: str, port: int | None, ids: RequestIds) -> bytes:
        """The body for both legs: the client's fields, then ours, which win."""
        if self.fields is None:
            return self._splice(host, port, ids)
        ours = self._ours(host, port, ids)
        if self.route is Route.VERTEX:
            return msgspec.json.encode({**self.fields, "parameters": {**self.fields["parameters"], **ours}})
        return msgspec.json.encode({**self.fields, **ours})

    def _splice(self, host: str, port: int | None, ids: RequestIds) -> bytes:
        rid_field = self.route.rid_field
        rid = f',"{rid_field}":"{ids.rids[0]}"' if rid_field else ""
        ours = (
            f',"bootstrap_host":"{host}","bootstrap_port":{"null" if port is None else port}'
            f',"bootstrap_room":{ids.rooms[0]}{rid}}}'
        )
        # What precedes the last brace is not an opening one: a request without any field has no prompt.
        return self.raw[: self.raw.rindex(b"}")] + ours.encode()

    def _ours(self, host: str, port: int | None, ids: RequestIds) -> dict[str, Any]:
        rid_field = self.route.rid_field
        ours: dict[str, Any]
        if self.num_prompts is None:
            ours = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": ids.rooms[0]}
            rid: Any = ids.rids[0]
        else:
            n = self.num_prompts
            ours = {"bootstrap_host": [host] * n, "bootstrap_port": [port] * n, "bootstrap_room": ids.rooms}
            rid = ids.rids
        if rid_field:
            ours[rid_field] = rid
        return ours
