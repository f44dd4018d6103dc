"""A worker that cannot be kept running is told, tried again with growing pauses, and counts at the end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cluster import supervise
from pdserve.cluster.local import EXIT_INCOMPLETE, LocalCluster, run_cluster
from pdserve.cluster.supervise import State, retry_s
from pdserve.config.launch import LaunchConfig
from pdserve.types import Role
from tests.support.small_fleet import Recorder, SmallFleet, until

LIMIT_S = 60.0
ONCE = """
import pathlib, sys
if pathlib.Path(sys.argv[1], "crash").exists():
    print("what it did before", flush=True)
    sys.exit("RuntimeError: it broke")
"""


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallFleet]:
    """Its prefill worker ends at once while a file ``crash`` is there; tried thrice, then every 0.05 s."""
    monkeypatch.setattr(supervise, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervise, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(supervise, "MAX_RETRY_S", 0.05)
    made = SmallFleet(tmp_path)
    made.workers[0] = made.worker("prefill-0", Role.PREFILL, ONCE + made.workers[0].argv[2])
    made.config = LaunchConfig(max_restarts=2, ready_timeout_s=LIMIT_S, drain_s=5, device="cpu")
    yield made
    made.close()


def _crash(fleet: SmallFleet) -> None:
    (fleet.folder / "crash").touch()
    os.kill(fleet.instance("prefill-0")[1], signal.SIGKILL)


@pytest.mark.process
async def test_it_comes_back_by_itself_once_what_broke_it_is_repaired(fleet: SmallFleet) -> None:
    display = Recorder()
    cluster = LocalCluster(fleet.config, fleet.spec(), fleet.folder, display)
    running = asyncio.create_task(run_cluster(cluster))
    await until(lambda: bool(display.ready_url), LIMIT_S)
    _crash(fleet)
    worker = cluster.processes["prefill-0"]
    await until(lambda: worker.retries >= 2, LIMIT_S)
    assert cluster.given_up == [worker]
    told = next(text for text in display.events if "given up after 2 restarts in a row" in text)
    assert "RuntimeError: it broke" in told.splitlines()[0] and "next try in" in told.splitlines()[0]
    assert told.splitlines()[-2:] == ["what it did before", "RuntimeError: it broke"]
    (fleet.folder / "crash").unlink()
    await until(lambda: not cluster.given_up, LIMIT_S)
    assert worker.state is State.RUNNING
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, LIMIT_S) == 0


@pytest.mark.process
async def test_a_launch_that_ends_without_it_says_so_and_exits_with_an_error(fleet: SmallFleet) -> None:
    display = Recorder()
    cluster = LocalCluster(fleet.config, fleet.spec(), fleet.folder, display)
    running = asyncio.create_task(run_cluster(cluster))
    await until(lambda: bool(display.ready_url), LIMIT_S)
    _crash(fleet)
    await until(lambda: bool(cluster.given_up), LIMIT_S)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, LIMIT_S) == EXIT_INCOMPLETE != 0
    last = display.events[-1]
    assert last == "ended without prefill-0, which was given up: exit status 1: RuntimeError: it broke"


def test_pauses_grow_to_ten_minutes() -> None:
    assert [retry_s(n) for n in (1, 2, 3, 4, 5, 99)] == [60, 120, 240, 480, 600, 600]
