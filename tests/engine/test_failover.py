"""Streams through the real balancer of a real 2P2D fleet whose servers are killed and stopped under them.

What clients get equals an undisturbed run's, and afterwards no server holds any KV. The order of the
tests saves restarts: each needs only what the one before left alive. Every cut of the worker's half is
in test_resume.py, every cut of the balancer's on fakes in tests/balancer/proxy/test_failover.py.
"""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.engine.fleet import Fleet, call, launch_fleet, wait_for
from tests.engine.resume_driver import Answer, digest, kill_scheduler, kill_server

pytestmark = pytest.mark.engine

_RNG = random.Random(20261201)
FLAGS = "--served-model-name tiny --tool-call-parser qwen25 --reasoning-parser qwen3"
CHAT = "/v1/chat/completions"
LONG = 150
NUM_PREFIX = 3600
"""Tokens of a prompt that takes prefill a while, in chunks of 64."""
_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 20} for name in ("name", "place", "colour")},
    "required": ["name", "place", "colour"],
    "additionalProperties": False,
}
"""Texts only: SGLang's parsers of tool calls read half numbers by how outputs happened to coalesce."""


def _ids(length: int) -> list[int]:
    return [_RNG.randrange(32, 127) for _ in range(length)]


def _generate(tokens: int = LONG, length: int = 150, **fields: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": _ids(length), "sampling_params": params, **fields}


def _openai(**fields: Any) -> dict[str, Any]:
    usage = {"include_usage": True}
    return {
        "model": "tiny", "temperature": 0, "max_tokens": LONG, "ignore_eos": True, "stream_options": usage,
        **fields,
    }  # fmt: skip


def _chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "tell me about the sea " * 5}]
    return _openai(messages=messages, chat_template_kwargs={"enable_thinking": False}, **fields)


_JSON = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA}}
_TOOLS = [{"type": "function", "function": {"name": "paint", "parameters": _SCHEMA}}]
_MESSAGES = {"model": "tiny", "max_tokens": LONG, "temperature": 0, "messages": _chat()["messages"]}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", _generate()),
    "log probabilities": ("/generate", _generate(return_logprob=True, top_logprobs_num=2)),
    "completions": ("/v1/completions", _openai(prompt="once upon a time")),
    "chat": (CHAT, _chat()),
    "two samples": (CHAT, _chat(n=2)),
    "schema": (CHAT, _chat(response_format=_JSON)),
    "tool": (CHAT, _chat(tools=_TOOLS, tool_choice="required")),
    "messages": ("/v1/messages", _MESSAGES),
}
LENGTHS = {f"{n} tokens": ("/generate", _generate(n, 40)) for n in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)}
PREFILLED = {f"prompt {n}": ("/generate", _generate(20, NUM_PREFIX)) for n in range(3)}
ALL = {**KINDS, **LENGTHS, **PREFILLED}


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """2 prefill and 2 decode servers with parsers, all under the model's name ``tiny``."""
    folder = tmp_path_factory.mktemp("failover")
    (folder / "launch.toml").write_text("[launch]\nmax_restarts = 1000\n")
    flags = ("--prefill-args", FLAGS, "--decode-args", FLAGS, "--config", str(folder / "launch.toml"))
    with launch_fleet(tiny_model, folder, prefill=2, decode=2, flags=flags) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> dict[str, Answer]:
    """What every kind of request is answered while nothing happens."""
    return {name: ask(fleet, name) for name in ALL}


@pytest.fixture(autouse=True)
def nothing_left(fleet: Fleet) -> Iterator[None]:
    """After each test: no request, no reservation, no queue, no KV in use on a living server."""
    yield
    wait_for(lambda: fleet.state()["requests"]["inflight"] == 0, "no request in flight")
    wait_for(lambda: not any(w["inflight"] for w in fleet.state()["workers"]), "no reservation")
    fleet.wait_empty(60)


def ask(fleet: Fleet, name: str, on_frame: Callable[[int], None] = lambda number: None) -> Answer:
    """One streamed request; ``on_frame`` is told the number of frames at each."""
    route, body = ALL[name]
    answer, tail = Answer(route), b""
    connection = http.client.HTTPConnection(urlsplit(fleet.url).netloc, timeout=120)
    whole_body = json.dumps({**body, "stream": True})
    connection.request("POST", route, whole_body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    while data := response.read1(65536):
        *frames, tail = (tail + data).split(b"\n\n")
        for frame in frames:
            answer.take(frame + b"\n\n")
            on_frame(len(answer.frames))
    connection.close()
    return answer


def check(undisturbed: dict[str, Answer], name: str, answer: Answer) -> None:
    """Equal to the undisturbed one, and without a trace of how it was made."""
    assert answer.is_done, answer.frames[-1:]
    assert not answer.log, "a comment of the servers has reached the client"
    first, second = digest(undisturbed[name]), digest(answer)
    logprobs, others = first.pop("logprobs", []), second.pop("logprobs", [])
    assert first == second
    assert others == pytest.approx(logprobs, abs=1e-3)


def only(fleet: Fleet, *names: str) -> None:
    """Only these servers take new requests; ``only(fleet)``: all do again."""
    for worker in fleet.state()["workers"]:
        body = {"draining": bool(names) and worker["worker_id"] not in names}
        assert call(fleet.url, "PUT", f"/workers/{worker['worker_id']}", body)[0] == 202
    roles = {name.partition("-")[0] for name in names}
    wait_for(lambda: fleet.ready_pairs(), f"a pair of {names or 'all'}")
    if len(roles) == 2:
        wait_for(lambda: {n for pair in fleet.ready_pairs() for n in pair} == set(names), f"only {names}")


def whole(fleet: Fleet, *, prefill: int = 2, decode: int = 2) -> None:
    """Wait until so many servers of each role are in ready pairs."""

    def is_ready() -> bool:
        pairs = fleet.ready_pairs()
        return len({p for p, _ in pairs}) >= prefill and len({d for _, d in pairs}) >= decode

    wait_for(is_ready, f"{prefill} prefill and {decode} decode servers ready", 90)


def resumed(fleet: Fleet) -> int:
    return int(fleet.state()["requests"]["resumed"])


def processes(fleet: Fleet, name: str) -> list[psutil.Process]:
    """A server's HTTP process, then its children."""
    root = psutil.Process(fleet.pid(name))
    return [root, *root.children(recursive=True)]


def kill_group(fleet: Fleet, name: str) -> Callable[[], None]:
    """Kill -9 of every process of a server."""
    found = processes(fleet, name)
    assert len(found) > 1
    return lambda: [process.kill() for process in found] and None


def all_at_once(
    fleet: Fleet, undisturbed: dict[str, Answer], names: list[str], on: tuple[str, str],
    trigger: tuple[str, int], kill: Callable[[], None],
) -> int:  # fmt: skip
    """Streams of these kinds on one pair; ``kill`` once ``trigger`` has so many frames.

    Its scheduler stands still until all are there and other pairs are ready. Returns how many have gone on
    elsewhere. Every one is checked.
    """
    before, once = resumed(fleet), threading.Lock()
    only(fleet, *on)
    (scheduler,) = (p for p in processes(fleet, on[1])[1:] if "scheduler" in " ".join(p.cmdline()))

    def asked(name: str) -> Answer:
        def on_frame(number: int) -> None:
            if name == trigger[0] and number >= trigger[1] and once.acquire(blocking=False):
                kill()

        return ask(fleet, name, on_frame)

    scheduler.suspend()
    with ThreadPoolExecutor(len(names)) as threads:
        answers = [threads.submit(asked, name) for name in names]
        try:
            wait_for(lambda: fleet.worker(on[1])["inflight"] >= len(names), "all of them there")
            only(fleet)
            wait_for(lambda: any(on[1] != decode for _, decode in fleet.ready_pairs()), "another pair")
        finally:
            scheduler.resume()
        for name, answer in zip(names, answers, strict=True):
            check(undisturbed, name, answer.result())
    assert once.locked()
    return resumed(fleet) - before


def test_killed_decode_and_prefill_server_under_eight_streams(
    fleet: Fleet, undisturbed: dict[str, Answer]
) -> None:
    """The prefill server, whose KV has arrived, dies with the decode server: both are others afterwards."""
    kills = [kill_server(fleet, "prefill-0"), kill_server(fleet, "decode-0")]

    def kill() -> None:
        for each in kills:
            each()

    number = all_at_once(fleet, undisturbed, list(KINDS), ("prefill-0", "decode-0"), ("generate", 15), kill)
    assert number >= 1


def test_prefill_server_killed_before_it_begins(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    whole(fleet, decode=1)
    names = ("chat", "generate", "schema")
    only(fleet, "prefill-1", "decode-1")
    found = processes(fleet, "prefill-1")
    for process in found:
        process.suspend()
    with ThreadPoolExecutor(len(names)) as threads:
        answers = [threads.submit(ask, fleet, name) for name in names]
        wait_for(lambda: fleet.worker("prefill-1")["inflight"] == len(names), "the requests there")
        only(fleet)
        found[0].kill()
        for name, answer in zip(names, answers, strict=True):
            check(undisturbed, name, answer.result())


def test_killed_scheduler_at_the_first_and_last_tokens(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    """Ten streams of one to 89 tokens: the cut finds each at another place, some at their ends."""
    whole(fleet, prefill=1)
    kill = kill_scheduler(fleet, "decode-0")
    number = all_at_once(fleet, undisturbed, list(LENGTHS), ("prefill-0", "decode-0"), ("21 tokens", 1), kill)
    assert number >= 1


def test_prefill_server_killed_during_the_transfer(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    whole(fleet, decode=1)
    only(fleet, "prefill-0", "decode-1")
    fleet.flush()
    kill = kill_server(fleet, "prefill-0")
    with ThreadPoolExecutor(len(PREFILLED)) as threads:
        answers = [threads.submit(ask, fleet, name) for name in PREFILLED]
        url = fleet.worker("decode-1")["url"]

        def num_waiting() -> int:
            load = call(url, "GET", "/v1/loads?include=all")[1]["loads"][0]
            return int(load["disaggregation"]["decode_transfer_queue_reqs"])

        wait_for(lambda: num_waiting() >= 2, "decode waiting for KV")
        only(fleet)
        kill()
        for name, answer in zip(PREFILLED, answers, strict=True):
            check(undisturbed, name, answer.result())


def test_killed_group_of_a_decode_server(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    whole(fleet, prefill=1)
    kill = kill_group(fleet, "decode-1")
    names = ["generate", "chat", "tool", "messages"]
    number = all_at_once(fleet, undisturbed, names, ("prefill-1", "decode-1"), ("generate", 15), kill)
    assert number >= 1


def test_decode_server_that_stands_still(fleet: Fleet, undisturbed: dict[str, Answer]) -> None:
    """Its connections stay open; another server goes on after five seconds of silence."""
    whole(fleet, prefill=1)
    found = processes(fleet, "decode-0")

    def suspend() -> None:
        for process in found:
            process.suspend()

    names = ["generate", "chat", "schema"]
    try:
        number = all_at_once(
            fleet, undisturbed, names, (next(p for p, _ in fleet.ready_pairs()), "decode-0"),
            ("generate", 15), suspend,
        )  # fmt: skip
        assert number >= 1
    finally:
        for process in found:
            process.resume()


def test_second_death_leaves_no_decode_server_until_one_is_back(
    fleet: Fleet, undisturbed: dict[str, Answer]
) -> None:
    """One stream outlives both decode servers: it waits for the first one's restart."""
    whole(fleet, prefill=1)
    only(fleet, next(p for p, _ in fleet.ready_pairs()), "decode-0")
    kills = {15: kill_server(fleet, "decode-0"), 80: kill_server(fleet, "decode-1")}
    before = resumed(fleet)

    def on_frame(number: int) -> None:
        if kill := kills.pop(number, None):
            if number == 15:
                only(fleet)
                wait_for(lambda: any(d == "decode-1" for _, d in fleet.ready_pairs()), "the other")
            kill()

    check(undisturbed, "generate", ask(fleet, "generate", on_frame))
    assert resumed(fleet) - before == 2
    whole(fleet)
    assert fleet.state()["requests"]["failed"] == 0


def chaos(fleet: Fleet, *options: str) -> dict[str, Any]:
    """``pdserve chaos``; the last line of what it prints."""
    command = [sys.executable, "-m", "pdserve", "chaos", fleet.url, "--yes", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_chaos_keeps_every_promise(fleet: Fleet) -> None:
    whole(fleet)
    report = chaos(fleet, "--duration", "15", "--every", "4", "--output", "300", "--seed", "5")
    assert report["requests"] > 8 and sum(report["faults"].values()) >= 2
    assert not report["broken_promises"]


@pytest.mark.exhaustive
def test_chaos_for_minutes(fleet: Fleet) -> None:
    whole(fleet)
    report = chaos(fleet, "--duration", "180", "--every", "6", "--output", "400", "--seed", "6")
    assert report["resumed"] >= 10 and not report["broken_promises"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("frames", [1, 3, 60, 140])
@pytest.mark.parametrize("what", [kill_server, kill_scheduler, kill_group])
def test_every_death_at_every_stage(
    fleet: Fleet,
    undisturbed: dict[str, Answer],
    what: Callable[[Fleet, str], Callable[[], None]],
    frames: int,
) -> None:
    whole(fleet)
    on = ("prefill-1", f"decode-{frames % 2}")
    all_at_once(fleet, undisturbed, list(KINDS), on, ("generate", frames), what(fleet, on[1]))
