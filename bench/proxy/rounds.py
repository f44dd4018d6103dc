"""One round: one kind of request to one balancer for some seconds, and what it cost everyone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from proxy.cores import Cores, Usage
from proxy.mock_fleet import MockFleet
from proxy.processes import Child, ChildEnded
from proxy.prompts import Prompt

SATURATED = 0.9
"""Share of the load core used by load and workers from which they may be what limits."""
DISTURBED = 0.05
"""Share of the time that the balancer was ready but others had its core, from which a round is marked."""
CROWDED = 0.2
"""Share of the load core used by others, from which a round is marked."""


class RoundFailed(Exception):
    """The balancer is gone, or the load."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What load to make. ``rate`` 0: closed loop; ``requests`` > 0: so many instead of so long."""

    prompt: Prompt
    connections: int
    seconds: float = 2.0
    warmup_s: float = 0.5
    rate: float = 0.0
    requests: int = 0
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Round:
    """Measured between begin and end of a load. Times in microseconds, shares of one core."""

    requests_s: float
    events_s: float
    cpu_us_request: float
    cpu_us_event: float
    latency_us: dict[str, float]
    first_us: dict[str, float]
    delay_us: dict[str, float]
    balancer_share: float
    balancer_core_share: float
    load_core_share: float
    ours_share: float
    wait_share: float
    num_wrong: int
    example: str = ""

    @property
    def is_load_saturated(self) -> bool:
        """Load and workers had nothing left: the balancer might have been able to do more."""
        return self.ours_share >= SATURATED

    @property
    def is_disturbed(self) -> bool:
        """Somebody else had the balancer's core when it was ready."""
        return self.wait_share >= DISTURBED

    @property
    def is_crowded(self) -> bool:
        """Somebody else used the load core."""
        return self.load_core_share - self.ours_share >= CROWDED


def summarize(before: Usage, after: Usage, report: dict[str, Any], prompt: Prompt) -> Round:
    """Arithmetic of a round: ``before`` and ``after`` its two moments, ``report`` what the load printed."""
    wall_s = after.at_s - before.at_s
    events_s = report["events"] / report["seconds"]
    cpu_s = before.balancer.cpu_s_until(after.balancer)
    if prompt.is_stream:
        # Streams begun together end together: whole requests would be counted in lumps.
        requests = report["events"] / prompt.num_events
    else:
        requests = report["requests"] or report["done"]
    return Round(
        requests_s=requests / report["seconds"],
        events_s=events_s,
        cpu_us_request=cpu_s / requests * 1e6 if requests else 0.0,
        cpu_us_event=cpu_s / report["events"] * 1e6 if report["events"] else 0.0,
        latency_us=report["latency_us"],
        first_us=report["first_us"],
        delay_us=report["delay_us"],
        balancer_share=cpu_s / wall_s,
        balancer_core_share=(after.balancer_core_s - before.balancer_core_s) / wall_s,
        load_core_share=(after.load_core_s - before.load_core_s) / wall_s,
        ours_share=before.ours.cpu_s_until(after.ours) / wall_s,
        wait_share=before.balancer.wait_s_until(after.balancer) / wall_s,
        num_wrong=report["wrong"] + report["broken"] + report["unfinished"],
        example=report["example"],
    )


@dataclass(slots=True)
class Row:
    """All rounds of one balancer under one offer, and their medians."""

    label: str
    connections: int
    rounds: list[Round] = field(default_factory=list)
    failure: str = ""

    def middle(self, name: str, figure: str = "") -> float:
        """Median over the rounds of a field, or of one figure of a field."""
        values = [getattr(one, name) for one in self.rounds]
        found: float = median(value[figure] if figure else value for value in values)
        return found

    @property
    def num_wrong(self) -> int:
        """Requests not answered as they should be, over all rounds."""
        return sum(one.num_wrong for one in self.rounds)

    @property
    def marks(self) -> str:
        """What was so in half of the rounds or more; tables.LEGEND says what each letter means."""
        marks = (("L", "is_load_saturated"), ("d", "is_disturbed"), ("o", "is_crowded"))
        return "".join(
            letter for letter, name in marks
            if 2 * sum(getattr(one, name) for one in self.rounds) >= len(self.rounds)
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For the result line."""
        if not self.rounds:
            return {"balancer": self.label, "connections": self.connections, "failure": self.failure}
        plain = (
            "requests_s", "events_s", "cpu_us_request", "cpu_us_event",
            "balancer_share", "balancer_core_share", "load_core_share", "ours_share", "wait_share",
        )  # fmt: skip
        figures = {
            f"{name}_{figure}": round(self.middle(name, figure), 1)
            for name in ("latency_us", "first_us", "delay_us")
            for figure in ("p50", "p99")
        }
        spread = [round(one.requests_s, 1) for one in self.rounds]
        return {
            "balancer": self.label, "connections": self.connections,
            "marks": self.marks, "wrong": self.num_wrong, "failure": self.failure,
            **{name: round(self.middle(name), 3) for name in plain}, **figures, "requests_s_rounds": spread,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bench:
    """Where rounds run."""

    cores: Cores
    load: tuple[str, ...]
    fleet: MockFleet
    folder: Path

    def run(self, offer: Offer, ports: Sequence[int], balancer: Sequence[int]) -> Round:
        """One round against ``ports``; ``balancer``: whose CPU time counts (pids). Raises RoundFailed."""
        self.fleet.stats(reset=True)
        try:
            found = self._run_load(offer, ports, balancer)
        except ChildEnded as exc:
            raise RoundFailed(f"{exc}") from exc
        counted = self.fleet.stats()
        # A room that only one of two workers has seen would never be answered by real ones.
        return replace(found, num_wrong=found.num_wrong + counted["mismatched"] + counted["lonely"])

    def _run_load(self, offer: Offer, ports: Sequence[int], balancer: Sequence[int]) -> Round:
        request = self.folder / "request.http"
        request.write_bytes(offer.prompt.render())
        command = [*self.load, "--ports", ",".join(map(str, ports)), "--connections", str(offer.connections)]
        command += ["--request", str(request), "--seed", str(offer.seed), "--rate", str(offer.rate)]
        command += ["--events", str(offer.prompt.num_events), "--expect", offer.prompt.expected]
        command += ["--warmup", str(offer.warmup_s), "--seconds", str(offer.seconds)]
        command += ["--requests", str(offer.requests)]
        with Child(command, self.cores.load, self.folder / "load.log", reads_stdout=True) as load:
            ours = (load.pid, self.fleet.child.pid, os.getpid())
            moments = []
            for line in ("begin", "end"):
                found = load.read_line()
                assert found == line, found
                moments.append(Usage.now(self.cores, balancer, ours))
            report = json.loads(load.read_line())
            load.process.wait()
        return summarize(moments[0], moments[1], report, offer.prompt)
