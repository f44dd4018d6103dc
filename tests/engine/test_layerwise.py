"""``--layerwise on`` on real servers: one plain server's tokens, and no page kept when a side ends early."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pdserve.model.tiny import TinyShape, write_tiny_model
from tests.engine.corpus import Prompt
from tests.engine.fleet import Fleet, Reference, call, generate_body, join_worker, launch_fleet, wait_for
from tests.engine.test_tokens import _assert_same
from tests.engine.test_transfer import Joined, _over_pair, _transfer

pytestmark = pytest.mark.engine

SHAPE = TinyShape(layers=12, hidden=256, heads=4, kv_heads=4)
"""24 KiB of KV a token: a chunk of 512 tokens leaves in three parts of four layers."""
CHUNK = 512
ENGINE = ("--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "32768")
ON = {"PDSERVE_LAYERWISE": "on"}

CASES = {
    "packed": Joined("prefill", environ={**ON, "PDSERVE_TRANSFER_PATH": "packed"}),
    "pages-64": Joined("decode", ("--page-size", "64")),
    "two-ranks": Joined("prefill", options=("--tp", "2"), environ=ON),
}


def _make_prompts() -> list[Prompt]:
    rng = random.Random(13)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(32, 127) for _ in range(length))

    # Ends inside a page, on a page, and on a chunk; the shared prefix ends inside a chunk.
    prompts = [Prompt(f"long-{length}", ids(length), 6) for length in (1500, 3 * CHUNK, 2999)]
    prefix = ids(1104)
    return prompts + [Prompt(f"shared-{end}", prefix + ids(end), 6) for end in (400, 900)]


PROMPTS = _make_prompts()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("layers"), SHAPE)


@pytest.fixture(scope="module")
def answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """One plain server's tokens."""
    with Reference(model, tmp_path_factory.mktemp("plain"), *ENGINE) as reference:
        return {prompt.name: reference.generate(prompt) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def layered(
    answers: dict[str, list[int]], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """1 prefill + 1 decode server. Asks for ``answers`` only to run after it."""
    folder = tmp_path_factory.mktemp("layered")
    flags = ("--layerwise", "on")
    with launch_fleet(model, folder, prefill=1, decode=1, flags=flags, engine_flags=ENGINE) as fleet:
        yield fleet


def _ask(fleet: Fleet) -> dict[str, list[int]]:
    def tokens(prompt: Prompt) -> list[int]:
        status, answer = call(fleet.url, "POST", "/generate", generate_body(prompt), timeout_s=120)
        assert status == 200, (prompt.name, answer)
        return list(answer["output_ids"])

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return dict(zip((prompt.name for prompt in PROMPTS), threads.map(tokens, PROMPTS), strict=True))


def test_tokens_equal_one_servers_cold_and_from_the_prefix_cache(
    layered: Fleet, answers: dict[str, list[int]]
) -> None:
    before = _transfer(layered, "prefill-0")
    _assert_same(_ask(layered), answers)
    cold = _transfer(layered, "prefill-0")
    chunks = cold["direct_chunks"] + cold["packed_chunks"] - before["direct_chunks"] - before["packed_chunks"]
    assert chunks > sum(len(prompt.input_ids) for prompt in PROMPTS) // CHUNK
    assert cold["writes"] - before["writes"] > chunks + 2 * len(PROMPTS), "chunks left in parts"
    _assert_same(_ask(layered), answers)
    assert _transfer(layered, "prefill-0")["failures"] == before["failures"]
    layered.wait_empty(60)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name != "packed" else ()) for name in CASES]
)
def test_tokens_equal_one_servers_whatever_way_layers_take(
    layered: Fleet, answers: dict[str, list[int]], model: Path, name: str
) -> None:
    case = CASES[name]
    flags = (*ENGINE, *case.flags)
    before = _transfer(layered, "prefill-0")
    with join_worker(layered, case.role, model, name, flags, environ=case.environ, options=case.options):
        layered.wait_ready(2)
        pair = (name, "decode-0") if case.role == "prefill" else ("prefill-0", name)
        prefill, decode = (layered.worker(worker_id) for worker_id in pair)
        for _ in range(2):
            _assert_same(_over_pair(prefill, decode, PROMPTS), answers)
        layered.wait_empty(60)
        sent = _transfer(layered, pair[0])
        if case.role == "decode":
            sent = {key: value - before[key] for key, value in sent.items()}
        assert sent["packed_chunks"] > sum(len(prompt.input_ids) for prompt in PROMPTS) // CHUNK
        assert sent["direct_chunks"] == sent["failures"] == 0
    layered.wait_ready(1)


class Burst:
    """Both legs of long requests, sent to the servers themselves; the prefill server is at work on them."""

    def __init__(self, fleet: Fleet, threads: ThreadPoolExecutor, number: int = 4) -> None:
        self._fleet = fleet
        self._sides = {role: fleet.worker(f"{role}-0") for role in ("prefill", "decode")}
        rng = random.Random()
        self._bodies = [
            {
                "rid": f"{rng.getrandbits(128):032x}",
                "input_ids": [rng.randrange(32, 127) for _ in range(2900)],
                "sampling_params": {"temperature": 0, "max_new_tokens": 4},
                "bootstrap_host": self._sides["prefill"]["bootstrap_host"],
                "bootstrap_port": self._sides["prefill"]["bootstrap_port"],
                "bootstrap_room": rng.getrandbits(62) + 1,
            }
            for _ in range(number)
        ]
        self.answers = [
            threads.submit(call, side["url"], "POST", "/generate", body, 60.0)
            for body in self._bodies
            for side in self._sides.values()
        ]
        wait_for(lambda: self._used("prefill") > 0 and self._used("decode") > 0, "pages in use on both sides")

    def _used(self, role: str) -> int:
        load = call(self._sides[role]["url"], "GET", "/v1/loads?include=all")[1]["loads"][0]
        return int(load["num_used_tokens"])

    def abort(self, role: str) -> None:
        """Tell the servers of a role alone."""
        for body in self._bodies:
            status, answer = call(self._sides[role]["url"], "POST", "/abort_request", {"rid": body["rid"]})
            assert status == 200, answer

    def kill(self, role: str) -> None:
        """``kill -9``."""
        os.kill(self._fleet.pid(f"{role}-0"), signal.SIGKILL)

    def wait_unused(self, role: str) -> None:
        """Until no page is in use there, but for what the prefix cache holds."""

        def is_unused() -> bool:
            status, _ = call(self._sides[role]["url"], "POST", "/flush_cache?timeout=1")
            return status == 200 and self._used(role) == 0

        wait_for(is_unused, f"KV usage of {role} at zero, now {self._used(role)}")


def _ended(answer: tuple[int, Any]) -> bool:
    status, body = answer
    return status != 200 or body["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_requests_cancelled_in_mid_prefill_keep_no_page_and_spoil_no_other(
    layered: Fleet, answers: dict[str, list[int]], role: str
) -> None:
    layered.wait_empty(60)
    with ThreadPoolExecutor(16) as threads:
        burst = Burst(layered, threads)
        burst.abort(role)
        others = threads.submit(_ask, layered)
        assert any(_ended(answer.result(60)) for answer in burst.answers)
        _assert_same(others.result(60), answers)
    layered.wait_empty(60)


def test_what_is_left_of_a_killed_side_is_no_page_on_the_other(
    layered: Fleet, answers: dict[str, list[int]]
) -> None:
    layered.wait_empty(60)
    for killed, survivor in (("decode", "prefill"), ("prefill", "decode")):
        former = layered.worker(f"{killed}-0")["instance_id"]
        with ThreadPoolExecutor(8) as threads:
            burst = Burst(layered, threads)
            burst.kill(killed)
            burst.wait_unused(survivor)
            assert any(answer.exception(60) or _ended(answer.result()) for answer in burst.answers)
        is_back = lambda: layered.worker(f"{killed}-0")["instance_id"] != former  # noqa: B023, E731
        wait_for(is_back, f"{killed} started again", 120)
        layered.wait_ready(1, 120)
        _assert_same(_ask(layered), answers)
    layered.wait_empty(60)
