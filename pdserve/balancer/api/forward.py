"""Putting a client's control request to workers: which headers and which target travel, how long to wait.

The body travels unchanged. The path is quoted anew: ``IncomingRequest.path`` is decoded,
and a line break that was hidden in it must not end our request line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, quote_from_bytes

import msgspec

from pdserve.balancer.fleet.fleet import WorkerFleet
from pdserve.balancer.fleet.worker import COMMAND, Worker, WorkerState
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import PdserveError, WorkerError
from pdserve.http.answer import JSON_TYPE, Answer, Headers
from pdserve.http.client import FetchedResponse, HttpClient
from pdserve.http.incoming import IncomingRequest
from pdserve.types import Role

ASK_S = 10.0
"""Limit of a question to a worker; /server_info asks the scheduler, which may be in a long step."""

WORK_S = 60.0
"""Limit where the worker has something to do: tokenize a long text, flush its cache."""

Reply = FetchedResponse | WorkerError
"""What a worker answered, or why it did not."""

_PASSED_ON = (b"content-type", b"accept", b"x-request-id", b"traceparent", b"tracestate")
_SAFE_IN_PATH = "/:@!$&'()*+,;=~"
_SAFE_IN_QUERY = _SAFE_IN_PATH + "?%[]"


class ControlRefused(PdserveError):
    """A control request that cannot be carried out; ``status`` is 4xx or 501.

    api/routes.py makes it the answer: ``answer`` if that is set, else an error in the shape of the route.
    """

    def __init__(self, message: str, status: int = 400, answer: Answer | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Question:
    """What a worker is asked, for whom. ``target`` is path and query as they go on the wire.

    ``accept`` is the form the answer must have; empty: what the client accepts.
    """

    client: IncomingRequest
    method: str
    target: str
    body: bytes = b""
    timeout_s: float = ASK_S
    accept: bytes = b""

    @classmethod
    def of(
        cls,
        client: IncomingRequest,
        body: bytes = b"",
        *,
        path: str = "",
        query: bytes | None = None,
        timeout_s: float = ASK_S,
        accept: bytes = b"",
    ) -> Question:
        """The client's own request, perhaps on another path, with another query.

        Raises:
            Refused: for ``.`` and ``..`` in the path: whatever stands before a worker might resolve
                them, and a client's route would become an operator's.
        """
        if not {".", ".."}.isdisjoint(client.path.split("/")):
            raise ControlRefused("the path must not have . or .. in it")
        asked = client.query if query is None else query
        target = quote(path or client.path, safe=_SAFE_IN_PATH)
        if asked:
            target += f"?{quote_from_bytes(asked, safe=_SAFE_IN_QUERY)}"
        method = "GET" if client.method == "HEAD" else client.method
        return cls(client, method, target, body, timeout_s, accept)


class WorkerAsker:
    """Asks one worker or all of them in the name of a client."""

    def __init__(self, fleet: WorkerFleet, pool: HttpClient, config: BalancerConfig) -> None:
        self.fleet = fleet
        self.config = config
        self._pool = pool

    async def ask(self, question: Question, worker: Worker) -> Reply:
        """Put a question to one worker."""
        return await self.ask_url(question, worker.url)

    async def ask_url(self, question: Question, url: str) -> Reply:
        """The same by the worker's base address."""
        headers, target = self._headers(question), question.target
        is_command = question.method == "POST" and not target.startswith("/abort_request")
        try:
            return await self._pool.fetch(
                url,
                question.method,
                target,
                question.body,
                headers=headers,
                timeout_s=question.timeout_s,
                label=COMMAND if is_command else "",
            )
        except WorkerError as exc:
            return exc

    async def ask_all(self, question: Question, workers: Sequence[Worker]) -> list[Reply]:
        """Ask them all at once; replies in the order of ``workers``."""
        return await asyncio.gather(*(self.ask(question, worker) for worker in workers))

    def willing(self) -> list[Worker]:
        """All workers, those to ask first in front: ready, decode (it speaks for the service), least busy."""
        return sorted(
            self.fleet.workers(),
            key=lambda w: (w.state is not WorkerState.READY, w.role is not Role.DECODE, w.num_inflight),
        )

    def find(self, name: str) -> Worker:
        """The worker of that id, or of that address.

        Raises:
            Refused: 404 if there is none.
        """
        workers = self.fleet.workers()
        for key in (name, name.rstrip("/")):
            for worker in workers:
                if key in (worker.worker_id, worker.url):
                    return worker
        known = ", ".join(worker.worker_id for worker in workers) or "none yet"
        raise ControlRefused(f"there is no worker {name!r}; known: {known}", 404)

    def _headers(self, question: Question) -> Headers:
        """The client's own authorization, unless the workers have a key of their own."""
        config, given = self.config, question.client.headers
        headers = tuple((name, given[name]) for name in _PASSED_ON if name in given)
        if question.accept:
            headers = (*(each for each in headers if each[0] != b"accept"), (b"accept", question.accept))
        if question.body and b"content-type" not in given:
            headers += (JSON_TYPE,)
        authorization = given.get(b"authorization", b"")
        if config.worker_api_key or (config.worker_key and not authorization):
            authorization = b"Bearer " + config.worker_key.encode()
        return (*headers, (b"authorization", authorization)) if authorization else headers


def passed_on(reply: FetchedResponse) -> Answer:
    """A worker's answer as the client's: status, body and content type."""
    content = tuple((name, value) for name, value in reply.headers if name.lower() == b"content-type")
    return Answer(reply.status, reply.body, content)


def document(reply: Reply) -> dict[str, Any] | None:
    """The JSON object of a 200 answer, None for anything else."""
    if not isinstance(reply, FetchedResponse) or reply.status != 200:
        return None
    try:
        value = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def why_not(worker: Worker, reply: Reply) -> str:
    """Why ``reply`` is of no use, naming the worker."""
    return str(reply) if isinstance(reply, WorkerError) else f"{worker.url}: HTTP {reply.status}"


def fields_of(body: bytes) -> dict[str, Any]:
    """The body's JSON object; an empty body has none.

    Raises:
        Refused: if it is anything else.
    """
    if not body.strip():
        return {}
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ControlRefused(f"the request body is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ControlRefused("the request body must be a JSON object")
    return value
