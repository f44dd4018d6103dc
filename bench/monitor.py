"""What a monitor costs the balancer that it looks at.

Why: a monitor is left open all day; the balancer's core belongs to requests. Target: at 64 workers and two
frames a second at most 1 % of a core.

Set-up: 64 small servers that answer as SGLang's do (half prefill, half decode) in one process, `pdserve
balance` in front of them in another, this process as the monitor: it fetches the state document as `pdserve
monitor` does. The balancer's CPU time is read from /proc, over windows without and with the monitor in turn.

Output: set-up, a table, one JSON object as the last line.

    python bench/monitor.py [--workers 64] [--rounds 5] [--seconds 10]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median

import psutil
from common import describe_setup, print_result, print_setup

from pdserve.state.client import StateClient
from pdserve.types import Role

ROOT = Path(__file__).parents[1]
FRAMES_S = 2.0
READY_S = 180.0
TARGET = 0.01


async def serve_fakes(number: int) -> None:
    """Be that many workers until stdin closes; the first line out is their URLs."""
    sys.path.insert(0, str(ROOT))
    from tests.support.sglang_server import FakeSGLang

    roles = [Role.PREFILL if index < number // 2 else Role.DECODE for index in range(number)]
    fakes = [FakeSGLang(role, name=f"{role}-{index}") for index, role in enumerate(roles)]
    for fake in fakes:
        await fake.__aenter__()
    print(json.dumps([(str(fake.role), fake.url) for fake in fakes]), flush=True)
    await asyncio.to_thread(sys.stdin.read)


def start_balancer(workers: list[tuple[str, str]], port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pdserve", "balance", "--port", str(port), "--log-level", "error"]
    for index, (role, url) in enumerate(workers):
        command += ["--prefill", f"{url},{20000 + index}"] if role == "prefill" else ["--decode", url]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_ready(url: str, pairs: int) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"{url}/pdserve/state", timeout=30) as reply:
                state = json.load(reply)
            if sum(pair["state"] == "ready" for pair in state["pairs"]) == pairs:
                return
        except OSError:
            pass
        time.sleep(1.0)
    raise SystemExit(f"not every one of {pairs} pairs was ready within {READY_S:g} s")


def share(process: psutil.Process, seconds: float, client: StateClient | None) -> float:
    """The balancer's share of a core over a window, watched or not."""
    before, begun_s = sum(process.cpu_times()[:2]), time.monotonic()
    while (now_s := time.monotonic()) - begun_s < seconds:
        if client is not None:
            client.fetch()
        time.sleep(max(0.0, 1.0 / FRAMES_S - (time.monotonic() - now_s)))
    return (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - begun_s)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a monitor costs the balancer.")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=15980)
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve_fakes(args.serve))
        return
    setup = describe_setup(workers=args.workers, frames_s=FRAMES_S, rounds=args.rounds, seconds=args.seconds)
    print_setup(setup)
    fakes = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(args.workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert fakes.stdout is not None and fakes.stdin is not None
    balancer = start_balancer(json.loads(fakes.stdout.readline()), args.port)
    url = f"http://127.0.0.1:{args.port}"
    try:
        prefills = args.workers // 2
        wait_ready(url, prefills * (args.workers - prefills))
        process, client = psutil.Process(balancer.pid), StateClient(url, "")
        size = len(json.dumps(client.fetch_json()))
        rows = [
            (share(process, args.seconds, None), share(process, args.seconds, client))
            for _ in range(args.rounds)
        ]
        client.close()
    finally:
        balancer.send_signal(signal.SIGINT)
        fakes.stdin.close()
        balancer.wait()
        fakes.wait()
    alone, watched = median(row[0] for row in rows), median(row[1] for row in rows)
    cost = median(row[1] - row[0] for row in rows)
    print(f"\n{'':24}{'share of a core':>16}")
    for name, value in (("not watched", alone), ("watched", watched), ("the monitor's part", cost)):
        print(f"{name:24}{value:16.2%}")
    print(
        f"\nstate document: {size / 1e3:.0f} kB; <= {TARGET:.0%}: {'met' if cost <= TARGET else 'MISSED'}\n"
    )
    result = {"bench": "monitor", "setup": setup, "rounds": rows, "document_bytes": size}
    print_result({**result, "alone": alone, "watched": watched, "cost": cost, "is_met": cost <= TARGET})


if __name__ == "__main__":
    main()
