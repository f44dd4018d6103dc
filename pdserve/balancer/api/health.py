"""Is the service up? Answered from what the balancer knows; only ``/health_generate`` asks workers.

A pair is ready once a real token came through it, so readiness already means
more than SGLang's own ``/health``. ``/health_generate`` makes sure of the
present: every ready server must generate a token for itself.
"""

from __future__ import annotations

import asyncio

from pdserve.balancer.api.errors import error_answer
from pdserve.balancer.api.forward import Question, WorkerAsker, why_not
from pdserve.balancer.fleet.worker import PairState, Worker
from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.state import render_state
from pdserve.balancer.metrics.workers import WorkerMetrics
from pdserve.http.answer import Answer, json_answer
from pdserve.http.client import FetchedResponse
from pdserve.http.incoming import IncomingRequest

HEALTH_GENERATE_S = 25.0
"""SGLang looks at its token after 1 s at the earliest and gives up after 20 s."""
LEAVING = "the balancer is shutting down; requests that come nevertheless are served"


class HealthControl:
    """Liveness, readiness and the state document."""

    def __init__(self, asker: WorkerAsker, ledger: RequestLedger, metrics: WorkerMetrics) -> None:
        self.is_leaving = False
        """True once the balancer was told to stop: whoever sends requests should turn to another."""
        self._asker = asker
        self._fleet = asker.fleet
        self._ledger = ledger
        self._metrics = metrics
        self._generating: asyncio.Task[Answer] | None = None

    async def liveness(self, client: IncomingRequest, body: bytes) -> Answer:
        """200 while the process runs."""
        return json_answer({"status": "alive"})

    async def readiness(self, client: IncomingRequest, body: bytes) -> Answer:
        """200 while some pair can serve, else 503 that says why not; ``missing`` counts expected workers.

        503 at shutdown, as SGLang's /health.
        """
        if self.is_leaving:
            return error_answer(503, LEAVING)
        if self._fleet.scheduler.has_ready_pair:
            missing = ", ".join(row.missing for row in self._fleet.capacity() if row.missing)
            return json_answer({"status": "ready", **({"missing": missing} if missing else {})})
        return error_answer(503, self._fleet.scheduler.explain())

    async def acceptance(self, client: IncomingRequest, body: bytes) -> Answer:
        """Readiness, and 503 while whoever could serve is paused: SGLang's ``/ready``."""
        if paused := self._fleet.paused():
            names = ", ".join(worker.worker_id for worker in paused)
            return error_answer(503, f"generation is paused on {names}; POST /continue_generation ends that")
        return await self.readiness(client, body)

    async def health_generate(self, client: IncomingRequest, body: bytes) -> Answer:
        """200 if both servers of some ready pair generate a token now.

        Anyone may ask, and each round costs every server a token: those who ask
        while one is under way get its result.
        """
        ready = await self.readiness(client, body)
        if ready.status != 200:
            return ready
        if self._generating is None or self._generating.done():
            self._generating = asyncio.create_task(self._generate(client), name="health-generate")
        return await asyncio.shield(self._generating)

    async def state(self, client: IncomingRequest, body: bytes) -> Answer:
        """The state document."""
        return json_answer(render_state(self._fleet, self._metrics, self._ledger))

    async def _generate(self, client: IncomingRequest) -> Answer:
        pairs = [record for record in self._fleet.pairs() if record.state is PairState.READY]
        workers: list[Worker] = list({id(w): w for r in pairs for w in (r.prefill, r.decode)}.values())
        question = Question(client, "GET", "/health_generate", timeout_s=HEALTH_GENERATE_S)
        replies = await self._asker.ask_all(question, workers)
        asked = list(zip(workers, replies, strict=True))
        well = [w for w, reply in asked if isinstance(reply, FetchedResponse) and reply.status == 200]
        if any(record.prefill in well and record.decode in well for record in pairs):
            return json_answer({"status": "ready"})
        missing = "; ".join(why_not(worker, reply) for worker, reply in asked if worker not in well)
        return error_answer(503, f"no pair generates: {missing or self._fleet.scheduler.explain()}")
