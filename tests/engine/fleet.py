"""Real processes for the engine tests: a launched fleet, a joined worker, a plain reference server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.engine.corpus import CHUNK_TOKENS, Prompt

READY_S = 600.0
ENGINE_FLAGS = ("--dtype", "float32", "--chunked-prefill-size", str(CHUNK_TOKENS))
"""float32: with half precision two batch shapes may round an argmax tie differently."""


def free_port() -> int:
    """A port that was free a moment ago, below the ephemeral range so that no client takes it meanwhile."""
    for port in range(15_000 + os.getpid() % 1000, 20_000):
        with contextlib.closing(socket.socket()) as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


def call(url: str, method: str, path: str, body: Any = None, timeout_s: float = 60.0) -> tuple[int, Any]:
    """One request; the answer as JSON where it is JSON, else as text."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    try:
        return response.status, json.loads(data)
    except ValueError:
        return response.status, data.decode()


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """The first truthy value of ``condition``; AssertionError naming ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except (OSError, http.client.HTTPException, KeyError) as exc:
            last = exc
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s ({last})")


def generate_body(prompt: Prompt, **extra: Any) -> dict[str, Any]:
    """Greedy, and never ended by a token: the tokens alone decide the length."""
    sampling = {"temperature": 0, "max_new_tokens": prompt.max_new_tokens, "ignore_eos": True}
    return {"input_ids": list(prompt.input_ids), "sampling_params": sampling, **extra}


@dataclass
class Fleet:
    """A running ``pdserve launch``."""

    url: str
    launcher: subprocess.Popen[bytes]
    logs: Path
    bootstrap_url: str = ""
    is_expected_dead: bool = False

    def state(self) -> dict[str, Any]:
        """The balancer's state document."""
        status, document = call(self.url, "GET", "/pdserve/state", timeout_s=10)
        assert status == 200, document
        return dict(document)

    def worker(self, worker_id: str) -> dict[str, Any]:
        """Its row of the state document."""
        workers = {w["worker_id"]: dict(w) for w in self.state()["workers"]}
        return workers[worker_id]  # KeyError between its end and its return, which wait_for tries again

    def pid(self, worker_id: str) -> int:
        """Process id of its HTTP process, asked from the server itself."""
        return int(call(self.worker(worker_id)["url"], "GET", "/pdserve/instance")[1]["pid"])

    def ready_pairs(self) -> set[tuple[str, str]]:
        """Names of the pairs that take traffic."""
        return {(p["prefill"], p["decode"]) for p in self.state()["pairs"] if p["state"] == "ready"}

    def wait_ready(self, pairs: int, timeout_s: float = READY_S) -> None:
        """Wait until exactly this many pairs are ready."""
        wait_for(lambda: len(self.ready_pairs()) == pairs, f"{pairs} ready pairs", timeout_s)

    def wait_replaced(self, worker_id: str, instance_id: str, pairs: int, timeout_s: float = READY_S) -> None:
        """Wait until ``worker_id`` is another process than ``instance_id``, and ``pairs`` are ready."""

        def replaced() -> bool:
            instances = [w["instance_id"] for w in self.state()["workers"] if w["worker_id"] == worker_id]
            return instances not in ([], [instance_id])

        wait_for(replaced, f"a new {worker_id}", timeout_s)
        self.wait_ready(pairs, timeout_s)

    def loads(self) -> dict[str, dict[str, Any]]:
        """Every worker's own load figures, asked from the servers, not from the balancer."""
        return {
            w["worker_id"]: call(w["url"], "GET", "/v1/loads?include=all")[1]["loads"][0]
            for w in self.state()["workers"]
        }

    def flush(self) -> None:
        """Drop every prefix cache, so that what is left in use is a leak."""
        for worker in self.state()["workers"]:
            status, answer = call(worker["url"], "POST", "/flush_cache?timeout=30")
            assert status == 200, (worker["worker_id"], answer)

    def wait_empty(self, timeout_s: float = 30.0) -> None:
        """Every queue and the KV usage of every worker back at zero, as the servers themselves say."""
        fields = ("num_running_reqs", "num_waiting_reqs")
        queues = (
            "prefill_bootstrap_queue_reqs", "prefill_inflight_queue_reqs", "decode_prealloc_queue_reqs",
            "decode_transfer_queue_reqs", "decode_retracted_queue_reqs",
        )  # fmt: skip

        def busy() -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name, load in self.loads().items():
                counts = {field: load[field] for field in fields}
                counts |= {queue: load["disaggregation"][queue] for queue in queues}
                if any(counts.values()):
                    found[name] = counts
            return found

        wait_for(lambda: not busy(), "queues at zero", timeout_s)
        self.flush()
        used = lambda: {n: load["num_used_tokens"] for n, load in self.loads().items()}  # noqa: E731
        wait_for(lambda: not any(used().values()), f"KV usage at zero, now {used()}", timeout_s)


@contextlib.contextmanager
def launch_fleet(
    model: Path, folder: Path, *, prefill: int, decode: int, flags: Sequence[str] = (),
    engine_flags: Sequence[str] = (), environ: Mapping[str, str] | None = None,
) -> Iterator[Fleet]:  # fmt: skip
    """``pdserve launch`` with these counts; ended by Ctrl-C and checked to leave nothing.

    Args:
        flags: of pdserve; ``engine_flags`` those of SGLang, after ``ENGINE_FLAGS``.
    """
    port, bootstrap = free_port(), free_port()
    command = [sys.executable, "-m", "pdserve", "launch", str(model), "-p", str(prefill), "-d", str(decode)]
    command += [
        "--port",
        str(port),
        "--bootstrap-port",
        str(bootstrap + 1),
        "--log-dir",
        str(folder / "logs"),
    ]
    with (folder / "launch.log").open("wb") as log:
        launcher = subprocess.Popen(
            [*command, *flags, "--", *ENGINE_FLAGS, *engine_flags],
            stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, **(environ or {})},
        )  # fmt: skip
    fleet = Fleet(f"http://127.0.0.1:{port}", launcher, folder / "logs", f"http://127.0.0.1:{bootstrap + 1}")
    try:

        def ready() -> bool:
            assert launcher.poll() is None, (folder / "launch.log").read_text()[-3000:]
            return len(fleet.ready_pairs()) == prefill * decode

        wait_for(ready, "the fleet", READY_S)
        yield fleet
        if not fleet.is_expected_dead:
            stop(launcher, expect=0)
    finally:
        kill_tree(launcher)


@contextlib.contextmanager
def join_worker(
    fleet: Fleet, role: str, model: Path, name: str, flags: Sequence[str],
    *, environ: Mapping[str, str] | None = None, options: Sequence[str] = (),
) -> Iterator[int]:  # fmt: skip
    """``pdserve prefill|decode MODEL --join`` by hand, as on another machine; yields its process id."""
    command = [
        sys.executable,
        "-m",
        "pdserve",
        role,
        str(model),
        "--join",
        urlsplit(fleet.bootstrap_url).netloc,
    ]
    command += ["--name", name, *options, "--", *ENGINE_FLAGS, *flags]
    with (fleet.logs / f"{name}.log").open("wb") as log:
        worker = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **(environ or {})}
        )
    try:
        yield worker.pid
        stop(worker)
    finally:
        kill_tree(worker)


def _start_server(log_path: Path, port: int, *flags: str) -> subprocess.Popen[bytes]:
    """One SGLang server with only what it needs to run on a CPU; dies with the test process."""
    command = [sys.executable, "-m", "pdserve.plugin.worker", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--attention-backend", "torch_native", "--page-size", "16"]
    command += ["--max-total-tokens", "65536", "--skip-server-warmup", "--disable-overlap-schedule"]
    environ = {**os.environ, "PDSERVE_ACTIVE": "1", "PDSERVE_STOCK": "1", "SGLANG_PLATFORM": "pdserve"}
    environ |= {"PDSERVE_PARENT_PID": str(os.getpid()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environ |= {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python", "SGLANG_HOST_IP": "127.0.0.1"}
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [*command, *ENGINE_FLAGS, *flags], stdout=log, stderr=log, env=environ, start_new_session=True
        )


def _wait_listening(url: str) -> None:
    wait_for(lambda: call(url, "GET", "/ping", timeout_s=5)[0] == 200, f"SGLang at {url}", READY_S)


class Reference:
    """One plain SGLang server of the same model: what disaggregation must not change."""

    def __init__(self, model: Path, folder: Path, *flags: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = _start_server(folder / "reference.log", port, "--model-path", str(model), *flags)

    def __enter__(self) -> Reference:
        _wait_listening(self.url)
        return self

    def __exit__(self, *_: object) -> None:
        kill_tree(self._process)

    def generate(self, prompt: Prompt) -> list[int]:
        """The tokens one server answers."""
        status, answer = call(self.url, "POST", "/generate", generate_body(prompt))
        assert status == 200, answer
        return list(answer["output_ids"])


class StockPair:
    """A prefill and a decode server as SGLang's documentation starts them, unknown to any pdserve service."""

    def __init__(self, model: Path, folder: Path) -> None:
        prefill, decode, self.bootstrap_port = (free_port() + offset for offset in range(3))
        self.prefill_url, self.decode_url = (f"http://127.0.0.1:{port}" for port in (prefill, decode))
        common = ["--model-path", str(model), "--disaggregation-transfer-backend", "nixl"]
        common += ["--disaggregation-bootstrap-port", str(self.bootstrap_port)]
        self._processes = [
            _start_server(folder / f"{mode}.log", port, *common, "--disaggregation-mode", mode)
            for mode, port in (("prefill", prefill), ("decode", decode))
        ]

    def __enter__(self) -> StockPair:
        for url in (self.prefill_url, self.decode_url):
            _wait_listening(url)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            kill_tree(process)


def stop(process: subprocess.Popen[bytes], expect: int | None = None) -> None:
    """Ctrl-C once, and wait for the end."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT if expect is not None else signal.SIGTERM)
    code = process.wait(timeout=60)
    assert expect is None or code == expect, f"ended with {code}"


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL: whatever it started must die with it; the process group is only the last resort."""
    if process.poll() is None:
        process.kill()
        process.wait(timeout=10)
