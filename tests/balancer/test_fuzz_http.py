"""Thousands of malformed requests over real sockets: each is refused, the next served, no memory kept.

A failure names the family and number of its case; ``http_case(SEED, number)`` makes it again.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from pdserve.http import server as listener
from tests.faults.site import Site, running_site
from tests.support.fuzz_checks import check_answer, check_received, rss_bytes
from tests.support.fuzz_http import Case, http_case
from tests.support.fuzz_json import JsonCase, json_case
from tests.support.wire import Wire

SEED = 20261121
NUM_FAST, NUM_SLOW = 150, 5500
"""Cases of each kind, HTTP and JSON; the slow tests run all, the fast ones the first of them."""
CONNECTIONS = 100
CASE_S = 8.0
LIMITS = {"header_s": 1.0, "body_s": 1.0, "max_body_bytes": 8 * 2**20, "queue_timeout_s": 5.0}
GROWTH_BYTES = 16 * 2**20
"""Bodies of a million items leave holes in the interpreter's arenas: 10 MB were seen at the first one."""


@asynccontextmanager
async def fuzzed_site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """Two pairs, short time limits for clients; afterwards a normal request must work and nothing be left."""
    monkeypatch.setattr(listener, "SWEEP_S", 0.1, raising=False)
    async with running_site(2, 2, **LIMITS) as site:
        await check_serves(site)
        yield site
        await check_serves(site)
        await site.check_clean()
        await site.check_blame([{}])


async def check_serves(site: Site) -> None:
    """A normal request."""
    async with Wire.open(site.url) as wire:
        wire.send_json("/generate", {"text": "hi"})
        reply = await wire.reply()
        assert reply.status == 200 and reply.json["text"]


def path_of(case: Case) -> str:
    """The path whose error shape counts, where the request line is whole."""
    target = case.data.split(b"\r\n", 1)[0].split(b" ")
    return target[1].decode("latin-1") if len(target) > 1 else ""


async def play_http(site: Site, case: Case) -> None:
    """Send it, wait for the end of the connection, look at every answer."""
    async with asyncio.timeout(CASE_S), Wire.open(site.url) as wire:
        for chunk in case.chunks:
            wire.send(chunk)
            await asyncio.sleep(0)
        replies = await wire.ended()
    paths = {path_of(case), "/generate", "/nowhere", "/liveness", ""}
    for reply in replies:
        errors = []
        for path in paths:  # which of several requests it answers is not always clear
            try:
                check_answer(reply, path, is_head=case.family == "head")
                break
            except (AssertionError, KeyError, TypeError) as exc:
                errors.append(exc)
        else:
            raise errors[0]
    if case.must_refuse:
        assert [reply.status for reply in replies] == [400], [reply.status for reply in replies]


async def play_json(site: Site, wires: list[Wire], case: JsonCase) -> None:
    """Send it over a kept connection; a 4xx may close it."""
    async with asyncio.timeout(CASE_S):
        wire = wires.pop() if wires else await Wire.connect(site.url)
        wire.send_json(case.path, case.body, headers=f"content-type: {case.content_type}\r\n")
        reply = await wire.reply()
        check_answer(reply, case.path)
        if reply.header("connection") == "close":
            await wire.ended()
            await wire.close()
        else:
            wire.forget()
            wires.append(wire)


async def play_all(site: Site, number: int, play: Callable[[int], object], what: str) -> None:
    """Cases 0 … number-1, ``CONNECTIONS`` at a time; memory stays as after the second thousand."""
    early = 0
    for start in range(0, number, 1000):
        todo = iter(range(start, min(start + 1000, number)))

        async def worker(todo: object = todo) -> None:
            for index in todo:  # type: ignore[attr-defined]
                try:
                    await play(index)  # type: ignore[misc]
                except (AssertionError, TimeoutError, KeyError, TypeError, ValueError) as exc:
                    raise AssertionError(f"{what} case {index}: {exc!r}") from exc

        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(worker())
        await site.check_clean()
        for fake in site.fakes:
            check_received(fake)
        site.rendezvous.forget()
        assert not site.log.bugs, site.log.bugs[0]
        early = rss_bytes() if start <= 1000 else early
    assert rss_bytes() - early < GROWTH_BYTES, f"memory grew from {early} to {rss_bytes()} bytes"


async def fuzz_http(site: Site, number: int) -> None:
    """The HTTP cases; no tail of a refused one may reach a worker."""
    await play_all(site, number, lambda index: play_http(site, http_case(SEED, index)), "HTTP")


async def fuzz_json(site: Site, number: int) -> None:
    """The JSON cases."""
    wires: list[Wire] = []
    try:
        await play_all(site, number, lambda index: play_json(site, wires, json_case(SEED, index)), "JSON")
    finally:
        for wire in wires:
            await wire.close()


async def test_malformed_http_is_refused_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fuzzed_site(monkeypatch) as site:
        await fuzz_http(site, NUM_FAST)


async def test_malformed_bodies_are_refused_or_reach_workers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fuzzed_site(monkeypatch) as site:
        await fuzz_json(site, NUM_FAST)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http", "json"])
async def test_thousands_of_malformed_requests(kind: str) -> None:
    """In an interpreter of its own: the memory of one that ran a thousand tests before says nothing."""
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, kind, stdout=PIPE, stderr=STDOUT, cwd=Path(__file__).parents[2]
    )
    said, _ = await run.communicate()
    assert run.returncode == 0, said.decode(errors="replace")[-8000:]


async def run_all(kind: str) -> None:
    """Every case of one kind."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        async with fuzzed_site(monkeypatch) as site:
            await {"http": fuzz_http, "json": fuzz_json}[kind](site, NUM_SLOW)


if __name__ == "__main__":
    uvloop.run(run_all(sys.argv[1]))
