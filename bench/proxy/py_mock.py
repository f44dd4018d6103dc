"""The mock workers of mock.cpp for machines without a C++ compiler: same command line, routes and counts.

Raw asyncio.Protocol on uvloop, bytes prepared once; less than half as fast as the C++ one.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

import uvloop

# Run as a program, its folder's parent is not on the path; imported by a test, it is.
sys.path.insert(0, __file__.rpartition("/proxy/")[0])

from proxy import py_answers as answers

ROOM_WAIT_S = 10.0
GENERATION = {b"/generate": (False, b'"max_new_tokens"'), b"/v1/chat/completions": (True, b'"max_tokens"')}


@dataclass(slots=True)
class Counts:
    """As /mock/stats shows them."""

    prefills: int = 0
    decodes: int = 0
    matched: int = 0
    mismatched: int = 0
    lonely: int = 0
    parked: int = 0
    aborts: int = 0
    events: int = 0
    broken: int = 0
    other: int = 0
    streams_peak: int = 0


class Fleet:
    """Rooms and counts that all workers of the process share."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.num_streams = 0
        self.lonely: set[int] = set()
        self.parked: dict[int, Request] = {}
        self.eager: list[Request] = []

    def stats(self, *, reset: bool = False) -> dict[str, int]:
        """Counts since the last reset; ``reset`` begins anew first."""
        if reset:
            self.counts = Counts(streams_peak=self.num_streams)
            self.lonely.clear()
        return asdict(self.counts) | {"lonely": len(self.lonely), "parked": len(self.parked)}

    def hasten(self, request: Request) -> None:
        """One token for every unpaced stream per turn of the loop."""
        self.eager.append(request)
        if len(self.eager) == 1:
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        due, self.eager = self.eager, []
        for request in due:
            if not request.is_over and request.connection.can_write:
                request.step()
            if not request.is_over:
                self.hasten(request)


@dataclass(slots=True)
class Worker:
    """One port."""

    fleet: Fleet
    is_prefill: bool
    num_running: int = 0
    num_served: int = 0


class Request:
    """A generation being answered."""

    def __init__(self, connection: Connection, path: bytes, body: bytes) -> None:
        self.connection = connection
        self.worker = connection.worker
        self.fleet = self.worker.fleet
        self.is_chat, limit = GENERATION[path]
        self.is_stream = b'"stream":true' in body or b'"stream": true' in body
        self.pace_s = _number(body, b"pace=", 0) / 1e3
        self.total = max(1, _number(body, limit, 16))
        self.done = 0
        self.room = _number(body, b'"bootstrap_room"', -1)
        self.is_over = False
        self.is_streaming = False
        self.timer: asyncio.TimerHandle | None = None
        self.worker.num_running += 1
        self.worker.num_served += 1

    def serve(self) -> None:
        """Answer at once, or wait for the twin."""
        counts, fleet = self.fleet.counts, self.fleet
        if self.worker.is_prefill:
            counts.prefills += 1
            self.total, self.pace_s = 1, 0.0
            self.begin()
            self._call_twin()
            return
        counts.decodes += 1
        if self.room >= 0 and self.room not in fleet.lonely:
            if self.room in fleet.parked:
                self._refuse()
                return
            fleet.parked[self.room] = self
            self.timer = asyncio.get_running_loop().call_later(ROOM_WAIT_S, self._refuse)
            return
        counts.matched += self.room >= 0
        fleet.lonely.discard(self.room)
        self.begin()

    def _call_twin(self) -> None:
        fleet = self.fleet
        if self.room < 0:
            return
        twin = fleet.parked.pop(self.room, None)
        if twin is not None:
            fleet.counts.matched += 1
            twin.begin()
        elif self.room in fleet.lonely:
            fleet.counts.mismatched += 1
        else:
            fleet.lonely.add(self.room)

    def begin(self) -> None:
        """The first bytes, or when they are due."""
        if self.timer is not None:
            self.timer.cancel()
        if self.is_stream:
            self.is_streaming = not self.worker.is_prefill
            self.fleet.num_streams += self.is_streaming
            self.fleet.counts.streams_peak = max(self.fleet.counts.streams_peak, self.fleet.num_streams)
            self.connection.transport.write(answers.STREAM_HEAD)
        if self.pace_s:
            loop = asyncio.get_running_loop()
            steps = int(loop.time() / self.pace_s) + (1 if self.is_stream else self.total)
            self.timer = loop.call_at(steps * self.pace_s, self._tick, steps)
        elif self.is_stream:
            self.fleet.hasten(self)
        else:
            self.step()

    def _tick(self, steps: int) -> None:
        self.step()
        if not self.is_over:
            self.timer = asyncio.get_running_loop().call_at((steps + 1) * self.pace_s, self._tick, steps + 1)

    def step(self) -> None:
        """The next token of a stream, or the answer of one that does not stream."""
        self.done = self.done + 1 if self.is_stream else self.total
        is_last = self.done == self.total
        if self.is_stream:
            self.fleet.counts.events += 1
            message = answers.stamp(answers.event(self.is_chat, self.done, self.total))
        else:
            message = answers.stamp(answers.whole(self.is_chat, self.total))
        if is_last:
            self.end()
        self.connection.transport.write(message)
        if is_last and self.is_stream:
            self.connection.transport.write(answers.STREAM_TAIL)

    def end(self) -> None:
        """Over, answered or not."""
        if self.is_over:
            return
        self.is_over = True
        if self.timer is not None:
            self.timer.cancel()
        if self.fleet.parked.get(self.room) is self:
            del self.fleet.parked[self.room]
        self.fleet.num_streams -= self.is_streaming
        self.worker.num_running -= 1
        self.connection.request = None

    def _refuse(self) -> None:
        self.fleet.counts.mismatched += 1
        connection = self.connection
        self.end()
        document = {"error": {"message": "no prefill saw this room"}}
        connection.transport.write(answers.respond(document, "500 Internal Server Error"))


class Connection(asyncio.Protocol):
    """Parses requests and hands generations on."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.request: Request | None = None
        self.can_write = True
        self._data = b""

    def connection_made(self, transport: Any) -> None:
        """A balancer, or the load. uvloop's transports are no asyncio.Transport."""
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed by the other side."""
        if self.request is not None:
            self.worker.fleet.counts.broken += 1
            self.request.end()

    def pause_writing(self) -> None:
        """The reader is slow."""
        self.can_write = False

    def resume_writing(self) -> None:
        """It has caught up."""
        self.can_write = True

    def data_received(self, data: bytes) -> None:
        """Requests, whole or in parts."""
        self._data += data
        while self.request is None:
            head, end, rest = self._data.partition(b"\r\n\r\n")
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            length = int(found[1]) if found else 0
            if not end or len(rest) < length:
                return
            self._data = rest[length:]
            self._serve(head.split(b" ", 2)[1].partition(b"?")[0], rest[:length])

    def _serve(self, path: bytes, body: bytes) -> None:
        if path in GENERATION:
            self.request = Request(self, path, body)
            self.request.serve()
        else:
            self.transport.write(self._control(path.decode()))

    def _control(self, path: str) -> bytes:
        worker, fleet = self.worker, self.worker.fleet
        if path in ("/mock/stats", "/mock/reset"):
            return answers.respond(fleet.stats(reset=path == "/mock/reset"))
        if path == "/v1/loads":
            return answers.respond(answers.loads(worker.num_running, worker.num_served))
        fleet.counts.aborts += path == "/abort_request"
        try:
            return answers.respond(answers.control(path, "prefill" if worker.is_prefill else "decode"))
        except KeyError:
            fleet.counts.other += 1
            return answers.respond({"detail": "Not Found"}, "404 Not Found")


def _number(text: bytes, name: bytes, otherwise: int) -> int:
    found = re.search(re.escape(name) + rb'[ :"]*(\d+)', text)
    return int(found[1]) if found else otherwise


async def serve(num_prefill: int, num_decode: int) -> tuple[Fleet, dict[str, Any], list[asyncio.Server]]:
    """Listen; returns the fleet, its ports by role, and its servers."""
    fleet = Fleet()
    loop = asyncio.get_running_loop()
    ports: dict[str, Any] = {"prefill": [], "decode": []}
    servers = []
    for role, count in (("prefill", num_prefill), ("decode", num_decode)):
        for _ in range(count):
            worker = Worker(fleet, role == "prefill")
            server = await loop.create_server(
                lambda worker=worker: Connection(worker), "127.0.0.1", 0, backlog=4096
            )
            ports[role].append(server.sockets[0].getsockname()[1])
            servers.append(server)
    return fleet, ports, servers


async def _main() -> None:
    _, ports, servers = await serve(int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps(ports), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(_main())
