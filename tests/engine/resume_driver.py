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

import pytest

from pdserve.plugin.resume.log import parse_log
from tests.engine.fleet import Fleet, call

COMMENT = re.compile(rb"^: ids ([^\n]*)\n", re.MULTILINE)
RID_FIELDS = {"/v1/responses": "request_id", "/v1/messages": ""}


Worker = dict[str, Any]
"""A worker's row of the state document."""


class Aborted(Exception):
    """The server has said that it gives the answer up: its words, or its status and body."""


@dataclass
class Answer:
    """What a client has received, and what its balancer keeps for the case that the server dies."""

    route: str
    frames: list[bytes] = field(default_factory=list)
    log: str = ""
    num_resumes: int = 0
    gaps_s: list[float] = field(default_factory=list)
    """Seconds between the last frame of one leg and the first of the next."""
    last_s: float = 0.0
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
        return any(
            end in last for end in (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete")
        )

    def take(self, frame: bytes) -> None:
        """Keep one whole frame, its comment in the log."""
        for words in COMMENT.findall(frame):
            text = words.decode()
            if "~" in text:
                raise Aborted(text)
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
    answer, legs = Answer(route), []
    workers = {w["worker_id"]: w for w in fleet.state()["workers"]}
    try:
        for turn, cut in enumerate((*cuts, None)):
            name = decodes[turn % len(decodes)]
            legs.append(_Leg((workers["prefill-0"], workers[name]), route, body))
            if turn:
                answer.num_resumes += 1
                log = forge(answer.log) if forge else answer.log
                legs[-1].resume = {"log": log, "frames": len(answer.frames)}
            if legs[-1].run(answer, cut):
                break
            if cut is None:
                raise AssertionError(f"its stream from {name} ended early: {answer.frames[-1:]}")
        return answer
    finally:
        for leg in legs:
            leg.end()


class _Leg:
    def __init__(
        self, servers: tuple[dict[str, Any], dict[str, Any]], route: str, body: dict[str, Any]
    ) -> None:
        self.prefill, self.decode = servers
        self.route, self.body = route, body
        self.resume: dict[str, Any] | None = None
        self.rids: list[str] = []
        self._threads: list[threading.Thread] = []

    def run(self, answer: Answer, cut: Cut | None) -> bool:
        """True if the answer is complete; False if this leg was lost, as ``cut`` wanted it."""
        body = json.dumps(self._whole_body()).encode()
        self._start(self._ask_prefill, body)
        had = len(answer.frames)
        if cut is not None and not cut.frames and cut.kill is not None:
            cut.kill()
        try:
            for frame in self._frames(body):
                answer.take(frame)
                now = time.monotonic()
                if had and len(answer.frames) == had + 1:
                    answer.gaps_s.append(now - answer.last_s)
                answer.last_s = now
                if cut is not None and len(answer.frames) - had >= cut.frames:
                    if cut.kill is None:
                        self._start(self._abort)
                        return False
                    cut.kill()
                    cut = None
        except (OSError, http.client.HTTPException):
            if answer.last_s:
                answer.noticed_s.append(time.monotonic() - answer.last_s)
            self._start(self._abort)  # prefill would wait for a decode server that is gone
            return False
        return answer.is_done

    def end(self) -> None:
        """Wait for what was started beside it."""
        for thread in self._threads:
            thread.join(60)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

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

    def _ask_prefill(self, body: bytes) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = self._post(self.prefill, body)
            connection.getresponse().read()
            connection.close()

    def _frames(self, body: bytes) -> Iterator[bytes]:
        connection = self._post(self.decode, body)
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

    def _post(self, worker: Worker, body: bytes) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(urlsplit(worker["url"]).netloc, timeout=60)
        ids = worker["instance_id"] + ("" if self.resume is None else " resume")
        connection.request(
            "POST", self.route, body, {"Content-Type": "application/json", "x-pdserve-ids": ids}
        )
        return connection

    def _abort(self) -> None:
        for rid in self.rids if RID_FIELDS.get(self.route, "rid") else ():
            for worker in (self.decode, self.prefill):
                with contextlib.suppress(OSError):
                    call(worker["url"], "POST", "/abort_request", {"rid": rid}, timeout_s=5)


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


def assert_same(one: Answer, other: Answer) -> None:
    """Equal in all that must not depend on cuts; log probabilities within what a prefill rounds otherwise."""
    assert other.is_done
    assert parse_log(one.log).runs.keys() == parse_log(other.log).runs.keys()
    for index, run in parse_log(one.log).runs.items():
        assert parse_log(other.log).runs[index].ids == run.ids
    first, second = digest(one), digest(other)
    logprobs, others = first.pop("logprobs", []), second.pop("logprobs", [])
    assert first == second
    assert others == pytest.approx(logprobs, abs=1e-3)


def digest(answer: Answer) -> dict[str, Any]:
    """What a client makes of an answer; its ids and times as how many different ones there were."""
    reader = {"/generate": _generate, "/v1/messages": _messages, "/v1/responses": _responses}
    return reader.get(answer.route, _openai)(answer.documents)


def _generate(documents: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"logprobs": []}
    for index in sorted({document.get("index", 0) for document in documents}):
        mine = [document for document in documents if document.get("index", 0) == index]
        last, metas = mine[-1], [document["meta_info"] for document in mine]
        found[str(index)] = {
            "text": last["text"],
            "ids": last["output_ids"],
            **{k: metas[-1][k] for k in ("finish_reason", "prompt_tokens", "completion_tokens")},
            "ids_seen": len({meta["id"] for meta in metas}),
            "cached_seen": len({meta["cached_tokens"] for meta in metas}),
        }
        found["logprobs"] += [row[0] for row in metas[-1].get("output_token_logprobs") or ()]
        for row in metas[-1].get("output_top_logprobs") or ():
            found["logprobs"] += [pair[0] for pair in row or ()]
    return found


def _openai(documents: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"logprobs": [], "text": {}, "tools": {}, "finish": {}, "usage": {}, "roles": 0}
    for document in documents:
        found["usage"] = document.get("usage") or found["usage"]
        for choice in document["choices"]:
            _read_choice(choice, found)
    found["usage"].pop("prompt_tokens_details", None)
    found["tools"] = {key: {**tool, "ids": len(tool["ids"])} for key, tool in found["tools"].items()}
    names = {name: len({document[name] for document in documents}) for name in ("id", "created")}
    return {**found, "seen": names}


def _read_choice(choice: dict[str, Any], found: dict[str, Any]) -> None:
    index, delta = choice["index"], choice.get("delta") or {}
    found["roles"] += bool(delta.get("role"))
    for name, value in (*delta.items(), ("text", choice.get("text"))):
        if isinstance(value, str) and name != "role":
            key = f"{index} {name}"
            found["text"][key] = found["text"].get(key, "") + value
    for part in delta.get("tool_calls") or ():
        tool = found["tools"].setdefault(part["index"], {"ids": set(), "name": "", "arguments": ""})
        tool["ids"] |= {part["id"]} if part.get("id") else set()
        tool["name"] += part["function"].get("name") or ""
        tool["arguments"] += part["function"].get("arguments") or ""
    if rows := choice.get("logprobs"):
        found["logprobs"] += [row["logprob"] for row in rows.get("content") or ()]
        found["logprobs"] += rows.get("token_logprobs") or []
    if choice.get("finish_reason"):
        found["finish"][index] = (choice["finish_reason"], choice.get("matched_stop"))


def _messages(documents: list[dict[str, Any]]) -> dict[str, Any]:
    blocks: dict[int, str] = {}
    for document in documents:
        if document["type"] == "content_block_delta":
            delta = document["delta"]
            piece = delta.get("text") or delta.get("partial_json") or delta.get("thinking") or ""
            blocks[document["index"]] = blocks.get(document["index"], "") + piece
    kinds = [document["type"] for document in documents if document["type"] != "content_block_delta"]
    ends = [document for document in documents if document["type"] == "message_delta"]
    return {"blocks": blocks, "ends": ends, "kinds": kinds}


def _responses(documents: list[dict[str, Any]]) -> dict[str, Any]:
    whole = documents[-1].get("response", {})
    responses = [document["response"] for document in documents if "response" in document]
    return {
        "text": "".join(d["delta"] for d in documents if d["type"] == "response.output_text.delta"),
        "kinds": [d["type"] for d in documents if not d["type"].endswith(".delta")],
        "is_numbered": [d["sequence_number"] for d in documents] == list(range(len(documents))),
        "final": [part["text"] for item in whole.get("output", ()) for part in item.get("content") or ()],
        "item_ids": len({d["item_id"] for d in documents if "item_id" in d}),
        "seen": [len({r[name] for r in responses}) for name in ("id", "created_at")],
        "output_tokens": whole.get("usage", {}).get("output_tokens"),
    }
