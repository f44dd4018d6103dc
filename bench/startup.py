"""How long from ``pdserve launch`` to ready, where the time goes, and what idle servers cost.

Two sides, interleaved, in one invocation: ``pdserve launch`` (forked workers)
and the same servers started by hand as SGLang's documentation says (one
``launch_server`` process each, all at once, on the same CPU platform), ready
when each answers and one token has come through each pair. Physics: a server
is three processes and each imports torch and SGLang, 18 to 25 s of one core;
the forkserver imports once and forks.

    python bench/startup.py [--rounds 3] [--model PATH]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import describe_setup, print_result, print_setup, spread

from pdserve.cluster.ports import SystemPorts
from pdserve.cluster.worker_flags import WorkerPlan, worker_environment, worker_flags
from pdserve.config.worker_env import environment
from pdserve.model.tiny import write_tiny_model
from pdserve.types import Role

IDLE_WINDOW_S = 10.0
READY_S = 300.0


@dataclass
class Run:
    """One start: seconds to each milestone, and per server process tree its idle cost."""

    ready_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    idle_cpu_percent: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)


def main() -> None:
    """Run both sides ``--rounds`` times for each shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="", help="default: the tiny seeded model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(write_tiny_model(Path(folder) / "model"))
        setup = describe_setup(rounds=args.rounds, model=args.model or "tiny", idle_window_s=IDLE_WINDOW_S)
        print_setup(setup)
        runs: dict[str, list[Run]] = {}
        for index in range(args.rounds):
            for decode in (1, 2):
                for name, side in (("launch", launch), ("by_hand", by_hand)):
                    run = side(model, decode, Path(folder) / f"{name}-{decode}-{index}")
                    runs.setdefault(f"{name}_1p{decode}d", []).append(run)
                    print(f"{name:>8} 1P{decode}D: ready {run.ready_s:6.1f} s  {_parts(run)}", flush=True)
    _report(setup, runs)


def launch(model: str, decode: int, folder: Path) -> Run:
    """``pdserve launch -p 1 -d decode``."""
    folder.mkdir()
    port = SystemPorts().pick("127.0.0.1", 16_000)
    command = [sys.executable, "-m", "pdserve", "launch", model, "-p", "1", "-d", str(decode)]
    command += ["--port", str(port), "--log-dir", str(folder / "logs"), "--device", "cpu"]
    started = time.monotonic()
    with (folder / "launch.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(lambda: _ready_pairs(url) == decode, process)
        run = Run(ready_s=time.monotonic() - started, parts_s=_launch_parts(folder / "launch.log"))
        workers = _get(url + "/pdserve/state")["workers"]
        trees = [_tree(_get(worker["url"] + "/pdserve/instance")["pid"]) for worker in workers]
        run.idle_cpu_percent, run.memory_mb = _idle_cost(trees)
        return run
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def by_hand(model: str, decode: int, folder: Path) -> Run:
    """The same servers as separate stock processes: no forkserver, no forks, no pdserve hooks on idling."""
    folder.mkdir()
    ports = SystemPorts()
    bootstrap = ports.pick("127.0.0.1", 17_500)
    servers = [(Role.PREFILL, ports.pick("127.0.0.1", 17_000))]
    servers += [(Role.DECODE, ports.pick("127.0.0.1", 17_000)) for _ in range(decode)]
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        processes = [
            stack.enter_context(_stock_server(model, role, port, bootstrap, folder, len(servers)))
            for role, port in servers
        ]
        for (_, port), process in zip(servers, processes, strict=True):
            _wait(lambda port=port: _answers(port), process)
        listening_s = time.monotonic() - started
        for _, port in servers[1:]:
            _one_token(servers[0][1], port, bootstrap)
        run = Run(ready_s=time.monotonic() - started, parts_s={"servers up": listening_s})
        run.idle_cpu_percent, run.memory_mb = _idle_cost([_tree(process.pid) for process in processes])
        return run


@contextlib.contextmanager
def _stock_server(
    model: str, role: Role, port: int, bootstrap: int, folder: Path, servers: int
) -> Iterator[subprocess.Popen[bytes]]:
    plan = WorkerPlan(
        role=role, name="", model_path=model, host="127.0.0.1", port=port, device="cpu", bootstrap_url="",
        threads=max(1, len(os.sched_getaffinity(0)) // servers), environ=environment(),
    )  # fmt: skip
    flags, env = worker_flags(plan), worker_environment(plan)
    # The platform and the DRAM memory kinds are what stock SGLang lacks on CPU; all else stays stock.
    env |= {"PDSERVE_FORK_CHILDREN": "0", "PDSERVE_STOCK": "1"}
    env["SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS"] = "{}"
    argv = [sys.executable, "-m", "pdserve.plugin.worker", *flags]
    argv += ["--disaggregation-bootstrap-port", str(bootstrap)]
    with (folder / f"{role}-{port}.log").open("wb") as log:
        process = subprocess.Popen(argv, env={**environment(), **env}, stdout=log, stderr=log)
    try:
        yield process
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def _one_token(prefill: int, decode: int, bootstrap: int) -> None:
    body = {
        "input_ids": list(range(1, 9)), "sampling_params": {"max_new_tokens": 2, "temperature": 0},
        "bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap,
        "bootstrap_room": random.getrandbits(62) + 1,
    }  # fmt: skip
    payload = json.dumps(body).encode()

    def post(port: int) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/generate", payload, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=120).read()

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(post, (prefill, decode)))


def _launch_parts(log: Path) -> dict[str, float]:
    """Milestones from the launcher's own lines: ``[  29.4 s] prefill-0: loading weights``."""
    names = {
        "imports": "waiting for the forkserver|starting", "weights": "loading weights|weights loaded",
        "kv pool": "KV pool allocated", "server up": "server up|joined", "pairs": "ready",
    }  # fmt: skip
    last: dict[str, float] = {}
    for line in log.read_text().splitlines():
        match = re.match(r"\[ *([\d.]+) s\] (prefill|decode)-\d+: (.*)", line)
        if match:
            for name, pattern in names.items():
                if re.match(pattern, match[3]):
                    last[name] = float(match[1])
    return last


def _parts(run: Run) -> str:
    return "  ".join(f"{name} at {seconds:.1f}" for name, seconds in run.parts_s.items())


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _idle_cost(trees: list[list[psutil.Process]]) -> tuple[list[float], list[float]]:
    """Per server: percent of one core over the window, and proportional memory (PSS) in MB."""
    time.sleep(2)  # let the start settle before the window opens
    busy = [sum(_cpu_s(process) for process in tree) for tree in trees]
    time.sleep(IDLE_WINDOW_S)
    after = [sum(_cpu_s(process) for process in tree) for tree in trees]
    cpu = [(new - old) / IDLE_WINDOW_S * 100 for old, new in zip(busy, after, strict=True)]
    memory = [sum(process.memory_full_info().pss for process in tree) / 2**20 for tree in trees]
    return cpu, memory


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _get(url: str) -> Any:
    return json.loads(urllib.request.urlopen(url, timeout=5).read())


def _ready_pairs(url: str) -> int:
    try:
        return sum(pair["state"] == "ready" for pair in _get(url + "/pdserve/state")["pairs"])
    except (OSError, ValueError):
        return 0


def _answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).status == 200
    except (OSError, urllib.error.HTTPError):
        return False


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"not ready: process ended with {process.poll()}")
        time.sleep(0.05)


def _report(setup: dict[str, object], runs: dict[str, list[Run]]) -> None:
    result: dict[str, Any] = {"bench": "startup", "setup": setup}
    print(f"\n{'':>16}{'ready s':>10}{'idle CPU %/server':>20}{'PSS MB/server':>16}   (medians)")
    for name, side in runs.items():
        ready = spread([run.ready_s for run in side])
        cpu = spread([value for run in side for value in run.idle_cpu_percent])
        memory = spread([value for run in side for value in run.memory_mb])
        parts = {
            key: spread([run.parts_s[key] for run in side if key in run.parts_s]) for key in side[0].parts_s
        }
        result[name] = {"ready_s": ready, "idle_cpu_percent": cpu, "pss_mb": memory, "parts_at_s": parts}
        print(f"{name:>16}{ready['median']:>10.1f}{cpu['median']:>20.1f}{memory['median']:>16.0f}")
    for shape in ("1p1d", "1p2d"):
        pairs = zip(runs[f"launch_{shape}"], runs[f"by_hand_{shape}"], strict=True)
        result[f"by_hand_over_launch_{shape}"] = spread([hand.ready_s / ours.ready_s for ours, hand in pairs])
    print_result(result)


if __name__ == "__main__":
    main()
