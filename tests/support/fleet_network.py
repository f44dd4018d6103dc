"""An in-memory network of SGLang-like servers in place of ``HttpClient``, for fleet tests.

Each answer's moment is in the test's hands: ``hold`` a server's /generate, take it ``down``, change
its status.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.proxy.pairs import Reservations
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import NoWorkerError, WorkerError, WorkerUnreachable
from pdserve.scheduling.reservation import Reservation
from pdserve.types import InstanceId, RequestShape, Role, WorkerId, WorkerInfo

SHAPE = RequestShape(prompt_tokens=100, max_new_tokens=16)
LARGE = RequestShape(prompt_tokens=800, max_new_tokens=16)
DEADLINE_S = 60.0
SOON_S = 0.01
"""Longest wait of a request that should not have to wait, or that cannot be served."""
GENERATED = b'{"text":" ok","output_ids":[1,2],"meta_info":{"finish_reason":{"type":"length"}}}'


@dataclass(frozen=True)
class Answer:
    """Status and body, as ``FetchedResponse`` has them."""

    status: int
    body: bytes = b"{}"


@dataclass
class Server:
    """One server's present behaviour and what it has received."""

    is_down: bool = False
    generate: Answer = Answer(200, GENERATED)
    ping: Answer = Answer(200)
    loads: Answer = Answer(200, b'{"loads":[{}]}')
    model_info: Answer = Answer(404)
    server_info: Answer = Answer(200)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    calls: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, object]] = field(default_factory=list)
    authorizations: dict[str, bytes] = field(default_factory=dict)
    """Path → the last authorization it was asked with; empty without one."""

    def __post_init__(self) -> None:
        self.gate.set()


class Network:
    """Servers by URL; a server that was never named behaves well."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}

    def __getitem__(self, info: WorkerInfo) -> Server:
        return self.servers.setdefault(info.url, Server())

    async def fetch(
        self,
        url: str,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        timeout_s: float,
    ) -> Answer:
        """The seam: ``HttpClient.fetch`` without sockets."""
        server = self.servers.setdefault(url, Server())
        path = path.partition("?")[0]
        server.calls[path] += 1
        server.authorizations[path] = dict(headers).get(b"authorization", b"")
        await asyncio.sleep(0)
        if path == "/generate":
            server.bodies.append(json.loads(body))
            await server.gate.wait()
        if server.is_down:
            raise WorkerUnreachable(url, "connection refused")
        answers = {
            "/generate": server.generate,
            "/ping": server.ping,
            "/v1/loads": server.loads,
            "/model_info": server.model_info,
            "/server_info": server.server_info,
        }
        return answers.get(path, Answer(200))

    def num_heard(self, url: str) -> int:
        """The seam: no client's request goes through here."""
        return 0

    def is_busy_with(self, url: str, label: str) -> bool:
        """The same."""
        return False

    def fail_worker(self, url: str, make_error: Callable[[], WorkerError], *, is_begun: bool = True) -> int:
        """The same."""
        return 0


def worker(role: Role, index: int, instance: str = "") -> WorkerInfo:
    """Describe a worker; another ``instance`` is another process with another bootstrap port."""
    return WorkerInfo(
        worker_id=WorkerId(f"{role}-{index}"),
        instance_id=InstanceId(f"{role}{index}{instance}"),
        role=role,
        url=f"http://{role}-{index}{instance}",
        model="tiny",
        bootstrap_host="h" if role is Role.PREFILL else "",
        bootstrap_port=9000 + index if role is Role.PREFILL else None,
    )


P0, P1 = worker(Role.PREFILL, 0), worker(Role.PREFILL, 1)
D0, D1 = worker(Role.DECODE, 0), worker(Role.DECODE, 1)


@asynccontextmanager
async def running_fleet(
    network: Network, membership: Any = None, **settings: object
) -> AsyncIterator[WorkerFleet]:
    """A started fleet over ``network``, stopped at the end; no task may survive it."""
    fleet = WorkerFleet(BalancerConfig(**{"load_poll_s": 0.02, **settings}), network, membership)  # type: ignore[arg-type]
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.stop()
    orphans = [task for task in asyncio.all_tasks() if task.get_name().startswith(("keep-", "fleet-"))]
    assert not orphans


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; fails after DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def loads(**figures: object) -> Answer:
    """An answer of ``/v1/loads`` with one DP rank."""
    return Answer(200, json.dumps({"loads": [figures]}).encode())


async def sampled(fleet: WorkerFleet) -> None:
    """Wait until every member's load is known."""
    await until(lambda: all(fleet.scheduler.table.load(member.instance_id) for member in fleet.workers()))


def pair_states(fleet: WorkerFleet) -> dict[str, str]:
    """Label → state of every pair."""
    return {record.label: str(record.state) for record in fleet.pairs()}


def worker_states(fleet: WorkerFleet) -> dict[str, str]:
    """Worker id → state."""
    return {str(member.worker_id): str(member.state) for member in fleet.workers()}


async def all_ready(fleet: WorkerFleet) -> None:
    """Wait until every pair is ready."""
    await until(lambda: fleet.pairs() and set(pair_states(fleet).values()) == {"ready"})


@asynccontextmanager
async def known_fleet(
    network: Network, *members: WorkerInfo, **settings: object
) -> AsyncIterator[WorkerFleet]:
    """A fleet whose members are ready and have told their load; polls go on, quickly."""
    async with running_fleet(network, **settings) as fleet:
        fleet.apply(members)
        await all_ready(fleet)
        await sampled(fleet)
        yield fleet


async def reserve(
    fleet: WorkerFleet, shape: RequestShape = SHAPE, *, timeout_s: float = SOON_S, **how: Any
) -> Reservation:
    """A pair for a request, as the proxy takes it."""
    return await Reservations(fleet.scheduler, fleet).take(shape, timeout_s=timeout_s, **how)


def prefill_finished(fleet: WorkerFleet, reservation: Reservation) -> None:
    """The request's prefill leg ends well."""
    Reservations(fleet.scheduler, fleet).prefill_finished(reservation)


def release(fleet: WorkerFleet, reservation: Reservation, **results: Any) -> None:
    """End a request as the proxy does; well, unless ``results`` say otherwise."""
    results = results or {"prefill_ok": True, "decode_ok": True}
    Reservations(fleet.scheduler, fleet).release(reservation, **results)


class Line:
    """Clients that wait; ``served`` has their names in the order in which they got a pair,
    ``refused`` what the others were told."""

    def __init__(self, fleet: WorkerFleet) -> None:
        self.fleet = fleet
        self.served: list[str] = []
        self.refused: dict[str, str] = {}
        self.held: dict[str, Reservation] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def join(self, name: str, shape: RequestShape = SHAPE, **how: object) -> None:
        """Stand in line; returns when the client does."""
        length = self.fleet.scheduler.num_waiting
        self.tasks[name] = asyncio.create_task(self._client(name, shape, how))
        await until(lambda: self.fleet.scheduler.num_waiting == length + 1 or name in self.served)

    async def _client(self, name: str, shape: RequestShape, how: dict[str, Any]) -> None:
        try:
            self.held[name] = await reserve(self.fleet, shape, **{"timeout_s": 5, **how})
        except NoWorkerError as exc:
            self.refused[name] = str(exc)
        else:
            self.served.append(name)

    async def until_served(self, *names: str) -> None:
        """Wait until these, and in this order, have been served; nobody else."""
        await until(lambda: len(self.served) >= len(names))
        assert self.served == list(names)
