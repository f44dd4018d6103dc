"""One request inside a fake worker: its path from admission to the last byte, and the ways it can break.

    ADMITTED ─ transfer with the twin ─ RECEIVED / ANSWERING ─ first event ─ STREAMING ─ end

``Behaviour`` says how a fake treats every request; a ``Hold`` (sglang_pairing.py) ends one
request in a chosen ``Way`` at a chosen point.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pdserve.types import LOCAL_HOST, Role
from tests.support.resumable import HEADER, Break, Frame, error_frames, frames_of, rendered, rest_of, rids_in
from tests.support.sglang_answers import (
    abort_event,
    body_of,
    error_event,
    event_of,
    is_list_of_prompts,
    options_of,
    rids_of,
    rooms_of,
)
from tests.support.sglang_connection import FakeConnection
from tests.support.sglang_pairing import Meeting, Point, Way

if TYPE_CHECKING:
    from tests.support.sglang_server import FakeSGLang

PROBE_IDS = [1, 2, 3, 4, 5, 6, 7, 8]
"""The balancer's own test of a pair: tests do not interfere with it."""


@dataclass
class Behaviour:
    """How a fake answers data-plane requests. Change it between requests."""

    status: int = 200
    error_body: bytes = b'{"error":{"message":"the fake was told to fail"}}'
    tokens: int = 3
    delay_s: float = 0.0
    """Before the response head."""
    token_delay_s: float = 0.0
    padding_bytes: int = 0
    """Added to every streamed event."""
    hang: bool = False
    """Accept the request and never answer it."""
    hang_after: int | None = None
    """Fall silent after this many streamed events."""
    go_on: asyncio.Event | None = None
    """If set, ends the silence within ``segments``, or of a ``Break``."""
    reset_before_head: bool = False
    reset_after: int | None = None
    """Break the connection after this many events (0: after the head); a JSON body breaks half-way."""
    segments: tuple[bytes, ...] = ()
    """Sent in place of a stream's events, each in a segment of its own, and nothing after them."""
    body: bytes = b""
    """Sent in place of a whole answer."""
    finish: dict[str, Any] = field(default_factory=lambda: {"type": "length", "length": 3})
    close_after_answer: bool = False
    """End the connection after a response without announcing it: the peer holds a stale connection."""
    mute_connections: int = 0
    """Break this many kept-alive connections at their next request, before any answer."""
    gate: asyncio.Event | None = None
    """If set, wait for it before the response head."""


class Run:
    """One request inside a fake. ``is_over``: it came to an end of its own, so its KV is free."""

    def __init__(
        self, worker: FakeSGLang, connection: FakeConnection, path: str, request: dict[str, Any]
    ) -> None:
        self.is_over = False
        self.rids = rids_of(path, request)
        self._worker = worker
        self._does = worker.behaviour
        self._connection = connection
        self._path = path
        self._request = request
        self._is_probe = request.get("input_ids") == PROBE_IDS
        self._meetings: list[Meeting] = []
        self._is_aborted = False
        self._has_transferred = worker.rendezvous is None
        self._task = asyncio.current_task()
        if worker.rendezvous is not None:
            self._meetings = worker.rendezvous.arrive(worker.name, worker.role, rooms_of(path, request))

    @property
    def _is_stream(self) -> bool:
        # pydantic's reading of a bool, in small
        return str(options_of(self._path, self._request).get("stream")).lower() in ("true", "1", "1.0", "yes")

    def abort(self) -> None:
        """``/abort_request``: the HTTP answer, if it is still wanted, ends with finish reason abort."""
        self.lose()
        if not self._is_aborted and self._task is not None:
            self._is_aborted = True
            self._task.cancel()

    def lose(self) -> None:
        """Nobody works on it any more: a prefill that waits for this decode fails."""
        if self._worker.role is Role.DECODE:
            for meeting in self._meetings:
                meeting.break_off()

    async def serve(self) -> None:
        """Until it ended, well or badly."""
        try:
            await self._serve()
        except asyncio.CancelledError:
            if not self._is_aborted or self._connection.is_answered:
                raise
            if self._has_transferred:
                self._end_aborted()
            else:  # as SGLang does for what is in its bootstrap, prealloc and transfer queues
                self._respond(500, b'{"error":{"message":"KV transfer failed for request rank=0"}}')

    async def _serve(self) -> None:
        does, connection = self._does, self._connection
        if self._request.get("bootstrap_host") == LOCAL_HOST and not self._worker.prefills_locally:
            self._respond(501, b'{"error":{"message":"this server does not prefill the request itself"}}')
            return
        if await self._point(Point.ADMITTED) or not await self._meet():
            return
        if does.gate is not None:
            await does.gate.wait()
        if does.delay_s:
            await asyncio.sleep(does.delay_s)
        if does.hang:
            await asyncio.Event().wait()
        if does.reset_before_head:
            connection.abort()
        elif does.status != 200:
            self._respond(does.status, does.error_body)
        elif self._is_stream and self._tells and not self._is_probe:
            await self._tell()
        elif self._is_stream and does.segments:
            await self._send_segments()
        elif self._is_stream:
            await self._stream()
        elif does.body and not self._is_probe:
            self._respond(200, does.body)
        else:
            await self._complete()

    async def _meet(self) -> bool:
        """Both workers' part in the transfer; False if the request has ended in it."""
        rendezvous = self._worker.rendezvous
        if rendezvous is None:
            return True
        if self._worker.role is Role.DECODE:
            await rendezvous.receive(self._meetings)
            self._has_transferred = True
            return not await self._point(Point.RECEIVED)
        if not await rendezvous.send(self._meetings):
            self._respond(500, b'{"error":{"message":"KVTransferError: decode is gone"}}')
            return False
        self._has_transferred = True
        return not await self._point(Point.ANSWERING)

    async def _complete(self) -> None:
        does = self._does
        body = json.dumps(
            body_of(
                self._path, self._request, does.tokens, finish=does.finish, padding_bytes=does.padding_bytes,
                is_prefill=self._worker.role is Role.PREFILL,
            )
        ).encode()  # fmt: skip
        if does.reset_after is not None:
            self._connection.respond(200, body[: len(body) // 2], length=len(body))
            self._connection.fin()
        elif self._has_hold(Point.STREAMING):
            self._connection.respond(200, body[: len(body) // 2], length=len(body))
            if not await self._point(Point.STREAMING):
                self._connection.write(body[len(body) // 2 :])
                self._connection.is_answered = self.is_over = True
        else:
            self._respond(200, body)

    async def _stream(self) -> None:
        does, connection = self._does, self._connection
        connection.begin_stream()
        rids = self.rids or [""]
        for step in range(1 if self._worker.role is Role.PREFILL else does.tokens):
            if does.reset_after == step:
                connection.fin()
                return
            if does.hang_after == step:
                await asyncio.Event().wait()
            for index, rid in enumerate(rids):
                event = event_of(
                    self._path,
                    rid,
                    step + 1,
                    finish=does.finish,
                    padding_bytes=does.padding_bytes,
                    message="delta",
                )
                self._send_event(event if len(rids) == 1 else {**event, "index": index})
            await connection.writable.wait()
            if step == 0 and await self._point(Point.STREAMING):
                return
            if does.token_delay_s:
                await asyncio.sleep(does.token_delay_s)
        self._end_stream()

    @property
    def _tells(self) -> bool:
        """Decode was asked for its tokens, by its own name."""
        worker = self._worker
        asked = self._connection.headers.get(HEADER, "").partition(" ")[0]
        return worker.resumes and worker.role is Role.DECODE and asked == worker.instance_id

    async def _tell(self) -> None:
        worker, path, field = self._worker, self._path, None
        if self._connection.headers[HEADER].endswith(" resume"):
            field = self._request["pdserve_resume"]
        rids = self.rids if field is None else rids_in(field["log"])
        is_batch = is_list_of_prompts(path, self._request)
        frames: list[Frame] | None = frames_of(path, rids, self._does.tokens, is_batch=is_batch)
        if field is not None:
            frames = rest_of(frames or [], field)
        if frames is None or (field is not None and set(rids) & set(self.rids)):
            self._respond(400, b'{"error":{"message":"pdserve_resume: not a log of this request"}}')
            return
        end = worker.breaks.popleft() if worker.breaks else None
        if end is not None and end.how == "refuse":
            self._respond(400, b'{"error":{"message":"cannot resume"}}')
        else:
            await self._send_frames(frames, end)

    async def _send_frames(self, frames: list[Frame], end: Break | None) -> None:
        connection = self._connection
        if end is not None and end.obstacle:
            frames = [(f"{frames[0][0]} !{end.obstacle}".strip(), frames[0][1]), *frames[1:]]
        if end is not None and end.how.isdigit():
            frames = frames[: end.frames] + error_frames(self._path, int(end.how))
            end = None
        connection.begin_stream()
        for frame in frames if end is None else frames[: end.frames]:
            connection.chunk(rendered(frame))
            if self._does.token_delay_s:
                await asyncio.sleep(self._does.token_delay_s)
        if end is None:
            self.is_over = True
            connection.end_stream()
            return
        if end.num_bytes and (part := rendered(frames[end.frames])[: end.num_bytes]):
            connection.chunk(part)
        if end.how == "hang":
            await (self._does.go_on or asyncio.Event()).wait()
            for frame in frames[end.frames :]:
                connection.chunk(rendered(frame))
            self.is_over = True
            connection.end_stream()
            return
        await asyncio.sleep(0)
        self._worker.kill() if end.how == "kill" else connection.fin()

    async def _send_segments(self) -> None:
        does, connection = self._does, self._connection
        connection.begin_stream()
        for step, segment in enumerate(does.segments):
            if does.hang_after == step:
                await (does.go_on or asyncio.Event()).wait()
            connection.chunk(segment)
            await asyncio.sleep(does.token_delay_s)
        if does.reset_after is not None:
            connection.fin()
        else:
            self.is_over = True
            connection.end_stream()

    def _send_event(self, event: dict[str, Any]) -> None:
        self._connection.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _end_stream(self) -> None:
        self._connection.chunk(b"data: [DONE]\n\n")
        self.is_over = True
        self._connection.end_stream()

    def _respond(self, status: int, body: bytes) -> None:
        self.is_over = True
        self.lose()
        self._connection.respond(status, body)

    # -- where tests interfere ---------------------------------------------------------------

    def _has_hold(self, point: Point) -> bool:
        return any(hold.point is point and hold.worker is None for hold in self._worker.holds)

    async def _point(self, point: Point) -> bool:
        """True if the request has ended here."""
        if self._is_probe:
            return False
        for hold in self._worker.holds:
            if hold.point is point and hold.worker is None:
                way = await hold.stop(self._worker)
                if way is not None:
                    await self._end(way)
                    return True
        return False

    async def _end(self, way: Way) -> None:
        connection = self._connection
        match way:
            case Way.STATUS_500 | Way.STATUS_503 | Way.STATUS_400:
                self._respond(int(way.value), self._does.error_body)
            case Way.ERROR_EVENT:
                connection.begin_stream()
                self._send_event(error_event(self._path, connection.rid))
                self._end_stream()
            case Way.ABORTED:
                self._end_aborted()
            case Way.RESET_MID_BODY | Way.FIN_MID_BODY:
                self._begin_badly()
                connection.reset() if way is Way.RESET_MID_BODY else connection.fin()
            case Way.RESET_BEFORE_HEAD:
                connection.reset()
            case Way.FIN_BEFORE_HEAD:
                connection.fin()
            case Way.GARBAGE:
                connection.garble()
                await asyncio.Event().wait()
            case Way.SILENCE:
                await asyncio.Event().wait()
            case Way.KILLED:
                self._worker.kill()

    def _end_aborted(self) -> None:
        """As SGLang answers whoever still listens: status 200, finish reason abort, no status code."""
        self.is_over = True
        self.lose()
        event = abort_event(self._path, self._connection.rid)
        if not self._is_stream:
            self._connection.respond(200, json.dumps(event).encode())
            return
        if not self._connection.is_streaming:
            self._connection.begin_stream()
        self._send_event(event)
        self._end_stream()

    def _begin_badly(self) -> None:
        """Part of an answer, unless part of it is out already: half an event, half a body."""
        connection = self._connection
        if connection.is_streaming:
            connection.chunk(b'data: {"text": "cut')
        elif self._is_stream:
            connection.begin_stream()
            connection.chunk(b'data: {"text": "cut')
        elif not connection.has_head:
            connection.respond(200, b'{"text": "cut', length=100)
