"""Whom chaos breaks: never the last pair unless asked, the same for one seed; and what it reports."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import time
from typing import Any

import pytest
from rich.console import Console

from pdserve.chaos.command import ChaosOptions, Report, print_report
from pdserve.chaos.faults import Faults, victims
from pdserve.chaos.process import Server
from pdserve.errors import ConfigError
from pdserve.state.document import StateDocument
from pdserve.state.workers import PairEntry, WorkerEntry


def fleet_of(prefill: int, decode: int, *, not_ready: tuple[str, ...] = ()) -> StateDocument:
    names = [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]
    workers = [
        WorkerEntry(
            worker_id=name, role=name.partition("-")[0], url=f"http://127.0.0.1:{number}",
            state="suspect" if name in not_ready else "ready",
        )
        for number, name in enumerate(names, 1)
    ]  # fmt: skip
    pairs = [
        PairEntry(prefill=p, decode=d, state="untested" if {p, d} & set(not_ready) else "ready")
        for p, d in itertools.product(names[:prefill], names[prefill:])
    ]
    return StateDocument(workers=workers, pairs=pairs)


@pytest.mark.parametrize(
    ("state", "standing", "expected"),
    [
        (fleet_of(2, 2), set(), "prefill-0 prefill-1 decode-0 decode-1"),
        (fleet_of(1, 2), set(), "decode-0 decode-1"),
        (fleet_of(1, 1), set(), ""),
        (fleet_of(2, 2, not_ready=("decode-1",)), set(), "prefill-0 prefill-1"),
        (fleet_of(2, 2), {"prefill-0"}, "decode-0 decode-1"),
        (fleet_of(2, 2, not_ready=("decode-1",)), {"prefill-0"}, ""),
    ],
)
def test_a_pair_is_left(state: StateDocument, standing: set[str], expected: str) -> None:
    assert victims(state, standing, spare_last=True) == expected.split()
    assert set(victims(state, standing, spare_last=False)) >= set(expected.split())


def test_the_last_pair_is_broken_if_asked() -> None:
    assert victims(fleet_of(1, 1), set(), spare_last=False) == ["prefill-0", "decode-0"]


class Processes:
    """Stands for the launched fleet: notes what is sent to whom."""

    def __init__(self) -> None:
        self.sent: list[tuple[tuple[int, ...], int]] = []

    def server(self, url: str) -> Server | None:
        """Each has three processes, named by its port."""
        port = int(url.rpartition(":")[2])
        return Server(port * 10, (port * 10 + 1, port * 10 + 2))

    def send(self, pids: tuple[int, ...], number: int) -> int:
        """Note it."""
        self.sent.append((pids, number))
        return len(pids)


async def broken(seed: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    monkeypatch.setattr("pdserve.chaos.faults.MAX_STOP_S", 0.0)
    monkeypatch.setattr("pdserve.chaos.faults.MIN_STOP_S", 0.0)
    processes: Any = Processes()
    faults = Faults(processes, random.Random(seed), 0.001, True, lambda text: None)
    state = fleet_of(2, 2)

    def read() -> StateDocument:
        return state

    async def watch() -> None:
        while sum(faults.done.values()) < 30:
            await asyncio.sleep(0.001)
        run.cancel()

    run = asyncio.create_task(faults.run(read, time.monotonic() + 60))
    await watch()
    await asyncio.gather(run, return_exceptions=True)
    return processes.sent


async def test_one_seed_breaks_the_same_servers_in_the_same_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = [await broken(seed, monkeypatch) for seed in (1, 1, 2)]
    beginning = [sent for sent in first if sent[1] != signal.SIGCONT][:10]
    assert beginning == [sent for sent in again if sent[1] != signal.SIGCONT][:10]
    assert beginning != [sent for sent in other if sent[1] != signal.SIGCONT][:10]
    assert {number for _, number in first} == {signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT}
    stopped = [pids for pids, number in first if number == signal.SIGSTOP]
    for pids in stopped:
        ends = {number for other_pids, number in first if other_pids == pids}
        assert ends & {signal.SIGCONT, signal.SIGKILL}


def report_of(**values: Any) -> Report:
    given: dict[str, Any] = {name: 0 for name in Report.__dataclass_fields__}
    given |= {"url": "http://x", "faults": {"stop decode": 2}, "errors": {}, "kv_left": {"decode-0": 0}}
    given |= {"missing": (), "gaps_s": (0.1, 0.2, 5.0), "is_comparable": True, "requests": 100}
    return Report(**{**given, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"failed": 2}, "2 requests failed"),
        ({"broken": 1}, "1 streams broke off"),
        ({"differing": 3}, "3 answers differ"),
        ({"kv_left": {"decode-0": 16}}, "16 KV tokens"),
        ({"inflight_left": 1}, "left in the balancer"),
        ({"missing": ("1 of 2 decode workers",)}, "did not come back"),
    ],
)
def test_a_broken_promise_is_named(values: dict[str, Any], words: str) -> None:
    assert words in report_of(**values).promises[0]


def test_what_is_not_promised_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(differing=3, is_comparable=False)
    assert report.promises == []
    print_report(report, Console(width=200))
    text = capsys.readouterr().out
    assert "every promise was kept" in text and "differ undisturbed" in text and "partition" in text
    document = json.loads(report.as_json())
    assert document["gaps_s"] == {"count": 3, "p50": 0.2, "p99": 5.0, "max": 5.0}
    assert document["broken_promises"] == []


@pytest.mark.parametrize("name", ["duration_s", "every_s", "concurrency", "prompts", "output"])
def test_wrong_options_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ChaosOptions(**{name: 0})
