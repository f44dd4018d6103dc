"""What the balancer answers itself or by asking its workers: health, models, server info, fan-outs.

Each method is one endpoint: it takes the request (body already read) and
returns the whole answer. Only ``state`` and the health family ask no worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from pdserve.balancer.fleet import Fleet
from pdserve.balancer.http_errors import Answer, Headers, error_answer, json_answer
from pdserve.balancer.member import Worker, WorkerState
from pdserve.balancer.proxy import Client
from pdserve.balancer.state import render_state
from pdserve.balancer.upstream import FetchedResponse, UpstreamPool
from pdserve.errors import WorkerError
from pdserve.types import Role

ASK_S = 10.0
"""Limit of a question to a worker; /server_info asks the scheduler, which may be in a long step."""

FLUSH_S = 60.0
SERVER_INFO = "/server_info"
_OLD_NAMES = {"/get_model_info": "/model_info"}


class DataPlane(Protocol):
    """What is asked of the dispatcher."""

    def snapshot(self) -> dict[str, object]:
        """``requests`` and ``recent``."""
        ...

    def rids_of(self, name: str) -> list[str]:
        """The workers' rids of the live request that its client calls ``name``."""
        ...


class ControlPlane:
    """The endpoints that take no prompt."""

    def __init__(self, fleet: Fleet, pool: UpstreamPool, data_plane: DataPlane) -> None:
        self._fleet = fleet
        self._pool = pool
        self._data_plane = data_plane

    # -- answered here -----------------------------------------------------------------------

    async def liveness(self, client: Client, body: bytes) -> Answer:
        """200 while the process runs."""
        return json_answer({"status": "alive"})

    async def readiness(self, client: Client, body: bytes) -> Answer:
        """200 while some pair can serve, else 503 that says why not."""
        if self._fleet.has_ready_pair:
            return json_answer({"status": "ready"})
        return error_answer(503, self._fleet.explain())

    async def state(self, client: Client, body: bytes) -> Answer:
        """The state document."""
        return json_answer(render_state(self._fleet, self._data_plane.snapshot()))

    async def workers(self, client: Client, body: bytes) -> Answer:
        """The members as sglang-router lists them."""
        workers = self._fleet.workers()
        counts = {role: sum(worker.role is role for worker in workers) for role in Role}
        stats = {
            "prefill_count": counts[Role.PREFILL],
            "decode_count": counts[Role.DECODE],
            "regular_count": 0,
        }
        rows = [_router_row(worker) for worker in workers]
        return json_answer({"workers": rows, "total": len(rows), "stats": stats})

    # -- asked of one worker -----------------------------------------------------------------

    async def any_worker(self, client: Client, body: bytes) -> Answer:
        """What the first worker that answers says; decode workers first, they speak for the service."""
        path = _OLD_NAMES.get(client.path, client.path)
        why = self._fleet.explain()
        for worker in sorted(self._fleet.workers(), key=_reluctance):
            answer = await self._ask(worker, client, path)
            if isinstance(answer, FetchedResponse) and answer.status < 500:
                content = tuple(h for h in answer.headers if h[0].lower() == b"content-type")
                return Answer(answer.status, answer.body, content)
            why = str(answer) if isinstance(answer, WorkerError) else f"{worker.url}: HTTP {answer.status}"
        return error_answer(503, f"no worker answers {client.path}: {why}", is_openai=_is_openai(client))

    # -- asked of all ------------------------------------------------------------------------

    async def server_info(self, client: Client, body: bytes) -> Answer:
        """Each worker's server info by role; the first decode's fields stand for the service."""
        workers = self._fleet.workers()
        answers = await self._ask_all(workers, client, SERVER_INFO, ASK_S)
        infos: dict[Role, list[dict[str, Any]]] = {role: [] for role in Role}
        for worker, answer in zip(workers, answers, strict=True):
            if isinstance(answer, FetchedResponse) and (info := _document(answer)) is not None:
                infos[worker.role].append(info)
        prefills, decodes = infos[Role.PREFILL], infos[Role.DECODE]
        if not decodes:
            return error_answer(503, f"no decode server tells its server info: {self._fleet.explain()}")
        states = [state for info in decodes for state in info.get("internal_states") or ()]
        whole = {**decodes[0], "prefill": prefills, "decode": decodes, "internal_states": states}
        return json_answer(whole)

    async def flush_cache(self, client: Client, body: bytes) -> Answer:
        """Every worker drops its prefix cache; 200 only if all did."""
        path = "/flush_cache" + (f"?{client.query.decode('latin-1')}" if client.query else "")
        workers = self._fleet.workers()
        return _fan_out_answer(workers, await self._ask_all(workers, client, path, FLUSH_S))

    async def abort_request(self, client: Client, body: bytes) -> Answer:
        """Every worker aborts the request; its client may name it by its own rid or X-Request-Id."""
        try:
            fields = msgspec.json.decode(body) if body else {}
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            return error_answer(400, f"the request body is not valid JSON: {exc}")
        if not isinstance(fields, dict):
            return error_answer(400, "the request body must be a JSON object")
        name = fields.get("rid")
        rids: list[Any] = self._data_plane.rids_of(name) if isinstance(name, str) else []
        workers = self._fleet.workers()
        answers: Sequence[FetchedResponse | WorkerError] = []
        for rid in rids or [name]:
            told = msgspec.json.encode({**fields, "rid": rid} if rid is not None else fields)
            answers = await self._ask_all(workers, client, "/abort_request", ASK_S, told)
        return _fan_out_answer(workers, answers)

    # -- asking ------------------------------------------------------------------------------

    async def _ask(
        self, worker: Worker, client: Client, path: str, timeout_s: float = ASK_S, body: bytes = b""
    ) -> FetchedResponse | WorkerError:
        headers: Headers = ((b"content-type", b"application/json"),) if body else ()
        if authorization := client.headers.get(b"authorization"):
            headers += ((b"authorization", authorization),)
        method = "GET" if client.method == "HEAD" else client.method
        try:
            return await self._pool.fetch(
                worker.url, method, path, body, headers=headers, timeout_s=timeout_s
            )
        except WorkerError as exc:
            return exc

    async def _ask_all(
        self, workers: list[Worker], client: Client, path: str, timeout_s: float, body: bytes = b""
    ) -> list[FetchedResponse | WorkerError]:
        return await asyncio.gather(*(self._ask(w, client, path, timeout_s, body) for w in workers))


def _fan_out_answer(workers: list[Worker], answers: Sequence[FetchedResponse | WorkerError]) -> Answer:
    """200 if every worker said so; otherwise the first other status, 502 for no answer at all."""
    if not workers:
        return error_answer(503, "the fleet has no workers")
    rows: list[dict[str, object]] = []
    for worker, answer in zip(workers, answers, strict=True):
        if isinstance(answer, WorkerError):
            status, message = 502, str(answer)
        else:
            status, message = answer.status, answer.body.decode("utf-8", "replace").strip()
        row = {"worker_id": worker.worker_id, "url": worker.url, "status": status, "message": message}
        rows.append(row)
    bad = [row["status"] for row in rows if row["status"] != 200]
    return json_answer({"success": not bad, "workers": rows}, int(str(bad[0])) if bad else 200)


def _router_row(worker: Worker) -> dict[str, object]:
    info = worker.info
    row: dict[str, object] = {
        "id": info.worker_id,
        "url": info.url,
        "model_id": info.served_model_name or info.model or "unknown",
        "worker_type": str(info.role),
        "is_healthy": worker.state is WorkerState.READY,
        "load": worker.num_inflight,
        "connection_mode": "http",
        "state": str(worker.state),
    }
    if info.role is Role.PREFILL:
        row["bootstrap_host"], row["bootstrap_port"] = info.bootstrap_host, info.bootstrap_port
    return row


def _document(answer: FetchedResponse) -> dict[str, Any] | None:
    try:
        document = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return document if answer.status == 200 and isinstance(document, dict) else None


def _reluctance(worker: Worker) -> tuple[bool, bool]:
    return worker.state is not WorkerState.READY, worker.role is not Role.DECODE


def _is_openai(client: Client) -> bool:
    return client.path.startswith("/v1/")
