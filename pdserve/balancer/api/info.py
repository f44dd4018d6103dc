"""What clients may want to know of the service: asked of one worker, or put together from all.

A worker's own answer, 4xx included, is passed on as it is; a worker that cannot
be reached or fails is skipped for the next.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl

from pdserve.balancer.api.errors import route_error
from pdserve.balancer.api.forward import (
    ASK_S,
    WORK_S,
    Question,
    Reply,
    WorkerAsker,
    document,
    passed_on,
    why_not,
)
from pdserve.balancer.fleet.worker import Worker
from pdserve.balancer.metrics.export import render_metrics
from pdserve.balancer.metrics.exposition import ExpositionMerger
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.http.answer import Answer, json_answer
from pdserve.http.client import FetchedResponse
from pdserve.http.incoming import IncomingRequest
from pdserve.types import Role

SERVER_INFO = "/server_info"
LOADS = "/v1/loads"
METRICS = "/metrics"
RESPONSES = "/v1/responses/"
CANCEL = "/cancel"
SCRAPE_S = 4.0
"""Limit of a worker's metrics: one that hangs must not cost Prometheus, which waits 10 s, the others'."""
EXPOSITION = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")

_OLD_NAMES = {"/get_model_info": "/model_info"}


class InfoControl:
    """The endpoints that only look."""

    def __init__(self, asker: WorkerAsker, ledger: RequestLedger, metrics: WorkerMetrics) -> None:
        self._asker = asker
        self._fleet = asker.fleet
        self._ledger = ledger
        self._metrics = metrics

    # -- one worker --------------------------------------------------------------------------

    async def any_worker(self, client: IncomingRequest, body: bytes) -> Answer:
        """What the first worker that answers says; decode workers first, they speak for the service."""
        timeout_s = WORK_S if body else ASK_S
        question = Question.of(client, body, path=_OLD_NAMES.get(client.path, ""), timeout_s=timeout_s)
        status, why = 503, self._fleet.scheduler.explain()
        for worker in self._asker.willing():
            reply = await self._asker.ask(question, worker)
            if isinstance(reply, FetchedResponse):
                if reply.status < 500 or reply.status == 501:
                    return passed_on(reply)
                status = reply.status  # SGLang has 500 for some wrong questions too
            why = why_not(worker, reply)
        return route_error(client.path, status, f"no worker answers {client.path}: {why}")

    # -- all workers -------------------------------------------------------------------------

    async def server_info(self, client: IncomingRequest, body: bytes) -> Answer:
        """Each worker's server info by role; the first decode's fields stand for the service."""
        workers = self._fleet.workers()
        replies = await self._asker.ask_all(Question.of(client, path=SERVER_INFO), workers)
        infos: dict[Role, list[dict[str, Any]]] = {role: [] for role in Role}
        for worker, reply in zip(workers, replies, strict=True):
            if (info := document(reply)) is not None:
                infos[worker.role].append(info)
        prefills, decodes = infos[Role.PREFILL], infos[Role.DECODE]
        if not decodes:
            why = f"no decode server tells its server info: {self._fleet.scheduler.explain()}"
            return route_error(client.path, 503, why)
        states = [state for info in decodes for state in info.get("internal_states") or ()]
        whole = {**decodes[0], "prefill": prefills, "decode": decodes, "internal_states": states}
        return json_answer(whole)

    async def loads(self, client: IncomingRequest, body: bytes) -> Answer:
        """SGLang's ``/v1/loads`` of all workers in one list; each entry says whose it is.

        ``num_accelerators`` (behind one DP rank) stands in each entry too: workers may differ.
        """
        parameters = parse_qsl(client.query.decode("latin-1"), keep_blank_values=True)
        wants_text = dict(parameters).get("format") == "prometheus"
        workers = self._fleet.workers()
        replies = await self._asker.ask_all(Question.of(client, path=LOADS), workers)
        if wants_text:
            return await self._exposition(client, workers, replies, "no worker tells its load")
        told = [(w, d) for w, reply in zip(workers, replies, strict=True) if (d := document(reply))]
        if not told:
            return self._refusal(client, workers, replies, "no worker tells its load")
        first = told[0][1]
        rows = [
            {**row, "num_accelerators": d.get("num_accelerators"), "worker_id": w.worker_id, "role": w.role}
            for w, d in told
            for row in d.get("loads") or ()
            if isinstance(row, dict)
        ]
        whole = {**first, "timestamp": datetime.now(UTC).isoformat(), "loads": rows}
        return json_answer(whole)

    async def metrics(self, client: IncomingRequest, body: bytes) -> Answer:
        """The balancer's own metrics, then those of the workers that publish any. Always 200."""
        workers = self._fleet.workers()
        replies = await self._asker.ask_all(_scrape(client, SCRAPE_S), workers)
        theirs = await _merged(workers, replies)
        return Answer(200, (self._own() + theirs).encode(), (EXPOSITION,))

    async def own_metrics(self, client: IncomingRequest, body: bytes) -> Answer:
        """The balancer's own alone; no worker is asked."""
        return Answer(200, self._own().encode(), (EXPOSITION,))

    async def engine_metrics(self, client: IncomingRequest, body: bytes) -> Answer:
        """The workers' Prometheus text in one, with a ``worker_id`` label; they need ``--enable-metrics``."""
        workers = self._fleet.workers()
        replies = await self._asker.ask_all(_scrape(client, ASK_S), workers)
        if any(isinstance(reply, FetchedResponse) and reply.status == 404 for reply in replies) and not any(
            isinstance(reply, FetchedResponse) and reply.status == 200 for reply in replies
        ):
            why = "the workers publish no metrics: start SGLang with --enable-metrics"
            return route_error(client.path, 501, why)
        return await self._exposition(client, workers, replies, "no worker tells its metrics")

    # -- answers -----------------------------------------------------------------------------

    def _own(self) -> str:
        return render_metrics(self._fleet, self._metrics, self._ledger)

    async def _exposition(
        self, client: IncomingRequest, workers: list[Worker], replies: list[Reply], why: str
    ) -> Answer:
        if not any(isinstance(reply, FetchedResponse) and reply.status == 200 for reply in replies):
            return self._refusal(client, workers, replies, why)
        return Answer(200, (await _merged(workers, replies)).encode(), (EXPOSITION,))

    def _refusal(
        self, client: IncomingRequest, workers: list[Worker], replies: list[Reply], why: str
    ) -> Answer:
        """A worker's own 4xx where there is one (the client's fault), else 503."""
        reasons = [why_not(worker, reply) for worker, reply in zip(workers, replies, strict=True)]
        for reply in replies:
            if isinstance(reply, FetchedResponse) and 400 <= reply.status < 500:
                return passed_on(reply)
        return route_error(
            client.path, 503, f"{why}: {'; '.join(reasons) or self._fleet.scheduler.explain()}"
        )


def _scrape(client: IncomingRequest, timeout_s: float) -> Question:
    """Prometheus would rather have OpenMetrics, whose samples are no text of version 0.0.4."""
    return Question.of(client, path=METRICS, timeout_s=timeout_s, accept=b"text/plain")


async def _merged(workers: list[Worker], replies: list[Reply]) -> str:
    """The texts of those who answered in one, each with the labels that tell whose it is.

    A worker's takes milliseconds, and streams go on between two of them.
    """
    merger = ExpositionMerger()
    for worker, reply in zip(workers, replies, strict=True):
        if isinstance(reply, FetchedResponse) and reply.status == 200:
            labels = {"worker_id": str(worker.worker_id), "worker_role": str(worker.role)}
            merger.add(labels, reply.body.decode("utf-8", "replace"))
            await asyncio.sleep(0)
    return merger.text()
