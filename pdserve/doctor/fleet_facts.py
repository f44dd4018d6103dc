"""What a running fleet says of itself: asked of the balancer, the bootstrap service and each worker.

    GET /pdserve/state ──► every worker: /health, /server_info, /pdserve/instance, /v1/loads
                      └──► bootstrap service: /fleet/view     (KV layouts)
    two tokens through every pair, sent straight to the two workers (balancer/probe.py)

Gathers only; fleet_checks.py judges. Every question has a limit, and so have all together.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pdserve.balancer.fleet.probe import Headers, WorkerKeys, probe_pair
from pdserve.balancer.fleet.worker import ProbeResult
from pdserve.bootstrap.messages import FleetView
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import PdserveError, WorkerError
from pdserve.http.client import FetchedResponse, HttpClient
from pdserve.types import InstanceId, Pair, Role, WorkerId, WorkerInfo

STATE_S = 10.0
HEALTH_S = 25.0
"""Stock SGLang's /health generates a token and gives up after 20 s."""
INFO_S = 15.0
VIEW_S = 5.0
PROBE_S = 40.0
"""A pair's first transfer over NIXL may take 38 s on a large GPU server (sglang#28737)."""
ALL_PROBES_S = 180.0
WORKERS_AT_ONCE = 64
PROBES_AT_ONCE = 4
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Keys:
    """Bearer keys: ``admin`` for the balancer's control routes, ``worker`` for the workers' own."""

    admin: str = ""
    workers: WorkerKeys = field(default_factory=WorkerKeys)

    @classmethod
    def of(cls, api_key: str, environment_keys: Mapping[str, str]) -> Keys:
        """``api_key`` (``--api-key``) wins over PDSERVE_ADMIN_API_KEY and PDSERVE_API_KEY."""
        config = BalancerConfig(
            api_key=environment_keys.get("api_key", ""),
            admin_api_key=api_key or environment_keys.get("admin_api_key", ""),
            worker_api_key=environment_keys.get("worker_api_key", ""),
        )
        return cls(config.control_key, WorkerKeys.of(config))


@dataclass(frozen=True, slots=True)
class StateLook:
    """``state`` is empty when there is ``trouble``; ``status`` of the answer, 0 without one."""

    state: Row = field(default_factory=dict)
    trouble: str = ""
    status: int = 0
    took_s: float = 0.0
    skew_s: float | None = None
    """Balancer's wall clock minus this machine's."""


@dataclass(frozen=True, slots=True)
class WorkerLook:
    """One worker: its row of the state document, and what it says itself. ``health``: why it is not well."""

    row: Row
    health: str = ""
    is_hidden: bool = False
    """Its address is a loopback of another machine: it cannot be asked from here."""
    info: Row = field(default_factory=dict)
    info_trouble: str = ""
    instance: Row = field(default_factory=dict)
    """``GET /pdserve/instance``; empty for a stock SGLang server."""
    loads: Row = field(default_factory=dict)
    skew_s: float | None = None

    @property
    def name(self) -> str:
        """Its id in the fleet."""
        return str(self.row.get("worker_id", "?"))

    @property
    def role(self) -> Role:
        """Prefill or decode."""
        return Role(self.row["role"])

    @property
    def is_reached(self) -> bool:
        """It answered, well."""
        return not self.health and not self.is_hidden


@dataclass(frozen=True, slots=True)
class PairLook:
    """A pair by worker ids; ``result`` is None when it was not tried, ``untried`` says why."""

    prefill: str
    decode: str
    result: ProbeResult | None = None
    untried: str = ""

    @property
    def label(self) -> str:
        """As everywhere: ``prefill-0>decode-1``."""
        return f"{self.prefill}>{self.decode}"


@dataclass(frozen=True, slots=True)
class FleetFacts:
    """Everything but the tokens."""

    url: str
    balancer: StateLook
    workers: tuple[WorkerLook, ...] = ()
    view: Mapping[str, WorkerInfo] = field(default_factory=dict)
    """By instance id; empty if the bootstrap service cannot be asked from here."""


def gather_fleet(url: str, keys: Keys) -> FleetFacts:
    """Ask the balancer and everybody it names. Never raises for what they do."""
    return asyncio.run(_gather(url, keys))


async def _gather(url: str, keys: Keys) -> FleetFacts:
    pool = HttpClient()
    try:
        balancer = await _look_at_state(pool, url, keys.admin)
        rows = balancer.state.get("workers") or []
        service = str((balancer.state.get("bootstrap") or {}).get("url") or "")
        view = asyncio.create_task(_look_at_view(pool, service, url))
        gate = asyncio.Semaphore(WORKERS_AT_ONCE)
        looks = [_look_at_worker(pool, row, url, keys.workers.plain, gate) for row in rows]
        return FleetFacts(url, balancer, tuple(await asyncio.gather(*looks)), await view)
    finally:
        await pool.close()


async def _look_at_state(pool: HttpClient, url: str, key: str) -> StateLook:
    headers: Headers = ((b"authorization", b"Bearer " + key.encode()),) if key else ()
    asked_s, wall_s = time.monotonic(), time.time()
    try:
        answer = await pool.fetch(url, "GET", "/pdserve/state", headers=headers, timeout_s=STATE_S)
    except WorkerError as exc:
        return StateLook(trouble=str(exc))
    took_s = time.monotonic() - asked_s
    if answer.status != 200:
        return StateLook(trouble=f"HTTP {answer.status}", status=answer.status, took_s=took_s)
    state = _document(answer)
    if not isinstance(state.get("workers"), list):
        return StateLook(trouble="the answer is no state document", status=200, took_s=took_s)
    now_s = state.get("now_s")
    skew_s = now_s - (wall_s + took_s / 2) if isinstance(now_s, int | float) else None
    return StateLook(state, status=200, took_s=took_s, skew_s=skew_s)


async def _look_at_view(pool: HttpClient, service: str, url: str) -> dict[str, WorkerInfo]:
    if not service or is_hidden(service, url):
        return {}
    try:
        answer = await pool.fetch(service, "GET", "/fleet/view", timeout_s=VIEW_S)
        view = msgspec.json.decode(answer.body, type=FleetView)
    except (PdserveError, msgspec.DecodeError):
        return {}
    return {info.instance_id: info for info in view.workers}


async def _look_at_worker(
    pool: HttpClient, row: Row, fleet_url: str, headers: Headers, gate: asyncio.Semaphore
) -> WorkerLook:
    url = str(row.get("url", ""))
    if is_hidden(url, fleet_url):
        return WorkerLook(row, is_hidden=True)
    async with gate:
        health, _ = await _ask(pool, url, "/health", headers, HEALTH_S)
        if health:
            return WorkerLook(row, health=health)
        info_trouble, info = await _ask(pool, url, "/server_info", headers, INFO_S)
        _, instance = await _ask(pool, url, "/pdserve/instance", headers, INFO_S)
        begun_s = time.time()
        _, loads = await _ask(pool, url, "/v1/loads?include=core,disagg,queues", headers, INFO_S)
        middle_s = (begun_s + time.time()) / 2
    return WorkerLook(
        row, info=info, info_trouble=info_trouble, instance=instance, loads=loads,
        skew_s=_skew_s(loads.get("timestamp"), middle_s),
    )  # fmt: skip


async def _ask(
    pool: HttpClient, url: str, path: str, headers: Headers, limit_s: float
) -> tuple[str, dict[str, Any]]:
    """Why it gave no good answer (empty if it did), and the answer's JSON object."""
    try:
        answer = await pool.fetch(url, "GET", path, headers=headers, timeout_s=limit_s)
    except PdserveError as exc:
        return str(exc).removeprefix(f"{url}: "), {}
    if answer.status != 200:
        return f"HTTP {answer.status} to GET {path}", {}
    return "", _document(answer)


def _document(answer: FetchedResponse) -> dict[str, Any]:
    try:
        value = json.loads(answer.body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _skew_s(stamp: object, here_s: float) -> float | None:
    """The worker's clock minus ours; SGLang stamps its loads with an ISO time in UTC."""
    try:
        told = datetime.fromisoformat(str(stamp))
    except ValueError:
        return None
    return told.timestamp() - here_s if told.tzinfo else None


def is_hidden(url: str, fleet_url: str) -> bool:
    """True for an address on the loopback of the fleet's machine when that is another one."""
    return _host(url) in LOOPBACK_HOSTS and _host(fleet_url) not in LOOPBACK_HOSTS


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def worker_info(row: Row) -> WorkerInfo:
    """A row of the state document as pairs and probes need it."""
    port = row.get("bootstrap_port")
    return WorkerInfo(
        worker_id=WorkerId(str(row["worker_id"])),
        instance_id=InstanceId(str(row.get("instance_id", ""))),
        role=Role(row["role"]),
        url=str(row["url"]),
        model="",
        bootstrap_host=str(row.get("bootstrap_host") or ""),
        bootstrap_port=int(port) if port is not None else None,
    )


def spread(
    prefills: Sequence[WorkerLook], decodes: Sequence[WorkerLook]
) -> list[tuple[WorkerLook, WorkerLook]]:
    """All pairs, in rounds that have every worker of the larger side once, should time run out."""
    num_small = min(len(prefills), len(decodes))
    is_wide = len(decodes) >= len(prefills)

    def round_of(place: tuple[int, int]) -> int:
        small, large = place if is_wide else place[::-1]
        return (small - large) % num_small

    places = [(p, d) for p in range(len(prefills)) for d in range(len(decodes))]
    return [(prefills[p], decodes[d]) for p, d in sorted(places, key=round_of)]


def gather_pairs(facts: FleetFacts, keys: Keys, untried: Mapping[str, str]) -> list[PairLook]:
    """A token through every pair; ``untried`` maps labels of pairs that must not be tried to the reason."""
    return asyncio.run(_gather_pairs(facts, keys, untried))


async def _gather_pairs(facts: FleetFacts, keys: Keys, untried: Mapping[str, str]) -> list[PairLook]:
    prefills = [look for look in facts.workers if look.role is Role.PREFILL]
    decodes = [look for look in facts.workers if look.role is Role.DECODE]
    pool, gate = HttpClient(), asyncio.Semaphore(PROBES_AT_ONCE)
    ends_s = time.monotonic() + ALL_PROBES_S

    async def look_at(prefill: WorkerLook, decode: WorkerLook) -> PairLook:
        pair = Pair(worker_info(prefill.row), worker_info(decode.row))
        reason = untried.get(pair.label) or _not_now(prefill) or _not_now(decode)
        if reason:
            return PairLook(prefill.name, decode.name, untried=reason)
        async with gate:
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                return PairLook(prefill.name, decode.name, untried="no time left")
            result = await probe_pair(pool, pair, min(PROBE_S, left_s), keys.workers)
        return PairLook(prefill.name, decode.name, result)

    try:
        tests: list[Coroutine[Any, Any, PairLook]] = [
            look_at(prefill, decode) for prefill, decode in spread(prefills, decodes)
        ]
        return list(await asyncio.gather(*tests))
    finally:
        await pool.close()


def _not_now(look: WorkerLook) -> str:
    if look.is_hidden:
        return f"{look.name} cannot be reached from this machine"
    if look.health:
        return f"{look.name} does not answer"
    return f"{look.name} is draining" if look.row.get("draining") else ""
