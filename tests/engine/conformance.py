"""Two answers to one request, compared field by field: a plain server's and ours.

What may differ is said once, in ``UNCOMPARED``; everything else must be equal, logprobs
to within ``TOLERANCE``. Request ids are compared by their pattern: the first one
seen is ``id0`` wherever it stands. A stream is cut into events by the moment
each token was ready, so neighbouring events of one choice are joined before they are
compared, and what each event is made of is compared besides.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TOLERANCE = 2e-4
"""Of a float32 logprob: another batch shape adds in another order."""

FORBIDDEN = -1e6
"""A lower logprob is that of a token which a grammar rules out."""

UNCOMPARED = {
    "created": "the second in which the answer began",
    "created_at": "the same, of a response",
    "completed_at": "the same, of a response's end",
    "e2e_latency": "a duration",
    "sequence_number": "counts events of a stream, whose cut is a matter of timing; it must only grow",
}
"""Fields whose presence alone is compared, and why."""

LEFT_OUT = {
    "response_sent_to_client_ts": "a moment; only a stream's first event has it, which may be its last too",
}
"""Fields that may even be absent, and why."""

CLOCK = re.compile(r"\[\d\d:\d\d:\d\d\] ")
"""Log prefixes that grammar compilers put into their messages."""

SERVED = "the served model"
EVENT_STREAM = "text/event-stream"
ID_FIELDS = frozenset(("id", "rid", "item_id", "request_id", "response_id"))


@dataclass(frozen=True, slots=True)
class Case:
    """One request. ``first`` is sent before it, to fill the prefix cache; its answer is not looked at.

    An empty header is not sent. A body's model ``SERVED`` stands for the served one's name.
    """

    name: str
    path: str
    body: Any = None
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    first: Any = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: a JSON document, a text, or the events of a stream."""

    status: int
    content_type: str
    document: Any
    events: tuple[tuple[str, Any], ...] = ()

    @property
    def is_stream(self) -> bool:
        """True for server-sent events."""
        return self.content_type == EVENT_STREAM


def send(url: str, case: Case, model: str, timeout_s: float = 90.0) -> Reply:
    """The answer of the server at ``url``, which serves ``model``."""
    body = case.body
    if isinstance(body, dict) and body.get("model") == SERVED:
        body = {**body, "model": model}
    if case.first is not None:
        _exchange(url, case, case.first, timeout_s)
    return _exchange(url, case, body, timeout_s)


def send_all(url: str, cases: Sequence[Case], model: str) -> list[Reply]:
    """The answers to all cases, eight at a time."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda case: send(url, case, model), cases))


def _exchange(url: str, case: Case, body: Any, timeout_s: float) -> Reply:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **case.headers}
    headers = {name: value for name, value in headers.items() if value}
    try:
        connection.request(case.method, case.path, payload, headers)
        response = connection.getresponse()
        data = response.read().decode()
    finally:
        connection.close()
    return read_reply(response.status, (response.getheader("content-type") or ""), data)


def read_reply(status: int, content_type: str, text: str) -> Reply:
    """An answer from its parts."""
    content_type = content_type.partition(";")[0]
    if content_type == EVENT_STREAM:
        return Reply(status, content_type, None, tuple(_events(text)))
    try:
        document = json.loads(text)
    except ValueError:
        document = text
    return Reply(status, content_type, document)


def _events(stream: str) -> Iterator[tuple[str, Any]]:
    for block in stream.split("\n\n"):
        name, payload = "", None
        for line in block.split("\n"):
            kind, _, value = line.partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                payload = json.loads(value) if value.startswith("{") else value
        if payload is not None:
            yield name, payload


def differences(plain: Reply, ours: Reply) -> list[str]:
    """Each difference as ``path: plain's != ours``; empty if the answers are equal."""
    found = list(_diff(plain.status, ours.status, "status"))
    found += _diff(plain.content_type, ours.content_type, "content-type")
    if plain.is_stream and ours.is_stream:
        found += stream_differences(plain, ours)
    else:
        found += _diff(canonical(plain.document), canonical(ours.document), "")
    return found


# -- one document ------------------------------------------------------------------------------


class _Names:
    """Ids by the order of their first appearance."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def of(self, value: str) -> str:
        return self._seen.setdefault(value, f"id{len(self._seen)}")


def canonical(document: Any, names: _Names | None = None) -> Any:
    """The document without what legitimately differs."""
    names = names or _Names()
    if isinstance(document, dict):
        return {
            key: "present"
            if key in UNCOMPARED
            else names.of(value)
            if key in ID_FIELDS and isinstance(value, str) and not value.startswith("/")
            else _floats(value)
            if key.endswith("_val_flat_b64")
            else [_untied(top) for top in value]
            if key.endswith("_top_logprobs") and isinstance(value, list)
            else canonical(value, names)
            for key, value in document.items()
            if key not in LEFT_OUT
        }
    if isinstance(document, list):
        return [canonical(item, names) for item in document]
    if isinstance(document, str):
        return CLOCK.sub("", document)
    return document


def _untied(top: Any) -> Any:
    """One position's top logprobs without the order of equal ones.

    Where the list ends within a tie, or with tokens that a grammar forbids, which of them it names is chance.
    """
    if not isinstance(top, list) or not all(isinstance(row, list) and len(row) == 3 for row in top):
        return canonical(top)
    ties: list[list[Any]] = []
    for row in top:
        if ties and (row[0] == ties[-1][-1][0] or ties[-1][-1][0] - row[0] <= TOLERANCE):
            ties[-1].append(row)
        else:
            ties.append([row])
    rows = [row for tie in ties for row in sorted(tie, key=lambda row: int(row[1]))]
    if ties and (len(ties[-1]) > 1 or ties[-1][0][0] < FORBIDDEN):
        rows[-len(ties[-1]) :] = [[row[0], "any of a tie"] for row in ties[-1]]
    return rows


def _floats(text: str) -> list[float]:
    data = base64.b64decode(text)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def _diff(plain: Any, ours: Any, path: str) -> Iterator[str]:
    if isinstance(plain, dict) and isinstance(ours, dict):
        for key in sorted(plain.keys() | ours.keys()):
            if key not in ours or key not in plain:
                value = plain.get(key, ours.get(key))
                yield f"{path}.{key}: only in {'plain' if key in plain else 'ours'}: {_short(value)}"
            else:
                yield from _diff(plain[key], ours[key], f"{path}.{key}")
    elif isinstance(plain, list) and isinstance(ours, list) and len(plain) == len(ours):
        for index, pair in enumerate(zip(plain, ours, strict=True)):
            yield from _diff(*pair, f"{path}[{index}]")
    elif isinstance(plain, float) and isinstance(ours, float):
        if abs(plain - ours) > TOLERANCE:
            yield f"{path}: {plain} != {ours}"
    elif type(plain) is not type(ours) or plain != ours:
        yield f"{path}: {_short(plain)} != {_short(ours)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 400 else text[:400] + "…"


# -- streams -----------------------------------------------------------------------------------


def stream_differences(plain: Reply, ours: Reply) -> list[str]:
    """As ``differences``, for two streams."""
    found = []
    left, right = _joined(plain), _joined(ours)
    for lane in sorted(left.keys() | right.keys()):
        found += _diff(left.get(lane, []), right.get(lane, []), f"stream[{lane}]")
    found += _diff(sorted(_shapes(plain)), sorted(_shapes(ours)), "shapes")
    found += _diff(_ending(plain), _ending(ours), "ending")
    return found


def _lane(name: str, payload: Any) -> str:
    """Which choice or prompt an event belongs to; events of all are kept in order."""
    if isinstance(payload, dict):
        choices = payload.get("choices")
        if choices:
            return f"choice {choices[0]['index']}"
        if "text" in payload and "meta_info" in payload:
            return f"prompt {payload.get('index', 'of one')}"
    return "rest"


def _joined(reply: Reply) -> dict[str, list[Any]]:
    lanes: dict[str, list[tuple[str, Any]]] = {}
    for name, payload in reply.events:
        lane = lanes.setdefault(_lane(name, payload), [])
        joined = join(lane[-1][1], payload) if lane and lane[-1][0] == name else None
        if joined is None:
            lane.append((name, payload))
        else:
            lane[-1] = (name, joined)
    return {lane: canonical([list(event) for event in events]) for lane, events in lanes.items()}


def join(first: Any, second: Any) -> Any:
    """Two neighbours as the one event they are if their tokens are ready together; None: they never are."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return None
    if "meta_info" in first and "meta_info" in second:
        return _join_native(first, second)
    if first.get("choices") and second.get("choices"):
        return _join_choices(first, second)
    if first.get("type") == second.get("type"):
        return _join_typed(first, second)
    return None


def _join_native(first: dict[str, Any], second: dict[str, Any]) -> Any:
    if first.keys() != second.keys():
        return None
    for key, value in first["meta_info"].items():
        if key.startswith("input_") and value != second["meta_info"].get(key):
            return None  # every event has the prompt's
    if second["meta_info"]["completion_tokens"] > len(second["output_ids"]):
        return _join_increments(first, second)
    if not second["text"].startswith(first["text"]):
        return None  # a cumulative stream only grows
    if second["output_ids"][: len(first["output_ids"])] != first["output_ids"]:
        return None
    # Lists may run ahead of their event: SGLang goes on filling the very list it is sending.
    return second


def _join_increments(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Events of a server with ``--incremental-streaming-output``."""
    meta = dict(second["meta_info"])
    for key, value in meta.items():
        if key.startswith("output_") and isinstance(value, list):
            meta[key] = first["meta_info"][key] + value
    joined = {key: first[key] + second[key] for key in ("text", "output_ids")}
    return {**second, **joined, "meta_info": meta}


def _join_choices(first: dict[str, Any], second: dict[str, Any]) -> Any:
    a, b = first["choices"][0], second["choices"][0]
    if a.get("finish_reason") is not None or "hidden_states" in b:
        return None
    if "text" in a:
        joined = {**b, "text": a["text"] + b["text"]}
        for key in ("token_ids", "prompt_token_ids"):
            if key in a or key in b:
                joined[key] = (a.get(key) or []) + (b.get(key) or [])
        if a.get("logprobs") and b.get("logprobs"):
            joined["logprobs"] = {key: a["logprobs"][key] + b["logprobs"][key] for key in a["logprobs"]}
        return {**second, "choices": [joined]}
    content = [choice["delta"].get("content") for choice in (a, b)]
    if None in content or "" in content or a["delta"].keys() != b["delta"].keys():
        return None
    joined = {**b, "delta": {**b["delta"], "content": content[0] + content[1]}}
    if a.get("logprobs") and b.get("logprobs"):
        joined["logprobs"] = {"content": a["logprobs"]["content"] + b["logprobs"]["content"]}
    return {**second, "choices": [joined]}


def _join_typed(first: dict[str, Any], second: dict[str, Any]) -> Any:
    """Deltas of /v1/responses and /v1/messages."""
    a, b = first.get("delta"), second.get("delta")
    if isinstance(a, str) and isinstance(b, str):
        logprobs = {}
        if isinstance(first.get("logprobs"), list):
            logprobs = {"logprobs": first["logprobs"] + second["logprobs"]}
        return {**second, **logprobs, "delta": a + b}
    if isinstance(a, dict) and isinstance(b, dict) and "text" in a and "text" in b:
        return {**second, "delta": {**b, "text": a["text"] + b["text"]}}
    return None


def _shapes(reply: Reply) -> set[str]:
    """What events are made of: their keys, at every depth."""
    return {f"{name} {_shape(payload)}" for name, payload in reply.events}


SHAPELESS = frozenset(("logprobs", *LEFT_OUT))


def _shape(value: Any) -> str:
    if isinstance(value, dict):
        fields = (f"{key}:{_shape(item)}" for key, item in sorted(value.items()) if key not in SHAPELESS)
        return "{" + ",".join(fields) + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"[{_shape(value[0])}]"
    if isinstance(value, str | list):
        return "…"
    return "…" if value is None or isinstance(value, int | float) else str(type(value))


def _ending(reply: Reply) -> list[str]:
    """The kinds of the last events, after the last one of any choice or prompt."""
    kinds = [_lane(name, payload) for name, payload in reply.events]
    tail: list[str] = []
    for (name, payload), kind in zip(reversed(reply.events), reversed(kinds), strict=True):
        if kind != "rest":
            break
        tail.append(payload if isinstance(payload, str) else f"{name} {payload.get('type', '')}")
    return tail[::-1] if len(tail) < len(kinds) else []
