"""A real decode server is drained with ``move`` under running streams: clients do not see it."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.engine.fleet import Fleet, call, wait_for
from tests.engine.resume_driver import Answer, digest

pytestmark = pytest.mark.engine

_RNG = random.Random(20261202)
LENGTH = 400
_SEA = [{"role": "user", "content": "tell me about the sea " * 5}]
_OPENAI = {"max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
_SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "minLength": 200, "maxLength": 250}}}
_JSON = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA}}


def _generate(**more: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": LENGTH, "ignore_eos": True, **more}
    return {"input_ids": [_RNG.randrange(32, 127) for _ in range(150)], "sampling_params": params}


STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", _generate()),
    "log probabilities": ("/generate", {**_generate(), "return_logprob": True}),
    "penalties": ("/generate", _generate(frequency_penalty=0.7, presence_penalty=0.4)),
    "two samples": ("/generate", _generate(n=2)),
    "chat": ("/v1/chat/completions", {**_OPENAI, "messages": _SEA}),
    "schema": ("/v1/chat/completions", {**_OPENAI, "messages": _SEA, "response_format": _JSON}),
    "completions": ("/v1/completions", {**_OPENAI, "prompt": "once upon a time"}),
    "messages": ("/v1/messages", {"messages": _SEA, "max_tokens": LENGTH, "temperature": 0}),
}


def ask(fleet: Fleet, name: str, model: str, begun: threading.Barrier | None = None) -> Answer:
    """One streamed request; waits at ``begun`` once a part of it is there."""
    route, body = STREAMS[name]
    answer, tail = Answer(route), b""
    connection = http.client.HTTPConnection(urlsplit(fleet.url).netloc, timeout=120)
    body = {**body, "model": model, "stream": True}
    connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    while data := response.read1(4096):
        *frames, tail = (tail + data).split(b"\n\n")
        for frame in frames:
            answer.take(frame + b"\n\n")
        if begun is not None and answer.frames:  # a busy server may tell much in few frames
            begun.wait(60)
            begun = None
    connection.close()
    return answer


def _drain(fleet: Fleet, name: str, **how: bool) -> None:
    status, told = call(fleet.url, "PUT", f"/workers/{name}", how)
    assert status == 202, told


def _is_empty(fleet: Fleet, name: str) -> bool:
    """The server itself says that nothing runs or waits there, and that no KV is in use but its cache's."""
    load = fleet.loads()[name]
    if load["num_running_reqs"] or load["num_waiting_reqs"]:
        return False
    call(fleet.worker(name)["url"], "POST", "/flush_cache")
    return not fleet.loads()[name]["num_used_tokens"]


def test_streams_leave_a_server_that_drains_with_move(fleet: Fleet, tiny_model: Path) -> None:
    """Eight run on two servers when one is drained; they end on the other as if nothing had happened."""
    model = str(tiny_model)
    with ThreadPoolExecutor(len(STREAMS)) as clients:
        answered = clients.map(lambda name: ask(fleet, name, model), STREAMS)
    undisturbed = dict(zip(STREAMS, answered, strict=True))
    begun = threading.Barrier(len(STREAMS) + 1)
    before = fleet.state()["requests"]
    with ThreadPoolExecutor(len(STREAMS)) as clients:
        answers = {name: clients.submit(ask, fleet, name, model, begun) for name in STREAMS}
        begun.wait(60)
        num_there = fleet.worker("decode-0")["inflight"]
        began_s = time.monotonic()
        _drain(fleet, "decode-0", draining=True, move=True)
        wait_for(lambda: not fleet.worker("decode-0")["inflight"], "nothing of ours is there")
        left_s = time.monotonic() - began_s
        wait_for(lambda: _is_empty(fleet, "decode-0"), "it holds nothing")
        emptied_s = time.monotonic() - began_s
        num_running = sum(not answer.done() for answer in answers.values())
        found = {name: answer.result() for name, answer in answers.items()}
    state = fleet.state()
    counts = {name: state["requests"][name] - before[name] for name in ("moved", "resumed", "failed")}
    print(
        f"{num_there} streams left in {left_s:.2f} s, KV free in {emptied_s:.2f} s; {num_running} then ran on"
    )
    print(counts, state["latency"]["move_gap_s"])
    assert counts["moved"] >= 1 and counts["resumed"] == counts["failed"] == 0
    for name, answer in found.items():
        assert answer.is_done and not answer.log, name
        first, second = digest(undisturbed[name]), digest(answer)
        logprobs, others = first.pop("logprobs", []), second.pop("logprobs", [])
        assert first == second, name
        assert others == pytest.approx(logprobs, abs=1e-3)
    worker = fleet.worker("decode-0")
    assert worker["state"] == "draining" and not worker["errors"] and not worker["failures"]
    _drain(fleet, "decode-0", draining=False)
    fleet.wait_ready(2)
    fleet.wait_empty()
