"""Which server is broken when, and how: drawn from a seed, bounded by what must live on.

state document ─► victims ─► draw ─► signals to its processes ─► (stopped ones go on, or are killed)
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.chaos.process import LaunchedFleet, Server
from pdserve.state.document import StateDocument

KILLS = ("kill server", "kill scheduler", "kill group")
STOP = "stop"
FAULTS = (*KILLS, STOP)
"""Kill -9 of the HTTP process, of the scheduler behind it, of all processes; SIGSTOP of all."""
MIN_STOP_S, MAX_STOP_S = 1.0, 12.0
"""A stopped server stands still for so long: shorter and longer than a stream waits for it."""
STOP_SHARE = 0.4
"""Of faults that are stops; half of them end with a kill."""
JITTER = 0.5
"""Pauses between faults are so much shorter or longer than asked."""


def victims(state: StateDocument, standing: set[str], *, spare_last: bool) -> list[str]:
    """Names of the workers that may be broken now, in the order of the document.

    ``standing``: those that we have stopped. With ``spare_last`` a ready pair is left without the victim.
    """
    pairs = [p for p in state.pairs if p.state == "ready" and not {p.prefill, p.decode} & standing]
    living = [w.worker_id for w in state.workers if w.state == "ready" and w.worker_id not in standing]
    if not spare_last:
        return living
    return [name for name in living if any(name not in (pair.prefill, pair.decode) for pair in pairs)]


@dataclass
class Faults:
    """Breaks a server every ``every_s`` seconds or so; ``read`` gives the state document.

    ``done`` counts faults by kind and role, ``num_skipped`` the times when nobody could be spared.
    """

    fleet: LaunchedFleet
    rng: random.Random
    every_s: float
    spare_last: bool
    say: Callable[[str], None]
    done: Counter[str] = field(default_factory=Counter)
    num_skipped: int = 0
    _standing: dict[str, Server] = field(default_factory=dict)
    _stops: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, read: Callable[[], StateDocument], until_s: float) -> None:
        """Break servers until ``until_s`` of the monotonic clock; those that stand still go on then."""
        started_s = time.monotonic()
        try:
            while True:
                pause_s = self.every_s * self.rng.uniform(1 - JITTER, 1 + JITTER)
                if time.monotonic() + pause_s >= until_s:
                    return
                await asyncio.sleep(pause_s)
                state = await asyncio.to_thread(read)
                name, what = self._draw(state)
                if name:
                    self.say(f"  {time.monotonic() - started_s:6.1f} s  {what:<15} {name}")
        finally:
            self.release()

    def release(self) -> None:
        """Let everything that we have stopped go on."""
        for task in self._stops:
            task.cancel()
        for server in self._standing.values():
            self.fleet.send(server.everything, signal.SIGCONT)
        self._standing.clear()

    def _draw(self, state: StateDocument) -> tuple[str, str]:
        """Break somebody; returns whom and how, two empty texts if nobody can be spared."""
        names = victims(state, set(self._standing), spare_last=self.spare_last)
        workers = {worker.worker_id: worker for worker in state.workers}
        if not names:
            self.num_skipped += 1
            return "", ""
        name = self.rng.choice(names)
        what = STOP if self.rng.random() < STOP_SHARE else self.rng.choice(KILLS)
        hold_s, ends_dead = self.rng.uniform(MIN_STOP_S, MAX_STOP_S), self.rng.random() < 0.5
        server = self.fleet.server(workers[name].url)
        if server is None or not self._break(name, server, what, hold_s, ends_dead):
            self.num_skipped += 1
            return "", ""
        self.done[f"{what} {workers[name].role}"] += 1
        end = f", {'killed' if ends_dead else 'goes on'} after {hold_s:.1f} s" if what == STOP else ""
        return name + end, what

    def _break(self, name: str, server: Server, what: str, hold_s: float, ends_dead: bool) -> bool:
        if what == STOP:
            self._standing[name] = server
            task = asyncio.create_task(self._stand(name, hold_s, ends_dead))
            self._stops.add(task)
            task.add_done_callback(self._stops.discard)
            return self.fleet.send(server.everything, signal.SIGSTOP) > 0
        pids = {"kill server": (server.leader,), "kill scheduler": (server.scheduler,)}
        return self.fleet.send(pids.get(what, server.everything), signal.SIGKILL) > 0

    async def _stand(self, name: str, hold_s: float, ends_dead: bool) -> None:
        await asyncio.sleep(hold_s)
        server = self._standing.pop(name)
        self.fleet.send(server.everything, signal.SIGKILL if ends_dead else signal.SIGCONT)
