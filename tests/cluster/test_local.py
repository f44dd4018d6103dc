"""The launcher against real processes: start, crash, restart, drain, and what a killed launcher leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pdserve.cluster import local, supervise
from pdserve.cluster.local import LocalCluster, make_log_dir
from pdserve.cluster.ready import FleetState, LogStage, get_json
from pdserve.cluster.spawn import Child, ForkServerSpawner
from pdserve.cluster.spec import ClusterSpec
from pdserve.cluster.supervise import State, backoff_s
from pdserve.config.launch import LaunchConfig
from pdserve.errors import ConfigError, StartupError
from pdserve.types import Role
from tests.support.small_fleet import Recorder, SmallFleet, is_running, until

pytestmark = pytest.mark.process

CRASH = "import sys; print('CUDA out of memory. Tried to allocate 2.00 GiB', file=sys.stderr); sys.exit(3)"
ONCE = """
import pathlib, sys
mark = pathlib.Path(sys.argv[1], "crash")
if mark.exists():
    sys.exit("RuntimeError: it broke")
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[SmallFleet]:
    fleet = SmallFleet(tmp_path)
    yield fleet
    fleet.close()


@contextlib.asynccontextmanager
async def running(fleet: SmallFleet, spec: ClusterSpec | None = None) -> AsyncIterator[LocalCluster]:
    cluster = LocalCluster(fleet.config, spec or fleet.spec(), fleet.folder, Recorder())
    cluster.start()
    try:
        yield cluster
    finally:
        await cluster.kill_and_wait()


def _shown(cluster: LocalCluster) -> Recorder:
    assert isinstance(cluster._display, Recorder)
    return cluster._display


async def test_ready_then_drained(fleet: SmallFleet) -> None:
    async with running(fleet) as cluster:
        await cluster.wait_ready()
        assert _shown(cluster).ready_url == fleet.url
        assert ("decode-0", "ready") in _shown(cluster).stages
        pids = fleet.pids()
        assert len(pids) == 6 and all(map(is_running, pids))
        await cluster.stop()
        await until(lambda: not any(map(is_running, pids)), 2)
        assert all(p.state is State.STOPPED for p in cluster.processes.values())


async def test_worker_gets_its_environment(fleet: SmallFleet) -> None:
    async with running(fleet) as cluster:
        await cluster.wait_ready()
        instance_id, pid = fleet.instance("prefill-0")
        assert len(instance_id) == 32
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert f"PDSERVE_PARENT_PID={os.getpid()}".encode() in environ
        assert os.getsid(pid) == pid


async def test_first_crash_fails_the_launch_with_its_log(fleet: SmallFleet) -> None:
    fleet.workers[1] = fleet.worker("decode-0", Role.DECODE, CRASH)
    async with running(fleet) as cluster:
        began = time.monotonic()
        with pytest.raises(
            StartupError, match="decode-0 ended before it was ready: exit status 3: the GPU"
        ) as e:
            await cluster.wait_ready()
        assert time.monotonic() - began < 5
        assert "Tried to allocate 2.00 GiB" in e.value.log_tail


async def test_a_service_that_cannot_start_fails_the_launch(fleet: SmallFleet) -> None:
    async with running(fleet, fleet.spec(bootstrap_code="raise SystemExit('no')")) as cluster:
        fleet.is_hidden = True
        with pytest.raises(StartupError, match="bootstrap ended before it was ready: exit status 1"):
            await cluster.wait_ready()


async def test_timeout_says_what_is_missing(tmp_path: Path) -> None:
    fleet = SmallFleet(tmp_path)
    fleet.workers[0] = fleet.worker(
        "prefill-0", Role.PREFILL, "import time; print('Load weight begin.', flush=True); time.sleep(99)"
    )
    cluster = LocalCluster(LaunchConfig(ready_timeout_s=4, device="cpu"), fleet.spec(), tmp_path, Recorder())
    cluster.start()
    try:
        with pytest.raises(
            StartupError, match=r"not ready after 4 s; missing: (.*; )?prefill-0 \(loading weights\)"
        ):
            await cluster.wait_ready()
    finally:
        await cluster.kill_and_wait()
        fleet.close()


async def test_crash_after_ready_is_restarted_as_a_new_instance(fleet: SmallFleet) -> None:
    async with running(fleet) as cluster:
        await cluster.wait_ready()
        serving = asyncio.create_task(cluster.serve())
        first, pid = fleet.instance("prefill-0")
        scheduler = int((fleet.folder / "prefill-0.scheduler").read_text())
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        await until(lambda: first in fleet.deregistered, 2)
        assert time.monotonic() - killed < 1
        await until(lambda: fleet.instance("prefill-0")[0] not in ("", first))
        assert not is_running(scheduler), "what the dead worker forked must be gone before its successor runs"
        await until(lambda: _shown(cluster).stages.count(("prefill-0", "ready")) == 2)
        assert "prefill-0 ended: killed by signal 9" in _shown(cluster).events[0]
        assert cluster.processes["decode-0"].restarts == 0
        serving.cancel()


async def test_gives_up_on_one_worker_after_max_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "FIRST_BACKOFF_S", 0.01)
    fleet = SmallFleet(tmp_path)
    code = ONCE + fleet.workers[0].argv[2]
    fleet.workers[0] = fleet.worker("prefill-0", Role.PREFILL, code)
    fleet.config = LaunchConfig(max_restarts=2, ready_timeout_s=20, device="cpu")
    async with running(fleet) as cluster:
        await cluster.wait_ready()
        (tmp_path / "crash").touch()
        os.kill(fleet.instance("prefill-0")[1], signal.SIGKILL)
        worker = cluster.processes["prefill-0"]
        await until(lambda: worker.state is State.FAILED)
        last = _shown(cluster).events[-1]
        assert "prefill-0 given up after 2 restarts in a row: exit status 1: RuntimeError: it broke" in last
        assert cluster.processes["decode-0"].state is State.RUNNING
    fleet.close()


async def test_refused_worker_is_not_restarted(fleet: SmallFleet) -> None:
    refused = "import sys; sys.exit(79) if pathlib.Path(sys.argv[1], 'crash').exists() else 0\n"
    fleet.workers[0] = fleet.worker(
        "prefill-0", Role.PREFILL, "import pathlib\n" + refused + fleet.workers[0].argv[2]
    )
    async with running(fleet) as cluster:
        await cluster.wait_ready()
        (fleet.folder / "crash").touch()
        os.kill(fleet.instance("prefill-0")[1], signal.SIGKILL)
        worker = cluster.processes["prefill-0"]
        await until(lambda: worker.state is State.FAILED)
        assert worker.restarts == 1
        assert "given up: exit status 79" in _shown(cluster).events[-1]


async def test_dead_balancer_comes_back(fleet: SmallFleet) -> None:
    async with running(fleet) as cluster:
        await cluster.wait_ready()
        pid = fleet.folder / "balancer.pid"
        former = pid.read_text()
        os.kill(int(former), signal.SIGKILL)
        await until(lambda: pid.read_text() not in ("", former))


class _NoForkServer:
    """A spawner whose preparation fails, as when SGLang cannot be imported."""

    def start(self) -> None: ...

    async def spawn(self, spec: object, *, log_path: Path, instance_id: str = "") -> Child:
        raise StartupError("the forkserver ended: no module named sglang", "its last line")

    def close(self, *, is_forced: bool = False) -> None: ...


async def test_failed_spawner_shows_its_own_log(fleet: SmallFleet) -> None:
    cluster = LocalCluster(fleet.config, fleet.spec(), fleet.folder, Recorder(), _NoForkServer())
    cluster.start()
    try:
        with pytest.raises(StartupError, match="no module named sglang") as e:
            await cluster.wait_ready()
        assert e.value.log_tail == "its last line"
    finally:
        await cluster.kill_and_wait()


def test_a_forkserver_that_still_imports_is_not_waited_for(tmp_path: Path) -> None:
    spawner = ForkServerSpawner(dict(os.environ), tmp_path / "forkserver.log")
    spawner.start()
    began = time.monotonic()
    spawner.close()
    assert time.monotonic() - began < 2


async def test_child_deaf_to_sigterm_is_killed(fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WORKER_GRACE_S", 0.3)
    fleet.workers[0] = fleet.worker("prefill-0", Role.PREFILL, fleet.workers[0].argv[2], "--deaf")
    async with running(fleet) as cluster:
        await cluster.wait_ready()
        pids = fleet.pids()
        await cluster.stop()
        # A killed scheduler is nobody's child any more: the kernel ends it a moment after its server.
        await until(lambda: not any(map(is_running, pids)), 2)
        assert any("prefill-0 did not end" in text for text in _shown(cluster).events)


def test_backoff_is_bounded() -> None:
    assert [backoff_s(n) for n in (1, 2, 3, 4, 5, 6, 99)] == [0.5, 1, 2, 4, 8, 10, 10]


def test_log_stage_follows_complete_lines_and_restarts(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogStage(path)
    log.read()
    path.write_text("Load weight begin. avail mem\nKV Cache is allo")
    log.read()
    assert log.stage == "loading weights"
    with path.open("a") as file:
        file.write("cated.\n")
    log.read()
    assert log.stage == "KV pool allocated"
    log.restart(path.stat().st_size)
    log.read()
    assert log.stage == ""


async def test_nobody_listens_is_an_unreached_state(fleet: SmallFleet) -> None:
    document = await get_json(fleet.url + "/pdserve/state")
    assert document is not None and FleetState.parse(document).is_reached
    fleet.close()
    assert await get_json(fleet.url + "/pdserve/state", 1.0) is None
    assert not FleetState.parse(None).is_reached


def test_log_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot make the log folder"):
        make_log_dir(str(tmp_path / "file" / "logs"))


def _launch(folder: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.small_fleet", str(folder), *args]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline().startswith("ready")
    return launcher


def _pids(folder: Path) -> list[int]:
    own = [
        int(n) for f in (*folder.glob("*.pid"), *folder.glob("*.scheduler")) for n in f.read_text().split()
    ]
    pids = own + [int(f.read_text().split()[1]) for f in folder.glob("*.instance")]
    assert len(pids) == 8
    return pids


async def test_ctrl_c_drains_and_exits_0(tmp_path: Path) -> None:
    launcher = _launch(tmp_path)
    pids = _pids(tmp_path)
    launcher.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(launcher.wait, 15) == 0
    await until(lambda: not any(map(is_running, pids)), 2)


async def test_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    launcher = _launch(tmp_path, "--deaf")
    pids = _pids(tmp_path)
    launcher.send_signal(signal.SIGINT)
    balancer = int((tmp_path / "balancer.pid").read_text())
    await until(lambda: not is_running(balancer))
    began = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(launcher.wait, 15) == 128 + signal.SIGINT
    assert time.monotonic() - began < 5, "the deaf worker has 10 s after the first signal only"
    await until(lambda: not any(map(is_running, pids)), 2)


async def test_killed_launcher_leaves_no_process_of_its_own(tmp_path: Path) -> None:
    launcher = _launch(tmp_path, "--deaf")
    mains = [*tmp_path.glob("*.pid"), *tmp_path.glob("*.instance")]
    pids = [int(f.read_text().split()[-1]) for f in mains]
    assert len(pids) == 5
    launcher.kill()
    launcher.wait()
    await until(lambda: not any(map(is_running, pids)), 5)
    for scheduler in tmp_path.glob("*.scheduler"):  # in SGLang they die with their server; these stay
        os.kill(int(scheduler.read_text()), signal.SIGKILL)
