"""Faults at chosen stages of real requests: clients leave, legs are aborted, servers stand still.

Through a balancer of its own over the session's servers, so that limits can be short. After each
test every queue and all KV of every server are back at zero, by the servers' own figures.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.engine.corpus import CORPUS, Prompt
from tests.engine.fleet import Fleet, call, generate_body, wait_for
from tests.engine.own_balancer import OwnBalancer

pytestmark = pytest.mark.engine

LONG_ANSWER = Prompt("long-answer", CORPUS[-20].input_ids, max_new_tokens=400)
LONG_PROMPT = Prompt("long-prompt", tuple(32 + (7 * i) % 90 for i in range(3800)), max_new_tokens=40)
SHORT = CORPUS[0]
LIMITS = {"wedge_s": 4.0, "queue_timeout_s": 40.0, "request_s": 60.0}
HANG_S = 40.0
"""A request must not take longer for a fault: SGLang's own timers are 300 s."""


@pytest.fixture(scope="module")
def own(fleet: Fleet) -> Iterator[OwnBalancer]:
    """One for the module."""
    fleet.wait_ready(2, 90)
    with OwnBalancer(fleet, **LIMITS) as balancer:
        yield balancer


class Caller:
    """One request on a connection of its own."""

    def __init__(self, own: OwnBalancer, prompt: Prompt, *, name: str = "", **extra: Any) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(own.url).netloc, timeout=HANG_S)
        headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
        self.connection.request("POST", "/generate", json.dumps(generate_body(prompt, **extra)), headers)

    def leave(self) -> None:
        """Close, answer or not."""
        sock = self.connection.sock
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def events(self, number: int) -> list[str]:
        """That many events of the stream."""
        self.response = self.connection.getresponse()
        lines: list[str] = []
        while len(lines) < number:
            line = self.response.readline().decode().strip()
            lines += [line.removeprefix("data: ")] if line else []
        return lines

    def rest(self) -> list[str]:
        """The events after those."""
        events = self.response.read().decode().split("\n\n")
        return [event.strip().removeprefix("data: ") for event in events if event.strip()]


@contextlib.contextmanager
def stopped(pid: int, *, only_scheduler: bool = False) -> Iterator[None]:
    """SIGSTOP for a server's processes, or for its scheduler alone; they go on at the end."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    if only_scheduler:
        processes = [p for p in processes if any("scheduler" in word for word in (p.name(), *p.cmdline()))]
        assert processes, [(p.name(), p.cmdline()) for p in root.children(recursive=True)]
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)


def queued(own: OwnBalancer, role: str, *fields: str) -> int:
    """How many requests the servers of a role list in these fields of their load figures."""
    total = 0
    for name, load in own.fleet.loads().items():
        if role in name:
            total += sum(load.get(field) or load["disaggregation"].get(field) or 0 for field in fields)
    return total


def still_serves(own: OwnBalancer, expected: dict[str, list[int]]) -> None:
    """Right tokens through every decode server."""
    for prompt in CORPUS[::40]:
        status, answer = call(own.url, "POST", "/generate", generate_body(prompt))
        assert (status, answer.get("output_ids")) == (200, expected[prompt.name]), answer


# -- clients that leave ------------------------------------------------------------------------------


def _leave_in_line(own: OwnBalancer) -> None:
    for decode in ("decode-0", "decode-1"):
        own.drain(decode)
    caller = Caller(own, SHORT)
    wait_for(lambda: own.state()["waiting"] == 1, "the request in line")
    caller.leave()
    wait_for(lambda: own.state()["waiting"] == 0, "the request out of line")
    for decode in ("decode-0", "decode-1"):
        own.drain(decode, False)
    wait_for(lambda: len(own.ready_pairs()) == 2, "both pairs back")


def _leave_in_prefill(own: OwnBalancer) -> None:
    callers = [Caller(own, LONG_PROMPT) for _ in range(4)]
    wait_for(lambda: queued(own, "prefill", "num_running_reqs", "num_waiting_reqs") >= 2, "prefill at work")
    for caller in callers:
        caller.leave()


def _leave_in_transfer(own: OwnBalancer) -> None:
    callers = [Caller(own, LONG_PROMPT, stream=True) for _ in range(4)]
    wait_for(lambda: queued(own, "decode", "decode_transfer_queue_reqs") >= 1, "decode waiting for KV")
    for caller in callers:
        caller.leave()


def _leave_in_stream(own: OwnBalancer) -> None:
    callers = [Caller(own, LONG_ANSWER, stream=True) for _ in range(4)]
    for caller in callers:
        caller.events(3)
        caller.leave()


def _leave_a_server_that_stands_still(own: OwnBalancer) -> None:
    """The aborts wait in a stopped server's sockets, behind the requests they are for."""
    with stopped(own.fleet.pid("prefill-0"), only_scheduler=True):
        callers = [Caller(own, SHORT) for _ in range(3)]
        queues = ("decode_prealloc_queue_reqs", "decode_transfer_queue_reqs")
        wait_for(lambda: queued(own, "decode", *queues) >= 3, "decode waiting for prefill")
        for caller in callers:
            caller.leave()
        wait_for(lambda: own.counts()["inflight"] == 0, "the requests ended here")


LEAVES = [
    _leave_in_line,
    _leave_in_prefill,
    _leave_in_transfer,
    _leave_in_stream,
    _leave_a_server_that_stands_still,
]


@pytest.mark.parametrize("leave", LEAVES, ids=lambda leave: leave.__name__.removeprefix("_leave_"))
def test_client_leaving_frees_every_server(
    own: OwnBalancer, expected: dict[str, list[int]], leave: Callable[[OwnBalancer], None]
) -> None:
    before = own.counts()
    leave(own)
    own.check_nothing_left()
    after = own.counts()
    assert after["aborted"] > before["aborted"] and after["failed"] == before["failed"]
    still_serves(own, expected)


# -- legs that end behind the balancer's back ----------------------------------------------------------


def _abort_while_decode_waits(own: OwnBalancer, stream: bool, abort: Callable[[str], None]) -> str:
    """A long prompt behind others, aborted before its KV has come; how it ended for its client."""
    with ThreadPoolExecutor(8) as threads:
        body = generate_body(LONG_PROMPT)
        others = [threads.submit(call, own.url, "POST", "/generate", body) for _ in range(3)]
        caller = Caller(own, LONG_PROMPT, name="victim", stream=stream)
        (rid,) = wait_for(lambda: own.rids_of("victim"), "the victim dispatched")
        queues = ("decode_transfer_queue_reqs", "decode_prealloc_queue_reqs")
        wait_for(lambda: queued(own, "decode", *queues) >= 1, "decode waiting for KV")
        abort(rid)
        response = caller.connection.getresponse()
        answer = response.read().decode()
        assert [other.result()[0] for other in others] == [200] * 3
    if response.status != 200:
        return f"{response.status} {answer}"
    last = [line for line in answer.split("\n\n") if line not in ("", "data: [DONE]")][-1]
    document = json.loads(last.removeprefix("data: "))
    return str(document["meta_info"]["finish_reason"]["type"] if "meta_info" in document else document)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_leg_aborted_on_its_server_does_not_leave_the_other_waiting(
    own: OwnBalancer, expected: dict[str, list[int]], role: str, stream: bool
) -> None:
    """Prefill's abort is not told to decode, which would wait for 300 s."""

    def abort(rid: str) -> None:
        for worker in own.state()["workers"]:
            if worker["role"] == role:
                assert call(worker["url"], "POST", "/abort_request", {"rid": rid})[0] == 200

    end = _abort_while_decode_waits(own, stream, abort)
    # SGLang reports the lost transfer as its own failure, so the balancer may try again elsewhere.
    assert end in ("length", "abort") or end[:3] in ("500", "502", "503"), end
    own.check_nothing_left()
    still_serves(own, expected)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_aborted_request_is_not_tried_again(
    own: OwnBalancer, expected: dict[str, list[int]], stream: bool
) -> None:
    """Its servers may report the lost transfer as a failure of theirs."""
    before = own.counts()["retried"]

    def abort(rid: str) -> None:
        assert call(own.url, "POST", "/abort_request", {"rid": "victim"})[0] == 200

    end = _abort_while_decode_waits(own, stream, abort)
    assert end == "abort" or end[0] in "45", end
    assert own.counts()["retried"] == before
    own.check_nothing_left()
    still_serves(own, expected)


def test_stream_aborted_on_decode_behind_the_balancers_back_goes_on_elsewhere(
    own: OwnBalancer, expected: dict[str, list[int]]
) -> None:
    """Nobody asked the balancer for its end: the server gives it up, and another one goes on."""
    resumed = own.counts()["resumed"]
    caller = Caller(own, LONG_ANSWER, name="victim", stream=True)
    caller.events(3)
    (rid,) = own.rids_of("victim")
    for worker in own.state()["workers"]:
        if worker["role"] == "decode":
            assert call(worker["url"], "POST", "/abort_request", {"rid": rid})[0] == 200
    *_, last, done = caller.rest()
    assert done == "[DONE]"
    assert json.loads(last)["meta_info"]["finish_reason"]["type"] == "length"
    assert own.counts()["resumed"] == resumed + 1
    own.check_nothing_left()
    still_serves(own, expected)


# -- servers that stand still --------------------------------------------------------------------------


def _load(own: OwnBalancer, threads: ThreadPoolExecutor, number: int) -> list[Future[tuple[int, Any]]]:
    body = generate_body(LONG_ANSWER)
    return [threads.submit(call, own.url, "POST", "/generate", body, HANG_S) for _ in range(number)]


@pytest.mark.parametrize("only_scheduler", [False, True], ids=["whole-server", "scheduler"])
def test_decode_that_stands_still_fails_over(
    own: OwnBalancer, expected: dict[str, list[int]], only_scheduler: bool
) -> None:
    """What had reached no client is tried on the other server; streams go on there."""
    resumed = own.counts()["resumed"]
    with ThreadPoolExecutor(16) as threads:
        answers = _load(own, threads, 4)
        streams = [Caller(own, LONG_ANSWER, stream=True) for _ in range(4)]
        for stream in streams:
            stream.events(2)
        wait_for(lambda: own.worker("decode-1")["inflight"] >= 2, "requests on decode-1")
        with stopped(own.fleet.pid("decode-1"), only_scheduler=only_scheduler):
            ends = [stream.rest()[-1] for stream in streams]
            statuses = {answer.result()[0] for answer in answers}
            wait_for(lambda: own.worker("decode-1")["inflight"] == 0, "nothing left on decode-1")
            assert own.worker("decode-1")["state"] != "ready"
    assert statuses == {200}
    assert ends == ["[DONE]"] * 4
    assert own.counts()["resumed"] > resumed
    wait_for(lambda: len(own.ready_pairs()) == 2, "decode-1 back", 60)
    own.fleet.wait_ready(2, 60)
    own.check_nothing_left()
    still_serves(own, expected)


def test_prefill_that_stands_still_keeps_no_request_for_ever(
    own: OwnBalancer, expected: dict[str, list[int]]
) -> None:
    """There is no other prefill server: requests fail or wait for it, decode is free again."""
    with ThreadPoolExecutor(16) as threads:
        with stopped(own.fleet.pid("prefill-0")):
            answers = [
                threads.submit(call, own.url, "POST", "/generate", generate_body(SHORT), HANG_S)
                for _ in range(4)
            ]
            wait_for(lambda: own.worker("prefill-0")["state"] != "ready", "prefill-0 out of service", HANG_S)
            queues = ("decode_prealloc_queue_reqs", "decode_transfer_queue_reqs")
            live = [w["url"] for w in own.state()["workers"] if w["role"] == "decode"]

            def waiting() -> int:
                found = [call(url, "GET", "/v1/loads?include=all")[1]["loads"][0] for url in live]
                return sum(load["disaggregation"][queue] for load in found for queue in queues)

            wait_for(lambda: waiting() == 0, "decode servers free")
        statuses = {answer.result()[0] for answer in answers}
    assert statuses <= {200, 502, 503, 504}, statuses
    wait_for(lambda: len(own.ready_pairs()) == 2, "prefill-0 back", 60)
    own.fleet.wait_ready(2, 60)
    own.check_nothing_left()
    still_serves(own, expected)


# -- drains --------------------------------------------------------------------------------------------


def test_drain_under_load_fails_nothing(own: OwnBalancer, expected: dict[str, list[int]]) -> None:
    with ThreadPoolExecutor(16) as threads:
        answers = _load(own, threads, 6)
        wait_for(lambda: own.worker("decode-0")["inflight"] >= 1, "requests on decode-0")
        failed = own.counts()["failed"]
        own.drain("decode-0")
        mine = own.worker("decode-0")["inflight"]
        answers += _load(own, threads, 6)
        wait_for(lambda: own.worker("decode-1")["inflight"] >= 6, "the new ones on decode-1")
        assert own.worker("decode-0")["inflight"] <= mine
        assert {answer.result()[0] for answer in answers} == {200}
    assert own.counts()["failed"] == failed
    assert any(e["event"] == "drained" and e["worker"] == "decode-0" for e in own.state()["events"])
    own.drain("decode-0", False)
    wait_for(lambda: len(own.ready_pairs()) == 2, "decode-0 back")
    own.check_nothing_left()
    still_serves(own, expected)
