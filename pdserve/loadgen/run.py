"""Sends a plan in time: open loop (each request when it is due), bounded by ``concurrency`` if asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.loadgen.client import LoadClient, RequestResult
from pdserve.loadgen.plan import Ask


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    total: int
    sent: int = 0
    ended: int = 0
    failed: int = 0
    output_tokens: int = 0

    @property
    def inflight(self) -> int:
        """Sent and not ended."""
        return self.sent - self.ended


@dataclass(slots=True)
class RunResult:
    """What came of a run. ``wall_s``: from its start to the end of the last answer."""

    wall_s: float = 0.0
    outcomes: list[RequestResult] = field(default_factory=list)

    def extend(self, other: RunResult) -> None:
        """Add another round of the same service."""
        self.wall_s += other.wall_s
        self.outcomes += other.outcomes


async def run_asks(
    client: LoadClient,
    asks: Sequence[Ask],
    *,
    concurrency: int,
    progress: Progress,
    on_change: Callable[[Progress], None] = lambda progress: None,
) -> RunResult:
    """Send each request when it is due, or as soon after as ``concurrency`` (0: no bound) allows.

    Requests keep their order. Cancelling ends those that are under way.
    """
    started_s = time.monotonic()
    gate = asyncio.Semaphore(concurrency or len(asks) or 1)
    first_due_s = asks[0].due_s if asks else 0.0
    outcomes: list[RequestResult | None] = [None] * len(asks)

    async def send(index: int, due_s: float) -> None:
        try:
            outcome = outcomes[index] = await client.send(asks[index], due_s)
        finally:
            gate.release()
        progress.ended += 1
        progress.failed += not outcome.is_ok
        progress.output_tokens += outcome.output_tokens
        on_change(progress)

    async with asyncio.TaskGroup() as group:
        for index, ask in enumerate(asks):
            due_s = started_s + ask.due_s - first_due_s
            if (wait_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            await gate.acquire()
            progress.sent += 1
            on_change(progress)
            group.create_task(send(index, due_s if ask.due_s else time.monotonic()))
    ended = list(filter(None, outcomes))
    last_s = max((outcome.last_s for outcome in ended), default=started_s)
    return RunResult(last_s - started_s, ended)
