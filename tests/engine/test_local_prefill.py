"""A decode server that prefills requests itself, on real SGLang servers: the answers are those of a pair.

The requests go to it as a balancer sends them: with LOCAL_HOST instead of a prefill server's address. A fleet
of its own, as a decode server is told at its start that it may.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pdserve.types import LOCAL_HOST
from tests.engine.corpus import CORPUS, Prompt
from tests.engine.fleet import Fleet, call, generate_body, join_worker, launch_fleet, wait_for
from tests.engine.test_tokens import _assert_same
from tests.engine.test_tokens import _run as over_pair
from tests.engine.test_transfer import _over_pair

pytestmark = pytest.mark.engine

NAME = "decode-0"
AUTO = ("--deflect", "auto")
SOME = [p for p in CORPUS if p.name.startswith(("edge", "shared"))]
_RNG = random.Random(20261130)
LONG = Prompt("long", tuple(_RNG.randrange(32, 127) for _ in range(4000)))
"""63 chunks of the test fleet, some seconds of work."""


def _local(prompt: Prompt, budget_ms: int = 90, **extra: Any) -> dict[str, Any]:
    room = random.randrange(1, 2**62)
    body = generate_body(prompt, bootstrap_host=LOCAL_HOST, bootstrap_room=room, **extra)
    return {**body, "bootstrap_port": budget_ms}


def _answer(url: str, body: dict[str, Any]) -> list[int]:
    status, answer = call(url, "POST", "/generate", body, timeout_s=120)
    assert status == 200, answer
    return list(answer["output_ids"])


def _run(url: str, prompts: Iterable[Prompt], threads: int = 16) -> dict[str, list[int]]:
    with ThreadPoolExecutor(threads) as pool:
        futures = {prompt.name: pool.submit(_answer, url, _local(prompt)) for prompt in prompts}
        return {name: future.result() for name, future in futures.items()}


def _beside_a_pairs(fleet: Fleet, name: str, prompts: list[Prompt]) -> dict[str, list[int]]:
    """Every second prompt computed there itself, the others by the prefill server, all at once."""
    rows = fleet.worker("prefill-0"), fleet.worker(name)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(_over_pair, *rows, prompts[::2])
        return {**_run(rows[1]["url"], prompts[1::2]), **theirs.result()}


def _prefilled(fleet: Fleet, name: str) -> int:
    return int(fleet.loads()[name]["total_prefill_uncached_tokens"])


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """1 prefill and 1 decode server."""
    folder = tmp_path_factory.mktemp("local")
    with launch_fleet(tiny_model, folder, prefill=1, decode=1, flags=AUTO) as running:
        yield running


@pytest.fixture(scope="module")
def decode(fleet: Fleet) -> str:
    """The decode server's URL."""
    return str(fleet.worker(NAME)["url"])


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> dict[str, list[int]]:
    """The pair's tokens for each prompt at temperature 0, which are a plain server's (test_tokens.py)."""
    return over_pair(fleet.url, SOME)


def test_server_says_whether_it_can(fleet: Fleet, decode: str) -> None:
    told = {
        name: call(fleet.worker(name)["url"], "GET", "/pdserve/instance")[1]["prefills_locally"]
        for name in ("prefill-0", NAME)
    }
    assert told == {"prefill-0": False, NAME: True}


def test_tokens_equal_one_servers_alone_and_beside_a_pairs_requests(
    fleet: Fleet, decode: str, expected: dict[str, list[int]]
) -> None:
    before = _prefilled(fleet, NAME)
    _assert_same(_beside_a_pairs(fleet, NAME, SOME), expected)
    computed = sum(len(prompt.input_ids) for prompt in SOME[1::2])
    # Rows of running requests that shared a pass with a chunk count too.
    assert _prefilled(fleet, NAME) - before >= computed, "half of the prompts were to be computed there"
    beside = re.findall(r"Prefill batch.*#running-req: ([1-9]\d*)", (fleet.logs / f"{NAME}.log").read_text())
    assert beside, "no chunk ran beside a running request"
    fleet.wait_empty()


def test_streams_and_grammars_are_those_of_a_pair(fleet: Fleet, decode: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for fields in ({"json_schema": json.dumps(schema)}, {"regex": "[a-f]{9}"}):
        sampling = {"temperature": 0, "max_new_tokens": 24, **fields}
        body = {"input_ids": list(SOME[-1].input_ids), "sampling_params": sampling}
        status, pairs = call(fleet.url, "POST", "/generate", body)
        assert status == 200, pairs
        local = {**_local(SOME[-1]), **body}
        assert call(decode, "POST", "/generate", local)[1]["text"] == pairs["text"]
        events = list(_events(decode, {**_local(SOME[-1], stream=True), **body}))
        assert json.loads(events[-2])["text"] == pairs["text"]


def _events(url: str, body: dict[str, Any]) -> Iterator[str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            yield line[6:].strip().decode()
    connection.close()


# -- ends -------------------------------------------------------------------------------------------


def test_aborted_wherever_it_is_and_the_others_go_on(
    fleet: Fleet, decode: str, expected: dict[str, list[int]]
) -> None:
    """In the queue behind another long prompt, in the middle of its chunks, and while it decodes."""
    url, others = decode, SOME[:24]
    endless = Prompt("endless", SOME[0].input_ids, 2000)
    with ThreadPoolExecutor(8) as pool:
        doomed = {
            name: pool.submit(call, url, "POST", "/generate", _local(prompt, rid=f"doomed-{name}"), 120)
            for name, prompt in (("chunked", LONG), ("queued", LONG), ("running", endless))
        }
        running = pool.submit(_run, url, others, 4)
        wait_for(lambda: fleet.loads()[NAME]["num_waiting_reqs"] >= 2, "long prompts wait")
        for name in ("running", "queued", "chunked"):
            call(url, "POST", "/abort_request", {"rid": f"doomed-{name}"})
        for name, ended in doomed.items():
            status, answer = ended.result()
            assert status == 200, (name, answer)
            assert answer["meta_info"]["finish_reason"]["type"] == "abort", (name, answer)
        _assert_same(running.result(), expected)
    fleet.wait_empty()


def test_client_that_leaves_frees_all(fleet: Fleet, decode: str) -> None:
    before = _prefilled(fleet, NAME)
    for chunks in (0, 8):
        connection = http.client.HTTPConnection(urlsplit(decode).netloc, timeout=60)
        body = json.dumps(_local(LONG, stream=True))
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        least = before + 64 * chunks
        wait_for(lambda least=least: _prefilled(fleet, NAME) >= least, f"{chunks} chunks")  # type: ignore[misc]
        connection.close()
    fleet.wait_empty()


def test_paused_with_retraction_it_goes_on_with_the_same_tokens(
    fleet: Fleet, decode: str, expected: dict[str, list[int]]
) -> None:
    url = decode
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_run, url, SOME)
        wait_for(lambda: fleet.loads()[NAME]["num_running_reqs"] > 0 or running.done(), "requests run")
        status, answer = call(url, "POST", "/pause_generation", {"mode": "retract"})
        assert status == 200, answer
        status, answer = call(url, "POST", "/continue_generation", {})
        assert status == 200, answer
        _assert_same(running.result(), expected)
    fleet.wait_empty()


# -- who needs a prefill server ---------------------------------------------------------------------


def test_what_needs_a_prefill_server_is_refused_by_name(fleet: Fleet, decode: str) -> None:
    body = _local(SOME[0], return_logprob=True, logprob_start_len=0)
    status, answer = call(decode, "POST", "/generate", body)
    assert (status, "logprobs of the prompt" in str(answer)) == (501, True), answer
    fleet.wait_empty()


def test_no_client_of_the_balancer_can_ask_for_it(fleet: Fleet, decode: str) -> None:
    before = _prefilled(fleet, NAME)
    status, answer = call(fleet.url, "POST", "/generate", _local(SOME[0]))
    assert status == 200, answer
    fleet.wait_empty()
    assert _prefilled(fleet, NAME) == before


def test_without_any_prefill_server_it_answers(
    fleet: Fleet, decode: str, expected: dict[str, list[int]]
) -> None:
    url, pid = fleet.worker("prefill-0")["url"], fleet.pid("prefill-0")
    running: list[Future[dict[str, list[int]]]] = []
    with ThreadPoolExecutor(1) as pool:
        running.append(pool.submit(_run, decode, SOME))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: _is_refused(url), "the prefill server is gone")
        _assert_same(_run(decode, SOME[:8]), expected)
        _assert_same(running[0].result(), expected)
    fleet.wait_ready(1)
    fleet.wait_empty()


def _is_refused(url: str) -> bool:
    try:
        call(url, "GET", "/ping", timeout_s=5)
    except ConnectionRefusedError:
        return True
    return False


# -- every form ---------------------------------------------------------------------------------------

_TEST_RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "3"}
FORMS: dict[str, dict[str, Any]] = {
    "radix": {"flags": ("--disaggregation-decode-enable-radix-cache",)},
    "retracting": {"environ": _TEST_RETRACT, "flags": ("--num-reserved-decode-tokens", "16")},
    "tight": {"flags": ("--max-total-tokens", "2048", "--num-reserved-decode-tokens", "16")},
    "two-ranks": {"options": ("--tp", "2")},
    "chunks-of-a-page": {"flags": ("--chunked-prefill-size", "16")},
}


@pytest.fixture(scope="module")
def whole(fleet: Fleet) -> dict[str, list[int]]:
    """The pair's tokens for the whole corpus."""
    return over_pair(fleet.url, CORPUS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_tokens_equal_a_pairs_in_every_form(
    fleet: Fleet, whole: dict[str, list[int]], tiny_model: Path, form: str
) -> None:
    name, case = f"decode-{form}", FORMS[form]
    environ, flags, options = (case.get(what, ()) for what in ("environ", "flags", "options"))
    options = (*AUTO, *options)
    with join_worker(fleet, "decode", tiny_model, name, flags, environ=dict(environ), options=options):
        fleet.wait_ready(2)
        worker = fleet.worker(name)
        _assert_same(_run(worker["url"], CORPUS), whole)
        for _ in range(2):
            _assert_same(_beside_a_pairs(fleet, name, list(CORPUS)), whole)
        if form == "radix":
            _check_next_turn(fleet, worker["url"])
        fleet.wait_empty()
    fleet.wait_ready(1)


def _check_next_turn(fleet: Fleet, url: str) -> None:
    """The next turn of a conversation is computed from the KV of the answer before."""
    first = Prompt("turn-1", LONG.input_ids[:300], 64)
    second = Prompt("turn-2", (*first.input_ids, *_answer(url, _local(first)), *LONG.input_ids[:40]), 12)
    status, later = call(url, "POST", "/generate", _local(second))
    assert status == 200, later
    assert later["meta_info"]["cached_tokens"] >= 336, later["meta_info"]
    assert later["output_ids"] == _answer(fleet.url, generate_body(second))
