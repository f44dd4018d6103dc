"""Whatever ends one side of a transfer ends the other at once: no 300 s time-outs, no pages kept.

The legs are sent to the servers themselves, as a balancer would, so that one can
be ended without anybody ending the other.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.fleet import Fleet, call, wait_for

pytestmark = pytest.mark.engine

TOLD_S = 20.0
"""Far below SGLang's 300 s; generous for two busy cores."""


class Legs:
    """Both legs of one request, sent by hand."""

    def __init__(self, fleet: Fleet, threads: ThreadPoolExecutor, num_tokens: int) -> None:
        self.prefill, self.decode = fleet.worker("prefill-0"), fleet.worker("decode-0")
        self._threads = threads
        rng = random.Random(num_tokens)
        self.rid = f"{rng.getrandbits(128):032x}"
        self._body = {
            "rid": self.rid,
            "input_ids": [rng.randrange(32, 127) for _ in range(num_tokens)],
            "sampling_params": {"temperature": 0, "max_new_tokens": 4},
            "bootstrap_host": self.prefill["bootstrap_host"],
            "bootstrap_port": self.prefill["bootstrap_port"],
            "bootstrap_room": rng.getrandbits(62) + 1,
        }

    def send(self, side: dict[str, Any]) -> Future[tuple[int, Any]]:
        return self._threads.submit(call, side["url"], "POST", "/generate", self._body, 120.0)

    def abort(self, side: dict[str, Any]) -> None:
        status, answer = call(side["url"], "POST", "/abort_request", {"rid": self.rid})
        assert status == 200, answer


def _is_failure(answer: tuple[int, Any]) -> bool:
    status, body = answer
    return status != 200 or body["meta_info"]["finish_reason"]["type"] == "abort"


def _queued(fleet: Fleet, worker_id: str, queue: str) -> int:
    return int(fleet.loads()[worker_id]["disaggregation"][queue])


def test_decode_hears_at_once_that_prefill_gave_the_request_up(fleet: Fleet) -> None:
    with ThreadPoolExecutor(16) as threads:
        backlog = [Legs(fleet, threads, 3000 + number) for number in range(6)]
        answers = [legs.send(side) for legs in backlog for side in (legs.prefill, legs.decode)]
        victim = Legs(fleet, threads, 2000)
        decode, prefill = victim.send(victim.decode), victim.send(victim.prefill)
        wait_for(lambda: _queued(fleet, "decode-0", "decode_transfer_queue_reqs") > 2, "rooms in transfer")
        victim.abort(victim.prefill)
        begin = time.monotonic()
        assert _is_failure(prefill.result(TOLD_S))
        assert _is_failure(decode.result(TOLD_S)), "decode must not go on without its prefill"
        assert time.monotonic() - begin < TOLD_S
        assert not any(_is_failure(answer.result(120)) for answer in answers), "the others are not touched"
    fleet.wait_empty()


def test_prefill_does_not_wait_for_a_decode_leg_that_was_aborted_before_it_came(fleet: Fleet) -> None:
    with ThreadPoolExecutor(2) as threads:
        legs = Legs(fleet, threads, 300)
        decode = legs.send(legs.decode)
        wait_for(
            lambda: _queued(fleet, "decode-0", "decode_transfer_queue_reqs") == 1, "the room in transfer"
        )
        legs.abort(legs.decode)
        assert _is_failure(decode.result(TOLD_S))
        assert _is_failure(legs.send(legs.prefill).result(TOLD_S))
    fleet.wait_empty()


def test_decode_aborted_during_the_transfer_leaves_no_page_on_either_side(fleet: Fleet) -> None:
    with ThreadPoolExecutor(16) as threads:
        legs = [Legs(fleet, threads, 2500 + number) for number in range(5)]
        answers = [one.send(side) for one in legs for side in (one.prefill, one.decode)]
        wait_for(lambda: _queued(fleet, "decode-0", "decode_transfer_queue_reqs") > 1, "rooms in transfer")
        for one in legs:
            one.abort(one.decode)
        for answer in answers:
            answer.result(TOLD_S)
    fleet.wait_empty(timeout_s=10)
