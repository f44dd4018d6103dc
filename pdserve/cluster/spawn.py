"""How a planned process becomes a running one: executed, or forked from the forkserver.

Everything here runs in the launcher's main thread, because the kernel's
parent-death signal is tied to the thread that creates the child.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pdserve.cluster.diagnose import diagnose, last_lines, read_tail
from pdserve.cluster.forkserver_client import ForkServer
from pdserve.cluster.spec import ClusterSpec, ProcessSpec
from pdserve.config.launch import LaunchConfig
from pdserve.config.worker_env import environment
from pdserve.errors import StartupError
from pdserve.process.parent_death import die_with_parent

_PUMP_S = 0.05
_PERSONAL = ("PDSERVE_ROLE", "PDSERVE_WORKER_ID", "PDSERVE_INSTANCE_ID")
"""Variables of one worker; the forkserver itself must not have them."""


class Child(Protocol):
    """One running process that leads its own session."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    def poll(self) -> int | None:
        """Exit status (negative: signal), or None while it runs."""
        ...

    def signal(self, sig: int) -> None:
        """Send ``sig`` to this process alone; nothing if it is gone."""
        ...

    def kill_group(self) -> None:
        """SIGKILL it and everything it forked."""
        ...


class Spawner(Protocol):
    """Starts processes."""

    def start(self) -> None:
        """Prepare what ``spawn`` needs; returns at once."""
        ...

    async def spawn(self, spec: ProcessSpec, *, log_path: Path, instance_id: str = "") -> Child:
        """Start one process; its output is appended to ``log_path``. Raises StartupError."""
        ...

    def close(self, *, is_forced: bool = False) -> None:
        """End what ``start`` began; the children have ended, or end now if ``is_forced``."""
        ...


class ExecChild:
    """A direct child of the launcher."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status (negative: signal), or None while it runs."""
        return self._process.poll()

    def signal(self, sig: int) -> None:
        """Send ``sig`` to this process alone; nothing if it is gone."""
        self._process.send_signal(sig)

    def kill_group(self) -> None:
        """SIGKILL it and everything it forked; what outlived its leader is reached too."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


class ExecSpawner:
    """Starts each process by itself; a worker then imports SGLang itself."""

    def start(self) -> None:
        """Nothing to prepare."""

    async def spawn(self, spec: ProcessSpec, *, log_path: Path, instance_id: str = "") -> ExecChild:
        """Start ``spec.argv``. Raises StartupError if the program cannot be executed."""
        try:
            return ExecChild(_execute(spec, log_path, instance_id))
        except (OSError, subprocess.SubprocessError) as exc:
            raise StartupError(f"{spec.name} could not be started: {exc}") from exc

    def close(self, *, is_forced: bool = False) -> None:
        """Nothing to end."""


class ForkServerSpawner:
    """Forks workers from one process that has SGLang imported; a dead forkserver is started again."""

    def __init__(self, env: Mapping[str, str], log_path: Path) -> None:
        self._env = {key: value for key, value in env.items() if key not in _PERSONAL}
        self._log_path = log_path
        self._forkserver: ForkServer | None = None

    def start(self) -> None:
        """Start importing; returns at once."""
        self._forkserver = ForkServer(self._env, self._log_path)
        self._forkserver.start()

    async def spawn(self, spec: ProcessSpec, *, log_path: Path, instance_id: str = "") -> Child:
        """Fork a worker once the forkserver is ready. Raises StartupError if the forkserver cannot start."""
        env = child_environment(spec, instance_id)
        for _ in range(2):
            forkserver = await self._ready_forkserver()
            try:
                return forkserver.spawn(argv=spec.argv, flags=spec.flags, env=env, log_path=log_path)
            except (StartupError, OSError) as exc:
                if forkserver.is_alive:
                    raise StartupError(f"{spec.name} could not be forked: {exc}") from exc
        raise StartupError(
            f"the forkserver ended twice while it forked {spec.name}; its log is {self._log_path}"
        )

    def close(self, *, is_forced: bool = False) -> None:
        """End the forkserver; workers that still run die with it."""
        forkserver, self._forkserver = self._forkserver, None
        if forkserver is None:
            return
        # One that still imports reads no request for seconds, and Ctrl-C would wait for it.
        if forkserver.is_alive and (is_forced or not forkserver.is_ready):
            os.kill(forkserver.pid, signal.SIGKILL)
        forkserver.close()

    async def _ready_forkserver(self) -> ForkServer:
        if self._forkserver is not None and not self._forkserver.is_alive and self._forkserver.is_ready:
            self._forkserver.close()
            self._forkserver = None
        if self._forkserver is None:
            self.start()
        forkserver = self._forkserver
        assert forkserver is not None
        while not forkserver.is_ready:
            forkserver.pump()
            if not forkserver.is_ready and not forkserver.is_alive:
                raise self._forkserver_failed(forkserver)
            await asyncio.sleep(_PUMP_S)
        return forkserver

    def _forkserver_failed(self, forkserver: ForkServer) -> StartupError:
        forkserver.close()
        if self._forkserver is forkserver:
            self._forkserver = None
        tail = read_tail(self._log_path)
        why = diagnose(tail) or f"its log is {self._log_path}"
        return StartupError(
            f"the forkserver, which imports SGLang for all workers, ended: {why}", last_lines(tail)
        )


def child_environment(spec: ProcessSpec, instance_id: str) -> dict[str, str]:
    """The whole environment of one process: inherited, then the plan's, then its place in this run."""
    env = {**environment(), **spec.env, "PDSERVE_PARENT_PID": str(os.getpid())}
    if instance_id:
        env["PDSERVE_INSTANCE_ID"] = instance_id
    return env


def choose_spawner(config: LaunchConfig, spec: ClusterSpec, log_dir: Path) -> Spawner:
    """The spawner for workers: the forkserver where a fork is possible and wanted."""
    if not spec.can_fork or config.start_method == "spawn":
        return ExecSpawner()
    return ForkServerSpawner({**environment(), **spec.workers[0].env}, log_dir / "forkserver.log")


def _execute(spec: ProcessSpec, log_path: Path, instance_id: str) -> subprocess.Popen[bytes]:
    with log_path.open("ab") as log:
        return subprocess.Popen(
            spec.argv,
            env=child_environment(spec, instance_id),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # Set for every program, also one that knows nothing of pdserve; survives the exec.
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
