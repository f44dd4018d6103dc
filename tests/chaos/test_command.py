"""A whole run of ``pdserve chaos`` over fakes: what it asks, waits for, and reports."""

from __future__ import annotations

import asyncio
import signal
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from pdserve.chaos.command import ChaosOptions, Report, _Run, run_chaos
from pdserve.chaos.process import Server
from pdserve.errors import ConfigError
from tests.support.balancer_client import Site, running_site


class Processes:
    """Stands for the processes of a site's fakes: their leaders are named by their places."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.loop = asyncio.get_running_loop()

    def server(self, url: str) -> Server | None:
        """The fake at that address."""
        return Server([fake.url for fake in self.site.fakes].index(url), ())

    def send(self, pids: tuple[int, ...], number: int) -> int:
        """Killed fakes are gone for good."""
        if number == signal.SIGKILL:
            self.site.fakes[pids[0]].kill()
        return 1


async def run(site: Site, **options: Any) -> Report:
    given = {"url": site.balancer.url, "prompts": 4, "concurrency": 2, "output": 20, "seed": 1}
    chosen = ChaosOptions(**{**given, **options})
    fleet: Any = Processes(site)
    return await _Run(chosen, fleet, site.balancer.url, Console(file=StringIO())).run("")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.chaos.command.POLL_S", 0.02)
    monkeypatch.setattr("pdserve.chaos.command.WHOLE_S", 0.1)


async def test_a_run_without_faults_keeps_every_promise() -> None:
    async with running_site(prefill=2, decode=2, resumes=True, load_poll_s=0.05) as site:
        report = await run(site, duration_s=0.1, every_s=60.0)
    assert report.promises == [] and report.requests > 0 and not report.faults
    assert set(report.kv_left) == {"prefill-0", "prefill-1", "decode-0", "decode-1"}


async def test_servers_that_stay_dead_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.chaos.faults.STOP_SHARE", 0.0)
    async with running_site(prefill=2, decode=2, resumes=True, load_poll_s=0.05) as site:
        report = await run(site, duration_s=0.3, every_s=0.05)
    assert 1 <= sum(report.faults.values()) <= 2, "one of each role: then nobody can be spared"
    assert report.missing and "did not come back" in report.promises[-1]
    assert (report.failed, report.broken, report.differing) == (0, 0, 0), report.errors


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="listens"):
        run_chaos(ChaosOptions(url="http://127.0.0.1:9"), lambda question: True)
