"""How long the balancer takes to choose a pair, and all it does around it.

Why: every request waits for this. Targets: 50 us a pick at 8 prefill x 8 decode workers, 300 us at 64 x 64.

Set-up: random fleets (queues, batches, pools partly full, rates that differ by a few per cent), prompts of
--prompt bytes of which a half is shared with an earlier one, prompt trees filled by --warm requests
before. ``pick`` is ``Policy.choose`` and the ends of both legs; ``reserve`` is the
balancer's own way: Scheduler.try_now, both legs' ends. ``links``: workers on as many hosts as there
are pairs of rows, so that every choice weighs same-host against other-host links; ``one host``: links alike.

Output: set-up, a table in microseconds (median over fleets of each fleet's median, and the worst fleet's 99th
percentile), one JSON object as the last line.

    python bench/decision.py [--fleets 5] [--requests 400] [--prompt 16384]
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

from common import describe_setup, print_result, print_setup

from pdserve.config.balancer import BalancerConfig
from pdserve.scheduling.load_sample import Sample
from pdserve.scheduling.policy import Policy, make_policy
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.scheduler import Scheduler
from pdserve.sim.baselines import SIMULATED_MAKERS
from pdserve.types import (
    Forecast,
    InstanceId,
    KVLayoutDescriptor,
    RequestShape,
    Role,
    WorkerId,
    WorkerInfo,
    WorkerLoad,
)

POLICIES = ("pair_cost", "least_load", "cache_aware", "dynamo_kv", "aibrix", "round_robin")
SIZES = (1, 8, 64)
LAYOUT = KVLayoutDescriptor(page_size=1, dtype="bf16", num_layers=32, num_kv_heads=8, token_bytes=4096)
POOL_TOKENS = 1_000_000
OPEN = 4
"""Requests under way per worker while one is measured."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    policy: str
    size: int
    has_links: bool


class Bench:
    """One random fleet under one policy."""

    def __init__(self, case: Case, seed: int, prompt_bytes: int) -> None:
        self._draw = random.Random(seed)
        self._prompt_bytes = prompt_bytes
        self._now_s = 0.0
        self.policy: Policy = make_policy(case.policy, seed, makers=SIMULATED_MAKERS)
        self.scheduler = Scheduler(
            BalancerConfig(), lambda: "no worker", policy=self.policy, clock=lambda: self._now_s
        )
        self.admission = self.scheduler.admission
        self.rows = [self._worker(Role.PREFILL, index, case) for index in range(case.size)]
        self.columns = [self._worker(Role.DECODE, index, case) for index in range(case.size)]
        self.scheduler.set_ready_pairs((p, d) for p in self.rows for d in self.columns)
        self._shared = [self._text() for _ in range(8 * case.size)]
        self._open: list[Reservation] = []

    def _worker(self, role: Role, index: int, case: Case) -> InstanceId:
        draw = self._draw
        host = f"host{index}" if case.has_links else "host0"
        info = WorkerInfo(
            worker_id=WorkerId(f"{role}-{index}"),
            instance_id=InstanceId(f"{role[0]}{index:031d}"),
            role=role,
            url=f"http://{host}:{30000 + index}",
            model="m",
            kv_layout=LAYOUT,
            max_total_num_tokens=POOL_TOKENS,
        )
        slots = self.scheduler.add_worker(info)
        used = draw.randrange(POOL_TOKENS // 2)
        is_prefill = role is Role.PREFILL
        load = WorkerLoad(
            timestamp_s=0.0,
            num_running_reqs=draw.randrange(60) * (not is_prefill),
            num_waiting_uncached_tokens=draw.randrange(20_000) * is_prefill,
            num_used_tokens=used,
            num_total_tokens=used,
            max_total_num_tokens=POOL_TOKENS,
            max_running_requests=256,
            gen_throughput=1000.0 * (not is_prefill),
        )
        self.scheduler.sampled(slots, Sample(load, -1.0))
        return info.instance_id

    def _text(self) -> bytes:
        return b'"' + self._draw.randbytes(self._prompt_bytes // 4).hex().encode()

    def shape(self) -> RequestShape:
        """A request whose first half was seen before, more often than not."""
        prompt = self._draw.choice(self._shared) + self._text()[1:] + b'"'
        mean = self._draw.uniform(50, 600)
        return RequestShape(len(prompt) // 4, 2000, prompt, forecast=Forecast(mean, 0.3 * mean, 2 * mean))

    def warm(self, requests: int) -> None:
        """Fill trees and queues; a few requests stay under way on each worker."""
        for _ in range(requests):
            self._now_s += 0.01
            reservation = self.scheduler.try_now(self.shape())
            assert reservation is not None, "the fleet is full"
            self._open.append(reservation)
            if len(self._open) > OPEN * len(self.rows):
                self._end(self._open.pop(0))

    def _end(self, reservation: Reservation) -> None:
        self.scheduler.prefill_finished(reservation)
        self.scheduler.end(reservation, prefill_ok=True, decode_ok=True)
        self.scheduler.serve()

    def pick(self) -> float:
        """Seconds of one bare choice and its ends."""
        shape, candidates, policy = self.shape(), self.admission.placement.ready_pairs.candidates, self.policy
        self._now_s += 0.01
        candidates.now_s = now_s = self._now_s
        started_s = time.perf_counter()
        choice = policy.choose(shape, candidates)
        for role in Role:
            policy.leg_ended(choice, role, is_whole=True, now_s=now_s)
        return time.perf_counter() - started_s

    def choose(self) -> float:
        """Seconds of one bare choice."""
        shape, candidates, policy = self.shape(), self.admission.placement.ready_pairs.candidates, self.policy
        self._now_s += 0.01
        candidates.now_s = now_s = self._now_s
        started_s = time.perf_counter()
        choice = policy.choose(shape, candidates)
        took_s = time.perf_counter() - started_s
        for role in Role:
            policy.leg_ended(choice, role, is_whole=True, now_s=now_s)
        return took_s

    def reserve(self) -> float:
        """Seconds of the balancer's whole way: reserve, prefill finished, release."""
        shape = self.shape()
        self._now_s += 0.01
        started_s = time.perf_counter()
        reservation = self.scheduler.try_now(shape)
        assert reservation is not None, "the fleet is full"
        self._end(reservation)
        return time.perf_counter() - started_s


def measure(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds of ``choose``, ``pick`` and ``reserve``."""
    told: dict[str, list[float]] = {"choose": [], "pick": [], "reserve": []}
    tails: dict[str, list[float]] = {name: [] for name in told}
    for seed in range(args.fleets):
        bench = Bench(case, seed, args.prompt)
        bench.warm(args.warm)
        ways: dict[str, Callable[[], float]] = {
            "choose": bench.choose,
            "pick": bench.pick,
            "reserve": bench.reserve,
        }
        gc.collect()
        for name, way in ways.items():
            took = [way() * 1e6 for _ in range(args.requests)]
            told[name].append(median(took))
            tails[name].append(quantiles(took, n=100)[98])
    return {
        **{name: round(median(values), 1) for name, values in told.items()},
        "reserve_p99": round(max(tails["reserve"]), 1),
    }


def main() -> None:
    """Run all cases and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fleets", type=int, default=5, help="random fleets per row")
    parser.add_argument("--requests", type=int, default=400, help="decisions measured per fleet")
    parser.add_argument("--warm", type=int, default=800, help="requests before them")
    parser.add_argument("--prompt", type=int, default=16_384, help="prompt length, bytes")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated")
    args = parser.parse_args()
    setup = describe_setup(
        fleets=args.fleets, requests=args.requests, warm=args.warm, prompt_bytes=args.prompt
    )
    print_setup(setup)
    print(
        f"{'policy':<14}{'fleet':>8}{'links':>10}{'choose us':>11}{'+ ends us':>11}{'reserve us':>12}"
        f"{'p99 us':>9}"
    )
    rows = []
    for policy in args.policies.split(","):
        for size in SIZES:
            for has_links in (False, True) if policy == "pair_cost" else (False,):
                case = Case(policy, size, has_links)
                took = measure(case, args)
                links = "by host" if has_links else "alike"
                print(
                    f"{policy:<14}{f'{size}P{size}D':>8}{links:>10}{took['choose']:>11.1f}{took['pick']:>11.1f}"
                    f"{took['reserve']:>12.1f}{took['reserve_p99']:>9.1f}",
                    flush=True,
                )
                rows.append({"policy": policy, "size": size, "links": has_links, **took})
    print_result({"bench": "decision", "setup": setup, "rows": rows})


if __name__ == "__main__":
    main()
