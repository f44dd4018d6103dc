"""Whatever way KV takes, tokens stay those of one plain server: real SGLang servers, one joined per case."""

from __future__ import annotations

import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engine.corpus import CORPUS, Prompt
from tests.engine.fleet import Fleet, call, generate_body, join_worker
from tests.engine.test_tokens import _assert_same

pytestmark = pytest.mark.engine

PROMPTS = [prompt for prompt in CORPUS if prompt.name.startswith(("shared", "again", "edge", "long"))]


@dataclass(frozen=True)
class Joined:
    """A worker that joins the fleet for one test, and what its transfers must look like."""

    role: str
    flags: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)


CASES = {
    "packed": Joined("prefill", environ={"PDSERVE_TRANSFER_PATH": "packed"}),
    "pages-64": Joined("decode", ("--page-size", "64")),
    "pages-1": Joined("decode", ("--page-size", "1")),
    "two-ranks": Joined("decode", options=("--tp", "2")),
    "stock-peer": Joined("decode", environ={"PDSERVE_DATA_PLANE": "off"}),
}


def _transfer(fleet: Fleet, worker_id: str) -> dict[str, int]:
    url = fleet.worker(worker_id)["url"]
    return dict(call(url, "GET", "/pdserve/instance")[1]["transfer"])


def _over_pair(
    prefill: dict[str, Any], decode: dict[str, Any], prompts: Iterable[Prompt]
) -> dict[str, list[int]]:
    """Both legs of every prompt sent to this very pair, as a balancer would; sixteen prompts at a time."""

    def leg(worker: dict[str, Any], prompt: Prompt, room: int) -> list[int]:
        body = generate_body(prompt, bootstrap_host=prefill["bootstrap_host"], bootstrap_room=room)
        body["bootstrap_port"] = prefill["bootstrap_port"]
        status, answer = call(worker["url"], "POST", "/generate", body, timeout_s=120)
        assert status == 200, (prompt.name, answer)
        return list(answer["output_ids"])

    with ThreadPoolExecutor(32) as threads:
        legs = {}
        for prompt in prompts:
            room = random.randrange(1, 2**62)
            threads.submit(leg, prefill, prompt, room)
            legs[prompt.name] = threads.submit(leg, decode, prompt, room)
        return {name: future.result() for name, future in legs.items()}


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_one_servers_whatever_way_kv_takes(
    fleet: Fleet, expected: dict[str, list[int]], tiny_model: Path, name: str
) -> None:
    case = CASES[name]
    before = _transfer(fleet, "prefill-0")
    with join_worker(
        fleet, case.role, tiny_model, name, case.flags, environ=case.environ, options=case.options
    ):
        fleet.wait_ready(4 if case.role == "prefill" else 3)
        pair = (name, "decode-0") if case.role == "prefill" else ("prefill-0", name)
        prefill_row, decode_row = (fleet.worker(worker_id) for worker_id in pair)
        for _ in range(2):
            _assert_same(_over_pair(prefill_row, decode_row, PROMPTS), expected)
        fleet.wait_empty()
        own = _transfer(fleet, name)
        prefill = _transfer(fleet, "prefill-0")
        packed = prefill["packed_chunks"] - before["packed_chunks"]
        match name:
            case "packed":
                assert own["packed_chunks"] >= 2 * len(PROMPTS)
                assert own["direct_chunks"] == 0
                assert own["gather_us"] > 0
            case "stock-peer":
                assert own["messages"] == 0
                assert prefill["transfers"] - before["transfers"] >= 2 * len(PROMPTS)
            case _:
                assert packed >= 2 * len(PROMPTS), "another geometry can only be reached through the slab"
                assert own["scattered_bytes"] > 0
        assert own["failures"] == prefill["failures"] - before["failures"] == 0
    fleet.wait_ready(2)


def test_direct_chunks_take_one_descriptor_per_run_and_region(fleet: Fleet) -> None:
    """A lone request in an empty pool gets one run on both sides: 2 layers x K and V, plus metadata.

    On a busy machine the planner may have found the slab quicker: then it tries direct once in a while.
    """
    prompt = next(prompt for prompt in CORPUS if len(prompt.input_ids) > 200)
    body = {"input_ids": list(prompt.input_ids), "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    for _ in range(400):
        fleet.wait_empty()
        before = _transfer(fleet, "prefill-0")
        status, answer = call(fleet.url, "POST", "/generate", body)
        assert status == 200, answer
        fleet.wait_empty()
        after = _transfer(fleet, "prefill-0")
        if after["packed_chunks"] == before["packed_chunks"]:
            break
    chunks = after["direct_chunks"] - before["direct_chunks"]
    descriptors = after["descriptors"] - before["descriptors"]
    assert chunks >= 1
    metadata = descriptors - chunks * 4
    assert 0 < metadata <= 20, f"{descriptors} descriptors for {chunks} chunks"
