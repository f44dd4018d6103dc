"""A balancer over fakes that meet through rooms, and what must hold after any fault.

fakes ◄──► Balancer ◄── Wire
Site.check_clean(): no KV held, no exchange open, no task, room or reservation left
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from msgspec import structs

from pdserve.balancer.app import Balancer
from pdserve.bootstrap.messages import FleetView
from pdserve.config.balancer import BalancerConfig
from pdserve.types import Role, WorkerInfo
from tests.support.sglang_pairing import Hold, Point, Rendezvous, Way
from tests.support.sglang_server import FakeSGLang, until

KEEPERS = ("keep-", "fleet-", "fake-", "wire")
"""Tasks by which the balancer watches its workers, and the test's own: they go on after a request."""


class Members:
    """Membership in the test's hands, in place of a bootstrap service."""

    is_connected = True
    epoch = "test"

    def __init__(self) -> None:
        self._views: asyncio.Queue[list[WorkerInfo]] = asyncio.Queue()
        self._version = 0

    def set(self, workers: list[WorkerInfo]) -> None:
        """These are the members from now on."""
        self._views.put_nowait(workers)

    async def watch(self) -> AsyncIterator[FleetView]:
        """As FleetWatcher."""
        while True:
            workers = await self._views.get()
            self._version += 1
            yield FleetView(epoch=self.epoch, version=self._version, workers=workers)


class ErrorLog(logging.Handler):
    """Everything logged with a traceback or as an unforeseen failure: a bug of the balancer."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.bugs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it if it is a bug."""
        if record.exc_info or record.name == "asyncio":
            formatter = logging.Formatter()
            trace = formatter.formatException(record.exc_info) if record.exc_info else ""
            self.bugs.append(f"{record.name}: {record.getMessage()}\n{trace}")


class Site:
    """Balancer, workers, and the books to check."""

    def __init__(
        self,
        balancer: Balancer,
        fakes: list[FakeSGLang],
        members: Members,
        log: ErrorLog,
        rendezvous: Rendezvous,
    ) -> None:
        self.balancer = balancer
        self.fakes = fakes
        self.members = members
        self.log = log
        self.rendezvous = rendezvous
        self._tasks = _task_names()

    @property
    def url(self) -> str:
        """The balancer's."""
        return self.balancer.url

    def of(self, role: Role) -> list[FakeSGLang]:
        """The fakes of a role."""
        return [fake for fake in self.fakes if fake.role is role]

    @property
    def prefill(self) -> FakeSGLang:
        """The first one."""
        return self.of(Role.PREFILL)[0]

    @property
    def decode(self) -> FakeSGLang:
        """The first one."""
        return self.of(Role.DECODE)[0]

    @property
    def counts(self) -> dict[str, int]:
        """``requests`` of the state document."""
        return structs.asdict(self.balancer.dispatcher.ledger.request_counts())

    def hold(self, role: Role, point: Point) -> Hold:
        """Stop the next request that comes to ``point`` on a worker of that role."""
        hold = Hold(point)
        for fake in self.of(role):
            fake.holds.append(hold)
        return hold

    def breaker(self, fake: FakeSGLang) -> Any:
        """A worker's breaker."""
        return self._worker(fake).breaker

    def errors(self) -> dict[str, int]:
        """Failures each worker was blamed for; workers without any are left out."""
        workers = self.balancer.fleet.workers()
        return {str(worker.worker_id): worker.breaker.errors for worker in workers if worker.breaker.errors}

    def remove(self, fake: FakeSGLang) -> None:
        """The worker leaves the fleet, its process goes on."""
        self.members.set([other.info for other in self.fakes if other is not fake])

    def is_member(self, fake: FakeSGLang) -> bool:
        """True while the balancer counts it in."""
        return any(worker.worker_id == fake.name for worker in self.balancer.fleet.workers())

    async def drop_kept(self) -> None:
        """Close every kept connection: what breaks on a fresh one cannot be taken for a stale one."""
        for fake in self.fakes:
            fake.drop_idle()
        await until(lambda: not self.balancer.pool.connections, "no kept connection")

    async def until_pairs(self, number: int) -> None:
        """Wait until that many pairs take traffic."""
        pairs = self.balancer.fleet.pairs
        await until(
            lambda: sum(str(p.state) == "ready" for p in pairs()) == number == len(pairs()),
            f"{number} ready pairs",
        )

    async def check_clean(self) -> None:
        """Nothing of any request is left, on the workers or in the balancer."""
        for fake in self.fakes:
            await until(lambda fake=fake: not fake.held, f"no KV held by {fake.name}")
            await until(lambda fake=fake: not fake.num_exchanges, f"no exchange open with {fake.name}")
        await until(lambda: not self.counts["inflight"], "no request in flight")
        await until(lambda: not self.balancer.dispatcher.num_rooms, "no room in use")
        for worker in self.balancer.fleet.workers():
            await until(lambda w=worker: not w.num_inflight, f"no reservation on {worker.worker_id}")
            table = self.balancer.fleet.scheduler.table
            assert table.inflight(worker.instance_id) == 0, f"load credit left on {worker.worker_id}"
        await until(lambda: not _task_names() - self._tasks, f"no task left: {_task_names() - self._tasks}")
        counts = self.counts
        assert counts["total"] == sum(counts[name] for name in ("completed", "failed", "aborted", "shed"))
        assert not self.rendezvous.reused, "a room was used twice on one worker"
        assert not self.log.bugs, "\n".join(self.log.bugs)

    async def check_blame(self, allowed: list[dict[str, int]]) -> None:
        """Who was blamed how often; nobody else's breaker was ever open. Nothing allowed: not checked."""
        if not allowed:
            return
        await until(lambda: self.errors() in allowed, f"blame {allowed}, it is {self.errors()}")
        for fake in self.fakes:
            if fake.name not in self.errors() and self.is_member(fake):
                assert self.breaker(fake).is_closed, fake.name
                assert self.breaker(fake).opened == 0, fake.name

    async def until_healed(self, *, dead: tuple[FakeSGLang, ...] = ()) -> None:
        """Every worker that lives takes traffic again."""
        for fake in self.fakes:
            if fake not in dead and self.is_member(fake):
                await until(lambda fake=fake: self.breaker(fake).is_closed, f"{fake.name}'s breaker closed")

    def _worker(self, fake: FakeSGLang) -> Any:
        return next(w for w in self.balancer.fleet.workers() if w.worker_id == fake.name)


@asynccontextmanager
async def running_site(prefill: int = 1, decode: int = 1, **settings: Any) -> AsyncIterator[Site]:
    """A balancer and fakes, every pair ready. Checked at the end: no task and no connection survives them."""
    before = asyncio.all_tasks()
    rendezvous, log = Rendezvous(), ErrorLog()
    fakes = [FakeSGLang(Role.PREFILL, name=f"prefill-{i}", rendezvous=rendezvous) for i in range(prefill)]
    fakes += [FakeSGLang(Role.DECODE, name=f"decode-{i}", rendezvous=rendezvous) for i in range(decode)]
    logging.getLogger().addHandler(log)
    for fake in fakes:
        await fake.start()
    members = Members()
    quiet = {"port": 0, "load_poll_s": 60.0, "wedge_s": 0.0, "request_s": 5.0, "queue_timeout_s": 2.0}
    balancer = Balancer(BalancerConfig(**{**quiet, **settings}), members)
    try:
        await balancer.start()
        members.set([fake.info for fake in fakes])
        site = Site(balancer, fakes, members, log, rendezvous)
        await site.until_pairs(prefill * decode)
        for fake in fakes:
            await until(lambda fake=fake: not fake.held, "probes over")
            for seen in (fake.requests, fake.bodies, fake.paths, fake.headers, fake.calls):
                seen.clear()
        yield site
    finally:
        await balancer.stop()
        left = {fake.name: fake.num_connections for fake in fakes}
        for fake in fakes:
            await fake.stop()
        logging.getLogger().removeHandler(log)
    await until(lambda: not (asyncio.all_tasks() - before), f"no task: {asyncio.all_tasks() - before}")
    assert not any(left.values()) or not any(fake.num_connections for fake in fakes), left


def _task_names() -> Counter[str]:
    tasks = [task for task in asyncio.all_tasks() if not task.get_name().startswith(KEEPERS)]
    return Counter(getattr(task.get_coro(), "__qualname__", "?") for task in tasks)


__all__ = ["Members", "Point", "Site", "Way", "running_site"]
