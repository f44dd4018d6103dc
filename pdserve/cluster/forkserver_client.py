"""Client of the forkserver: starts it, asks it to fork workers, collects their exit statuses.

The protocol is one JSON object a line over a Unix socket pair, see
plugin/forkserver.py. Everything here is called from the launcher's main thread;
``spawn`` blocks only for the fork itself once the forkserver is ready.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdserve.errors import StartupError

SPAWN_S = 30.0
"""Longest wait for a fork; it takes about 30 ms."""


class ForkedChild:
    """A worker process that the forkserver has forked; implements ``spawn.Child``."""

    def __init__(self, forkserver: ForkServer, pid: int) -> None:
        self.pid = pid
        self._forkserver = forkserver

    def poll(self) -> int | None:
        """Exit status (negative: signal), or None while it runs."""
        return self._forkserver.returncode(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Block until it ends. Raises TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = 0.1 if deadline is None else min(0.1, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            self._forkserver.pump(left)
        return code

    def signal(self, sig: int) -> None:
        """Send ``sig`` to the worker alone; nothing if it is gone."""
        if self.poll() is None:
            _kill(self.pid, sig)

    def kill_group(self) -> None:
        """SIGKILL the worker and everything it forked (it leads its own session)."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


class ForkServer:
    """One forkserver process. Call ``start`` in the main thread: the parent-death signal is per thread."""

    def __init__(self, env: Mapping[str, str], log_path: Path) -> None:
        self._env = {**env, "PDSERVE_ACTIVE": "1", "PDSERVE_PARENT_PID": str(os.getpid())}
        self.log_path = log_path
        self.is_ready = False
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._exits: dict[int, int] = {}
        self._spawned: dict[int, int] = {}
        self._ids = itertools.count(1)

    @property
    def is_alive(self) -> bool:
        """True from ``start`` until the process ends."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id, 0 before ``start``."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start importing; returns at once."""
        ours, theirs = socket.socketpair()
        with self.log_path.open("ab") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pdserve.plugin.forkserver", str(theirs.fileno())],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._channel = ours
        self._channel.setblocking(False)

    def pump(self, timeout_s: float = 0.0) -> None:
        """Read the forkserver's messages, waiting up to ``timeout_s`` for one."""
        if self._channel is None:
            return
        readable, _, _ = select.select([self._channel], [], [], max(timeout_s, 0.0))
        if not readable:
            return
        try:
            data = self._channel.recv(65536)
        except (BlockingIOError, ConnectionResetError):
            return
        if not data:
            self._lost()
            return
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def spawn(
        self, *, argv: Sequence[str], flags: Sequence[str], env: Mapping[str, str], log_path: Path
    ) -> ForkedChild:
        """Fork one worker running SGLang with ``flags``.

        Raises:
            StartupError: if the forkserver ended or does not answer.
        """
        if self._channel is None or not self.is_alive:
            raise StartupError(f"the forkserver process ended; its log is {self.log_path}")
        request_id = next(self._ids)
        request = {
            "id": request_id,
            "argv": list(argv),
            "flags": list(flags),
            "env": {**env, "PDSERVE_PARENT_PID": str(self.pid)},
            "log_path": str(log_path),
        }
        self._channel.setblocking(True)
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        self._channel.setblocking(False)
        deadline = time.monotonic() + SPAWN_S
        while request_id not in self._spawned:
            if time.monotonic() > deadline or not self.is_alive:
                raise StartupError(f"the forkserver forked no worker; its log is {self.log_path}")
            self.pump(0.1)
        return ForkedChild(self, self._spawned.pop(request_id))

    def returncode(self, pid: int) -> int | None:
        """Exit status of a forked process, None while it runs; it was killed if the forkserver has died."""
        self.pump()
        if pid in self._exits:
            return self._exits[pid]
        return None if self.is_alive else -signal.SIGKILL

    def close(self, timeout_s: float = 5.0) -> None:
        """End the forkserver; every worker it forked dies with it."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _take(self, message: dict[str, Any]) -> None:
        match message["event"]:
            case "ready":
                self.is_ready = True
            case "spawned":
                self._spawned[message["id"]] = message["pid"]
            case "exit":
                self._exits[message["pid"]] = message["returncode"]

    def _lost(self) -> None:
        assert self._channel is not None and self._process is not None
        self._channel.close()
        self._channel = None
        self._process.wait()


def _kill(pid: int, sig: int) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        return
