"""A client's request, read once: what it asks for, and the body both legs get.

    bytes ─ parse_request ─► ParsedRequest ─ render_body(host, port, ids) ─► bytes for both legs

Pure: no sockets, no clock. Only the fields that routing needs are looked at;
everything else goes to the workers as the client wrote it.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdserve.errors import PdserveError
from pdserve.types import MAX_ROOM, RequestShape, Rid

DEFAULT_NEW_TOKENS = 128
"""SGLang's own default of max_new_tokens."""

BYTES_PER_TOKEN = 4
"""A rule of thumb for English text; the policy needs the magnitude only."""


class Route(enum.StrEnum):
    """The paths that take a prompt. The value is the path, here and on the workers."""

    GENERATE = "/generate"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"

    @property
    def is_openai(self) -> bool:
        """True where requests, answers and errors have OpenAI's form."""
        return self is not Route.GENERATE


class RequestRefused(PdserveError):
    """The client's request cannot be served as it is; ``status`` is 400 or 501."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class RequestIds:
    """One room and one rid per prompt: one for a plain request, one each in a batch."""

    rooms: tuple[int, ...]
    rids: tuple[Rid, ...]


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """What was asked. ``fields`` is the body as sent; do not change it.

    ``num_prompts`` is None for a plain request and a number for a /generate
    batch, where SGLang wants lists even of one. ``client_rid`` is the client's
    own name for a plain request, if it gave one.
    """

    route: Route
    fields: dict[str, Any] = field(repr=False)
    shape: RequestShape
    is_stream: bool
    return_logprob: bool = False
    num_prompts: int | None = None
    client_rid: str = ""

    def render_body(self, host: str, port: int | None, ids: RequestIds) -> bytes:
        """The body for both legs: the client's fields, then ours, which win."""
        ours: dict[str, Any]
        if self.num_prompts is None:
            ours = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": ids.rooms[0]}
            ours["rid"] = ids.rids[0]
        else:
            n = self.num_prompts
            ours = {"bootstrap_host": [host] * n, "bootstrap_port": [port] * n}
            ours |= {"bootstrap_room": ids.rooms, "rid": ids.rids}
        return msgspec.json.encode({**self.fields, **ours})


class RoomBook:
    """Rooms in use. A room names one transfer on a pair, so no two live requests may share one."""

    def __init__(self) -> None:
        self._live: set[int] = set()

    def __len__(self) -> int:
        return len(self._live)

    def take(self, num_prompts: int | None) -> RequestIds:
        """Fresh random rooms and rids; give them back when both legs have ended."""
        rooms: list[int] = []
        rids: list[Rid] = []
        while len(rooms) < (1 if num_prompts is None else num_prompts):
            token = secrets.token_bytes(24)
            room = int.from_bytes(token[:8]) & MAX_ROOM
            if room and room not in self._live:
                self._live.add(room)
                rooms.append(room)
                rids.append(Rid(token[8:].hex()))
        return RequestIds(tuple(rooms), tuple(rids))

    def give_back(self, ids: RequestIds) -> None:
        """The rooms may be used again."""
        self._live.difference_update(ids.rooms)


def parse_request(route: Route, body: bytes) -> ParsedRequest:
    """Read a request body.

    Raises:
        RequestRefused: 400 if it is not a JSON object, 501 if it asks for several
            samples, or (OpenAI routes) several prompts, at once.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RequestRefused(f"the request body is not valid JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise RequestRefused(f"the request body must be a JSON object, got {_json_name(fields)}")
    sampling = _sampling(fields)
    _refuse_samples([fields, *sampling])
    if route is Route.COMPLETIONS:
        fields = _with_one_prompt(fields)
    num_prompts = _num_prompts(fields) if route is Route.GENERATE else None
    rid = fields.get("rid")
    return ParsedRequest(
        route=route,
        fields=fields,
        shape=RequestShape(_prompt_tokens(fields), _new_tokens(fields, sampling)),
        is_stream=fields.get("stream") is True,
        return_logprob=route is Route.GENERATE and _is_any(fields.get("return_logprob")),
        num_prompts=num_prompts,
        client_rid=rid if isinstance(rid, str) else "",
    )


def _sampling(fields: dict[str, Any]) -> list[dict[str, Any]]:
    value = fields.get("sampling_params")
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def _refuse_samples(places: Iterable[dict[str, Any]]) -> None:
    for place in places:
        n = place.get("n")
        if isinstance(n, int) and n > 1:
            raise RequestRefused(f"n={n} is not supported here: send one request per sample", 501)


def _with_one_prompt(fields: dict[str, Any]) -> dict[str, Any]:
    prompt = fields.get("prompt")
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return fields
    if len(prompt) > 1:
        raise RequestRefused(
            f"an array of {len(prompt)} prompts is not supported here: send one request per prompt", 501
        )
    return {**fields, "prompt": prompt[0]}


def _num_prompts(fields: dict[str, Any]) -> int | None:
    """As SGLang's GenerateReqInput counts: by the first of text, input_ids, input_embeds that is there."""
    text, ids, embeds = fields.get("text"), fields.get("input_ids"), fields.get("input_embeds")
    batch: Any = None
    if text is not None:
        batch = text if isinstance(text, list) else None
    elif isinstance(ids, list):
        batch = ids if ids and isinstance(ids[0], list) else None
    elif isinstance(embeds, list) and embeds and isinstance(embeds[0], list):
        batch = embeds if embeds[0] and isinstance(embeds[0][0], list) else None
    if batch is None:
        return None
    if not batch:
        raise RequestRefused("the batch is empty: give at least one prompt")
    return len(batch)


def _prompt_tokens(fields: dict[str, Any]) -> int:
    for name in ("input_ids", "text", "prompt", "messages", "input_embeds"):
        value = fields.get(name)
        if value is not None:
            return max(1, _tokens(value))
    return 1


def _tokens(value: Any) -> int:
    """Magnitude of a prompt: ints are token ids, text counts by its bytes, containers add up."""
    if isinstance(value, str):
        return -(-len(value.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
    if isinstance(value, list):
        if value and isinstance(value[0], int | float):
            return len(value) if isinstance(value[0], int) else 1
        return sum(map(_tokens, value))
    if isinstance(value, dict):
        return _tokens(value.get("content", value.get("text")))
    return 0


def _new_tokens(fields: dict[str, Any], sampling: list[dict[str, Any]]) -> int:
    limits = [item.get("max_new_tokens") for item in sampling]
    limits += [fields.get("max_completion_tokens"), fields.get("max_tokens")]
    return next((n for n in limits if isinstance(n, int) and n >= 0), DEFAULT_NEW_TOKENS)


def _is_any(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def _json_name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
