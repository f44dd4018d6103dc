"""What is measured: each part offers its loads to every balancer in turn, round after round: rows.

throughput   answers in one piece, closed loop, by connections: who can do how much
latency      1 connection, and 16 at a fixed rate: what passing through costs when nobody is full
streaming    64 tokens, each sent on its own, as fast as they are taken
paced        64 tokens, one each 10 ms
memory       pdserve only: a million requests, its memory along the way
streams      pdserve only: so many paced streams at once
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from proxy.contenders import Started
from proxy.cores import cpu_s, rss_bytes
from proxy.mock_fleet import MockFleet
from proxy.prompts import Prompt
from proxy.rounds import Bench, Offer, Round, RoundFailed, Row

DIRECT = "direct"
"""Label of the rows without a balancer: straight to the decode workers."""

LATENCY_RATE = 500.0
"""Requests/s at 16 connections in the latency part: a tenth or less of what the gateways can do."""

STREAM_TOKENS = 64
PACE_MS = 10
SLICES = 20
"""Memory is read so many times along the way."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often."""

    connections: tuple[int, ...] = (1, 16, 64, 256)
    rounds: int = 3
    seconds: float = 2.0
    routes: tuple[str, ...] = ("generate", "chat")
    memory_requests: int = 1_000_000
    num_streams: int = 2000
    stream_pace_ms: int = 100
    stream_tokens: int = 100

    def offers(self, part: str) -> dict[str, list[Offer]]:
        """By title, what a part of several balancers offers to each of them."""
        if part == "latency":
            one = Offer(Prompt(self.routes[0]), 1, self.seconds)
            many = replace(one, connections=16, rate=LATENCY_RATE)
            return {f"latency {one.prompt.route}": [one, many]}
        offers: dict[str, list[Offer]] = {}
        for route, connections in product(self.routes, self.connections):
            if part == "throughput":
                offer = Offer(Prompt(route), connections, self.seconds)
            else:
                pace_ms = PACE_MS if part == "paced" else 0
                prompt = Prompt(route, STREAM_TOKENS, is_stream=True, pace_ms=pace_ms)
                # A paced stream takes most of a second: the window begins once they are spread out.
                offer = Offer(prompt, connections, self.seconds, warmup_s=1.0 if pace_ms else 0.5)
            offers.setdefault(f"{part} {route}", []).append(offer)
        return offers


def compare(
    bench: Bench, started: list[Started], fleet: MockFleet, offers: list[Offer], rounds: int
) -> list[Row]:
    """Rows of every balancer and of the direct way, offer by offer; balancers take turns within a round."""
    rows: list[Row] = []
    for offer in offers:
        found = {
            label: Row(label, offer.connections) for label in [DIRECT, *(s.contender.label for s in started)]
        }
        for turn in range(rounds):
            seeded = replace(offer, seed=offer.seed + turn)
            found[DIRECT].rounds.append(bench.run(seeded, fleet.decode, ()))
            for one in _rotated(started, turn):
                row = found[one.contender.label]
                try:
                    row.rounds.append(bench.run(seeded, (one.port,), one.child.pids))
                except RoundFailed as exc:
                    row.failure = f"{exc}; its own last words: {one.child.last_words}"
        rows.extend(found.values())
    return rows


def _rotated(started: list[Started], turn: int) -> Iterable[Started]:
    """So that nobody always follows the same neighbour."""
    shift = turn % len(started) if started else 0
    return [*started[shift:], *started[:shift]]


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Resident memory after each slice of the requests, in MiB."""

    requests: int
    seconds: float
    num_wrong: int
    rss_mib: list[float]

    @property
    def growth_mib(self) -> float:
        """From a fifth of the way to the end: connections and caches are in place by then."""
        return self.rss_mib[-1] - self.rss_mib[len(self.rss_mib) // 5]


def hold_memory(bench: Bench, pdserve: Started, requests: int, connections: int = 64) -> MemoryReport:
    """Send ``requests`` and watch pdserve's memory."""
    offer = Offer(Prompt(), connections, requests=max(1, requests // SLICES))
    rss, seconds, wrong = [rss_bytes(pdserve.child.pids) / 2**20], 0.0, 0
    for _ in range(SLICES):
        before = bench.run(offer, (pdserve.port,), pdserve.child.pids)
        seconds += offer.requests / before.requests_s if before.requests_s else 0.0
        wrong += before.num_wrong
        rss.append(rss_bytes(pdserve.child.pids) / 2**20)
    return MemoryReport(offer.requests * SLICES, round(seconds, 1), wrong, [round(mib, 1) for mib in rss])


@dataclass(frozen=True, slots=True)
class StreamsReport:
    """What holding many streams took."""

    streams: int
    peak: int
    round: Round
    seconds: float
    rss_before_mib: float
    rss_after_mib: float
    cpu_s: float
    counted: dict[str, int]


def hold_streams(bench: Bench, pdserve: Started, fleet: MockFleet, plan: Plan) -> StreamsReport:
    """As many streams at once, each once; all have to complete."""
    prompt = Prompt("generate", plan.stream_tokens, is_stream=True, pace_ms=plan.stream_pace_ms)
    offer = Offer(prompt, plan.num_streams, requests=plan.num_streams)
    fleet.stats(reset=True)
    pids = pdserve.child.pids
    before_mib, before_s = rss_bytes(pids) / 2**20, cpu_s(pids)
    found = bench.run(offer, (pdserve.port,), pids)
    after_mib = rss_bytes(pids) / 2**20
    counted = fleet.stats()
    seconds = plan.num_streams / found.requests_s if found.requests_s else 0.0
    return StreamsReport(
        plan.num_streams, counted["streams_peak"], found, round(seconds, 2),
        round(before_mib, 1), round(after_mib, 1), round(cpu_s(pids) - before_s, 2), counted,
    )  # fmt: skip
