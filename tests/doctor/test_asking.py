"""Asking a fleet of fakes: what is gathered, with which key, and what is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest

from pdserve.balancer.app import Balancer
from pdserve.balancer.fleet.worker import ProbePassed
from pdserve.bootstrap.client import LeaseClient
from pdserve.bootstrap.messages import FleetView, Register
from pdserve.config.balancer import BalancerConfig
from pdserve.doctor.finding import Level
from pdserve.doctor.fleet import fleet_url
from pdserve.doctor.fleet_checks import judge_balancer
from pdserve.doctor.fleet_facts import Keys, gather_fleet, gather_pairs, is_hidden
from pdserve.doctor.pair_checks import judge_layouts, layout_mismatches
from pdserve.errors import ConfigError
from pdserve.types import Role, WorkerInfo
from tests.doctor.test_fleet import LAYOUT
from tests.support.balancer_client import running_site
from tests.support.bootstrap_parts import report, service
from tests.support.sglang_server import FakeSGLang, until


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("https://h", "https://h"),
        ("[::1]:5", "http://[::1]:5"),
    ],
)
def test_an_address_is_completed(text: str, url: str) -> None:
    assert fleet_url(text) == url


@pytest.mark.parametrize("text", ["ftp://h:1", "http://h:1/path", "http://h:port", "http://", "h:99999"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        fleet_url(text)


def test_the_key_given_wins_over_the_environment() -> None:
    keys = Keys.of("given", {"api_key": "client", "admin_api_key": "admin"})
    assert keys.admin == "given"
    assert Keys.of("", {"api_key": "client"}).admin == "client"
    assert keys.workers.plain == ((b"authorization", b"Bearer client"),)


class FixedMembers:
    """A membership that never changes, with KV layouts."""

    is_connected, epoch = True, "epoch"

    def __init__(self, workers: list[WorkerInfo]) -> None:
        self._workers = workers

    async def watch(self) -> AsyncIterator[FleetView]:
        yield FleetView(epoch="epoch", version=1, workers=self._workers)
        await asyncio.Event().wait()


@asynccontextmanager
async def fleet_with_page_sizes(prefill: int, decode: int) -> AsyncIterator[Balancer]:
    """One pair of fakes whose layouts the bootstrap service would have told."""
    async with AsyncExitStack() as stack:
        infos = []
        for role, page_size in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            fake = await stack.enter_async_context(FakeSGLang(role))
            layout = msgspec.structs.replace(LAYOUT, page_size=page_size, converts_pages=False)
            infos.append(msgspec.structs.replace(fake.info, kv_layout=layout))
        balancer = Balancer(BalancerConfig(port=0), FixedMembers(infos))
        await balancer.start()
        stack.push_async_callback(balancer.stop)
        await until(
            lambda: [str(pair.state) in ("ready", "failed") for pair in balancer.fleet.pairs()] == [True]
        )
        yield balancer


async def test_a_fleet_of_fakes_is_asked_and_tried() -> None:
    async with running_site(prefill=2, decode=2) as site:
        facts = await asyncio.to_thread(gather_fleet, site.balancer.url, Keys())
        pairs = await asyncio.to_thread(gather_pairs, facts, Keys(), {"prefill-0>decode-1": "not wanted"})
    assert [each.name for each in facts.workers if each.is_reached] == [f.name for f in site.fakes]
    assert {pair.label for pair in pairs if isinstance(pair.result, ProbePassed)} == {
        "prefill-0>decode-0", "prefill-1>decode-0", "prefill-1>decode-1",
    }  # fmt: skip
    assert [pair.untried for pair in pairs if pair.result is None] == ["not wanted"]
    rooms = [site.prefills[0].rooms, site.decodes[1].rooms]
    assert rooms == [[site.prefills[0].rooms[0]], [site.decodes[1].rooms[0]]]


async def test_a_locked_balancer_wants_its_key() -> None:
    async with running_site(admin_api_key="secret") as site:
        without = await asyncio.to_thread(gather_fleet, site.balancer.url, Keys())
        with_key = await asyncio.to_thread(gather_fleet, site.balancer.url, Keys.of("secret", {}))
    assert without.balancer.status == 401
    assert not without.workers
    assert len(with_key.workers) == 2


async def test_a_pair_whose_layouts_differ_is_found_from_the_balancers_own_words() -> None:
    async with fleet_with_page_sizes(16, 32) as balancer:
        facts = await asyncio.to_thread(gather_fleet, balancer.url, Keys())
    assert layout_mismatches(facts) == {"prefill-0>decode-0": "page_size: 16 != 32"}


def test_workers_on_another_machines_loopback_are_not_asked() -> None:
    assert is_hidden("http://127.0.0.1:31000", "http://10.0.0.5:30000")
    assert not is_hidden("http://127.0.0.1:31000", "http://localhost:30000")
    assert not is_hidden("http://10.0.0.6:31000", "http://10.0.0.5:30000")


@pytest.mark.parametrize(("page_size", "level"), [(16, Level.OK), (32, Level.NOTE)])
async def test_layouts_are_read_from_the_bootstrap_service(page_size: int, level: Level) -> None:
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(service())
        for role, size in ((Role.PREFILL, 16), (Role.DECODE, page_size)):
            fake = await stack.enter_async_context(FakeSGLang(role))
            layout = msgspec.structs.replace(LAYOUT, page_size=size)
            client = LeaseClient(running.url)
            await asyncio.to_thread(client.report_rank, fake.info.instance_id, report(role, layout))
            await asyncio.to_thread(client.register, Register(worker=fake.info))
        balancer = Balancer(BalancerConfig(port=0, bootstrap_url=running.url))
        await balancer.start()
        stack.push_async_callback(balancer.stop)
        await until(lambda: [str(pair.state) for pair in balancer.fleet.pairs()] == ["ready"], "a ready pair")
        facts = await asyncio.to_thread(gather_fleet, balancer.url, Keys())
    assert {info.worker_id for info in facts.view.values()} == {"prefill-0", "decode-0"}
    (found,) = judge_layouts(facts)
    assert found.level is level
    assert [f.level for f in judge_balancer(facts)] == [Level.OK, Level.OK]
