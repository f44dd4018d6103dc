"""Shared prefixes on real servers: a policy that follows them computes and moves less than taking turns.

Named to run before the session's fleet exists: at most four SGLang servers are up at a time. One fleet
of two prefill and two decode servers, these with a radix cache; for each question two balancers with
different policies stand over the same servers and are asked in turn, each round with prefixes
that nobody has seen. Requests come one at a time, each when the balancer knows that the one before is
over: what is computed and moved follows from the choices alone. Only times depend on the
machine, and are compared as medians of many pairs.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import msgspec
import pytest

from pdserve.balancer.app import Balancer
from pdserve.types import Role
from tests.engine.fleet import Fleet, call, launch_fleet, wait_for
from tests.engine.own_balancer import OwnBalancer

pytestmark = [pytest.mark.engine, pytest.mark.exhaustive]

FOLLOWS, TAKES_TURNS = "pair_cost", "round_robin"
FAMILIES = 5
"""Odd: with two workers taking turns, the same prefix comes to the other one at its next visit."""
VISITS = 3
ROUNDS = 3
PREFIX_TOKENS, OWN_TOKENS = 1024, 24


@dataclass
class Seen:
    """What one policy's requests came to, over all rounds."""

    sent_tokens: int = 0
    computed_tokens: int = 0
    kv_bytes: int = 0
    second_ttft_s: list[float] = field(default_factory=list)
    """Of each prefix's second visit, in the order of rounds and families."""

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that prefill had cached, by the servers' own counters: the answers'
        ``cached_tokens`` holds what decode had, too."""
        return 1 - self.computed_tokens / self.sent_tokens


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two prefill servers, two decode servers that keep prefixes."""
    flags = ("--decode-args", "--disaggregation-decode-enable-radix-cache")
    folder = tmp_path_factory.mktemp("affinity")
    with launch_fleet(tiny_model, folder, prefill=2, decode=2, flags=flags) as running:
        yield running


class NamingBalancer(OwnBalancer):
    """Over the first so many of the fleet's servers, named one by one: then the policy knows no KV layout and
    takes a token for as large as an 8B model's. That of the tiny model would not be worth following."""

    def __init__(self, fleet: Fleet, policy: str, prefill: int, decode: int) -> None:
        super().__init__(fleet, policy=policy, load_poll_s=0.1)
        rows = fleet.state()["workers"]
        prefills = [(row["url"], row["bootstrap_port"]) for row in rows if row["role"] == "prefill"]
        decodes = [row["url"] for row in rows if row["role"] == "decode"]
        self._config = replace(
            self._config, bootstrap_url="", prefill=tuple(prefills[:prefill]), decode=tuple(decodes[:decode])
        )


def _ask(url: str, prompt: list[int]) -> float:
    """One streamed request: seconds to its first byte."""
    parts = urlsplit(url)
    body = {"input_ids": prompt, "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    begin = time.perf_counter()
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = response.read(1)
    ttft_s = time.perf_counter() - begin
    answer = first + response.read()
    connection.close()
    assert response.status == 200 and b'"length"' in answer, answer
    return ttft_s


def _counted(fleet: Fleet) -> tuple[int, int]:
    """Tokens computed and KV bytes sent so far by all prefill servers."""
    computed = sum(load["total_prefill_uncached_tokens"] for load in fleet.loads().values())
    workers = [worker for worker in fleet.state()["workers"] if worker["role"] == "prefill"]
    sent = (call(worker["url"], "GET", "/pdserve/instance")[1]["transfer"]["kv_bytes"] for worker in workers)
    return computed, sum(sent)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(32, 127) for _ in range(count)]


def _is_quiet(balancer: OwnBalancer, since_s: float) -> bool:
    """True once every worker was seen idle after ``since_s``: old news of load must not steer a choice."""
    age_s = time.monotonic() - since_s
    return all(
        not worker["inflight"]
        and worker["load_age_s"] < age_s
        and not worker["load"]["num_running_reqs"] + worker["load"]["num_waiting_reqs"]
        for worker in balancer.state()["workers"]
    )


def _visit_all(fleet: Fleet, balancer: OwnBalancer, rng: random.Random, seen: Seen) -> None:
    """Every prefix in turn, each time with another end, as often as VISITS."""
    prefixes = [_ids(rng, PREFIX_TOKENS) for _ in range(FAMILIES)]
    fleet.wait_empty()
    computed, sent = _counted(fleet)
    for visit in range(VISITS):
        for prefix in prefixes:
            ttft_s = _ask(balancer.url, prefix + _ids(rng, OWN_TOKENS))
            over_s = time.monotonic()
            wait_for(lambda since_s=over_s: _is_quiet(balancer, since_s), "news of idle workers")
            if visit == 1:
                seen.second_ttft_s.append(ttft_s)
    fleet.wait_empty()
    after = _counted(fleet)
    seen.sent_tokens += FAMILIES * VISITS * (PREFIX_TOKENS + OWN_TOKENS)
    seen.computed_tokens += after[0] - computed
    seen.kv_bytes += after[1] - sent


def _compare(fleet: Fleet, seed: int, prefill: int, decode: int) -> dict[str, Seen]:
    """Both policies in interleaved rounds over so many of the fleet's servers."""
    found: dict[str, Seen] = defaultdict(Seen)
    rng = random.Random(seed)
    with ExitStack() as stack:
        balancers = {
            policy: stack.enter_context(NamingBalancer(fleet, policy, prefill, decode))
            for policy in (TAKES_TURNS, FOLLOWS)
        }
        balancers[FOLLOWS].ask(_tell_of_decode_caches)
        for turn in range(ROUNDS):
            for policy in (TAKES_TURNS, FOLLOWS) if turn % 2 else (FOLLOWS, TAKES_TURNS):
                _visit_all(fleet, balancers[policy], rng, found[policy])
    return found


def _tell_of_decode_caches(balancer: Balancer) -> None:
    """Servers that register themselves tell that they keep prefixes; servers that are only named do not."""
    for worker in balancer.fleet.workers():
        if worker.role is Role.DECODE:
            worker.view.info = msgspec.structs.replace(worker.view.info, keeps_prefixes=True)


def test_prompts_go_where_prefill_has_their_prefix(fleet: Fleet) -> None:
    found = _compare(fleet, seed=5, prefill=2, decode=1)
    turns, follows = found[TAKES_TURNS], found[FOLLOWS]
    ratios = [slow / fast for slow, fast in zip(turns.second_ttft_s, follows.second_ttft_s, strict=True)]
    print(
        f"hit rate {turns.hit_rate:.3f} -> {follows.hit_rate:.3f}, "
        f"computed {turns.computed_tokens} -> {follows.computed_tokens} tokens, second visit's TTFT "
        f"{median(turns.second_ttft_s) * 1e3:.0f} -> {median(follows.second_ttft_s) * 1e3:.0f} ms, "
        f"ratio {median(ratios):.2f} over {len(ratios)} pairs"
    )
    # First visits cannot hit; taking turns, second ones come to the other server.
    assert follows.hit_rate > 0.6, (follows.hit_rate, turns.hit_rate)
    assert turns.hit_rate < 0.4, (follows.hit_rate, turns.hit_rate)
    assert median(ratios) > 1.0, ratios


def test_prompts_go_where_decode_has_their_prefix_and_less_kv_moves(fleet: Fleet) -> None:
    found = _compare(fleet, seed=6, prefill=1, decode=2)
    turns, follows = found[TAKES_TURNS], found[FOLLOWS]
    print(f"KV moved {turns.kv_bytes} -> {follows.kv_bytes} bytes")
    # One prefill server: both compute the same; what differs is what decode has already.
    assert abs(follows.computed_tokens - turns.computed_tokens) <= 0.05 * turns.computed_tokens
    assert follows.kv_bytes < 0.6 * turns.kv_bytes
