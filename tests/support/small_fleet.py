"""A fleet of tiny Python processes instead of SGLang, and a server that plays balancer and bootstrap service.

Each worker writes its instance id and pid to a file; the state document is made of those files.
``python -m tests.support.small_fleet FOLDER`` launches one for tests that signal or kill a launcher.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pdserve.cluster.local import LocalCluster, run_cluster
from pdserve.cluster.spec import ClusterSpec, ProcessKind, ProcessSpec
from pdserve.config.launch import LaunchConfig
from pdserve.types import Role

SERVICE = """
import os, pathlib, signal, sys
pathlib.Path(sys.argv[1], sys.argv[2] + ".pid").write_text(str(os.getpid()))
signal.pause()
"""

WORKER = """
import os, pathlib, signal, subprocess, sys
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
scheduler = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
with (folder / (name + ".scheduler")).open("a") as file:
    file.write(f"{scheduler.pid}\\n")
print("Load weight begin. avail mem=3.00 GB", flush=True)
print("The server is fired up and ready to roll!", flush=True)
scratch = folder / (name + ".new")
scratch.write_text(f"{os.environ['PDSERVE_INSTANCE_ID']} {os.getpid()}")
scratch.rename(folder / (name + ".instance"))
signal.pause()
"""


class SmallFleet:
    """The server and the spec of ``num_prefill`` x ``num_decode`` tiny workers in ``folder``."""

    def __init__(self, folder: Path, num_prefill: int = 1, num_decode: int = 1) -> None:
        self.folder = folder
        self.deregistered: list[str] = []
        self.is_hidden = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        roles = [(Role.PREFILL, i) for i in range(num_prefill)] + [
            (Role.DECODE, i) for i in range(num_decode)
        ]
        self.workers = [self.worker(f"{role}-{i}", role) for role, i in roles]
        self.config = LaunchConfig(
            prefill=num_prefill, decode=num_decode, ready_timeout_s=20, drain_s=5, device="cpu"
        )

    def worker(self, name: str, role: Role, code: str = WORKER, *args: str) -> ProcessSpec:
        argv = (sys.executable, "-c", code, str(self.folder), name, *args)
        return ProcessSpec(name, ProcessKind.WORKER, argv, {}, self.url + "/health", role)

    def spec(self, bootstrap_code: str = SERVICE) -> ClusterSpec:
        def service(kind: ProcessKind, code: str) -> ProcessSpec:
            argv = (sys.executable, "-c", code, str(self.folder), kind.value)
            return ProcessSpec(kind.value, kind, argv, {}, self.url + "/health")

        return ClusterSpec(
            bootstrap=service(ProcessKind.BOOTSTRAP, bootstrap_code),
            balancer=service(ProcessKind.BALANCER, SERVICE),
            workers=tuple(self.workers),
            device="cpu",
            balancer_url=self.url,
            bootstrap_url=self.url,
            can_fork=False,
        )

    def instance(self, name: str) -> tuple[str, int]:
        """``(instance id, pid)`` that the worker wrote; empty before."""
        path = self.folder / f"{name}.instance"
        if not path.exists():
            return "", 0
        instance_id, pid = path.read_text().split()
        return instance_id, int(pid)

    def pids(self) -> list[int]:
        """Every process that ever ran in this fleet."""
        files = [*self.folder.glob("*.pid"), *self.folder.glob("*.scheduler")]
        own = [int(line) for file in files for line in file.read_text().split()]
        return own + [
            self.instance(worker.name)[1] for worker in self.workers if self.instance(worker.name)[1]
        ]

    def document(self) -> dict[str, object]:
        workers = [
            {"worker_id": w.name, "instance_id": self.instance(w.name)[0], "role": w.role, "state": "ready"}
            for w in self.workers
            if self.instance(w.name)[0] not in ("", *self.deregistered)
        ]
        names = {str(w["role"]): [x for x in workers if x["role"] == w["role"]] for w in workers}
        pairs = [
            {"prefill": p["worker_id"], "decode": d["worker_id"], "state": "ready", "error": ""}
            for p in names.get("prefill", [])
            for d in names.get("decode", [])
        ]
        return {"bootstrap": {"connected": True}, "model": "tiny", "workers": workers, "pairs": pairs}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(fleet) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(404 if fleet.is_hidden else 200, fleet.document())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fleet.deregistered.append(body["instance_id"])
                self._answer(200, {})

            def _answer(self, status: int, document: object) -> None:
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        return Handler


class Recorder:
    """A ``Display`` that remembers."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, str]] = []
        self.events: list[str] = []
        self.ready_url = ""

    def stage(self, name: str, *, role: str, url: str, stage: str, log_file: str) -> None:
        self.stages.append((name, stage))

    def tick(self) -> None:
        pass

    def ready(self, *, url: str, model: str, log_dir: str) -> None:
        self.ready_url = url

    def event(self, level: int, text: str) -> None:
        self.events.append(text)

    def close(self) -> None:
        pass


def is_running(pid: int) -> bool:
    """False for a zombie too."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def until(condition: Callable[[], bool], limit_s: float = 15.0) -> None:
    """Return when ``condition`` holds; AssertionError after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true in time"
        await asyncio.sleep(0.02)


class _Announcer(Recorder):
    def ready(self, *, url: str, model: str, log_dir: str) -> None:
        print(f"ready {os.getpid()}", flush=True)


async def _main(folder: Path, args: list[str]) -> int:
    fleet = SmallFleet(folder, 1, 2)
    if "--deaf" in args:
        fleet.workers[0] = fleet.worker("prefill-0", Role.PREFILL, WORKER, "--deaf")
    return await run_cluster(LocalCluster(fleet.config, fleet.spec(), folder, _Announcer()))


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(Path(sys.argv[1]), sys.argv[2:])))
