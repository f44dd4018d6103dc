"""Forks workers from one process that has SGLang imported: ``python -m pdserve.plugin.forkserver FD``.

Importing torch and SGLang takes longer than all the rest of a start, and each
SGLang server does it three times (HTTP, scheduler, detokenizer). The forkserver
does it once; every server and every child of it is then a fork that shares
those pages. CPU only: a forked CUDA context is not usable.

    launcher ──spawn request (JSON line)──► forkserver ──fork──► worker ──fork──► scheduler, detokenizer
             ◄──pid, later exit status────

The launcher's half is cluster/forkserver_client.py; FD is one end of a Unix
socket pair. The forkserver dies with the launcher, the workers with the forkserver.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import random
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import setproctitle

from pdserve.config.worker_env import WorkerEnv, adopt_worker_defaults, replace_environ
from pdserve.plugin.imports import skip_gpu_only_packages, without_collections
from pdserve.process.parent_death import die_with_parent

logger = logging.getLogger(__name__)

PRELOAD = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang.srt.models.llama",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.disaggregation.prefill",
    "sglang.srt.disaggregation.decode",
    "nixl._api",
    "pdserve.plugin.backend",
    "pdserve.plugin.membership",
)
"""What a worker imports on its way to ready; a missing one is only slower."""


def main() -> None:
    """Import SGLang, report ready, then serve spawn requests until the launcher closes its end."""
    # Must come first: setproctitle notes where argv and the environment lie, to write the title there.
    setproctitle.setproctitle("pdserve forkserver")
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(WorkerEnv.from_environ().parent_pid or os.getppid())
    preload()
    _serve(channel)


def preload() -> None:
    """Import everything a worker needs and freeze it, so that collections do not unshare the pages."""
    skip_gpu_only_packages()
    with without_collections():
        from sglang.srt.plugins import load_plugins

        load_plugins()
        for name in PRELOAD:
            try:
                importlib.import_module(name)
            except ImportError as exc:
                logger.warning("forkserver could not preload %s: %s", name, exc)
    gc.collect()
    gc.freeze()


def _serve(channel: socket.socket) -> None:
    worker_pids: set[int] = set()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _send(channel, {"event": "ready"})
    buffer = b""
    while True:
        waiting: list[socket.socket | int] = [channel, wake_read]
        readable, _, _ = select.select(waiting, [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
        _reap(channel, worker_pids)
        if channel not in readable:
            continue
        data = channel.recv(65536)
        if not data:
            return
        buffer += data
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            pid = _fork_worker(channel, json.loads(line), (wake_read, wake_write))
            worker_pids.add(pid)


def _reap(channel: socket.socket, worker_pids: set[int]) -> None:
    for pid in list(worker_pids):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            worker_pids.discard(pid)
            _send(channel, {"event": "exit", "pid": pid, "returncode": os.waitstatus_to_exitcode(status)})


def _fork_worker(channel: socket.socket, request: dict[str, Any], wake: tuple[int, int]) -> int:
    """Fork one worker; the forkserver sends its pid, the forked process never returns."""
    forkserver_pid = os.getpid()
    pid = os.fork()
    if pid:
        _send(channel, {"event": "spawned", "id": request["id"], "pid": pid})
        return pid
    status = 1
    try:
        _become_worker(channel, request, wake, forkserver_pid)
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
        if isinstance(exc.code, str):
            sys.stderr.write(exc.code + "\n")
    except BaseException:
        logging.getLogger(__name__).exception("worker ended")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _become_worker(
    channel: socket.socket, request: dict[str, Any], wake: tuple[int, int], forkserver_pid: int
) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent(forkserver_pid)
    os.setsid()
    channel.close()
    for descriptor in wake:
        os.close(descriptor)
    log = os.open(Path(request["log_path"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    replace_environ(request["env"])
    # A fork copies the generator's state: without this all workers would draw the same ports and names.
    random.seed()
    setproctitle.setproctitle(f"pdserve {request['env'].get('PDSERVE_WORKER_ID', 'worker')}")
    _renew_zmq_context()
    sys.argv = list(request["argv"])
    from pdserve.plugin.worker import run_sglang

    run_sglang(request["flags"], adopt_worker_defaults())


def _renew_zmq_context() -> None:
    import zmq
    from sglang.srt.disaggregation.common.conn import CommonKVReceiver

    CommonKVReceiver._ctx = zmq.Context()


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
