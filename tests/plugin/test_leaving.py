"""SIGTERM to an SGLang server: the fleet hears of it before SGLang may end."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.plugin import membership
from pdserve.plugin.membership import leave_before_draining
from pdserve.types import Role
from tests.support.bootstrap_parts import join, service, until


@pytest.fixture(autouse=True)
def worker_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process counts as the worker decode-0, and balancers hear at once."""
    monkeypatch.setenv("PDSERVE_ACTIVE", "1")
    monkeypatch.setenv("PDSERVE_INSTANCE_ID", "d")
    monkeypatch.setattr(membership, "LEAVE_S", 0.01)


async def test_sglangs_handler_runs_once_the_fleet_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    async with service() as running:
        await join(running, "decode-0", "d", Role.DECODE)
        monkeypatch.setenv("PDSERVE_BOOTSTRAP_URL", running.url)
        known: list[bool] = []

        def sigterm_handler(handler: str) -> None:
            assert handler == "the handler"
            known.extend(member.is_leaving for member in running.fleet.members())

        asyncio.get_running_loop().call_soon(leave_before_draining, sigterm_handler, "the handler")
        await until(lambda: bool(known), "SGLang's handler was not called")
        assert known == [True]


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:9"], ids=["no service", "a service that is gone"])
async def test_without_a_service_sglangs_handler_runs_alone(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDSERVE_BOOTSTRAP_URL", url)
    called = asyncio.Event()
    leave_before_draining(called.set)
    async with asyncio.timeout(60):
        await called.wait()
