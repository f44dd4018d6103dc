"""Control requests that every worker must hear, and those that only one may.

    client ─► balancer ─► prefill-0, prefill-1, decode-0 … ─► one row per worker, 200 only if all said 200

``?worker=ID`` (or the worker's URL; repeatable) narrows a fan-out down to the
workers named. Workers are told at once, and one that fails does not stop the
others: the rows say who has done it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode

import msgspec

from pdserve.balancer.api.errors import error_answer, worker_error_status
from pdserve.balancer.api.forward import (
    ASK_S,
    WORK_S,
    ControlRefused,
    Question,
    Reply,
    WorkerAsker,
    document,
    fields_of,
    passed_on,
)
from pdserve.balancer.fleet.weights import VERSION, parse_change
from pdserve.balancer.fleet.worker import Worker
from pdserve.balancer.request.options import lax_bool
from pdserve.errors import WorkerError
from pdserve.http.answer import Answer, json_answer
from pdserve.http.client import FetchedResponse
from pdserve.http.incoming import IncomingRequest

WORKER = "worker"
"""Query parameter, and body field where exactly one worker is meant."""

ABORTS_AT_ONCE = 32
"""Requests that a worker is told to end at the same time."""
_RANKS = (
    "a weight update group gives every server ranks of its own (rank_offset), so one body cannot go to all: "
    'send one request per server with ?worker=ID, all at once, or {"rank_offsets": {"prefill-0": 1, '
    '"decode-0": 2}} in place of rank_offset'
)
_KV_IS_REGISTERED = (
    "releasing the KV cache of {} is refused: its transfer backend keeps that memory registered and would go "
    'on writing there; {{"tags": ["weights"]}} releases the weights alone'
)
_CAN_DEREGISTER = ("mooncake", "mooncake_tcp", "ascend", "fake")
"""Transfer backends that let go of released KV memory (sglang disaggregation/*/conn.py); nixl does not."""


class FanOutControl:
    """The endpoints that change workers.

    ``abort`` ends the requests whose names begin so, as far as that is the balancer's, and returns the
    workers' rids of them; ``abort_all`` all.
    """

    def __init__(
        self, asker: WorkerAsker, abort: Callable[[str], list[str]], abort_all: Callable[[], None]
    ) -> None:
        self._asker = asker
        self._abort = abort
        self._abort_all = abort_all
        self._request_s = asker.config.request_s

    # -- to all ------------------------------------------------------------------------------

    async def fan_out(self, client: IncomingRequest, body: bytes) -> Answer:
        """Method, body and query as they are, to all; quick work."""
        return await self._fan_out(client, body, WORK_S)

    async def fan_out_slow(self, client: IncomingRequest, body: bytes) -> Answer:
        """The same for what may take minutes: weights, profiles, memory."""
        return await self._fan_out(client, body, self._request_s)

    async def change_weights(self, client: IncomingRequest, body: bytes) -> Answer:
        """What must be the same everywhere: weights and adapters. Who fails serves again once it has it."""
        if not _named(client) and _aborts_all(client.path, fields_of(body)):
            self._abort_all()
        change = parse_change(client.path, body)
        if change is None:
            return await self._fan_out(client, body, self._request_s)
        workers, question = self._chosen(client), self._question(client, body, self._request_s)
        aborts_all = fields_of(body).get("abort_all_requests", client.path == VERSION)
        if lax_bool(aborts_all) and not _named(client):
            self._abort_all()  # workers do so with what they have
        with self._asker.fleet.updates.update(change, workers, is_whole=not _named(client)) as update:

            async def tell(worker: Worker) -> Reply:
                reply: Reply | None = None
                try:
                    reply = await self._asker.ask(question, worker)
                    return reply
                finally:
                    is_done = isinstance(reply, FetchedResponse) and reply.status == 200
                    update.told(worker, is_done=is_done)

            return _rows(workers, await asyncio.gather(*(tell(worker) for worker in workers)))

    async def flush_cache(self, client: IncomingRequest, body: bytes) -> Answer:
        """Every worker drops its prefix cache; SGLang waits ``?timeout=`` seconds for idleness."""
        try:
            wait_s = float(dict(_parameters(client)).get("timeout", "0"))
        except ValueError:
            wait_s = 0.0  # SGLang will say what is wrong with it
        answer = await self._fan_out(client, body, WORK_S + min(max(0.0, wait_s), self._request_s))
        for worker in self._chosen(client):
            # Also for one that refused: the prompt tree then knows less than it might.
            self._asker.fleet.scheduler.cache_flushed(worker.instance_id)
        return answer

    async def pause(self, client: IncomingRequest, body: bytes) -> Answer:
        """Stop generation: who is paused does not count as stuck, and gets requests only if all are."""
        if not _named(client) and _aborts_all(client.path, fields_of(body)):
            self._abort_all()
        return await self._pause(client, body, self._request_s, is_paused=True)

    async def go_on(self, client: IncomingRequest, body: bytes) -> Answer:
        """End a pause."""
        return await self._pause(client, body, WORK_S, is_paused=False)

    async def _pause(
        self, client: IncomingRequest, body: bytes, timeout_s: float, *, is_paused: bool
    ) -> Answer:
        workers = self._chosen(client)
        replies = await self._asker.ask_all(self._question(client, body, timeout_s), workers)
        for worker, reply in zip(workers, replies, strict=True):
            if isinstance(reply, FetchedResponse) and reply.status == 200:
                self._asker.fleet.health.worker_paused(worker, is_paused)
        return _rows(workers, replies)

    async def abort_request(self, client: IncomingRequest, body: bytes) -> Answer:
        """End requests here and on every worker: all, or those whose rid or X-Request-Id begins as told."""
        fields = fields_of(body)
        name = fields.get("rid")
        rids: list[str] = []
        if lax_bool(fields.get("abort_all")):
            self._abort_all()
        elif isinstance(name, str):
            rids = self._abort(name)
        workers = self._asker.fleet.workers()
        if not workers:  # what waited for one has ended
            return json_answer({"success": True, "message": "there are no workers to tell", "workers": []})
        told = [msgspec.json.encode({**fields, "rid": rid}) for rid in rids] or [body]
        questions = [Question.of(client, each, timeout_s=ASK_S) for each in told]
        replies: list[list[Reply]] = []
        for start in range(0, len(questions), ABORTS_AT_ONCE):
            batch = questions[start : start + ABORTS_AT_ONCE]
            replies += await asyncio.gather(*(self._asker.ask_all(each, workers) for each in batch))
        return _rows(workers, [_worst(of_worker) for of_worker in zip(*replies, strict=True)])

    async def open_session(self, client: IncomingRequest, body: bytes) -> Answer:
        """One session under one id on every worker; answers with the id alone, as SGLang does."""
        fields = fields_of(body)
        session_id = fields.get("session_id") or uuid.uuid4().hex
        told = msgspec.json.encode({**fields, "session_id": session_id})
        answer = await self._fan_out(client, told, WORK_S)
        return json_answer(session_id) if answer.status == 200 else answer

    async def release_memory(self, client: IncomingRequest, body: bytes) -> Answer:
        """Release GPU memory; that of the KV cache only where the transfer backend lets it go."""
        tags = fields_of(body).get("tags")
        if not isinstance(tags, list) or not tags or "kv_cache" in tags:
            workers = self._chosen(client)
            infos = await self._asker.ask_all(Question(client, "GET", "/server_info"), workers)
            bound = [w.worker_id for w, info in zip(workers, infos, strict=True) if _holds_kv(info)]
            if bound:
                raise ControlRefused(_KV_IS_REGISTERED.format(", ".join(bound)), 501)
        return await self._fan_out(client, body, self._request_s)

    # -- to one ------------------------------------------------------------------------------

    async def one_worker(self, client: IncomingRequest, body: bytes) -> Answer:
        """For what concerns a single server: ``?worker=`` or the body's ``worker`` names it, else 400."""
        names = _named(client)
        if not names and body:
            fields = fields_of(body)
            if WORKER in fields:
                names = [str(fields.pop(WORKER))]
                body = msgspec.json.encode(fields)
        if len(names) != 1:
            known = ", ".join(worker.worker_id for worker in self._asker.fleet.workers()) or "none yet"
            raise ControlRefused(f"{client.path} is for one server: name it with ?worker=ID; known: {known}")
        worker = self._asker.find(names[0])
        reply = await self._asker.ask(self._question(client, body, self._request_s), worker)
        if isinstance(reply, WorkerError):
            return error_answer(worker_error_status(reply), str(reply))
        return passed_on(reply)

    async def init_weights_update_group(self, client: IncomingRequest, body: bytes) -> Answer:
        """Ranks differ from server to server: to one that is named, or each with its own ``rank_offset``."""
        fields = fields_of(body)
        offsets = fields.pop("rank_offsets", None)
        if offsets is None:
            if WORKER not in fields and not _named(client):
                raise ControlRefused(_RANKS)
            return await self.one_worker(client, body)
        if not isinstance(offsets, dict) or not all(type(offset) is int for offset in offsets.values()):
            raise ControlRefused("rank_offsets must be an object: worker id to its first rank")
        workers = [self._asker.find(name) for name in offsets]
        bodies = [msgspec.json.encode({**fields, "rank_offset": offset}) for offset in offsets.values()]
        questions = [self._question(client, told, self._request_s) for told in bodies]
        # At once: each waits for all the others in the rendezvous.
        asked = (self._asker.ask(q, worker) for q, worker in zip(questions, workers, strict=True))
        return _rows(workers, await asyncio.gather(*asked))

    # -- telling -----------------------------------------------------------------------------

    async def _fan_out(self, client: IncomingRequest, body: bytes, timeout_s: float) -> Answer:
        workers = self._chosen(client)
        return _rows(workers, await self._asker.ask_all(self._question(client, body, timeout_s), workers))

    def _chosen(self, client: IncomingRequest) -> list[Worker]:
        names = _named(client)
        return [self._asker.find(name) for name in names] if names else self._asker.fleet.workers()

    def _question(self, client: IncomingRequest, body: bytes, timeout_s: float) -> Question:
        """The client's request without our own parameter."""
        query = client.query
        if _named(client):
            query = urlencode([pair for pair in _parameters(client) if pair[0] != WORKER]).encode()
        return Question.of(client, body, query=query, timeout_s=timeout_s)


def _parameters(client: IncomingRequest) -> list[tuple[str, str]]:
    return parse_qsl(client.query.decode("latin-1"), keep_blank_values=True)


def _named(client: IncomingRequest) -> list[str]:
    """The workers that ``?worker=`` names."""
    return [value for name, value in _parameters(client) if name == WORKER] if client.query else []


def _holds_kv(reply: Reply) -> bool:
    if isinstance(reply, WorkerError):
        return False  # it will not hear the release either; its row says so
    info = document(reply)
    return info is None or info.get("disaggregation_transfer_backend") not in _CAN_DEREGISTER


def _aborts_all(path: str, fields: dict[str, Any]) -> bool:
    """True for what ends every request of a server, those in its queue too, before it does its work."""
    if path == "/pause_generation":
        return bool(fields.get("mode", "abort") == "abort")
    return lax_bool(fields.get("abort_all_requests", path == "/update_weight_version")) is True


def _worst(replies: Sequence[Reply]) -> Reply:
    """The first that is not a plain yes, if there is one."""
    bad = (reply for reply in replies if isinstance(reply, WorkerError) or reply.status != 200)
    return next(bad, replies[0])


def _rows(workers: Sequence[Worker], replies: Sequence[Reply]) -> Answer:
    """200 if every worker said so; otherwise the first other status, 502 for no answer at all."""
    if not workers:
        return error_answer(503, "the fleet has no workers")
    rows = [_row(worker, reply) for worker, reply in zip(workers, replies, strict=True)]
    bad = [row for row in rows if row["status"] != 200]
    message = f"{len(rows) - len(bad)} of {len(rows)} workers have done it"
    status = bad[0]["status"] if bad else 200
    return json_answer({"success": not bad, "message": message, "workers": rows}, status)


def _row(worker: Worker, reply: Reply) -> dict[str, Any]:
    """``message`` is what the worker said as text; ``answer`` the document, where it was one."""
    row: dict[str, Any] = {"worker_id": worker.worker_id, "url": worker.url}
    if isinstance(reply, WorkerError):
        return {**row, "status": 502, "message": str(reply)}
    row |= {"status": reply.status, "message": reply.body.decode("utf-8", "replace").strip()}
    try:
        said = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return row
    if isinstance(said, dict):
        texts = (said.get(name) for name in ("message", "error", "detail"))
        return {**row, "message": next((text for text in texts if isinstance(text, str)), ""), "answer": said}
    return {**row, "message": "", "answer": said} if isinstance(said, list) else row
