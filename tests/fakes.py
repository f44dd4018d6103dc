"""FakeSGLang: a small real HTTP server that behaves like a prefill or decode SGLang server, or misbehaves.

    async with FakeSGLang(Role.PREFILL) as worker:
        worker.behaviour.status = 500        # what it does from now on
        ... send something to worker.url ...
        worker.requests, worker.aborts, worker.disconnects   # what it saw

A pair of fakes meets only through the recorded rooms: no KV travels. Everything
runs on the test's event loop over a real socket; nothing here sleeps to settle.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import httptools

from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo

GENERATE_PATHS = ("/generate", "/v1/chat/completions", "/v1/completions")
DEADLINE_S = 5.0


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
    reset_before_head: bool = False
    reset_after: int | None = None
    """Break the connection after this many events (0: after the head); a JSON body breaks half-way."""
    finish: dict[str, Any] = field(default_factory=lambda: {"type": "length", "length": 3})
    close_after_answer: bool = False
    """End the connection after a response without announcing it: the peer holds a stale connection."""
    mute_connections: int = 0
    """Break this many kept-alive connections at their next request, before any answer."""
    gate: asyncio.Event | None = None
    """If set, wait for it before the response head."""


class FakeSGLang:
    """One server on a free port of the loopback. ``async with`` starts and stops it."""

    def __init__(
        self, role: Role = Role.DECODE, *, name: str = "", behaviour: Behaviour | None = None
    ) -> None:
        self.role = role
        self.name = name or f"{role}-0"
        self.behaviour = behaviour or Behaviour()
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.aborts: list[str] = []
        self.disconnects: list[str] = []
        """rid of each request whose connection the peer closed before the response had ended."""
        self.flushes = 0
        self.load: dict[str, Any] = {"num_running_reqs": 0, "num_waiting_reqs": 0}
        self.num_connections = 0
        self.num_accepted = 0
        self.is_write_paused = False
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def rooms(self) -> list[Any]:
        """bootstrap_room of each request, in order."""
        return [request.get("bootstrap_room") for request in self.requests]

    @property
    def info(self) -> WorkerInfo:
        """How the bootstrap service would describe it; the instance is this start of it."""
        is_prefill = self.role is Role.PREFILL
        return WorkerInfo(
            worker_id=WorkerId(self.name),
            instance_id=InstanceId(f"{self.name}@{self.port}"),
            role=self.role,
            url=self.url,
            model="fake-model",
            bootstrap_host="127.0.0.1" if is_prefill else "",
            bootstrap_port=9000 + self.port % 1000 if is_prefill else None,
        )

    async def start(self, port: int = 0) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Break every connection and close the port, as a killed process would."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()
        tasks = [c.task for c in self._connections if c.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    def drop_idle(self) -> None:
        """Close every connection, politely: what uvicorn does when keep-alive runs out."""
        for connection in list(self._connections):
            connection.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def answer(self, connection: _Connection, method: str, path: str, body: bytes) -> None:
        """Serve one request."""
        if path in GENERATE_PATHS:
            await self._generate(connection, path, json.loads(body))
        elif path == "/abort_request":
            self.aborts.append(json.loads(body).get("rid", ""))
            connection.respond(200, b"")
        elif path == "/flush_cache":
            self.flushes += 1
            connection.respond(200, b"Cache flushed.\n", "text/plain; charset=utf-8")
        elif (document := self._document(path)) is not None and method == "GET":
            connection.respond(200, json.dumps(document).encode())
        else:
            connection.respond(404, b'{"detail":"Not Found"}')

    def _document(self, path: str) -> dict[str, Any] | None:
        documents: dict[str, dict[str, Any]] = {
            "/ping": {},
            "/health": {},
            "/v1/loads": {"loads": [self.load]},
            "/v1/models": {"object": "list", "data": [{"id": "fake-model", "object": "model"}]},
            "/model_info": {"model_path": "fake-model", "disaggregation_mode": str(self.role)},
            "/server_info": {
                "model_path": "fake-model",
                "name": self.name,
                "internal_states": [{"last_gen_throughput": 1.5, "name": self.name}],
            },
        }
        return documents.get(path)

    async def _generate(self, connection: _Connection, path: str, request: dict[str, Any]) -> None:
        does = self.behaviour
        self.requests.append(request)
        self.paths.append(path)
        self.headers.append(connection.headers)
        connection.rid = str(request.get("rid", ""))
        if does.gate is not None:
            await does.gate.wait()
        if does.delay_s:
            await asyncio.sleep(does.delay_s)
        if does.hang:
            await asyncio.Event().wait()
        if does.reset_before_head:
            connection.abort()
        elif does.status != 200:
            connection.respond(does.status, does.error_body)
        elif request.get("stream"):
            await self._stream(connection, path, does)
        else:
            self._complete(connection, path, request, does)

    def _complete(self, connection: _Connection, path: str, request: dict[str, Any], does: Behaviour) -> None:
        rids = request.get("rid", "")
        one = not isinstance(rids, list)
        answers = [self._event(path, rid, does.tokens, does) for rid in ([rids] if one else rids)]
        if request.get("return_logprob"):
            for answer in answers:
                answer["meta_info"] |= self._logprobs(does.tokens)
        body = json.dumps(answers[0] if one or path != "/generate" else answers).encode()
        if does.reset_after is not None:
            connection.respond(200, body[: len(body) // 2], length=len(body))
            connection.abort_after_write()
        else:
            connection.respond(200, body)

    def _logprobs(self, tokens: int) -> dict[str, Any]:
        """Prefill knows the prompt's, decode the output's, as in SGLang."""
        is_prefill = self.role is Role.PREFILL
        return {
            "input_token_logprobs": [[None, 5, None], [-0.5, 6, None]] if is_prefill else [],
            "output_token_logprobs": [[-0.25, 7, None]] * tokens,
        }

    async def _stream(self, connection: _Connection, path: str, does: Behaviour) -> None:
        connection.begin_stream()
        for index in range(1 if self.role is Role.PREFILL else does.tokens):
            if does.reset_after == index:
                connection.abort_after_write()
                return
            if does.hang_after == index:
                await asyncio.Event().wait()
            event = self._event(path, connection.rid, index + 1, does)
            connection.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            await connection.writable.wait()
            if does.token_delay_s:
                await asyncio.sleep(does.token_delay_s)
        connection.chunk(b"data: [DONE]\n\n")
        connection.end_stream()

    def _event(self, path: str, rid: str, tokens: int, does: Behaviour) -> dict[str, Any]:
        text = " tok" * tokens + "x" * does.padding_bytes
        usage = {"prompt_tokens": 4, "completion_tokens": tokens, "total_tokens": 4 + tokens}
        if path == "/generate":
            meta = {"id": rid, "finish_reason": does.finish, "prompt_tokens": 4, "completion_tokens": tokens}
            return {"text": text, "output_ids": list(range(tokens)), "meta_info": meta}
        choice: dict[str, Any] = {"index": 0, "finish_reason": does.finish["type"]}
        choice |= {"text": text} if path == "/v1/completions" else {"message": {"content": text}}
        return {"id": rid, "object": "fake", "choices": [choice], "usage": usage}


class _Connection(asyncio.Protocol):
    """One accepted connection: parses requests, runs one at a time, notices the peer leaving."""

    def __init__(self, fake: FakeSGLang) -> None:
        self.fake = fake
        self.rid = ""
        self.headers: dict[str, str] = {}
        self.task: asyncio.Task[None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = bytearray()
        self._is_answered = True
        self._num_served = 0
        self._transport: asyncio.Transport | None = None

    # -- asyncio.Protocol --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        self.fake._connections.add(self)
        self.fake.num_connections += 1
        self.fake.num_accepted += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.fake._connections.discard(self)
        self.fake.num_connections -= 1
        if not self._is_answered:
            self.fake.disconnects.append(self.rid)
        self.writable.set()
        if self.task is not None and not self.task.done():
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        self.writable.clear()
        self.fake.is_write_paused = True

    def resume_writing(self) -> None:
        self.writable.set()
        self.fake.is_write_paused = False

    # -- httptools ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url, self._body, self.headers = b"", bytearray(), {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._is_answered, self.rid = False, ""
        self._num_served += 1
        if self._num_served > 1 and self.fake.behaviour.mute_connections > 0:
            self.fake.behaviour.mute_connections -= 1
            self.abort()
            return
        method, path = self._parser.get_method().decode(), self._url.decode().partition("?")[0]
        work = self.fake.answer(self, method, path, bytes(self._body))
        self.task = asyncio.get_running_loop().create_task(work)

    # -- answering ---------------------------------------------------------------------------

    def respond(
        self, status: int, body: bytes, content_type: str = "application/json", length: int | None = None
    ) -> None:
        """A whole response; ``length`` announces another size than is sent."""
        size = len(body) if length is None else length
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {size}\r\n\r\n"
        self._write(head.encode() + body)
        if length is None:
            self._answered()

    def begin_stream(self) -> None:
        """The head of an event stream."""
        self._write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    def chunk(self, data: bytes) -> None:
        """One chunk of a stream."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        """The terminating chunk."""
        self._write(b"0\r\n\r\n")
        self._answered()

    def close(self) -> None:
        """FIN after what was written."""
        if self._transport is not None:
            self._transport.close()

    def abort_after_write(self) -> None:
        """End in the middle of a response, after what was written has left."""
        self._is_answered = True  # our doing, not the peer's
        self.close()

    def abort(self) -> None:
        """Reset the connection now."""
        self._is_answered = True
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _answered(self) -> None:
        self._is_answered = True
        if self.fake.behaviour.close_after_answer:
            self.close()


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition; fails after DEADLINE_S."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"did not happen within {DEADLINE_S:g} s: {what}") from None
