"""The balancer's half of a resumed answer, as docs/resume.md asks for it, in a few blocking lines.

One request goes to a prefill and a decode server; after so many frames its decode server is left
or killed, and another one goes on. ``Answer`` is what the client has of it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.engine.fleet import Fleet, call

COMMENT = re.compile(rb"^: ids ([^\n]*)\n", re.MULTILINE)
RID_FIELDS = {"/v1/responses": "request_id", "/v1/messages": ""}


class Aborted(Exception):
    """The server has said that it gives the answer up; its status."""


@dataclass
class Answer:
    """What a client has received, and what its balancer keeps for the case that the server dies."""

    route: str
    frames: list[bytes] = field(default_factory=list)
    log: str = ""
    num_resumes: int = 0
    gaps_s: list[float] = field(default_factory=list)
    """Seconds between the last frame of one leg and the first of the next."""
    noticed_s: list[float] = field(default_factory=list)
    """Seconds between the last frame of a leg and the end of its connection."""

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The frames' JSON."""
        data = (frame.partition(b"data: ")[2] for frame in self.frames)
        return [json.loads(text) for text in data if text and not text.startswith(b"[DONE]")]

    @property
    def is_done(self) -> bool:
        """True if it ended as its route ends."""
        last = self.frames[-1] if self.frames else b""
        return b"[DONE]" in last or b"message_stop" in last or b"response.completed" in last

    def take(self, frame: bytes) -> None:
        """Keep one whole frame, its comment in the log."""
        for words in COMMENT.findall(frame):
            text = words.decode()
            if aborted := [word for word in text.split() if word[0] == "~"]:
                raise Aborted(aborted[0][1:])
            self.log = f"{self.log} {text}".strip()
        if rest := COMMENT.sub(b"", frame):
            self.frames.append(rest)


@dataclass
class Cut:
    """What happens to a leg after ``frames`` of its frames: left with an abort, or ``kill`` is called."""

    frames: int
    kill: Callable[[], Any] | None = None


def ask(
    fleet: Fleet, route: str, body: dict[str, Any], *cuts: Cut,
    decodes: tuple[str, ...] = ("decode-0", "decode-1"), forge: Callable[[str], str] | None = None,
) -> Answer:  # fmt: skip
    """One streamed request over the ``decodes`` in turn, cut once per ``cuts``; ``forge`` changes the log."""
    answer, turn = Answer(route), 0
    workers = {w["worker_id"]: w for w in fleet.state()["workers"]}
    cuts_left = list(cuts)
    while True:
        cut = cuts_left.pop(0) if cuts_left else None
        leg = _Leg(workers["prefill-0"], workers[decodes[turn % len(decodes)]], route, body)
        if turn:
            answer.num_resumes += 1
            log = forge(answer.log) if forge else answer.log
            leg.resume = {"log": log, "frames": len(answer.frames)}
        began = time.monotonic()
        if leg.run(answer, cut):
            return answer
        turn += 1
        answer.noticed_s.append(time.monotonic() - max(leg.last_s, began))


class _Leg:
    def __init__(
        self, prefill: dict[str, Any], decode: dict[str, Any], route: str, body: dict[str, Any]
    ) -> None:
        self.prefill, self.decode, self.route, self.body = prefill, decode, route, body
        self.resume: dict[str, Any] | None = None
        self.rids: list[str] = []
        self.last_s = 0.0

    def run(self, answer: Answer, cut: Cut | None) -> bool:
        """True if the answer is complete; False if this leg was lost, as ``cut`` wanted it."""
        body = json.dumps(self._whole_body()).encode()
        prefill = threading.Thread(target=self._prefill, args=(body,))
        prefill.start()
        had, first = len(answer.frames), True
        try:
            for frame in self._frames(body):
                answer.take(frame)
                if first and answer.num_resumes:
                    answer.gaps_s.append(time.monotonic() - self._since)
                first, self.last_s = False, time.monotonic()
                _Leg._since = self.last_s
                if cut is not None and len(answer.frames) - had >= cut.frames:
                    if cut.kill is None:
                        return False
                    cut.kill()
                    cut = None
        except (OSError, http.client.HTTPException):
            return False
        finally:
            self._abort()
            prefill.join(30)
        return answer.is_done

    _since = 0.0

    def _whole_body(self) -> dict[str, Any]:
        whole: dict[str, Any] = {**self.body, "stream": True}
        prompts = whole.get("prompt") or whole.get("input_ids") or whole.get("text")
        size = len(prompts) if isinstance(prompts, list) and isinstance(prompts[0], list | str) else None
        self.rids = [secrets.token_hex(16) for _ in range(size or 1)]
        rooms = [secrets.randbelow(2**62) + 1 for _ in self.rids]
        address = (self.prefill["bootstrap_host"], self.prefill["bootstrap_port"])
        if size is None:
            ours: dict[str, Any] = {"bootstrap_host": address[0], "bootstrap_port": address[1]}
            ours["bootstrap_room"] = rooms[0]
        else:
            ours = {"bootstrap_host": [address[0]] * size, "bootstrap_port": [address[1]] * size}
            ours["bootstrap_room"] = rooms
        if name := RID_FIELDS.get(self.route, "rid"):
            ours[name] = self.rids[0] if size is None else self.rids
        if self.resume is not None:
            ours["pdserve_resume"] = self.resume
        return {**whole, **ours}

    def _prefill(self, body: bytes) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = _post(self.prefill, self.route, body)
            self.prefill_answer = connection.getresponse().read()
            connection.close()

    def _frames(self, body: bytes) -> Iterator[bytes]:
        connection = _post(self.decode, self.route, body)
        try:
            response = connection.getresponse()
            if response.status != 200:
                raise Aborted(f"{response.status} {response.read().decode()}")
            tail = b""
            while data := response.read1(65536):
                *frames, tail = (tail + data).split(b"\n\n")
                for frame in frames:
                    yield frame + b"\n\n"
        finally:
            if connection.sock is not None:
                connection.sock.close()
            connection.close()

    def _abort(self) -> None:
        for rid in self.rids if RID_FIELDS.get(self.route, "rid") else ():
            for worker in (self.decode, self.prefill):
                with contextlib.suppress(OSError):
                    call(worker["url"], "POST", "/abort_request", {"rid": rid}, timeout_s=5)


def _post(worker: dict[str, Any], route: str, body: bytes) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(urlsplit(worker["url"]).netloc, timeout=60)
    headers = {"Content-Type": "application/json", "x-pdserve-ids": worker["instance_id"]}
    connection.request("POST", route, body, headers)
    return connection


def kill_server(fleet: Fleet, name: str) -> Callable[[], None]:
    """Kill -9 of a worker's HTTP process; its children die with it."""
    pid = fleet.pid(name)
    return lambda: os.kill(pid, signal.SIGKILL)


def kill_scheduler(fleet: Fleet, name: str) -> Callable[[], None]:
    """Kill -9 of a worker's scheduler behind its living HTTP process."""
    import psutil

    children = psutil.Process(fleet.pid(name)).children()
    (scheduler,) = (c for c in children if "scheduler" in " ".join(c.cmdline()))
    return lambda: os.kill(scheduler.pid, signal.SIGKILL)


# -- what a client makes of an answer ----------------------------------------------------------


def digest(answer: Answer) -> dict[str, Any]:
    """Everything that must not depend on where a stream was cut; ids and times as their number."""
    documents = answer.documents
    match answer.route:
        case "/generate":
            return _generate(documents)
        case "/v1/messages":
            return _messages(documents)
        case "/v1/responses":
            return _responses(documents)
    return _openai(documents)


def _generate(documents: list[dict[str, Any]]) -> dict[str, Any]:
    last: dict[int, dict[str, Any]] = {}
    for document in documents:
        last[document.get("index", 0)] = document
    kept = ("finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "id")
    rows = ("output_token_logprobs", "output_top_logprobs")
    return {
        str(index): {
            "text": document["text"],
            "ids": document["output_ids"],
            **{name: document["meta_info"].get(name) for name in kept[:3]},
            **{name: document["meta_info"].get(name) for name in rows},
            "ids_seen": len({d["meta_info"]["id"] for d in documents if d.get("index", 0) == index}),
            "cached_seen": len(
                {d["meta_info"]["cached_tokens"] for d in documents if d.get("index", 0) == index}
            ),
        }
        for index, document in sorted(last.items())
    }


def _openai(documents: list[dict[str, Any]]) -> dict[str, Any]:
    text: dict[str, str] = {}
    logprobs: list[Any] = []
    finishes, usage, tools = {}, None, {}
    for document in documents:
        usage = document.get("usage") or usage
        for choice in document["choices"]:
            index, delta = choice["index"], choice.get("delta") or {}
            for name, value in (*delta.items(), ("text", choice.get("text"))):
                if isinstance(value, str) and name != "role":
                    text[f"{index} {name}"] = text.get(f"{index} {name}", "") + value
            for part in delta.get("tool_calls") or ():
                tool = tools.setdefault(
                    f"{index} {part['index']}", {"ids": set(), "name": "", "arguments": ""}
                )
                tool["ids"] |= {part["id"]} - {None} if part.get("id") else set()
                tool["name"] += part["function"].get("name") or ""
                tool["arguments"] += part["function"].get("arguments") or ""
            if rows := choice.get("logprobs"):
                logprobs += rows.get("content") or rows.get("token_logprobs") or []
            if choice.get("finish_reason"):
                finishes[index] = (choice["finish_reason"], choice.get("matched_stop"))
    for tool in tools.values():
        tool["ids"] = len(tool["ids"])
    return {
        "text": text, "tools": tools, "logprobs": logprobs, "finish": finishes,
        "usage": {k: v for k, v in (usage or {}).items() if k != "prompt_tokens_details"},
        "ids_seen": len({d["id"] for d in documents}), "created_seen": len({d["created"] for d in documents}),
        "roles": sum(bool((c.get("delta") or {}).get("role")) for d in documents for c in d["choices"]),
    }  # fmt: skip


def _messages(documents: list[dict[str, Any]]) -> dict[str, Any]:
    blocks: dict[int, list[str]] = {}
    end = None
    for document in documents:
        if document["type"] == "content_block_delta":
            delta = document["delta"]
            piece = delta.get("text") or delta.get("partial_json") or delta.get("thinking") or ""
            blocks.setdefault(document["index"], []).append(piece)
        end = document if document["type"] == "message_delta" else end
    kinds = [d["type"] for d in documents if d["type"] != "content_block_delta"]
    return {"blocks": {k: "".join(v) for k, v in blocks.items()}, "end": end, "kinds": kinds}


def _responses(documents: list[dict[str, Any]]) -> dict[str, Any]:
    text = "".join(d["delta"] for d in documents if d["type"] == "response.output_text.delta")
    whole = documents[-1].get("response", {})
    return {
        "text": text,
        "kinds": [d["type"] for d in documents if not d["type"].endswith(".delta")],
        "numbers": [d["sequence_number"] for d in documents] == list(range(len(documents))),
        "final": [part["text"] for item in whole.get("output", ()) for part in item.get("content") or ()],
        "item_ids": len({d["item_id"] for d in documents if "item_id" in d}),
        "ids_seen": len({d["response"]["id"] for d in documents if "response" in d}),
        "created_seen": len({d["response"]["created_at"] for d in documents if "response" in d}),
        "output_tokens": whole.get("usage", {}).get("output_tokens"),
    }
