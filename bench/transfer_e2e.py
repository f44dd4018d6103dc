"""KV transfer through real servers: pdserve's data plane against SGLang's own NIXL path, or by layer and not.

Two fleets of one prefill and one decode server, alike but for one option
(``--compare data-plane`` or ``layerwise``), stay up side by side; requests go to
them in turn, one at a time, first with fresh pools, then after a churn of mixed
requests has turned the pools over. The model is small in compute but keeps as much
KV as the embedded SmolLM2-135M (30 layers, 3 heads of 128 bytes: 23 040 bytes a
token), so that transfer is a visible part of the time to first token. ``--embedded``
serves that model itself, with fresh pools only.

    transfer_ms   SGLang's own figure: prompt handed over when its forward has ended -> transfer a success
                  at prefill; by layer only what was left then is handed over
    ttft_ms       first streamed byte at the client
    cpu_ms        CPU time of the prefill scheduler's other threads (transfer, transport) per request

    python bench/transfer_e2e.py [--tokens 500,2048] [--requests 12] [--compare layerwise] [--embedded]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from common import describe_setup, print_result, print_setup, spread

from pdserve.cluster.ports import SystemPorts
from pdserve.model.tiny import TinyShape, write_tiny_model

COMPARISONS = {
    "data-plane": {"stock": ("--data-plane", "off"), "pdserve": ("--data-plane", "on")},
    "layerwise": {"off": ("--layerwise", "off"), "on": ("--layerwise", "on")},
}
"""What is compared -> side -> its options of ``pdserve launch``."""
POOL_TOKENS = 24_576
CHURN_REQUESTS = 60
READY_S = 300.0


@dataclass
class Fleet:
    """One launched fleet."""

    side: str
    port: int
    prefill_url: str = ""
    scheduler_pid: int = 0


@dataclass
class Sample:
    """One request. Milliseconds."""

    ttft_ms: float
    transfer_ms: float
    cpu_ms: float


def main() -> None:
    """Print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", default="500,2048", help="prompt lengths (tokens)")
    parser.add_argument("--requests", type=int, default=12, help="measured requests per cell (count)")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--compare", choices=COMPARISONS, default="data-plane")
    parser.add_argument("--embedded", action="store_true", help="serve the embedded model, with fresh pools")
    options = parser.parse_args()
    lengths = [int(text) for text in options.tokens.split(",")]
    sides, states = COMPARISONS[options.compare], ("fresh",) if options.embedded else ("fresh", "churned")
    small = "30 layers, hidden 96, 3 KV heads of 32, float32"
    setup = describe_setup(
        model=f"{'embedded SmolLM2-135M' if options.embedded else small}: 23040 KV bytes a token",
        pool=f"{POOL_TOKENS} tokens a server, pages of 16",
        requests=options.requests,
        seed=options.seed,
        sides=f"pdserve launch {' / '.join(' '.join(flags) for flags in sides.values())}, interleaved",
    )
    print_setup(setup)
    rng = random.Random(options.seed)
    samples: dict[tuple[str, int, str], list[Sample]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        shape = TinyShape(layers=30, hidden=96, heads=3, kv_heads=3, max_position=32768, dtype="float32")
        model = None if options.embedded else write_tiny_model(folder / "model", shape)
        fleets = [
            stack.enter_context(_fleet(side, flags, model, folder / side, 17_000 + 300 * number))
            for number, (side, flags) in enumerate(sides.items())
        ]
        for state in states:
            if state == "churned":
                for fleet in fleets:
                    _churn(fleet, options.seed)
            for length in lengths:
                for turn in range(-1, options.requests):
                    for fleet in fleets if turn % 2 else fleets[::-1]:
                        sample = _measure(fleet, _prompt(rng, length))
                        if turn >= 0:
                            samples[state, length, fleet.side].append(sample)
        counters = {fleet.side: _instance(fleet)["transfer"] for fleet in fleets}
    rows = _report(samples, list(sides))
    print_result({"bench": "transfer_e2e", "setup": setup, "rows": rows, "counters": counters})


def _report(samples: dict[tuple[str, int, str], list[Sample]], sides: list[str]) -> list[dict[str, Any]]:
    heads = (("transfer ms", 22), ("ttft ms", 20), ("cpu ms", 18))
    print(f"{'pools':8} {'tokens':>6}" + "".join(f"  {head:>{width}} {'ratio':>6}" for head, width in heads))
    rows = []
    for state, length in dict.fromkeys((state, length) for state, length, _ in samples):
        row: dict[str, Any] = {"pools": state, "tokens": length}
        text = f"{state:8} {length:6d}"
        for field, width in (("transfer_ms", 22), ("ttft_ms", 20), ("cpu_ms", 18)):
            values = [[getattr(one, field) for one in samples[state, length, side]] for side in sides]
            here, there = (median(side) for side in values)
            row[field] = {side: spread(found) for side, found in zip(sides, values, strict=True)}
            row[field]["ratio"] = round(there / max(here, 1e-9), 3)
            text += f"  {f'{here:.2f} -> {there:.2f}':>{width}} {there / max(here, 1e-9):6.2f}"
        rows.append(row)
        print(text)
    print(flush=True)
    return rows


@contextlib.contextmanager
def _fleet(
    side: str, flags: tuple[str, ...], model: Path | None, folder: Path, base_port: int
) -> Iterator[Fleet]:
    port = SystemPorts().pick("127.0.0.1", base_port)
    command = [sys.executable, "-m", "pdserve", "launch", *([] if model is None else [str(model)])]
    command += ["--port", str(port), *flags, "--log-dir", str(folder), "--"]
    command += ["--max-total-tokens", str(POOL_TOKENS), "--chunked-prefill-size", "8192"]
    command += [] if model is None else ["--dtype", "float32"]
    output = folder.with_suffix(".log")
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        fleet = Fleet(side, port)
        deadline = time.monotonic() + READY_S
        while not fleet.prefill_url:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{side}: not ready\n" + output.read_text()[-2000:])
            time.sleep(0.5)
            with contextlib.suppress(OSError, ValueError, KeyError, http.client.HTTPException):
                state = _call(port, "GET", "/pdserve/state")
                if any(pair["state"] == "ready" for pair in state["pairs"]):
                    roles = {worker["role"]: worker for worker in state["workers"]}
                    fleet.prefill_url = roles["prefill"]["url"]
        fleet.scheduler_pid = _scheduler_of(int(_instance(fleet)["pid"]))
        yield fleet
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)


def _scheduler_of(server_pid: int) -> int:
    """The scheduler is the child with the largest memory: it holds the pools."""
    children = psutil.Process(server_pid).children(recursive=True)
    return max(children, key=lambda child: child.memory_info().rss).pid


def _side_threads_s(pid: int) -> float:
    """CPU time of every thread but the scheduler's own loop, from the kernel's nanosecond counters."""
    return 1e-9 * sum(
        int((task / "schedstat").read_text().split()[0])
        for task in Path(f"/proc/{pid}/task").iterdir()
        if int(task.name) != pid
    )


def _measure(fleet: Fleet, prompt: list[int]) -> Sample:
    before, cpu_s = _instance(fleet)["transfer"], _side_threads_s(fleet.scheduler_pid)
    body = {"input_ids": prompt, "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", fleet.port, timeout=120)
    begin = time.perf_counter()
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{fleet.side}: {response.status} {response.read()!r}")
    response.read(1)
    ttft_s = time.perf_counter() - begin
    response.read()
    connection.close()
    deadline = time.monotonic() + 10
    while (after := _instance(fleet)["transfer"])["transfers"] == before["transfers"]:
        if time.monotonic() > deadline:
            raise SystemExit(f"{fleet.side}: the prefill server counted no transfer")
        time.sleep(0.01)
    transfer_ms = (after["latency_us"] - before["latency_us"]) / 1e3
    return Sample(ttft_s * 1e3, transfer_ms, (_side_threads_s(fleet.scheduler_pid) - cpu_s) * 1e3)


def _churn(fleet: Fleet, seed: int) -> None:
    """Mixed lengths and lifetimes, sixteen at a time, until the pools have turned over several times."""
    rng = random.Random(seed)
    jobs = [
        (
            _prompt(rng, min(3000, int(rng.lognormvariate(5.5, 1.0)) + 16)),
            min(120, int(rng.expovariate(1 / 25)) + 1),
        )
        for _ in range(CHURN_REQUESTS)
    ]

    def run(job: tuple[list[int], int]) -> None:
        prompt, length = job
        sampling = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        _call(fleet.port, "POST", "/generate", {"input_ids": prompt, "sampling_params": sampling})

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(run, jobs))


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(32, 127) for _ in range(length)]


def _instance(fleet: Fleet) -> dict[str, Any]:
    return _call(int(fleet.prefill_url.rpartition(":")[2]), "GET", "/pdserve/instance")


def _call(port: int, method: str, path: str, body: object = None) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    payload = None if body is None else json.dumps(body)
    connection.request(method, path, payload, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{method} {path}: {response.status} {text[:300]!r}")
    return dict(json.loads(text))


if __name__ == "__main__":
    main()
