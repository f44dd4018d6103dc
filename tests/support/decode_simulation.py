"""Decode servers on a virtual clock, told of by samples as SGLang's counters would tell.

Each server runs steps back to back while it has requests; a step of ``batch``
requests lasts ``step_s(steps so far, batch)`` seconds and gives each of them a
token. ``decode_moments`` grow as in SGLang's scheduler: only for steps that
follow another one without a pause, and only below two seconds.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.load_sample import ARRIVAL_S, Sample
from pdserve.scheduling.policy import Candidates, Policy
from pdserve.types import InstanceId, RequestShape, Role, WorkerId, WorkerInfo, WorkerLoad

STEP_MAX_S = 2.0
POLL_S = 0.25
TRANSFER_S = 0.03
"""From dispatch to the decode batch."""

StepTime = Callable[[int, int], float]


def line(base_s: float, slope_s: float) -> StepTime:
    """Steps of a warm server."""
    return lambda step, batch: base_s + slope_s * batch


def cold(num_steps: int, first_s: float, then: StepTime) -> StepTime:
    """A server whose first steps each take ``first_s``."""
    return lambda step, batch: first_s if step < num_steps else then(step, batch)


@dataclass(eq=False)
class DecodeServer:
    """One decode server. ``remaining`` has the tokens still to come of each running request, by leg."""

    name: str
    step_s: StepTime
    remaining: dict[int, int] = field(default_factory=dict)
    moments: list[float] = field(default_factory=lambda: [0.0] * 6)
    steps: int = 0
    is_running: bool = False

    @property
    def info(self) -> WorkerInfo:
        """Two of these differ in nothing but their names."""
        return WorkerInfo(
            worker_id=WorkerId(self.name),
            instance_id=InstanceId(self.name),
            role=Role.DECODE,
            url=f"http://{self.name}",
            model="m",
        )

    def sample(self, now_s: float) -> Sample:
        """What ``/v1/loads`` would tell."""
        load = WorkerLoad(
            timestamp_s=now_s, num_running_reqs=len(self.remaining), decode_moments=tuple(self.moments)
        )
        return Sample(load, now_s - ARRIVAL_S)

    def count(self, batch: int, took_s: float) -> None:
        """Book a step that followed another at once."""
        took_us = took_s * 1e6
        if took_s < STEP_MAX_S:
            grown = (1, batch, took_us, batch * batch, batch * took_us, batch)
            self.moments = [old + new for old, new in zip(self.moments, grown, strict=True)]


class Simulation:
    """A prefill server that takes no time, decode servers, a policy, a virtual clock."""

    def __init__(self, policy: Policy, servers: Iterable[DecodeServer]) -> None:
        self.policy = policy
        self.table = LoadTable()
        self.now_s = 0.0
        self.picks: Counter[str] = Counter()
        self._prefill = WorkerInfo(
            worker_id=WorkerId("p"), instance_id=InstanceId("p"), role=Role.PREFILL, url="", model="m"
        )
        self.table.add(self._prefill)
        self._servers: list[DecodeServer] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for server in servers:
            self.join(server)

    def join(self, server: DecodeServer) -> None:
        """A decode server comes into the ready pairs."""
        self.table.add(server.info)
        self._servers.append(server)
        self._poll(server)

    def burst(self, num_requests: int, per_s: float, tokens: int = 64) -> Counter[str]:
        """Dispatch requests at even intervals, run until all have ended; how many each server got."""
        before = Counter(self.picks)
        for index in range(num_requests):
            self._at(self.now_s + index / per_s, lambda: self._dispatch(tokens))
        last_s = self.now_s + num_requests / per_s
        self.run_until(lambda: self.now_s > last_s and not any(s.remaining for s in self._servers))
        return self.picks - before

    def rest(self, seconds: float) -> None:
        """Let time pass; polls go on."""
        end_s = self.now_s + seconds
        self.run_until(lambda: self.now_s >= end_s)

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Handle events in order of time."""
        while not is_over():
            self.now_s, _, action = heapq.heappop(self._events)
            action()

    def _at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), action))

    def _poll(self, server: DecodeServer) -> None:
        self.table.record(server.info.instance_id, server.sample(self.now_s))
        self._at(self.now_s + POLL_S, lambda: self._poll(server))

    def _dispatch(self, tokens: int) -> None:
        rows = [self.table.view(self._prefill.instance_id)]
        columns = [self.table.view(server.info.instance_id) for server in self._servers]
        chosen = self.policy.choose(RequestShape(256, tokens), Candidates(rows, columns)).pair.decode.info
        self.picks[chosen.worker_id] += 1
        leg = self.table.dispatch(chosen.instance_id, 256, self.now_s)
        server = next(s for s in self._servers if s.name == chosen.worker_id)
        self._at(self.now_s + TRANSFER_S, lambda: self._arrive(server, leg, tokens))

    def _arrive(self, server: DecodeServer, leg: int, tokens: int) -> None:
        server.remaining[leg] = tokens
        if not server.is_running:
            server.is_running = True
            self._step(server, follows=False)

    def _step(self, server: DecodeServer, *, follows: bool) -> None:
        batch = list(server.remaining)
        took_s = server.step_s(server.steps, len(batch))
        server.steps += 1

        def end() -> None:
            if follows:
                server.count(len(batch), took_s)
            for leg in batch:
                server.remaining[leg] -= 1
                if not server.remaining[leg]:
                    del server.remaining[leg]
                    self.table.finish(server.info.instance_id, leg)
            server.is_running = bool(server.remaining)
            if server.remaining:
                self._step(server, follows=True)

        self._at(self.now_s + took_s, end)
