"""Disaggregation must not change a single token; and nothing may stay behind afterwards."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.engine.corpus import CORPUS, Prompt
from tests.engine.fleet import Fleet, call, generate_body, join_worker

pytestmark = pytest.mark.engine
CONCURRENCY = 16


def _whole(url: str, prompt: Prompt) -> list[int]:
    status, answer = call(url, "POST", "/generate", generate_body(prompt), timeout_s=120)
    assert status == 200, (prompt.name, answer)
    return list(answer["output_ids"])


def _streamed(url: str, prompt: Prompt) -> list[int]:
    """Tokens of the last event; SGLang's stream is cumulative."""
    events = list(_events(url, "/generate", generate_body(prompt, stream=True)))
    assert events[-1] == "[DONE]", prompt.name
    return list(json.loads(events[-2])["output_ids"])


def _events(url: str, path: str, body: object) -> Iterable[str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: "):
            yield line[6:].strip().decode()
    connection.close()


def _run(url: str, prompts: Iterable[Prompt]) -> dict[str, list[int]]:
    """Sixteen at a time, every other one streamed."""
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        futures = {
            prompt.name: threads.submit(_streamed if index % 2 else _whole, url, prompt)
            for index, prompt in enumerate(prompts)
        }
        return {name: future.result() for name, future in futures.items()}


def _assert_same(got: dict[str, list[int]], expected: dict[str, list[int]]) -> None:
    wrong = {name: (tokens, expected[name]) for name, tokens in got.items() if tokens != expected[name]}
    assert not wrong, f"{len(wrong)} of {len(got)} differ, e.g. {next(iter(wrong.items()))}"


def test_reference_depends_on_the_prompt(expected: dict[str, list[int]]) -> None:
    """Guards the others: a model that answers all prompts alike would prove nothing."""
    assert len({tuple(tokens[:4]) for tokens in expected.values()}) > len(expected) // 2


def test_tokens_equal_one_servers_over_one_prefill_and_two_decodes(
    fleet: Fleet, expected: dict[str, list[int]]
) -> None:
    before = {pair["decode"]: pair["requests"] for pair in fleet.state()["pairs"]}
    _assert_same(_run(fleet.url, CORPUS), expected)
    used = {pair["decode"]: pair["requests"] - before[pair["decode"]] for pair in fleet.state()["pairs"]}
    assert sum(used.values()) == len(CORPUS)
    assert min(used.values()) > len(CORPUS) // 20, f"one decode server got hardly anything: {used}"
    fleet.wait_empty()


def test_tokens_are_equal_again_from_a_warm_prefix_cache(
    fleet: Fleet, expected: dict[str, list[int]]
) -> None:
    prompts = [prompt for prompt in CORPUS if prompt.name.startswith("shared")]
    _run(fleet.url, prompts)
    _assert_same(_run(fleet.url, reversed(prompts)), expected)
    fleet.wait_empty()


def test_kv_really_travelled_over_nixl(fleet: Fleet, expected: dict[str, list[int]]) -> None:
    """Bytes sent = pages of the prompt × bytes per page, as the prefill server itself counts."""
    fleet.wait_empty()
    prefill = fleet.worker("prefill-0")
    count = lambda: call(prefill["url"], "GET", "/pdserve/instance")[1]["transfer"]  # noqa: E731
    before, prompt = count(), CORPUS[0]
    tokens = _whole(fleet.url, prompt)
    after = count()
    assert tokens == expected[prompt.name]
    assert after["transfers"] - before["transfers"] == 1
    pages = -(-len(prompt.input_ids) // 16)
    assert after["kv_bytes"] - before["kv_bytes"] == pages * 16 * 2 * 256  # layers, bytes a token and layer


def test_tokens_equal_with_a_joined_decode_server_that_keeps_a_radix_cache(
    fleet: Fleet, expected: dict[str, list[int]], tiny_model: Path
) -> None:
    """A third decode server, joined by hand, that keeps prefixes and receives only the rest."""
    flags = ("--disaggregation-decode-enable-radix-cache",)
    with join_worker(fleet, "decode", tiny_model, "decode-radix", flags):
        fleet.wait_ready(3)
        prompts = [prompt for prompt in CORPUS if prompt.name.startswith(("shared", "again", "edge"))]
        for _ in range(2):
            _assert_same(_run(fleet.url, prompts), expected)
        pairs = {pair["decode"]: pair["requests"] for pair in fleet.state()["pairs"]}
        assert pairs["decode-radix"] > len(prompts) // 4
        fleet.wait_empty()
    fleet.wait_ready(2)


def test_openai_routes_agree_with_each_other(fleet: Fleet) -> None:
    model = call(fleet.url, "GET", "/v1/models")[1]["data"][0]["id"]
    body = {"model": model, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    chat = {**body, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    status, whole = call(fleet.url, "POST", "/v1/chat/completions", chat)
    assert status == 200, whole
    assert whole["usage"]["completion_tokens"] == 12
    events = list(_events(fleet.url, "/v1/chat/completions", {**chat, "stream": True}))
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"] for event in events[:-1]]
    text = "".join(choice["delta"].get("content") or "" for choices in deltas for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    status, completion = call(fleet.url, "POST", "/v1/completions", {**body, "prompt": "Once upon a time"})
    assert status == 200, completion
    assert len(completion["choices"][0]["text"]) >= 12


def test_batch_gets_a_room_each_and_keeps_its_order(fleet: Fleet, expected: dict[str, list[int]]) -> None:
    prompts = [prompt for prompt in CORPUS if prompt.max_new_tokens == 12][:5]
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    body = {"input_ids": [list(prompt.input_ids) for prompt in prompts], "sampling_params": sampling}
    status, answers = call(fleet.url, "POST", "/generate", body)
    assert status == 200, answers
    assert [answer["output_ids"] for answer in answers] == [expected[prompt.name] for prompt in prompts]
    fleet.wait_empty()


def test_idle_servers_sleep(fleet: Fleet) -> None:
    """Stock servers spin a whole core each while idle; the bench states our figure."""
    import psutil

    fleet.wait_empty()
    processes = []
    for worker in fleet.state()["workers"]:
        parent = psutil.Process(fleet.pid(worker["worker_id"]))
        processes += [parent, *parent.children(recursive=True)]
    for process in processes:
        process.cpu_percent()
    import time

    time.sleep(3)  # the measuring window itself
    busiest = max((process.cpu_percent(), process.pid) for process in processes)
    assert busiest[0] < 40, busiest
