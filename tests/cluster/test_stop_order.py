"""How ``launch`` ends: the balancer first, after SIGTERM once load balancers had time, then the workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.cluster.local import LocalCluster
from pdserve.types import Role
from tests.cluster.test_spec import plan
from tests.support import small_fleet
from tests.support.small_fleet import Recorder, SmallFleet

pytestmark = pytest.mark.process

RECORDED = """
def end(number, frame):
    with pathlib.Path(sys.argv[1], "ends").open("a") as file:
        file.write(f"{sys.argv[2]} {signal.Signals(number).name}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
"""
SERVICE = "import os, pathlib, signal, sys\n" + RECORDED + small_fleet.SERVICE
WORKER = "import pathlib, signal, sys\n" + RECORDED + small_fleet.WORKER


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[SmallFleet]:
    """One pair whose processes write down in ``ends`` which signal ended them, in order."""
    fleet = SmallFleet(tmp_path)
    fleet.workers = [fleet.worker(w.name, w.role or Role.DECODE, WORKER) for w in fleet.workers]
    yield fleet
    fleet.close()


async def ends_of(fleet: SmallFleet, *, is_ready: bool, number: int | None) -> list[str]:
    spec = fleet.spec(SERVICE)
    balancer = replace(spec.balancer, argv=(*spec.balancer.argv[:2], SERVICE, *spec.balancer.argv[3:]))
    cluster = LocalCluster(fleet.config, replace(spec, balancer=balancer), fleet.folder, Recorder())
    cluster.start()
    try:
        await cluster.wait_ready()
        for name in ("balancer", "bootstrap"):
            await small_fleet.until((fleet.folder / f"{name}.pid").exists, 60)
        cluster.is_ready = is_ready
        await (cluster.stop() if number is None else cluster.stop(number))
    finally:
        await cluster.kill_and_wait()
    return (fleet.folder / "ends").read_text().splitlines()


@pytest.mark.parametrize(
    ("number", "is_ready", "heard"),
    [
        (signal.SIGTERM, True, "SIGTERM"),
        (signal.SIGTERM, False, "SIGINT"),
        (signal.SIGINT, True, "SIGINT"),
        (signal.SIGHUP, True, "SIGINT"),
        (None, True, "SIGINT"),
    ],
)
async def test_only_sigterm_to_a_ready_fleet_lets_the_balancer_wait_for_load_balancers(
    fleet: SmallFleet, number: int | None, is_ready: bool, heard: str
) -> None:
    first, *workers, last = await ends_of(fleet, is_ready=is_ready, number=number)
    assert first == f"balancer {heard}"
    assert sorted(workers) == ["decode-0 SIGTERM", "prefill-0 SIGTERM"], (
        "none before the balancer has drained"
    )
    assert last == "bootstrap SIGTERM"


def test_the_balancer_is_told_the_times_of_the_launch() -> None:
    argv = plan(drain_s=120.0, shutdown_delay_s=0.5).balancer.argv
    assert argv[argv.index("--drain") + 1] == "120"
    assert argv[argv.index("--shutdown-delay") + 1] == "0.5"
