"""Real faults on a real fleet: clients that leave, servers that die, a service that is lost."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.engine.corpus import CORPUS, Prompt
from tests.engine.fleet import Fleet, call, generate_body, wait_for

pytestmark = pytest.mark.engine

LONG = Prompt("long", CORPUS[-20].input_ids, max_new_tokens=600)
SHORT = CORPUS[0]


def _open(fleet: Fleet, body: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(urlsplit(fleet.url).netloc, timeout=120)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def _still_serves(fleet: Fleet, expected: dict[str, list[int]]) -> None:
    for prompt in CORPUS[::25]:
        status, answer = call(fleet.url, "POST", "/generate", generate_body(prompt))
        assert status == 200, answer
        assert answer["output_ids"] == expected[prompt.name]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_decoding(fleet: Fleet, at_least: int = 1) -> None:
    def running() -> bool:
        loads = fleet.loads()
        return sum(load["num_running_reqs"] for name, load in loads.items() if "decode" in name) >= at_least

    wait_for(running, f"{at_least} requests decoding")


def test_clients_that_leave_leave_nothing_behind(fleet: Fleet, expected: dict[str, list[int]]) -> None:
    """Sixteen long requests, half of them streamed; each client goes away at a moment of its own."""
    rng = random.Random(7)
    aborted = fleet.state()["requests"]["aborted"]

    def leave(index: int) -> None:
        connection = _open(fleet, generate_body(LONG, stream=bool(index % 2)))
        if index % 4 == 1:  # after a few events
            response = connection.getresponse()
            for _ in range(rng.randrange(1, 8)):
                response.readline()
        elif index % 4 == 3:
            connection.getresponse()
        else:
            time.sleep(rng.random())  # anywhere between queueing and decoding
        connection.close()
        if connection.sock is not None:
            connection.sock.close()

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(leave, range(16)))
    fleet.wait_empty()
    assert fleet.state()["requests"]["inflight"] == 0
    assert fleet.state()["requests"]["aborted"] - aborted == 16
    _still_serves(fleet, expected)


def test_abort_request_ends_a_request_on_both_legs(fleet: Fleet) -> None:
    connection = http.client.HTTPConnection(urlsplit(fleet.url).netloc, timeout=60)
    headers = {"Content-Type": "application/json", "X-Request-Id": "operator-7"}
    connection.request("POST", "/generate", json.dumps(generate_body(LONG)), headers)
    _wait_decoding(fleet)
    assert call(fleet.url, "POST", "/abort_request", {"rid": "operator-7"})[0] == 200
    answer = json.loads(connection.getresponse().read())
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    fleet.wait_empty()


def test_request_the_servers_refuse_gets_their_words_and_blames_nobody(fleet: Fleet) -> None:
    body = {"input_ids": [65] * 5000, "sampling_params": {"max_new_tokens": 4}}  # context is 4096
    status, answer = call(fleet.url, "POST", "/generate", body)
    assert status == 400, answer
    assert "4096" in json.dumps(answer)
    assert {worker["state"] for worker in fleet.state()["workers"]} == {"ready"}
    fleet.wait_empty()


def test_killed_decode_server_comes_back_while_idle(fleet: Fleet, expected: dict[str, list[int]]) -> None:
    former = fleet.worker("decode-0")["instance_id"]
    pid = fleet.pid("decode-0")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: ("prefill-0", "decode-0") not in fleet.ready_pairs(), "leaving the ready pairs", 15)
    status, answer = call(fleet.url, "POST", "/generate", generate_body(SHORT))
    assert status == 200, f"the other decode server serves on: {answer}"
    fleet.wait_ready(2, 90)
    assert fleet.worker("decode-0")["instance_id"] != former
    _still_serves(fleet, expected)
    fleet.wait_empty()


def test_killed_decode_server_under_load_fails_only_its_own_requests(
    fleet: Fleet, expected: dict[str, list[int]]
) -> None:
    with ThreadPoolExecutor(16) as threads:
        answers = [
            threads.submit(call, fleet.url, "POST", "/generate", generate_body(LONG)) for _ in range(8)
        ]
        _wait_decoding(fleet, 4)
        os.kill(fleet.pid("decode-1"), signal.SIGKILL)
        statuses = [answer.result()[0] for answer in answers]
    # Nothing had reached the client yet, so every request was retried on the other decode server.
    assert set(statuses) == {200}
    fleet.wait_ready(2, 90)
    fleet.wait_empty()
    _still_serves(fleet, expected)


def test_killed_prefill_server_is_back_without_any_decode_waiting_for_a_time_out(
    fleet: Fleet, expected: dict[str, list[int]]
) -> None:
    former = fleet.worker("prefill-0")
    os.kill(fleet.pid("prefill-0"), signal.SIGKILL)
    wait_for(lambda: fleet.worker("prefill-0")["instance_id"] != former["instance_id"], "a new instance", 60)
    fleet.wait_ready(2, 90)
    assert fleet.worker("prefill-0")["bootstrap_port"] != former["bootstrap_port"]
    started = time.monotonic()
    _still_serves(fleet, expected)
    assert time.monotonic() - started < 30, "stock decode servers wait 300 s for the dead predecessor"
    fleet.wait_empty()
    for name in ("decode-0", "decode-1"):
        log = (fleet.logs / f"{name}.log").read_text()
        assert "timed out after" not in log


def test_prefill_killed_under_load_strands_no_decode_leg(
    fleet: Fleet, expected: dict[str, list[int]]
) -> None:
    """One prefill server: requests in prefill wait for its successor or fail, decode is free at once."""
    prompts = [prompt for prompt in CORPUS if len(prompt.input_ids) > 100]
    with ThreadPoolExecutor(16) as threads:
        answers = [
            threads.submit(call, fleet.url, "POST", "/generate", generate_body(prompt))
            for prompt in prompts * 2
        ]
        wait_for(lambda: fleet.state()["requests"]["inflight"] >= 8, "requests in flight")
        os.kill(fleet.pid("prefill-0"), signal.SIGKILL)
        statuses = sorted({answer.result()[0] for answer in answers})
    assert set(statuses) <= {200, 502, 503}, statuses
    assert 200 in statuses
    fleet.wait_ready(2, 90)
    fleet.wait_empty()
    _still_serves(fleet, expected)


def test_lost_bootstrap_service_stops_no_request_and_everybody_returns(
    fleet: Fleet, expected: dict[str, list[int]]
) -> None:
    before = {worker["worker_id"]: worker["instance_id"] for worker in fleet.state()["workers"]}
    epoch = fleet.state()["bootstrap"]["epoch"]
    pids = _children_running(fleet, "bootstrap")
    assert len(pids) == 1
    results: list[tuple[int, Any]] = []

    def ask() -> None:
        results.append(call(fleet.url, "POST", "/generate", generate_body(LONG)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    _wait_decoding(fleet, 2)
    os.kill(pids[0], signal.SIGKILL)
    _still_serves(fleet, expected)  # with no service, then with a new one
    for thread in threads:
        thread.join()
    assert [status for status, _ in results] == [200] * 4
    wait_for(
        lambda: fleet.state()["bootstrap"]["connected"] and fleet.state()["bootstrap"]["epoch"] != epoch,
        "a new service",
    )
    wait_for(
        lambda: len(call(fleet.bootstrap_url, "GET", "/fleet/view")[1]["workers"]) == 3, "re-registration"
    )
    after = {worker["worker_id"]: worker["instance_id"] for worker in fleet.state()["workers"]}
    assert after == before, "the same processes, none restarted"
    _still_serves(fleet, expected)
    fleet.wait_empty()


def test_silent_bootstrap_service_makes_no_decode_server_give_up_its_prefill(
    fleet: Fleet, expected: dict[str, list[int]]
) -> None:
    """Two missed heartbeats: stock decode then fails every room of that prefill; ours asks the prefill."""
    before = {worker["worker_id"]: worker["instance_id"] for worker in fleet.state()["workers"]}
    _still_serves(fleet, expected)
    logs = [fleet.logs / f"{name}.log" for name in ("decode-0", "decode-1")]
    seen = [len(log.read_text()) for log in logs]

    def news() -> str:
        return "".join(log.read_text()[start:] for log, start in zip(logs, seen, strict=True))

    (pid,) = _children_running(fleet, "bootstrap")
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: "the prefill server answers; its requests go on" in news(), "the question", 60)
        _still_serves(fleet, expected)
    finally:
        os.kill(pid, signal.SIGCONT)
    # A predecessor that an earlier test has killed may be given up just now; the present one may not.
    present = fleet.worker("prefill-0")["bootstrap_port"]
    lost = [line for line in news().splitlines() if "Lost connection with prefill instance" in line]
    assert not [line for line in lost if f":{present})" in line], lost
    wait_for(lambda: fleet.state()["bootstrap"]["connected"], "the service awake")
    after = {worker["worker_id"]: worker["instance_id"] for worker in fleet.state()["workers"]}
    assert after == before
    fleet.wait_empty()


def test_killed_balancer_comes_back_on_its_port(fleet: Fleet, expected: dict[str, list[int]]) -> None:
    pids = _children_running(fleet, "balancer")
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    wait_for(lambda: not _is_running(pids[0]), "its end")
    fleet.wait_ready(2, 60)
    _still_serves(fleet, expected)
    fleet.wait_empty()


def _children_running(fleet: Fleet, what: str) -> list[int]:
    import psutil

    children = psutil.Process(fleet.launcher.pid).children()
    return [child.pid for child in children if what in child.cmdline()]
