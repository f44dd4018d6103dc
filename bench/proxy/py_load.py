"""The load generator of load.cpp for machines without a C++ compiler: same options, same lines on stdout."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

import uvloop

DRAIN_S = 30.0
STAMP = re.compile(rb"@(\d{16})")


def figures(us: list[float]) -> dict[str, float]:
    """Count, mean and percentiles (nearest rank) of a sample in microseconds."""
    us = sorted(us)

    def at(share: float) -> float:
        return round(us[int(share * (len(us) - 1) + 0.5)], 1) if us else 0.0

    mean = round(sum(us) / len(us), 1) if us else 0.0
    return {"n": len(us), "mean": mean, "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1)}


class ChunkReader:
    """Takes ``transfer-encoding: chunked`` apart; bytes may come in any portions."""

    def __init__(self) -> None:
        self.is_done = False
        self._data = b""

    def feed(self, data: bytes) -> bytes:
        """Body bytes that are complete now."""
        self._data += data
        body = []
        while not self.is_done:
            line, end, rest = self._data.partition(b"\r\n")
            if not end:
                break
            size = int(line.partition(b";")[0], 16)
            if len(rest) < size + 2:
                break
            body.append(rest[:size])
            self._data = rest[size + 2 :]
            self.is_done = size == 0
        return b"".join(body)


class Load:
    """Keeps requests going, and counts what ends inside the window."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.request = Path(options.request).read_bytes()
        self.expected = options.expect.encode()
        self.idle: list[Connection] = []
        self.late: deque[float] = deque()
        self.is_measured = self.is_draining = False
        self.num_busy = self.num_started = self.num_done = self.num_measured = 0
        self.num_events = self.num_wrong = self.num_broken = 0
        self.latency_us: list[float] = []
        self.first_us: list[float] = []
        self.delay_us: list[float] = []
        self.example = ""
        self.all_done, self.all_idle = asyncio.Event(), asyncio.Event()

    async def run(self) -> dict[str, object]:
        """Begin, end and drain; returns what the last line says."""
        options, loop = self.options, asyncio.get_running_loop()
        ports = [int(port) for port in options.ports.split(",")]
        for index in range(options.connections):
            port = ports[index % len(ports)]
            await loop.create_connection(lambda: Connection(self), "127.0.0.1", port)
        self.is_measured = bool(options.requests)
        arrivals = asyncio.create_task(self._arrive()) if options.rate > 0 else None
        if arrivals is None:
            loop.call_soon(self._start_idle)
        if not options.requests:
            await asyncio.sleep(options.warmup)
        print("begin", flush=True)
        self.is_measured, began_s = True, time.monotonic()
        if options.requests:
            await self.all_done.wait()
        else:
            await asyncio.sleep(options.seconds)
        print("end", flush=True)
        self.is_measured, self.is_draining = False, True
        seconds = time.monotonic() - began_s
        if arrivals is not None:
            arrivals.cancel()
        if self.num_busy:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.all_idle.wait(), DRAIN_S)
        return self._report(seconds)

    def _report(self, seconds: float) -> dict[str, object]:
        return {
            "seconds": seconds, "requests": self.num_measured, "events": self.num_events,
            "done": self.num_done, "wrong": self.num_wrong, "broken": self.num_broken,
            "unfinished": self.num_busy,
            "latency_us": figures(self.latency_us), "first_us": figures(self.first_us),
            "delay_us": figures(self.delay_us), "example": self.example,
        }  # fmt: skip

    async def _arrive(self) -> None:
        rng = random.Random(self.options.seed)
        next_s = time.monotonic()
        while not self.is_draining:
            next_s += rng.expovariate(self.options.rate)
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            self.late.append(next_s)
            self._start_late()

    def _start_late(self) -> None:
        while self.late and self.idle and not self.is_draining:
            self.idle.pop().start(self.late.popleft())

    def _start_idle(self) -> None:
        limit = self.options.requests
        while self.idle and not self.is_draining and (not limit or self.num_started < limit):
            self.idle.pop().start(time.monotonic())

    def completed(self, connection: Connection, status: int, *, is_right: bool, text: bytes) -> None:
        """A response has ended; status 0: the connection broke."""
        now_s = time.monotonic()
        self.num_done += 1
        self.num_busy -= 1
        if not status:
            self.num_broken += 1
        elif not is_right:
            self.num_wrong += 1
            self.example = self.example or f"{status} {text[:200].decode(errors='replace')}"
        elif self.is_measured:
            self.num_measured += 1
            self.latency_us.append((now_s - connection.started_s) * 1e6)
            if connection.first_s:
                self.first_us.append((connection.first_s - connection.started_s) * 1e6)
        if self.options.requests and self.num_done >= self.options.requests:
            self.all_done.set()
        if self.is_draining and not self.num_busy:
            self.all_idle.set()
        if status:
            self.free(connection)

    def free(self, connection: Connection) -> None:
        """It can send the next request."""
        self.idle.append(connection)
        if self.options.rate > 0:
            self._start_late()
        else:
            self._start_idle()

    def took_event(self, event: bytes) -> None:
        """One event of a stream has arrived."""
        if self.is_measured:
            self.num_events += 1
            if found := STAMP.search(event):
                self.delay_us.append((time.monotonic_ns() - int(found[1])) / 1e3)


class Connection(asyncio.Protocol):
    """One client: a request at a time."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.started_s = self.first_s = 0.0
        self.is_busy = False

    def connection_made(self, transport: Any) -> None:
        """Ready. uvloop's transports are no asyncio.Transport."""
        self.transport = transport
        if self.load.num_started and not self.load.is_draining:
            self.load.free(self)  # takes the place of one that broke
        else:
            self.load.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed by the server: another connection takes this one's place."""
        if self in self.load.idle:
            self.load.idle.remove(self)
        if self.is_busy:
            self.is_busy = False
            self.load.completed(self, 0, is_right=False, text=b"")
        if not self.load.is_draining:
            address = self.transport.get_extra_info("peername")
            loop = asyncio.get_running_loop()
            self.reconnecting = loop.create_task(
                loop.create_connection(lambda: Connection(self.load), *address)
            )

    def start(self, due_s: float) -> None:
        """Send the request; its latency counts from ``due_s``."""
        self.is_busy = True
        self.started_s, self.first_s = due_s, 0.0
        self.status = self.left = self.num_events = 0
        self.head = self.text = b""
        self.chunks: ChunkReader | None = None
        self.load.num_busy += 1
        self.load.num_started += 1
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        """Head and body, in any portions."""
        if not self.status:
            self.head += data
            head, end, data = self.head.partition(b"\r\n\r\n")
            if not end:
                return
            self.status = int(head[9:12])
            found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            self.left = int(found[1]) if found else 0
            self.chunks = ChunkReader() if b"chunked" in head.lower() else None
        if self.chunks is not None:
            self.text += self.chunks.feed(data)
            is_done = self.chunks.is_done
        else:
            self.text += data
            self.left -= len(data)
            is_done = self.left <= 0
        if self.load.options.events:
            *events, self.text = self.text.split(b"\n\n")
            for event in events:
                self.first_s = self.first_s or time.monotonic()
                self.num_events += 1
                self.load.took_event(event)
        if is_done:
            self._complete()

    def _complete(self) -> None:
        load = self.load
        wanted = load.options.events
        is_right = self.num_events == wanted if wanted else load.expected in self.text
        self.is_busy = False
        load.completed(self, self.status, is_right=is_right and self.status == 200, text=self.text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of load.cpp."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ports", required=True)
    parser.add_argument("--request", required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--expect", default="")
    parser.add_argument("--events", type=int, default=0)
    parser.add_argument("--warmup", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args(arguments)


async def _main() -> None:
    print(json.dumps(await Load(parse()).run()))


if __name__ == "__main__":
    uvloop.run(_main())
