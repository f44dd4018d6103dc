"""Parts of bench/simulator.py: real servers, a balancer before them, a trace replayed, what was counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pdserve.cluster.ports import SystemPorts
from pdserve.errors import WorkerError
from pdserve.sim.live import LiveAnswer, LiveService, LiveWorker, generate_body, named_workers
from pdserve.types import WorkerLoad
from pdserve.workload import TracedRequest

READY_S = 300.0
PORTS = SystemPorts()


@dataclass(frozen=True)
class Servers:
    """A launched fleet and how to reach its servers without its own balancer."""

    url: str
    prefill: tuple[tuple[str, int | None], ...]
    decode: tuple[str, ...]
    process: subprocess.Popen[bytes]

    def workers(self) -> list[LiveWorker]:
        """For LiveService."""
        return named_workers(self.prefill, self.decode)


@dataclass(frozen=True)
class Replay:
    """One run of a trace: answers in the order of requests (None: failed), what each server counted, how much
    of the machine's processor time was ours and how much was others'."""

    answers: list[LiveAnswer | None]
    before: list[WorkerLoad]
    after: list[WorkerLoad]
    span_s: float
    busy_cores: float
    foreign_cores: float
    late_s: float
    """Latest that a request was sent after its time."""


@contextlib.contextmanager
def servers(model: str, prefill: int, decode: int, folder: Path, flags: Sequence[str]) -> Iterator[Servers]:
    """``pdserve launch`` with these counts, up until the end of the block."""
    port = PORTS.pick("127.0.0.1", 16_300)
    command = [sys.executable, "-m", "pdserve", "launch", model, "-p", str(prefill), "-d", str(decode)]
    command += ["--port", str(port), "--log-dir", str(folder / "logs"), "--device", "cpu", "--", *flags]
    with (folder / "launch.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: _ready_pairs(url) == prefill * decode, process, folder / "launch.log")
        rows = _get(url + "/pdserve/state")["workers"]
        yield Servers(
            url,
            tuple((row["url"], row["bootstrap_port"]) for row in rows if row["role"] == "prefill"),
            tuple(row["url"] for row in rows if row["role"] == "decode"),
            process,
        )
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)


@contextlib.contextmanager
def balancer(fleet: Servers, policy: str, folder: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """``pdserve balance`` over the fleet's servers; its URL, once every pair is ready, and its process id."""
    port = PORTS.pick("127.0.0.1", 16_600)
    command = [sys.executable, "-m", "pdserve", "balance", "--port", str(port), "--policy", policy, *flags]
    for url, bootstrap in fleet.prefill:
        command += ["--prefill", url, str(bootstrap)]
    for url in fleet.decode:
        command += ["--decode", url]
    log_path = folder / f"balance-{policy}{len(list(folder.glob('balance*')))}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(lambda: _ready_pairs(url) == len(fleet.prefill) * len(fleet.decode), process, log_path)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def sleep_in_forwards(fleet: Servers, seconds: float) -> None:
    """Every pass of every server sleeps so long besides computing (SGLang's own ``/slow_down``): time that
    a GPU would take and that no other server of this machine is slowed by."""
    for url in (*(url for url, _ in fleet.prefill), *fleet.decode):
        _post(url + "/slow_down", {"forward_sleep_time": seconds})


def replay(fleet: Servers, url: str, trace: Sequence[TracedRequest]) -> Replay:
    """Send every request at its time over the balancer at ``url``, caches empty before."""
    return asyncio.run(_replay(fleet, url, trace))


async def _replay(fleet: Servers, url: str, trace: Sequence[TracedRequest]) -> Replay:
    async with LiveService(fleet.workers()) as service:
        workers = [*service.prefills, *service.decodes]
        prompts = [input_ids(request) for request in trace]
        await service.generate(url, generate_body(input_ids(TracedRequest(0.0, 32, 4, serial=-1)), 4))
        for worker in workers:
            _post(worker.url + "/flush_cache?timeout=20")
        before = [await service.wait_idle(worker) for worker in workers]
        ours, machine = _our_cpu_s(fleet.process.pid), _machine_cpu_s()
        start_s = time.monotonic()
        late_s = 0.0

        async def one(request: TracedRequest, prompt: list[int]) -> LiveAnswer | None:
            nonlocal late_s
            await asyncio.sleep(max(0.0, start_s + request.arrival_s - time.monotonic()))
            late_s = max(late_s, time.monotonic() - start_s - request.arrival_s)
            try:
                return await service.generate(url, generate_body(prompt, request.output_tokens))
            except WorkerError as exc:
                print(f"  failed: {exc}", flush=True)
                return None

        answers = await asyncio.gather(*map(one, trace, prompts))
        await asyncio.sleep(0.3)  # SGLang publishes its counters at intervals
        after = [await service.wait_idle(worker) for worker in workers]
        span_s = time.monotonic() - start_s
        busy, own = _machine_cpu_s() - machine, _our_cpu_s(fleet.process.pid) - ours
    return Replay(list(answers), before, after, span_s, own / span_s, max(0.0, busy - own) / span_s, late_s)


def input_ids(request: TracedRequest) -> list[int]:
    """Printable ASCII, one id a token: equal leading block ids give equal leading tokens."""
    size, length = request.block_tokens, request.input_tokens
    blocks = request.block_ids
    if blocks is None:
        return _random_ids(f"alone {request.serial}", length)
    return [token for block in blocks for token in _random_ids(f"block {block}", size)][:length]


def _random_ids(name: str, count: int) -> list[int]:
    rng = random.Random(name)
    return [rng.randrange(32, 127) for _ in range(count)]


def _machine_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _our_cpu_s(launcher_pid: int) -> float:
    """The fleet's processes, and this one with its balancer."""
    total = 0.0
    for pid in (launcher_pid, psutil.Process().pid):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            if pid != launcher_pid and launcher_pid in (process.pid, *(p.pid for p in process.parents())):
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _post(url: str, body: dict[str, float] | None = None) -> None:
    content = json.dumps(body or {}).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=30).read()


def _get(url: str) -> Any:
    return json.loads(urllib.request.urlopen(url, timeout=5).read())


def _ready_pairs(url: str) -> int:
    try:
        return sum(pair["state"] == "ready" for pair in _get(url + "/pdserve/state")["pairs"])
    except (OSError, ValueError, urllib.error.HTTPError):
        return 0


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"not ready: {process.args!r}\n{log.read_text()[-3000:]}")
        time.sleep(0.1)
