"""``pdserve chaos``: break the servers of a launched fleet under load, and see what its clients notice.

find the fleet ─► undisturbed answers ─► load + faults ─► wait until it is whole ─► KV left ─► report
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.chaos.faults import Faults
from pdserve.chaos.load import ChaosLoad, questions
from pdserve.chaos.process import LaunchedFleet
from pdserve.config.setting import LOAD, admin_key_setting, setting
from pdserve.errors import ConfigError, WorkerError
from pdserve.http.client import HttpClient
from pdserve.state.client import StateClient
from pdserve.state.document import RequestCounts, StateDocument

POLL_S = 0.5
ASK_S = 30.0
WHOLE_S = 240.0
"""How long the launcher has to bring every server back, one that it had given up for a minute too."""
SETTLE_S = 30.0
"""And the servers to free what the last requests used."""

NOT_DONE = ("partition: dropping packets between processes of one machine needs root (nftables)",)
"""What the command is asked for and cannot do, and why."""


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """One run. Times in seconds."""

    url: str = setting("http://127.0.0.1:30000", "The balancer of `pdserve launch`.", "URL", "URL")
    duration_s: float = setting(60.0, "How long servers are broken.", "seconds", "--duration")
    every_s: float = setting(8.0, "From one fault to the next, half to one and a half.", "seconds", "--every")
    seed: int = setting(0, "Of prompts, victims and faults.", "number", "--seed")
    last_pair: bool = setting(
        False, "Break servers even if no pair is left to serve.", "flag", "--last-pair/--spare-last-pair"
    )
    yes: bool = setting(False, "Do not ask before servers are killed.", "flag", "--yes")
    concurrency: int = setting(8, "Requests at once.", "count", "-c --concurrency", panel=LOAD)
    prompts: int = setting(16, "Different requests, in turn of four kinds.", "count", "--prompts")
    output: int = setting(200, "Longest answer.", "tokens", "--output")
    api_key: str = admin_key_setting()

    def __post_init__(self) -> None:
        for name in ("duration_s", "every_s", "concurrency", "prompts", "output"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run; seconds and tokens. ``promises`` says what was broken of them.

    ``gaps_s``: the longest pause of every stream that went on elsewhere, as its client saw it, sorted.
    ``kv_left``: KV tokens in use after the run and a flush of the prefix caches, by worker; ``missing``:
    workers that were not back in time. ``is_comparable``: undisturbed answers are the same alone and under
    load.
    """

    url: str
    seed: int
    duration_s: float
    faults: dict[str, int]
    skipped: int
    requests: int
    failed: int
    broken: int
    differing: int
    is_comparable: bool
    resumed: int
    retried: int
    gaps_s: tuple[float, ...]
    kv_left: dict[str, int]
    inflight_left: int
    missing: tuple[str, ...]
    errors: dict[str, int]

    @property
    def promises(self) -> list[str]:
        """Every promise that was broken; empty if none was."""
        found = [
            f"{number} {what}"
            for number, what in (
                (self.failed, "requests failed"),
                (self.broken, "streams broke off"),
                (self.differing if self.is_comparable else 0, "answers differ from the undisturbed ones"),
                (sum(self.kv_left.values()), "KV tokens are left in use"),
                (self.inflight_left, "requests are left in the balancer"),
            )
            if number
        ]
        return found + [f"{what} did not come back" for what in self.missing]

    @property
    def gaps(self) -> dict[str, float | None]:
        """Percentiles of the gaps, in seconds; None without any."""
        ordered, last = self.gaps_s, len(self.gaps_s) - 1
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return {
            name: round(ordered[round(share * last)], 3) if ordered else None
            for name, share in shares.items()
        }

    def as_json(self) -> str:
        """One line."""
        document: dict[str, Any] = {"bench": "pdserve chaos", **asdict(self)}
        document["gaps_s"] = {"count": len(self.gaps_s), **self.gaps}
        return json.dumps({**document, "not_done": NOT_DONE, "broken_promises": self.promises})


def print_report(report: Report, console: Console) -> None:
    """The table, what went wrong, and the verdict."""
    table = Table(show_header=False, box=None, pad_edge=False)
    gaps = report.gaps
    figures = ", ".join(f"{name} {value:g} s" for name, value in gaps.items() if value is not None)
    is_told = "" if report.is_comparable else " (not counted: they differ undisturbed, too)"
    for name, value in (
        ("faults", ", ".join(f"{n} x {what}" for what, n in sorted(report.faults.items())) or "none"),
        ("", f"{report.skipped} times nobody could be spared"),
        ("requests", report.requests),
        ("failed", report.failed),
        ("streams broken off", report.broken),
        ("answers that differ", f"{report.differing}{is_told}"),
        ("went on elsewhere", f"{report.resumed} times; tried again whole: {report.retried}"),
        ("longest gap of each", f"{len(report.gaps_s)} streams: {figures}" if figures else "none"),
        ("KV tokens left", sum(report.kv_left.values())),
    ):
        table.add_row(name, str(value))
    console.print(table)
    for error, number in report.errors.items():
        console.print(f"  {number} x {error}", markup=False, highlight=False)
    for what in NOT_DONE:
        console.print(f"not done: {what}", markup=False, highlight=False)
    verdict = "; ".join(report.promises)
    console.print(f"broken: {verdict}" if verdict else "every promise was kept", highlight=False)


def run_chaos(options: ChaosOptions, confirm: Callable[[str], bool], *, client_key: str = "") -> int:
    """Break and report; 0 if every promise was kept, 1 if one was broken.

    ``confirm`` is asked before the first fault; ``client_key`` goes with requests, the options' key with
    questions for the state.

    Raises:
        ConfigError: for a fleet that is not of this machine and ``pdserve launch``, not whole, or refused.
    """
    console = Console()
    client = StateClient(options.url, options.api_key)
    fleet = LaunchedFleet(client.url)
    state = client.fetch()
    names = [worker.worker_id for worker in state.workers]
    if missing := _missing(state):
        raise ConfigError(f"the fleet is not whole: {', '.join(missing)}")
    if strange := [w.worker_id for w in state.workers if fleet.server(w.url) is None]:
        raise ConfigError(f"not servers of this `pdserve launch` (process {fleet.launcher}): {strange}")
    console.print(
        f"{client.url} ({state.model}): {', '.join(names)}; launcher {fleet.launcher}\n"
        f"{options.duration_s:g} s, a fault every {options.every_s:g} s or so, seed {options.seed}; "
        f"{options.concurrency} requests at once, {options.prompts} prompts, "
        f"answers up to {options.output} tokens",
        markup=False, highlight=False,
    )  # fmt: skip
    question = f"Kill and stop servers of this fleet for {options.duration_s:g} s?"
    if not (options.yes or confirm(question)):
        raise ConfigError("nothing was broken: not confirmed")
    report = asyncio.run(_Run(options, fleet, client.url, console).run(client_key))
    print_report(report, console)
    console.out(report.as_json(), highlight=False)
    return int(bool(report.promises))


class _Run:
    """One run over a fleet that was found and may be broken."""

    def __init__(self, options: ChaosOptions, fleet: LaunchedFleet, url: str, console: Console) -> None:
        self._options = options
        self._fleet = fleet
        self._url = url
        self._say: Callable[[str], None] = lambda text: console.print(text, markup=False, highlight=False)
        self._resumed: set[str] = set()
        """Requests that went on elsewhere, by their clients' ids."""

    async def run(self, client_key: str) -> Report:
        """Everything up to the report; servers that were stopped go on, however it ends."""
        options, pool = self._options, HttpClient()
        headers = [(b"authorization", f"Bearer {client_key}".encode())] if client_key else []
        state = await self._state()
        before = state.requests or RequestCounts()
        asked = questions(options.seed, options.prompts, options.output, state.model)
        load = ChaosLoad(self._url, asked, concurrency=options.concurrency, headers=headers)
        faults = Faults(
            self._fleet, random.Random(options.seed), options.every_s, not options.last_pair, self._say
        )
        try:
            await load.record(pool)
            await self._break(load, faults, pool)
            missing = await self._wait_whole()
            kv_left, inflight = await self._left(pool)
        finally:
            faults.release()
            await pool.close()
        after = (await self._state()).requests or RequestCounts()
        tally = load.tally
        gaps = sorted(tally.silences[rid] for rid in self._resumed if rid in tally.silences)
        return Report(
            self._url, options.seed, options.duration_s, dict(faults.done), faults.num_skipped,
            tally.requests,
            tally.failed, tally.broken, tally.differing, load.is_comparable, after.resumed - before.resumed,
            after.retried - before.retried, tuple(gaps), kv_left, inflight, tuple(missing),
            dict(tally.errors.most_common(10)),
        )  # fmt: skip

    async def _break(self, load: ChaosLoad, faults: Faults, pool: HttpClient) -> None:
        until_s = time.monotonic() + self._options.duration_s
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(faults.run(self._read, until_s))
                group.create_task(load.run(pool, random.Random(f"load {self._options.seed}"), until_s))
            await self._note_resumed()
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while True:
            await self._note_resumed()
            await asyncio.sleep(POLL_S)

    async def _note_resumed(self) -> None:
        state = await self._state()
        self._resumed |= {row.request_id for row in state.recent if row.resumes}

    async def _state(self) -> StateDocument:
        return await asyncio.to_thread(self._read)

    def _read(self) -> StateDocument:
        """The state document, on a connection of its own: several threads ask. On a busy machine it is late.

        Raises:
            WorkerError: if the balancer says nothing for ``ASK_S``.
        """
        deadline_s = time.monotonic() + ASK_S
        while True:
            client = StateClient(self._options.url, self._options.api_key)
            try:
                return client.fetch()
            except WorkerError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(POLL_S)
            finally:
                client.close()

    async def _wait_whole(self) -> list[str]:
        """What is still missing after ``WHOLE_S``."""
        deadline_s = time.monotonic() + WHOLE_S
        while True:
            missing = _missing(await self._state())
            if not missing or time.monotonic() > deadline_s:
                return missing
            await asyncio.sleep(POLL_S)

    async def _left(self, pool: HttpClient) -> tuple[dict[str, int], int]:
        """KV tokens in use and requests in flight once nothing is asked any more and caches are empty."""
        deadline_s = time.monotonic() + SETTLE_S
        key = self._options.api_key
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        while True:
            await pool.fetch(self._url, "POST", "/flush_cache", headers=headers, timeout_s=SETTLE_S)
            flushed_s = time.monotonic()
            await asyncio.sleep(POLL_S)
            state = await self._state()
            living = [worker for worker in state.workers if worker.state == "ready"]
            is_fresh = all(
                worker.load_age_s is not None and worker.load_age_s < time.monotonic() - flushed_s
                for worker in living
            )
            left = {worker.worker_id: worker.load.num_used_tokens for worker in living if worker.load}
            inflight = state.requests.inflight if state.requests else 0
            is_over = is_fresh and not any(left.values()) and not inflight
            if is_over or time.monotonic() > deadline_s:
                return left, inflight


def _missing(state: StateDocument) -> list[str]:
    found = [row.missing for row in state.capacity if row.missing]
    return found or [f"pair {pair.label}" for pair in state.pairs if pair.state != "ready"]
