"""Half-streamed answers that go on, token by token the same, on another decode server: real servers.

The balancer's half is tests/engine/resume_driver.py. What happens without the replays is in
test_resume_controls.py. Its own fleet, for the parsers of tools and reasoning.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pdserve.plugin.resume.log import parse_log
from tests.engine.fleet import Fleet, call, launch_fleet
from tests.engine.resume_driver import (
    Aborted,
    Answer,
    Cut,
    Worker,
    ask,
    assert_same,
    digest,
    kill_scheduler,
    kill_server,
)

pytestmark = pytest.mark.engine

_RNG = random.Random(20261130)
PROMPT = [_RNG.randrange(32, 127) for _ in range(150)]
CHAT = "/v1/chat/completions"
_WORDS = {"model": "tiny", "max_tokens": 70, "temperature": 0, "stream_options": {"include_usage": True}}


def _generate(**sampling: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": 70, "ignore_eos": True, **sampling}
    return {"input_ids": PROMPT, "sampling_params": params}


def _chat(words: str = "tell me about the sea ", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": words * 5}]
    return {**_WORDS, "messages": messages, "chat_template_kwargs": {"enable_thinking": False}, **fields}


_SIZES = {"type": "array", "items": {"type": "integer"}, "maxItems": 4}
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "sizes": _SIZES},
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": _SCHEMA}}
_JSON = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA}}
_LOGPROBS = {"return_logprob": True, "top_logprobs_num": 2}
_SEA = {"model": "tiny", "temperature": 0}
_LATE = {"ignore_eos": False, "min_new_tokens": 50, "stop_token_ids": list(range(32, 80))}
_LENGTHS = [{"temperature": 0, "max_new_tokens": 60}, {"temperature": 0, "max_new_tokens": 9}]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", _generate()),
    "generate, log probabilities": ("/generate", {**_generate(), **_LOGPROBS}),
    "generate, repetition penalty": ("/generate", _generate(repetition_penalty=1.3)),
    "generate, min_new_tokens": ("/generate", _generate(**_LATE)),
    "generate, batch": ("/generate", {"text": ["the sea", "the hills are"], "sampling_params": _LENGTHS}),
    "completions": ("/v1/completions", {**_WORDS, "prompt": "once upon a time"}),
    "completions, batch": ("/v1/completions", {**_WORDS, "prompt": ["once upon", "and then there was"]}),
    "completions, log probabilities": ("/v1/completions", {**_WORDS, "prompt": "once upon", "logprobs": 2}),
    "chat": (CHAT, _chat()),
    "chat, schema": (CHAT, _chat(response_format=_JSON)),
    "chat, penalties": (CHAT, _chat(frequency_penalty=0.7, presence_penalty=0.4)),
    "chat, log probabilities": (CHAT, _chat(logprobs=True, top_logprobs=3)),
    "chat, a tool is required": (CHAT, _chat(tools=[_TOOL], tool_choice="required")),
    "chat, reasoning": (CHAT, _chat(regex="<think>[a-z ]{20}</think>[a-z ]{30}")),
    "chat, all reasoning": (CHAT, _chat(chat_template_kwargs={"enable_thinking": True})),
    "messages": ("/v1/messages", {**_SEA, "max_tokens": 60, "messages": _chat()["messages"]}),
    "responses": ("/v1/responses", {**_SEA, "input": "the sea " * 9, "max_output_tokens": 60}),
}

FLAGS = "--served-model-name tiny --tool-call-parser qwen25 --reasoning-parser qwen3"


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """1 prefill and 2 decode servers with parsers, all under the model's name ``tiny``."""
    flags = ("--prefill-args", FLAGS, "--decode-args", FLAGS)
    folder = tmp_path_factory.mktemp("resume")
    with launch_fleet(tiny_model, folder, prefill=1, decode=2, flags=flags) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> dict[str, Answer]:
    """Every case's answer without a cut, from decode-1."""
    return {name: ask(fleet, *case, decodes=("decode-1",)) for name, case in CASES.items()}


def _cuts(answer: Answer, number: int) -> list[int]:
    """Frames to cut behind: the first, the last but one, and some between."""
    last = len(answer.frames) - 1
    return sorted({1, last, *(_RNG.randrange(1, last) for _ in range(number))})


@pytest.mark.parametrize("name", CASES)
def test_answer_cut_anywhere_is_the_undisturbed_one(
    fleet: Fleet, undisturbed: dict[str, Answer], name: str
) -> None:
    whole = undisturbed[name]
    for frames in _cuts(whole, 3):
        assert_same(whole, ask(fleet, *CASES[name], Cut(frames)))


@pytest.mark.parametrize("name", ["chat", "generate, batch", "chat, a tool is required"])
def test_answer_over_four_legs(fleet: Fleet, undisturbed: dict[str, Answer], name: str) -> None:
    assert_same(undisturbed[name], ask(fleet, *CASES[name], Cut(1), Cut(9), Cut(4)))


def test_stop_string_across_the_cut(fleet: Fleet) -> None:
    text = digest(ask(fleet, "/generate", _generate()))["0"]["text"]
    for begin in (20, 41):
        body = _generate(stop=[text[begin : begin + 4]])
        whole = ask(fleet, "/generate", body)
        assert digest(whole)["0"]["finish_reason"]["type"] == "stop"
        for frames in range(begin - 1, len(whole.frames)):
            assert_same(whole, ask(fleet, "/generate", body, Cut(frames)))


@pytest.mark.parametrize("limit", [1, 2, 17])
def test_last_tokens_of_a_length_limit(fleet: Fleet, limit: int) -> None:
    body = _chat(max_tokens=limit)
    whole = ask(fleet, CHAT, body)
    for frames in range(max(1, len(whole.frames) - 4), len(whole.frames)):
        assert_same(whole, ask(fleet, CHAT, body, Cut(frames)))


def test_last_tokens_of_the_context(fleet: Fleet) -> None:
    """Prefill takes 4091 tokens at most; a resume beyond that is refused in so many words."""
    body = {**_generate(max_new_tokens=30), "input_ids": [_RNG.randrange(32, 127) for _ in range(4060)]}
    whole = ask(fleet, "/generate", body)
    assert_same(whole, ask(fleet, "/generate", body, Cut(20)))
    log = "=" + "0" * 32 + " " + " ".join("65;1" for _ in range(40))
    workers = {w["worker_id"]: w for w in fleet.state()["workers"]}
    status, answer = _send(workers["prefill-0"], {**body, "pdserve_resume": {"log": log, "frames": 0}})
    assert status == 400
    assert "cannot resume: prompt and answer so far are 4099 tokens" in json.dumps(answer)
    fleet.wait_empty()


def _send(worker: Worker, body: dict[str, Any], header: str | None = None) -> tuple[int, Any]:
    import http.client
    from urllib.parse import urlsplit

    connection = http.client.HTTPConnection(urlsplit(worker["url"]).netloc, timeout=60)
    ours = {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": worker["bootstrap_port"] or 1,
        "bootstrap_room": 7,
    }
    headers = {"Content-Type": "application/json", "x-pdserve-ids": f"{worker['instance_id']} resume"}
    if header is not None:
        headers["x-pdserve-ids"] = header
    connection.request("POST", "/generate", json.dumps({**body, **ours}), headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


# -- death -----------------------------------------------------------------------------------------


KILLED = [name for name in CASES if "batch" not in name and "reasoning" not in name]


def _kill_under_all(
    fleet: Fleet, undisturbed: dict[str, Answer], what: Callable[[Fleet, str], Callable[[], None]]
) -> list[float]:
    """Requests of every kind at once on decode-0, killed when one has 25 frames; seconds until noticed."""
    fleet.wait_ready(2, 90)
    once, kill = threading.Lock(), what(fleet, "decode-0")
    killed = fleet.worker("decode-0")["instance_id"]

    def kill_once() -> None:
        if once.acquire(blocking=False):
            kill()

    with ThreadPoolExecutor(len(KILLED)) as threads:
        answers = list(threads.map(lambda name: ask(fleet, *CASES[name], Cut(25, kill_once)), KILLED))
    for name, answer in zip(KILLED, answers, strict=True):
        assert_same(undisturbed[name], answer)
    noticed = sorted(seconds for answer in answers for seconds in answer.noticed_s)
    gaps = sorted(seconds for answer in answers for seconds in answer.gaps_s)
    print("\nnoticed", [round(s, 3) for s in noticed], "gaps", [round(s, 3) for s in gaps])
    fleet.wait_replaced("decode-0", killed, 2, 90)
    return noticed


def test_killed_decode_server(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    assert _kill_under_all(fleet, undisturbed, kill_server)


def test_killed_scheduler_is_noticed_behind_a_living_http_process(
    fleet: Fleet, undisturbed: dict[str, Answer]
) -> None:
    """By itself SGLang's HTTP process keeps its streams open for six seconds."""
    noticed = _kill_under_all(fleet, undisturbed, kill_scheduler)
    assert noticed[0] < 4


def test_killed_while_it_resumes(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    """decode-0 is left, decode-1 dies before its first frame, decode-0 goes on."""
    fleet.wait_ready(2, 90)
    killed = fleet.worker("decode-1")["instance_id"]
    cuts = Cut(20), Cut(0, kill_server(fleet, "decode-1"))
    answer = ask(fleet, *CASES["chat, schema"], *cuts)
    assert answer.num_resumes == 2
    assert_same(undisturbed["chat, schema"], answer)
    fleet.wait_replaced("decode-1", killed, 2, 90)


# -- what must not be possible -----------------------------------------------------------------------


def test_a_client_can_neither_resume_nor_see_ids(fleet: Fleet) -> None:
    decode = next(w for w in fleet.state()["workers"] if w["worker_id"] == "decode-0")
    private = {**_generate(), "sampling_params": {"custom_params": {"pdserve_resume": [65]}}}
    for header in ("", "1", decode["instance_id"]):
        status, answer = _send(decode, private, header)
        assert (status, "not a client's" in json.dumps(answer)) == (400, True)
    expected = digest(ask(fleet, "/generate", _generate()))["0"]["text"]
    body = {**_generate(), "pdserve_resume": {"log": "65;1 66;1", "frames": 1}}
    assert call(fleet.url, "POST", "/generate", body)[1]["text"] == expected
    stream = call(fleet.url, "POST", "/generate", {**body, "stream": True})[1]
    assert ": ids" not in stream
    assert json.loads(stream.split("data: ")[-2])["text"] == expected


@pytest.mark.parametrize(
    ("log", "words"),
    [("999;1", "below 259"), ("1:65;1", "run 1"), ("65;1 !beam", "!beam"), ("?", "cannot hold")],
)
def test_logs_that_cannot_be_are_refused(fleet: Fleet, log: str, words: str) -> None:
    workers = {w["worker_id"]: w for w in fleet.state()["workers"]}
    body = {**_generate(), "pdserve_resume": {"log": log, "frames": 0}}
    for name in ("prefill-0", "decode-0"):
        status, answer = _send(workers[name], body)
        assert (status, words in json.dumps(answer)) == (400, True), answer


def test_answer_that_cannot_be_resumed_says_so(fleet: Fleet) -> None:
    """These servers do not return hidden states at all: the frame that says so is the answer's error."""
    body = {**_generate(), "return_hidden_states": True, "sampling_params": {"max_new_tokens": 3}}
    with pytest.raises(Aborted, match=r"!hidden_states ~400"):
        ask(fleet, "/generate", body)


# -- negative controls: each part of the log and each replay is needed ---------------------------------


def test_another_token_in_the_log_is_another_answer(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    def forge(log: str) -> str:
        *words, last = log.split()
        ids, _, rest = last.partition(";")
        return " ".join([*words, f"{(int(ids) - 31) % 90 + 33};{rest}"])

    answer = ask(fleet, *CASES["generate"], Cut(20), forge=forge)
    assert digest(answer)["0"]["text"] != digest(undisturbed["generate"])["0"]["text"]


def test_log_probabilities_come_from_the_log(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    name = "generate, log probabilities"
    answer = ask(fleet, *CASES[name], Cut(20), forge=lambda log: re.sub(r";l\S+", "", log))
    with pytest.raises(AssertionError):
        assert_same(undisturbed[name], answer)


def test_nothing_is_left(fleet: Fleet) -> None:
    fleet.wait_empty()


def test_log_of_a_resumed_answer_is_the_whole_answers(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    log = parse_log(ask(fleet, *CASES["chat"], Cut(5), Cut(5)).log)
    whole = parse_log(undisturbed["chat"].log)
    assert (log.runs[0].ids, log.runs[0].chars) == (whole.runs[0].ids, whole.runs[0].chars)
