"""A worker that was told to stop says so: balancers hear it at once, and nothing takes it back."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.bootstrap.client import LeaseClient, LeaseKeeper
from pdserve.bootstrap.messages import FleetView
from pdserve.bootstrap.service import BootstrapService
from pdserve.bootstrap.watch import FleetWatcher
from pdserve.errors import WorkerRejected
from pdserve.types import InstanceId, Role
from tests.support.bootstrap_parts import TIMEOUT_S, join, report, service, until, worker

DECODE = InstanceId("d")


async def leave(running: BootstrapService) -> None:
    await asyncio.to_thread(LeaseClient(running.url).heartbeat, DECODE, is_leaving=True)


def is_leaving(running: BootstrapService) -> bool:
    return [member.is_leaving for member in running.fleet.members() if member.instance_id == DECODE] == [True]


async def test_a_watcher_hears_it_at_once() -> None:
    async with service() as running:
        await join(running, "prefill-0", "a")
        await join(running, "decode-0", "d", Role.DECODE)
        views = FleetWatcher(running.url).watch()
        async with asyncio.timeout(TIMEOUT_S):
            first: FleetView = await anext(views)
            assert not any(member.is_leaving for member in first.workers)
            following = asyncio.ensure_future(anext(views))
            await leave(running)
            second = await following
        assert [member.is_leaving for member in second.workers] == [False, True]
        await leave(running)
        assert running.fleet.version == second.version, "said twice is no news"


async def test_renewals_and_a_restart_of_the_service_take_nothing_back() -> None:
    info = worker("decode-0", DECODE, Role.DECODE)
    keeper = None
    async with service(lease_s=0.4) as running:
        main_port = running.port
        await asyncio.to_thread(LeaseClient(running.url).report_rank, DECODE, report(Role.DECODE))
        keeper = LeaseKeeper(running.url, info, on_refused=lambda exc: None)
        keeper.start()
        await until(lambda: len(running.fleet.members()) == 1, "did not join")
        await leave(running)
        await until(lambda: keeper.lease is not None and keeper.lease.worker.is_leaving, "did not renew")
        assert is_leaving(running)
    async with service(port=main_port) as restarted:
        await until(lambda: is_leaving(restarted), "did not come back as one that leaves")
        await asyncio.to_thread(keeper.stop)


async def test_a_new_instance_of_that_name_is_not_leaving() -> None:
    async with service() as running:
        await join(running, "decode-0", "d", Role.DECODE)
        await leave(running)
        await join(running, "decode-0", "e", Role.DECODE)
        assert [member.is_leaving for member in running.fleet.members()] == [False]


async def test_who_is_no_member_is_told_so() -> None:
    async with service() as running:
        with pytest.raises(WorkerRejected):
            await leave(running)
