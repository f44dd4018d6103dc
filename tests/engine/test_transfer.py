"""Whatever way KV takes, tokens stay those of one plain server: real SGLang servers, one joined per case."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.engine.corpus import CORPUS
from tests.engine.fleet import Fleet, call, join_worker
from tests.engine.test_tokens import _assert_same, _run

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
        used_before = {pair["prefill"] + pair["decode"]: pair["requests"] for pair in fleet.state()["pairs"]}
        for _ in range(2):
            _assert_same(_run(fleet.url, PROMPTS), expected)
        used = sum(
            pair["requests"] - used_before[pair["prefill"] + pair["decode"]]
            for pair in fleet.state()["pairs"]
            if name in (pair["prefill"], pair["decode"])
        )
        assert used > len(PROMPTS) // 4, f"{name} got {used} of {2 * len(PROMPTS)} requests"
        fleet.wait_empty()
        own = _transfer(fleet, name)
        prefill = _transfer(fleet, "prefill-0")
        packed = prefill["packed_chunks"] - before["packed_chunks"]
        match name:
            case "packed":
                assert own["packed_chunks"] >= used
                assert own["direct_chunks"] == 0
                assert own["gather_us"] > 0
            case "stock-peer":
                assert own["messages"] == 0
            case _:
                assert packed >= used, "another geometry can only be reached through the slab"
                assert own["scattered_bytes"] > 0
        assert own["failures"] == prefill["failures"] - before["failures"] == 0
    fleet.wait_ready(2)


def test_direct_chunks_take_one_descriptor_per_run_and_region(fleet: Fleet) -> None:
    """A lone request in an empty pool gets one run on both sides: 2 layers x K and V, plus metadata."""
    fleet.wait_empty()
    before = _transfer(fleet, "prefill-0")
    prompt = next(prompt for prompt in CORPUS if len(prompt.input_ids) > 200)
    body = {"input_ids": list(prompt.input_ids), "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    status, answer = call(fleet.url, "POST", "/generate", body)
    assert status == 200, answer
    fleet.wait_empty()
    after = _transfer(fleet, "prefill-0")
    chunks = after["direct_chunks"] - before["direct_chunks"]
    descriptors = after["descriptors"] - before["descriptors"]
    assert chunks >= 1
    metadata = descriptors - chunks * 4
    assert 0 < metadata <= 20, f"{descriptors} descriptors for {chunks} chunks"
