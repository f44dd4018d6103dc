"""Probes a pair: one tiny request over both legs shows whether a real token comes through.

    POST /generate, same body and room ──► prefill ┐ both 200 and
                                       └─► decode  ┘ decode's answer has output

``max_new_tokens`` is 2: prefill makes the first token, so only the second
proves that decode got the KV and ran a step. Any failure ends both legs.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from pdserve.balancer.fleet.health import HealthTracker
from pdserve.balancer.fleet.worker import (
    Backoff,
    PairRecord,
    PairState,
    ProbeFailed,
    ProbePassed,
    ProbeResult,
    Worker,
    WorkerState,
)
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import WorkerError, WorkerUnreachable
from pdserve.http.client import HttpClient
from pdserve.types import MAX_ROOM, Pair, Role, WorkerInfo

logger = logging.getLogger(__name__)

ABORT_S = 2.0
Headers = tuple[tuple[bytes, bytes], ...]
JSON: Headers = ((b"content-type", b"application/json"),)


class _LegFailed(Exception):
    def __init__(self, worker: WorkerInfo, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.failure = ProbeFailed(worker.role, f"{worker.role} {message}", unreachable)


@dataclass(frozen=True, slots=True)
class WorkerKeys:
    """Headers that authorize the balancer's own questions: SGLang asks for its ``--api-key``, and on
    control routes such as /abort_request for its ``--admin-api-key`` if it has one."""

    plain: Headers = ()
    control: Headers = ()

    @classmethod
    def of(cls, config: BalancerConfig) -> WorkerKeys:
        """By the configured keys."""
        return cls(_bearer(config.worker_key), _bearer(config.worker_control_key))


def _bearer(key: str) -> Headers:
    return ((b"authorization", b"Bearer " + key.encode()),) if key else ()


class _Meta(msgspec.Struct):
    finish_reason: dict[str, Any] | None = None
    completion_tokens: int = 0


class _Generated(msgspec.Struct):
    text: str = ""
    output_ids: list[int] | None = None
    meta_info: _Meta = msgspec.field(default_factory=_Meta)


async def probe_pair(
    pool: HttpClient, pair: Pair, timeout_s: float, keys: WorkerKeys = WorkerKeys()
) -> ProbeResult:
    """Send the two-token request to both workers and check the answers.

    Never raises for what the workers do. Failed or cancelled, it ends both legs
    before it returns.
    """
    rid = uuid.uuid4().hex
    result: ProbeResult | None = None
    try:
        result = await _run_legs(pool, pair, _probe_body(pair.prefill, rid), timeout_s, keys.plain)
    finally:
        if not isinstance(result, ProbePassed):
            await abort_both(pool, pair, rid, keys.control)
    return result


async def abort_both(pool: HttpClient, pair: Pair, rid: str, headers: Headers = ()) -> None:
    """Have both servers drop a request; a server that cannot be reached is logged and left."""

    async def abort(worker: WorkerInfo) -> None:
        body = msgspec.json.encode({"rid": rid})
        try:
            await pool.fetch(
                worker.url, "POST", "/abort_request", body, headers=JSON + headers, timeout_s=ABORT_S
            )
        except WorkerError as exc:
            logger.debug("abort not delivered rid=%s worker=%s: %s", rid, worker.worker_id, exc)

    await asyncio.gather(abort(pair.prefill), abort(pair.decode))


async def _run_legs(
    pool: HttpClient, pair: Pair, body: bytes, timeout_s: float, headers: Headers
) -> ProbeResult:
    answered: set[Role] = set()
    started_s = time.monotonic()

    async def leg(worker: WorkerInfo) -> bytes:
        answer = await _ask(pool, worker, body, timeout_s, headers)
        answered.add(worker.role)
        return answer

    # No TaskGroup: in Python 3.11 it forgets that it was cancelled itself when a child fails at the same
    # moment, and the task that runs this would never end.
    legs = [asyncio.create_task(leg(worker)) for worker in (pair.prefill, pair.decode)]
    try:
        done, missing = await asyncio.wait(legs, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in legs:
            if task in done:
                task.result()
        if missing:
            return _silent(answered, timeout_s)
        _check_output(pair.decode, legs[1].result())
    except _LegFailed as exc:
        return exc.failure
    finally:
        for task in legs:
            task.cancel()
        await asyncio.gather(*legs, return_exceptions=True)
    return ProbePassed(time.monotonic() - started_s)


async def _ask(
    pool: HttpClient, worker: WorkerInfo, body: bytes, timeout_s: float, headers: Headers
) -> bytes:
    try:
        answer = await pool.fetch(
            worker.url, "POST", "/generate", body, headers=JSON + headers, timeout_s=timeout_s
        )
    except WorkerError as exc:
        raise _LegFailed(worker, str(exc), unreachable=isinstance(exc, WorkerUnreachable)) from exc
    if answer.status != 200:
        text = answer.body[:300].decode(errors="replace")
        raise _LegFailed(worker, f"{worker.url}: HTTP {answer.status}: {text}")
    return answer.body


def _probe_body(prefill: WorkerInfo, rid: str) -> bytes:
    return msgspec.json.encode(
        {
            "rid": rid,
            "input_ids": [1, 2, 3, 4, 5, 6, 7, 8],
            "sampling_params": {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True},
            "bootstrap_host": prefill.bootstrap_host,
            "bootstrap_port": prefill.bootstrap_port,
            "bootstrap_room": secrets.randbelow(MAX_ROOM) + 1,
        }
    )


def _check_output(worker: WorkerInfo, body: bytes) -> None:
    """SGLang reports some aborts as 200 with ``finish_reason.type == "abort"``: that is no output."""
    try:
        answer = msgspec.json.decode(body, type=_Generated)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise _LegFailed(worker, f"{worker.url}: not an answer: {exc}") from exc
    reason = answer.meta_info.finish_reason or {}
    if reason.get("type") == "abort":
        raise _LegFailed(worker, f"{worker.url}: aborted: {reason.get('message', '')}")
    if not answer.output_ids and not answer.text:
        raise _LegFailed(worker, f"{worker.url}: answered without output")


def _silent(answered: set[Role], timeout_s: float) -> ProbeFailed:
    missing = [role for role in Role if role not in answered]
    return ProbeFailed(
        missing[0] if len(missing) == 1 else None,
        f"no answer from {' and '.join(missing) or 'the pair'} within {timeout_s:g} s",
    )


SUSPECT_BACKOFF_S = (0.2, 10.0)
JOIN_BACKOFF_S = (0.5, 10.0)
"""Between two probes of a pair that fails: a busy partner of a broken worker hardly notices that."""
MAX_PROBES = 8
MAX_PROBES_PER_WORKER = 2
"""One probe may hang for ``probe_s`` on a broken peer; the second place lets other pairs be tested."""


VERSION_S = 5.0


class _ModelVersion(msgspec.Struct):
    weight_version: str | None = None


class ProbeGate:
    """Bounds how many probes run at once, in all and per worker."""

    def __init__(self) -> None:
        self._active = 0
        self._changed = asyncio.Event()

    async def enter(self, record: PairRecord) -> None:
        """Wait until this pair may be probed. Follow with ``turn``, without an await between."""
        while not self._has_room(record):
            await self._changed.wait()

    @contextmanager
    def turn(self, record: PairRecord) -> Iterator[None]:
        """Hold the place that ``enter`` waited for."""
        self._count(record, 1)
        try:
            yield
        finally:
            self._count(record, -1)
            self._changed.set()
            self._changed = asyncio.Event()

    def _has_room(self, record: PairRecord) -> bool:
        busiest = max(record.prefill.num_probes, record.decode.num_probes)
        return self._active < MAX_PROBES and busiest < MAX_PROBES_PER_WORKER

    def _count(self, record: PairRecord, step: int) -> None:
        self._active += step
        record.prefill.num_probes += step
        record.decode.num_probes += step


class PairProber:
    """Probes one pair until it is ready, and again each time it is called into question."""

    def __init__(
        self,
        record: PairRecord,
        config: BalancerConfig,
        pool: HttpClient,
        gate: ProbeGate,
        health: HealthTracker,
    ) -> None:
        self._record = record
        self._config = config
        self._pool = pool
        self._gate = gate
        self._health = health
        self._keys = WorkerKeys.of(config)

    async def run(self) -> None:
        """Until cancelled."""
        backoff: Backoff | None = None
        while True:
            result = await self._probe()
            if isinstance(result, ProbePassed):
                backoff = None
                await self._record.retest.wait()
            else:
                backoff = backoff or Backoff(*self._backoff_bounds())
                await asyncio.sleep(backoff.next_s())

    async def _probe(self) -> ProbeResult:
        record = self._record
        while not record.can_be_probed:
            for worker in (record.prefill, record.decode):
                await worker.answers.wait()
                await worker.serves.wait()
            if record.can_be_probed:
                await self._gate.enter(record)
        with self._gate.turn(record):
            record.retest.clear()
            record.state = PairState.PROBING
            differ = await self._compare_versions()
            result = differ or await probe_pair(self._pool, record.pair, self._config.probe_s, self._keys)
        self._health.pair_probed(record, result)
        return result

    async def _compare_versions(self) -> ProbeFailed | None:
        """Two servers that tell different versions of their weights give no right answer together."""
        record = self._record
        told = await asyncio.gather(*(self._version(w) for w in (record.prefill, record.decode)))
        if not all(told) or told[0] == told[1]:
            return None
        versions = f"{record.prefill.worker_id} has {told[0]}, {record.decode.worker_id} has {told[1]}"
        return ProbeFailed(None, f"weight versions differ: {versions}; send both the same weights")

    async def _version(self, worker: Worker) -> str:
        """What the server calls its weights; empty if it does not say."""
        try:
            answer = await self._pool.fetch(
                worker.url, "GET", "/model_info", headers=self._keys.plain, timeout_s=VERSION_S
            )
            return msgspec.json.decode(answer.body, type=_ModelVersion).weight_version or ""
        except (WorkerError, msgspec.DecodeError, UnicodeDecodeError):
            return ""

    def _backoff_bounds(self) -> tuple[float, float]:
        is_suspect = WorkerState.SUSPECT in (self._record.prefill.state, self._record.decode.state)
        return SUSPECT_BACKOFF_S if is_suspect else JOIN_BACKOFF_S
