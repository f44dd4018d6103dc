"""A whole fleet on this machine: started, watched until ready, kept running, drained.

    start ──► wait_ready ──► serve ──► stop        balancer drains first, bootstrap service ends last
                 └─ StartupError: everything is stopped, the error goes to the caller

Must run in the main thread, see spawn.py. What the user sees goes through a
``Display``; monitor/progress.py has the one for terminals.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Protocol

from pdserve.cluster.diagnose import last_lines
from pdserve.cluster.ready import READY, FleetState, LogStage, describe_missing, get_json, stage_of
from pdserve.cluster.spawn import ExecSpawner, Spawner, choose_spawner
from pdserve.cluster.spec import ClusterSpec
from pdserve.cluster.supervise import State, Supervised, Supervisor
from pdserve.config.launch import LaunchConfig
from pdserve.config.worker_env import cache_dir
from pdserve.errors import ConfigError, StartupError
from pdserve.process import scratch

logger = logging.getLogger(__name__)

POLL_S = 0.2
STEADY_POLL_S = 1.0
WORKER_GRACE_S = 10.0
SERVICE_GRACE_S = 5.0
EXIT_INCOMPLETE = 1


class Display(Protocol):
    """Shows a launch. Every method returns at once."""

    def stage(self, name: str, *, role: str, url: str, stage: str, log_file: str) -> None:
        """A process reached another stage; the first call for a name adds it."""
        ...

    def tick(self) -> None:
        """Time has passed; called several times a second while the fleet starts."""
        ...

    def ready(self, *, url: str, model: str, log_dir: str) -> None:
        """The fleet takes requests at ``url``."""
        ...

    def event(self, level: int, text: str) -> None:
        """One line worth telling; ``level`` as in ``logging``."""
        ...

    def close(self) -> None:
        """Nothing is redrawn any more; lines are printed plainly. May be called again."""
        ...


class LocalCluster:
    """The processes of one fleet. ``workers_by`` starts the workers; the default follows the config."""

    def __init__(
        self,
        config: LaunchConfig,
        spec: ClusterSpec,
        log_dir: Path,
        display: Display,
        workers_by: Spawner | None = None,
    ) -> None:
        self.config, self.spec, self.log_dir = config, spec, log_dir
        self.processes = {p.name: Supervised(p, log_dir / f"{p.name}.log") for p in spec.processes}
        self.is_ready = False
        self._display = display
        self._services_by = ExecSpawner()
        self._workers_by = workers_by or choose_spawner(config, spec, log_dir)
        self._supervisor = Supervisor(
            bootstrap_url=spec.bootstrap_url, max_restarts=config.max_restarts, report=self._tell
        )
        self._logs = {name: LogStage(process.log_path) for name, process in self.processes.items()}
        self._runs: dict[str, float] = {}
        self._stages: dict[str, str] = {}
        self._state = FleetState()

    @property
    def workers(self) -> list[Supervised]:
        """The SGLang servers."""
        return [process for process in self.processes.values() if process.is_worker]

    @property
    def given_up(self) -> list[Supervised]:
        """Workers that the fleet lacks, however often they were started."""
        return [worker for worker in self.workers if worker.is_given_up]

    def start(self) -> None:
        """Begin starting every process; returns at once."""
        self._workers_by.start()
        for process in self.processes.values():
            spawner = self._workers_by if process.is_worker else self._services_by
            self._supervisor.watch(process, spawner)

    async def wait_ready(self) -> None:
        """Return when every pair has moved a real token.

        Raises:
            StartupError: a process ended before it was ready, or ``ready_timeout_s`` ran out.
        """
        deadline = time.monotonic() + self.config.ready_timeout_s
        num_pairs = self.config.prefill * self.config.decode
        while True:
            await self._look()
            self._display.tick()
            if self._supervisor.failure.done():
                self._supervisor.failure.result()
            if self._state.is_ready(num_pairs):
                break
            if time.monotonic() > deadline:
                raise self._timed_out()
            await asyncio.wait({self._supervisor.failure}, timeout=POLL_S)
        self.is_ready = True
        for process in self.processes.values():
            process.was_ready = True
        self._display.ready(url=self.spec.balancer_url, model=self._state.model, log_dir=str(self.log_dir))

    async def serve(self) -> None:
        """Follow the running fleet until cancelled; raises StartupError if supervision itself fails."""
        while True:
            await self._look()
            if self._supervisor.failure.done():
                self._supervisor.failure.result()
            await asyncio.wait({self._supervisor.failure}, timeout=STEADY_POLL_S)

    async def stop(self, number: int = signal.SIGINT) -> None:
        """Let running requests end (``drain_s``), then end workers, bootstrap service and forkserver.

        For ``number`` SIGTERM the balancer first gives load balancers ``shutdown_delay_s`` to turn elsewhere.
        """
        supervisor = self._supervisor
        supervisor.is_stopping = True
        delays = self.is_ready and number == signal.SIGTERM
        delay_s = self.config.shutdown_delay_s if delays else 0.0
        drain_s = self.config.drain_s if self.is_ready else 0.0
        self._display.close()  # a live monitor gives the terminal back before the drain, not after it
        late = f" after {delay_s:g} s for load balancers" if delay_s else ""
        self._tell(logging.INFO, f"stopping: requests have {drain_s:g} s to end{late}; Ctrl-C again kills")
        # The balancer cuts off what is left by itself: it is killed only if it does not.
        limit_s = delay_s + drain_s + SERVICE_GRACE_S
        balancer = self.processes[self.spec.balancer.name]
        await supervisor.stop(balancer, limit_s, signal.SIGTERM if delays else signal.SIGINT)
        await asyncio.gather(*(supervisor.stop(worker, WORKER_GRACE_S) for worker in self.workers))
        await supervisor.stop(self.processes[self.spec.bootstrap.name], SERVICE_GRACE_S)
        self._close()
        for worker in self.given_up:
            self._tell(logging.ERROR, f"ended without {worker.name}, which was given up: {worker.last_exit}")

    def kill(self) -> None:
        """SIGKILL to every process at once."""
        self._supervisor.is_stopping = True
        for process in self.processes.values():
            if process.child is not None:
                process.child.kill_group()
            if process.task is not None and process.child is None:
                process.task.cancel()

    async def kill_and_wait(self) -> None:
        """``kill``, then collect the dead and remove what they left."""
        self.kill()
        tasks = {process.task for process in self.processes.values() if process.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=SERVICE_GRACE_S)
        self._close(is_forced=True)

    def _close(self, *, is_forced: bool = False) -> None:
        self._workers_by.close(is_forced=is_forced)
        scratch.sweep()
        if self._supervisor.failure.done():
            self._supervisor.failure.exception()  # seen, whether or not anybody raised it

    async def _look(self) -> None:
        """Read the logs and the state document; show what changed."""
        self._state = FleetState.parse(await get_json(self.spec.balancer_url + "/pdserve/state"))
        for name, process in self.processes.items():
            log = self._logs[name]
            if self._runs.get(name) != process.started_s:
                self._runs[name] = process.started_s
                log.restart(process.log_start)
                self._set_stage(process, State.STARTING.value)
            log.read()
            stage = stage_of(process, self._state, log)
            if stage == READY:
                process.became_ready()
            self._set_stage(process, stage)

    def _set_stage(self, process: Supervised, stage: str) -> None:
        if self._stages.get(process.name) == stage:
            return
        self._stages[process.name] = stage
        spec = process.spec
        url = spec.ready_url.rpartition("/")[0]
        role = spec.role.value if spec.role else spec.kind.value
        self._display.stage(process.name, role=role, url=url, stage=stage, log_file=str(process.log_path))

    def _tell(self, level: int, text: str) -> None:
        self._display.event(level, text)

    def _timed_out(self) -> StartupError:
        late = [p for p in self.processes.values() if self._stages.get(p.name) != READY]
        missing = describe_missing(self._stages, self._state, self.workers)
        tail = last_lines(late[0].read_log()) if late else ""
        return StartupError(
            f"not ready after {self.config.ready_timeout_s:g} s; missing: {missing} (logs: {self.log_dir})",
            tail,
        )


async def run_cluster(cluster: LocalCluster) -> int:
    """Start ``cluster`` and keep it until SIGINT, SIGTERM or SIGHUP; the second one kills.

    Returns 0 if it was ready and has drained with every worker it was planned with, EXIT_INCOMPLETE if one
    of them had been given up, else 128 + the signal.
    """
    loop = asyncio.get_running_loop()
    signals: list[int] = []
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal(number: int) -> None:
        (second if signals else first).set()
        signals.append(number)

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in caught:
        loop.add_signal_handler(number, on_signal, number)
    try:
        cluster.start()
        await _until(first, _start_and_serve(cluster))
        is_drained = await _until(second, cluster.stop(signals[0]))
    except BaseException:
        await cluster.kill_and_wait()
        raise
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
    if not is_drained:
        await cluster.kill_and_wait()
    if not (is_drained and cluster.is_ready):
        return 128 + signals[-1]
    return EXIT_INCOMPLETE if cluster.given_up else 0


def run_launch(config: LaunchConfig, spec: ClusterSpec, display: Display) -> int:
    """``pdserve launch``: start what is planned, serve until told to stop. Call it in the main thread.

    Returns the exit status, see ``run_cluster``.

    Raises:
        ConfigError: the log folder cannot be made.
        StartupError: the fleet did not become ready; everything has been stopped.
    """
    log_dir = make_log_dir(config.log_dir)
    scratch.sweep()

    async def run() -> int:
        return await run_cluster(LocalCluster(config, spec, log_dir, display))

    try:
        return asyncio.run(run())
    finally:
        display.close()


def make_log_dir(asked: str) -> Path:
    """The folder for this run's logs, made if missing. Raises ConfigError if it cannot be."""
    folder = (
        Path(asked).expanduser()
        if asked
        else cache_dir() / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot make the log folder {folder}: {exc.strerror}; set log_dir") from exc
    return folder


async def _start_and_serve(cluster: LocalCluster) -> None:
    await cluster.wait_ready()
    await cluster.serve()


async def _until(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Run ``work`` until it ends (True) or ``stop`` is set (False, and it is cancelled)."""
    task, stopper = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopper}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return False
        task.result()
        return True
    finally:
        task.cancel()
        stopper.cancel()
