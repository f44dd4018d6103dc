"""FakeSGLang: a small real HTTP server that behaves like a prefill or decode SGLang server, or misbehaves.

    async with FakeSGLang(Role.PREFILL) as worker:
        worker.behaviour.status = 500        # what it does from now on
        ... send something to worker.url ...
        worker.requests, worker.aborts, worker.disconnects   # what it saw
        worker.held                                          # rids whose KV it still holds

A pair of fakes meets only through the recorded rooms unless both were given the
same ``Rendezvous``: then decode waits for prefill as in SGLang, and a test can stop
a request anywhere by a ``Hold`` (sglang_pairing.py). No KV travels. Everything runs on
the test's event loop over a real socket; nothing here sleeps to settle.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo
from tests.support.resumable import Break
from tests.support.sglang_answers import GENERATE_PATHS, event_of
from tests.support.sglang_connection import FakeConnection
from tests.support.sglang_pairing import Hold, Rendezvous
from tests.support.sglang_run import Behaviour, Run
from tests.support.sglang_weights import ROUTES, FakeWeights

DEADLINE_S = 60.0
DEATH_NOTICE_S = 0.02
MAX_CALLS = 4096


class FakeSGLang:
    """One server on a free port of the loopback. ``async with`` starts and stops it."""

    def __init__(
        self,
        role: Role = Role.DECODE,
        *,
        name: str = "",
        behaviour: Behaviour | None = None,
        rendezvous: Rendezvous | None = None,
        resumes: bool = False,
    ) -> None:
        self.role = role
        self.name = name or f"{role}-0"
        self.behaviour = behaviour or Behaviour()
        self.rendezvous = rendezvous
        self.resumes = resumes
        """It tells its tokens and goes on with others' answers, as pdserve's workers do."""
        self.breaks: deque[Break] = deque()
        """How the next streams of decode end, where fakes tell their tokens; tests share it between them."""
        self.holds: list[Hold] = []
        self.calls: deque[tuple[str, bytes, dict[str, str]]] = deque(maxlen=MAX_CALLS)
        """Method, target and headers of every request of any kind, the last ones."""
        self.requests: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
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
        self.is_dead = False
        self.reset_on_accept = 0
        self.kill_at_request = False
        """Die at the next request, before it is accepted."""
        self.moving = asyncio.Event()
        """Cleared by /pause_generation: requests wait, and /ready says 503."""
        self.moving.set()
        self.weights = FakeWeights()
        self.poison = ""
        """Die of any request that has this text in it."""
        self.prefills_locally = True
        """A decode server that computes the prompts of requests that name LOCAL_HOST."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[FakeConnection] = set()
        self._kv: set[str] = set()
        self._runs: dict[str, Run] = {}

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def instance_id(self) -> str:
        """What a balancer must call it to hear its tokens."""
        return f"{self.name}.{self.port}"

    @property
    def rooms(self) -> list[Any]:
        """bootstrap_room of each request, in order."""
        return [request.get("bootstrap_room") for request in self.requests]

    @property
    def held(self) -> set[str]:
        """Rids whose KV is in use: admitted, and neither answered to the end nor aborted.

        A closed socket alone frees nothing: a server that waits for its twin notices it late. An abort
        may overtake its request, which is on another connection; the closed socket ends that one.
        """
        return self._kv - set(self.aborts)

    @property
    def num_exchanges(self) -> int:
        """Connections with a request that has not been answered to the end."""
        return sum(not connection.is_answered for connection in self._connections)

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

    # -- life --------------------------------------------------------------------------------

    async def start(self, port: int = 0) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: FakeConnection(self), "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def restart(self) -> FakeSGLang:
        """Die, and have another process take the port: with the weights of its start, and nothing cached.

        The caller stops it.
        """
        await self.stop()
        successor = FakeSGLang(self.role, name=self.name)
        await successor.start(self.port)
        return successor

    async def stop(self) -> None:
        """Break every connection and close the port, as a killed process would."""
        self.kill()
        tasks = [c.task for c in self._connections if c.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    def kill(self) -> None:
        """The process is gone, with its KV."""
        self.is_dead = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()
        # Twins learn of it by their transfer, later than by a socket of the process itself.
        for run in list(self._runs.values()):
            asyncio.get_running_loop().call_later(DEATH_NOTICE_S, run.lose)
        self._kv.clear()

    def drop_idle(self) -> None:
        """Close every connection, politely: what uvicorn does when keep-alive runs out."""
        for connection in list(self._connections):
            connection.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    # -- for connections ---------------------------------------------------------------------

    def connected(self, connection: FakeConnection) -> None:
        """Accepted."""
        self._connections.add(connection)
        self.num_connections += 1
        self.num_accepted += 1

    def disconnected(self, connection: FakeConnection, *, in_answer: bool) -> None:
        """Closed."""
        self._connections.discard(connection)
        self.num_connections -= 1
        if in_answer:
            self.disconnects.append(connection.rid)

    def is_muted(self, num_served: int) -> bool:
        """True if the connection must break now."""
        if self.kill_at_request:
            self.kill()
            return True
        if num_served > 1 and self.behaviour.mute_connections > 0:
            self.behaviour.mute_connections -= 1
            return True
        return False

    def answered(self, connection: FakeConnection) -> None:
        """A response is complete."""
        if self.behaviour.close_after_answer:
            connection.close()

    def called(self, method: str, target: bytes, headers: dict[str, str]) -> None:
        """Remember what was asked."""
        self.calls.append((method, target, headers))

    async def answer(self, connection: FakeConnection, method: str, path: str, body: bytes) -> None:
        """Serve one request."""
        if path in GENERATE_PATHS:
            await self._generate(connection, path, body)
        elif path == "/abort_request":
            asked = json.loads(body)
            for rid in list(self._runs) if asked.get("abort_all") else [asked.get("rid", "")]:
                self._abort(rid)
            connection.respond(200, b"")
        elif path in ("/pause_generation", "/continue_generation"):
            self.moving.clear() if path == "/pause_generation" else self.moving.set()
            connection.respond(200, b'{"status":"ok"}')
        elif path in ROUTES:
            connection.respond(*await self.weights.change(path, body))
        elif path == "/ready":
            connection.respond(200 if self.moving.is_set() else 503, b"")
        elif path == "/flush_cache":
            self.flushes += 1
            connection.respond(200, b"Cache flushed.\n", "text/plain; charset=utf-8")
        elif (document := self._document(path)) is not None and method == "GET":
            connection.respond(200, json.dumps(document).encode())
        else:
            connection.respond(404, b'{"detail":"Not Found"}')

    def _abort(self, rid: str) -> None:
        self.aborts.append(rid)
        run = self._runs.pop(rid, None)
        if run is not None and self.rendezvous is not None:
            run.abort()

    def _document(self, path: str) -> dict[str, Any] | None:
        documents: dict[str, dict[str, Any]] = {
            "/ping": {},
            "/health": {},
            "/v1/loads": {"loads": [self.load]},
            "/v1/models": {"object": "list", "data": [{"id": "fake-model", "object": "model"}]},
            "/model_info": {
                "model_path": self.weights.path,
                "weight_version": self.weights.version,
                "disaggregation_mode": str(self.role),
            },
            "/server_info": {
                "startup_time": self.weights.startup_time,
                "model_path": "fake-model",
                "name": self.name,
                "internal_states": [{"last_gen_throughput": 1.5, "name": self.name}],
            },
        }
        if self.resumes:
            is_able = self.role is Role.DECODE and self.prefills_locally
            about = {"instance_id": self.instance_id, "resumes": True, "prefills_locally": is_able}
            documents["/pdserve/instance"] = about
        return documents.get(path)

    # -- one prompt --------------------------------------------------------------------------

    async def _generate(self, connection: FakeConnection, path: str, body: bytes) -> None:
        request = json.loads(body)
        self.bodies.append(body)
        self.requests.append(request)
        if self.poison and self.poison.encode() in body:
            self.kill()
            return
        self.paths.append(path)
        self.headers.append(connection.headers)
        run = Run(self, connection, path, request)
        await self.moving.wait()
        self.weights.used[str(request.get("bootstrap_room"))] = self.weights.name
        rids = run.rids
        connection.rid = rids[0] if len(rids) == 1 else str(rids) if rids else ""
        self._kv.update(rids)
        self._runs.update(dict.fromkeys(rids, run))
        try:
            await run.serve()
        finally:
            if run.is_over:
                self._kv.difference_update(rids)
                for rid in rids:
                    self._runs.pop(rid, None)

    def _event(
        self, path: str, rid: str, tokens: int, does: Behaviour, message: str = "message"
    ) -> dict[str, Any]:
        return event_of(
            path, rid, tokens, finish=does.finish, padding_bytes=does.padding_bytes, message=message
        )


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition; fails after DEADLINE_S."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"did not happen within {DEADLINE_S:g} s: {what}") from None
