"""Processes the bench starts: each on its core, its output in a file, ended by its pid whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from proxy.cores import process_tree, session_members

STOP_S = 5.0
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def raise_open_files() -> int:
    """Let this process and its children open as many files as allowed; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ChildEnded(Exception):
    """It ended before it said what was asked; the message has its last words."""


def _settle(core: int) -> None:
    """In a new process: its core, and our priority for its session, which Linux weighs as one (sched(7)).

    It ends with us even if we are killed: nothing of a bench may stay on its cores.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, {core})
    priority = os.nice(0)
    if priority:
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(priority))


class Child:
    """One process and what it starts in turn. ``with`` ends them all."""

    def __init__(self, command: Sequence[str], core: int, log: Path, *, reads_stdout: bool = False) -> None:
        self.log, self.name = log, Path(command[0]).name
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if reads_stdout else output,
                stderr=output,
                text=True,
                start_new_session=True,  # Ctrl-C is for the bench, which then ends its children
                preexec_fn=lambda: _settle(core),
            )

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self.process.pid

    @property
    def pids(self) -> list[int]:
        """It and its descendants."""
        return process_tree(self.pid)

    @property
    def last_words(self) -> str:
        """The end of its output."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1][-200:] if lines else "no output"

    def read_line(self) -> str:
        """The next line of its stdout; raises ChildEnded if there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ChildEnded(f"{self.name} ended with {self.process.wait()}: {self.last_words}")
        return line.strip()

    def stop(self) -> None:
        """Ask it to end, kill what is left of its session, and wait until nothing is."""
        self.process.send_signal(signal.SIGINT)  # at SIGTERM a balancer first waits for load balancers
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # The session's number is not given away while it has members.
        while left := session_members(self.pid):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
