"""Keeps the processes of a fleet running: notices a death, clears up, starts anew.

    starting ──► running ──death──► backing off ──► starting …
                    │                    └─ too often, or refused ──► failed, given up ──minutes──► starting …
                    └── stop ──► stopped

Knows nothing of readiness beyond ``was_ready``, which ready.py sets: a process
that ends before it was ever ready fails the launch instead of being restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.bootstrap.client import LeaseClient
from pdserve.cluster.diagnose import explain_exit, last_lines, read_tail
from pdserve.cluster.spawn import Child, Spawner
from pdserve.cluster.spec import ProcessKind, ProcessSpec
from pdserve.errors import StartupError
from pdserve.process import scratch
from pdserve.types import InstanceId

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
FIRST_RETRY_S = 60.0
MAX_RETRY_S = 600.0
"""Pauses between the tries of a worker that was given up: what broke it may have been repaired."""
STEADY_RUN_S = 60.0
"""A run this long forgets earlier restarts."""
TAIL_LINES = 15
"""Of its log, shown when a worker is given up."""
DEREGISTER_S = 1.0
EXIT_HOOKS_FAILED = 78
EXIT_REFUSED = 79
FINAL_STATUS = (EXIT_HOOKS_FAILED, EXIT_REFUSED)
"""Exit statuses of a worker (plugin/hooks.py, plugin/worker.py) that a restart would only repeat."""
_POLL_S = 0.02

Report = Callable[[int, str], None]
"""``(logging level, one line)``: how an event reaches the user."""


class State(enum.StrEnum):
    """Where a supervised process is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    BACKING_OFF = "backing off"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class Supervised:
    """One process of the fleet: how it is started, and its present run.

    ``restarts`` counts those in a row, ``retries`` the tries since it was given up (1 is the giving up
    itself); ``log_start`` is where this run's log begins.
    """

    spec: ProcessSpec
    log_path: Path
    state: State = State.STARTING
    child: Child | None = None
    instance_id: str = ""
    restarts: int = 0
    retries: int = 0
    started_s: float = 0.0
    was_ready: bool = False
    last_exit: str = ""
    log_start: int = 0
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Name in the plan."""
        return self.spec.name

    @property
    def is_worker(self) -> bool:
        """True for an SGLang server."""
        return self.spec.kind is ProcessKind.WORKER

    @property
    def is_given_up(self) -> bool:
        """True from its giving up until it is ready again: the fleet is smaller than it was planned."""
        return self.retries > 0

    def became_ready(self) -> None:
        """It does its work."""
        self.was_ready, self.retries = True, 0

    def read_log(self) -> str:
        """The end of what this run wrote."""
        return read_tail(self.log_path, self.log_start)


def backoff_s(restarts: int) -> float:
    """Pause before the ``restarts``-th restart in a row, counted from 1."""
    return min(FIRST_BACKOFF_S * 2.0 ** min(restarts - 1, 10), MAX_BACKOFF_S)


def retry_s(retries: int) -> float:
    """Pause before the ``retries``-th try of a worker that was given up, counted from 1."""
    return min(FIRST_RETRY_S * 2.0 ** min(retries - 1, 10), MAX_RETRY_S)


def _describe_loss(process: Supervised, text: str, pause_s: float) -> str:
    """What is told of a worker that is given up: the end of its log too, the first time."""
    line = f"{process.name} {text}; next try in {pause_s:g} s (log: {process.log_path})"
    tail = last_lines(process.read_log(), TAIL_LINES) if process.retries == 1 else ""
    return f"{line}\n{tail}".rstrip()


async def wait_exit(child: Child) -> int:
    """Wait until ``child`` ends, take its whole session with it, and return its exit status."""
    try:
        descriptor = os.pidfd_open(child.pid)
    except (ProcessLookupError, AttributeError, OSError):
        descriptor = -1  # gone already, or a kernel without pidfd: polling finds it
    if descriptor >= 0:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        # Before the exit status is collected: until then the number is not given to a new process.
        child.kill_group()
    while True:
        code = child.poll()
        if code is not None:
            break
        await asyncio.sleep(_POLL_S)
    if descriptor < 0:
        child.kill_group()
    return code


class Supervisor:
    """Runs one asyncio task per process. ``failure`` is set by the first death before readiness."""

    def __init__(self, *, bootstrap_url: str, max_restarts: int, report: Report) -> None:
        self.is_stopping = False
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._bootstrap_url = bootstrap_url
        self._max_restarts = max_restarts
        self._report = report

    def watch(self, process: Supervised, spawner: Spawner) -> None:
        """Start ``process`` and keep it running from now on."""
        process.task = asyncio.create_task(self._keep(process, spawner), name=f"supervise-{process.name}")

    async def stop(self, process: Supervised, grace_s: float, number: int = signal.SIGTERM) -> None:
        """Signal ``number``, then SIGKILL of the whole session after ``grace_s``. Needs ``is_stopping``."""
        if process.task is None:
            return
        if process.child is None:
            process.task.cancel()
        else:
            process.child.signal(number)
        _, late = await asyncio.wait({process.task}, timeout=grace_s)
        if late and process.child is not None:
            self._report(logging.WARNING, f"{process.name} did not end within {grace_s:g} s: killed")
            process.child.kill_group()
            await asyncio.wait({process.task}, timeout=grace_s)
        process.state = State.STOPPED

    async def _keep(self, process: Supervised, spawner: Spawner) -> None:
        try:
            while not self.is_stopping:
                why, is_final = await self._run_once(process, spawner)
                if self.is_stopping or not await self._may_restart(process, why, is_final):
                    return
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            logger.exception("supervision of %s failed", process.name)
            self._fail(StartupError(f"{process.name} can no longer be supervised: {exc!r}"))

    async def _run_once(self, process: Supervised, spawner: Spawner) -> tuple[str, bool]:
        """One life of the process: ``(why it ended, a restart would be useless)``."""
        process.state, process.started_s = State.STARTING, time.monotonic()
        process.instance_id = uuid.uuid4().hex if process.is_worker else ""
        with contextlib.suppress(OSError):
            process.log_start = process.log_path.stat().st_size
        try:
            child = await spawner.spawn(
                process.spec, log_path=process.log_path, instance_id=process.instance_id
            )
        except StartupError as exc:
            process.last_exit = str(exc)
            if not process.was_ready:
                self._fail(exc)  # it carries the log of what failed, which is not this process's own
            return str(exc), False
        process.child, process.state = child, State.RUNNING
        code = await wait_exit(child)
        process.child = None
        if process.is_worker:
            await self._clear_up(process, child.pid)
        process.last_exit = explain_exit(code, process.read_log())
        return process.last_exit, process.is_worker and code in FINAL_STATUS

    async def _clear_up(self, process: Supervised, pid: int) -> None:
        """Take a dead worker out of the fleet before its lease runs out, and off the disk."""
        client = LeaseClient(self._bootstrap_url, timeout_s=DEREGISTER_S)
        with contextlib.suppress(Exception):  # the lease runs out by itself
            await asyncio.to_thread(
                client.deregister, InstanceId(process.instance_id), f"process {pid} of {process.name} ended"
            )
        scratch.remove(pid)

    async def _may_restart(self, process: Supervised, why: str, is_final: bool) -> bool:
        """Report the death; wait out the back-off. False if this process stays down."""
        if not process.was_ready:
            process.state = State.FAILED
            text = f"{process.name} ended before it was ready: {why}"
            self._fail(StartupError(f"{text} (log: {process.log_path})", last_lines(process.read_log())))
            return False
        if time.monotonic() - process.started_s >= STEADY_RUN_S:
            process.restarts = 0
        # Without balancer and bootstrap service nothing is served at all: they are never given up.
        is_worn_out = process.is_worker and process.restarts >= self._max_restarts
        if is_final or is_worn_out:
            process.state = State.FAILED
            process.retries += 1
            pause_s = retry_s(process.retries)
            after = "" if is_final else f" after {process.restarts} restarts in a row"
            self._report(logging.ERROR, _describe_loss(process, f"given up{after}: {why}", pause_s))
        else:
            process.restarts += 1
            pause_s = backoff_s(process.restarts)
            process.state = State.BACKING_OFF
            self._report(
                logging.WARNING, f"{process.name} ended: {why}; restart {process.restarts} in {pause_s:g} s"
            )
        await asyncio.sleep(pause_s)
        return True

    def _fail(self, error: StartupError) -> None:
        if not self.is_stopping and not self.failure.done():
            self.failure.set_exception(error)
