"""What a request gets that was aborted in the balancer's queue is what one plain server gives in that case.

``aborted_recordings.json``: a plain SGLang 0.5.23 server with one request running and the others in its
queue, then ``abort_all``. Ids, times, weight versions and the model's path were taken out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.balancer.request.aborted import aborted_answer
from pdserve.balancer.request.parse import parse_request
from pdserve.balancer.request.request import Route

RECORDINGS: dict[str, Any] = json.loads((Path(__file__).parent / "aborted_recordings.json").read_text())
VOLATILE = ("id", "created", "created_at", "output_token_logprobs", "input_token_logprobs")
VOLATILE += ("output_token_logprobs_length", "metadata")
MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = {"model": "m", "messages": MESSAGES, "max_tokens": 50}
COMPLETION = {"model": "m", "prompt": "hello", "max_tokens": 50}
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hello"},
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/messages": CHAT,
    "/v1/responses": {"model": "m", "input": "hello", "max_output_tokens": 50},
    "/invocations": CHAT,
}
VERTEX = [{"text": "a"}, {"text": "b"}]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{path} stream={flag}": (path, {**body, "stream": flag})
        for path, body in BODIES.items()
        for flag in (False, True)
    },
    "chat usage": (
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "comp echo": ("/v1/completions", {**COMPLETION, "prompt": "abc", "echo": True}),
    "comp batch": ("/v1/completions", {**COMPLETION, "prompt": ["a", "b"]}),
    "gen batch": ("/generate", {"text": ["a", "b"]}),
    "gen logprob": ("/generate", {"text": "a", "return_logprob": True}),
}


def bare(value: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {name: bare(item) for name, item in value.items() if name not in VOLATILE}
    return [bare(item) for item in value] if isinstance(value, list) else value


def parts(body: bytes) -> Any:
    """A whole document, or the events of a stream with their names."""
    if not body.startswith((b"data:", b"event:")):
        return bare(json.loads(body))
    found = []
    for event in body.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in event.split("\n"))
        data = lines["data"]
        found.append([lines.get("event"), data if data == "[DONE]" else bare(json.loads(data))])
    return found


def answer_to(path: str, body: dict[str, Any]) -> bytes:
    """What is answered once it is aborted."""
    answer = aborted_answer(parse_request(Route(path), json.dumps(body).encode()))
    assert answer.status == 200
    return answer.body


@pytest.mark.parametrize("name", CASES)
def test_a_request_aborted_in_the_queue_ends_as_on_one_server(name: str) -> None:
    path, body = CASES[name]
    assert parts(answer_to(path, body)) == RECORDINGS[name]


@pytest.mark.parametrize("stream", [False, True])
def test_vertex_lists_its_predictions(stream: bool) -> None:
    body = answer_to("/vertex_generate", {"instances": VERTEX, "parameters": {"stream": stream}})
    recorded = RECORDINGS[f"/vertex_generate stream={stream}"]
    got = parts(body)
    if stream:  # which prompt of a batch ends first is chance
        assert sorted(got[:-1], key=str) == sorted(recorded[:-1], key=str)
    else:
        assert got == recorded


def test_logprobs_that_were_asked_for_are_there_and_empty() -> None:
    meta = json.loads(answer_to("/generate", {"text": "a", "return_logprob": True}))["meta_info"]
    assert meta["output_token_logprobs"] == meta["input_token_logprobs"] == []
    assert meta["output_token_logprobs_length"] == 0


def test_the_answer_has_the_clients_own_names() -> None:
    body = {"text": ["a", "b"], "rid": ["x", "y"]}
    assert [item["meta_info"]["id"] for item in json.loads(answer_to("/generate", body))] == ["x", "y"]
    assert json.loads(answer_to("/v1/chat/completions", {**CHAT, "rid": "x"}))["id"] == "x"
    assert json.loads(answer_to("/v1/responses", {**BODIES["/v1/responses"], "request_id": "x"}))["id"] == "x"


def test_without_one_an_id_looks_like_sglangs() -> None:
    assert json.loads(answer_to("/v1/responses", BODIES["/v1/responses"]))["id"].startswith("resp_")
    assert len(json.loads(answer_to("/generate", {"text": "a"}))["meta_info"]["id"]) == 32
