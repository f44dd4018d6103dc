"""Real servers whose weights change, or that are paused: no answer of two models, no request killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pdserve.model.tiny import write_tiny_model
from tests.engine.corpus import CORPUS, Prompt
from tests.engine.fleet import Fleet, call, generate_body, wait_for

pytestmark = pytest.mark.engine

PROMPTS = CORPUS[60:80]
LONG = Prompt("long", CORPUS[-20].input_ids, max_new_tokens=400)
UPDATE = "/update_weights_from_disk"


def tokens(fleet: Fleet, prompt: Prompt) -> list[int]:
    status, answer = call(fleet.url, "POST", "/generate", generate_body(prompt))
    assert status == 200, answer
    return list(answer["output_ids"])


def answers(fleet: Fleet) -> list[list[int]]:
    with ThreadPoolExecutor(4) as clients:
        return list(clients.map(lambda prompt: tokens(fleet, prompt), PROMPTS))


def update(fleet: Fleet, model: Path, version: str) -> None:
    body = {"model_path": str(model), "weight_version": version}
    status, answer = call(fleet.url, "POST", UPDATE, body, timeout_s=120)
    assert status == 200, answer


@pytest.fixture
def updated(
    fleet: Fleet, tiny_model: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> Iterator[Fleet]:
    """The fleet with other weights; it has its own again afterwards."""
    update(fleet, write_tiny_model(tmp_path / "other", seed=1), "v2")
    yield fleet
    update(fleet, tiny_model, "v3")
    assert answers(fleet) == [expected[prompt.name] for prompt in PROMPTS]


def test_a_decode_server_that_was_killed_after_an_update_gives_no_mixed_answer(
    updated: Fleet, expected: dict[str, list[int]]
) -> None:
    fleet, old = updated, [expected[prompt.name] for prompt in PROMPTS]
    right = answers(fleet)
    assert sum(new != before for new, before in zip(right, old, strict=True)) > len(PROMPTS) / 2
    before = fleet.worker("decode-1")["instance_id"]
    os.kill(fleet.pid("decode-1"), signal.SIGKILL)

    def is_back() -> bool:
        assert answers(fleet) == right, "while it is away and when it joins"
        return bool(fleet.worker("decode-1")["instance_id"] != before) and len(fleet.ready_pairs()) == 2

    wait_for(is_back, "decode-1 is back", 240)
    for _ in range(2):
        assert answers(fleet) == right
    assert [e["worker"] for e in fleet.state()["events"] if e["event"] == "updated"] == ["decode-1"]
    versions = [call(w["url"], "GET", "/model_info")[1]["weight_version"] for w in fleet.state()["workers"]]
    assert versions == ["v2"] * 3


def test_a_pause_sent_to_an_engine_is_seen_and_its_requests_wait(
    fleet: Fleet, expected: dict[str, list[int]]
) -> None:
    right = tokens(fleet, LONG)
    found: list[Any] = []
    client = threading.Thread(target=lambda: found.append(tokens(fleet, LONG)))
    client.start()

    def holder() -> str:
        loads = fleet.loads().items()
        return next((name for name, load in loads if "decode" in name and load["num_running_reqs"]), "")

    name = wait_for(holder, "it is decoding")
    url = fleet.worker(name)["url"]
    assert call(url, "POST", "/pause_generation", {"mode": "in_place"})[0] == 200
    try:
        wait_for(lambda: fleet.worker(name)["paused"], "the balancer knows")
        assert answers(fleet) == [expected[prompt.name] for prompt in PROMPTS], "by the other one"
        assert not found
        assert fleet.worker(name)["state"] == "ready"
    finally:
        assert call(url, "POST", "/continue_generation", {})[0] == 200
    client.join(60)
    assert found == [right]
    wait_for(lambda: not fleet.worker(name)["paused"], "it goes on")
