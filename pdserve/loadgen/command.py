"""``pdserve bench``: load on one service, or on two in turn, and what it came to.

options ─► plan ─► warm-up ─► rounds (A, B, A, B …) ─► summaries ─► text, JSON, PNG
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pdserve import __version__
from pdserve.errors import ConfigError, WorkerError
from pdserve.http.client import HttpClient
from pdserve.loadgen.client import LoadClient
from pdserve.loadgen.options import BenchOptions
from pdserve.loadgen.plan import Ask, plan_asks, warmup_asks
from pdserve.loadgen.report import draw, render_ratio, render_stages, render_summary
from pdserve.loadgen.run import Progress, RunResult, run_asks
from pdserve.loadgen.summary import Summary, summarize

ASK_S = 10.0
REDRAW_S = 0.25


def run_bench(options: BenchOptions, say: Callable[[str], None] = print) -> int:
    """Run and report; 0 if every request was answered whole, 1 if some failed.

    Raises:
        ConfigError: for a service that does not answer, or a file that cannot be written.
    """
    services = asyncio.run(_run(options, say))
    if options.json_path:
        _write(options.json_path, _document(options, services))
    if options.plot_path:
        draw(options.plot_path, [(service.url, service.result) for service in services])
    return int(any(service.summary.failed for service in services))


class _Service:
    """One of the services under load."""

    def __init__(self, url: str, pool: HttpClient, options: BenchOptions) -> None:
        self.url = url.rstrip("/")
        self.headers = [(b"content-type", b"application/json")]
        if options.api_key:
            self.headers.append((b"authorization", f"Bearer {options.api_key}".encode()))
        self.client = LoadClient(self.url, pool, self.headers, options.timeout_s)
        self.model = options.model
        self.result = RunResult()
        self.summary: Summary
        self.stages = ""
        self._pool = pool

    async def ask(self, method: str, path: str) -> Any:
        """A JSON document, or None where the service has no such route.

        Raises:
            ConfigError: if the service does not answer at all.
        """
        try:
            reply = await self._pool.fetch(self.url, method, path, headers=self.headers, timeout_s=ASK_S)
        except WorkerError as exc:
            raise ConfigError(f"{self.url} does not answer: {exc}") from exc
        if reply.status in (401, 403):
            raise ConfigError(f"{self.url} wants a key for {path}: give --api-key or PDSERVE_API_KEY")
        try:
            return msgspec.json.decode(reply.body) if reply.status == 200 else None
        except msgspec.DecodeError:
            return None

    async def learn_model(self) -> None:
        """Its model's name, from /v1/models."""
        document = await self.ask("GET", "/v1/models")
        rows = document.get("data") if isinstance(document, dict) else None
        if not self.model:
            self.model = str(rows[0].get("id", "")) if rows and isinstance(rows[0], dict) else "default"


async def _run(options: BenchOptions, say: Callable[[str], None]) -> list[_Service]:
    pool = HttpClient()
    services = [_Service(url, pool, options) for url in (options.url, options.vs) if url]
    try:
        for service in services:
            await service.learn_model()
        plans = [plan_asks(options, service.model) for service in services]
        say(_set_up(options, services, plans[0]))
        for service in services:
            for ask in warmup_asks(options, service.model):
                outcome = await service.client.send(ask, time.monotonic())
                if not outcome.is_ok:
                    raise ConfigError(f"{service.url} failed a first request: {outcome.error}")
        await _rounds(options, services, plans)
        for service in services:
            service.summary = summarize(service.result, options.slo_ttft_s, options.slo_tpot_s)
            service.stages = render_stages(await _state(service))
            say(render_summary(service.url, service.summary, service.stages))
        if len(services) == 2:
            say(render_ratio(services[0].summary, services[1].summary))
    finally:
        await pool.close()
    return services


async def _rounds(
    options: BenchOptions, services: Sequence[_Service], plans: Sequence[Sequence[Ask]]
) -> None:
    """One service: all at once. Two: a part to each in turn, so that a noisy minute hits both."""
    number = options.rounds if len(services) > 1 else 1
    show = _Display(options.requests * len(services))
    size = -(-len(plans[0]) // number)
    for at in range(0, len(plans[0]), size):
        for service, plan in zip(services, plans, strict=True):
            if options.flush:
                await service.ask("POST", "/flush_cache")
            part = plan[at : at + size]
            result = await run_asks(
                service.client,
                part,
                concurrency=options.concurrency,
                progress=show.progress,
                on_change=show.update,
            )
            service.result.extend(result)
    show.clear()


async def _state(service: _Service) -> Any:
    """The state document if this is a pdserve service that shows it to us, else None."""
    try:
        return await service.ask("GET", "/pdserve/state")
    except ConfigError:
        return None


class _Display:
    """One line on the terminal that follows the run; nothing where stderr is a file."""

    def __init__(self, total: int) -> None:
        self.progress = Progress(total)
        self._is_on = sys.stderr.isatty()
        self._drawn_s = 0.0
        self._started_s = time.monotonic()

    def update(self, progress: Progress) -> None:
        """Redraw, four times a second at most."""
        now_s = time.monotonic()
        if not self._is_on or now_s - self._drawn_s < REDRAW_S:
            return
        self._drawn_s = now_s
        rate = progress.output_tokens / max(1e-3, now_s - self._started_s)
        sys.stderr.write(
            f"\r{progress.ended}/{progress.total} ended, {progress.inflight} in flight, "
            f"{progress.failed} failed, {rate:.0f} tokens/s \x1b[K"
        )
        sys.stderr.flush()

    def clear(self) -> None:
        """Leave the line empty."""
        if self._is_on:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _set_up(options: BenchOptions, services: Sequence[_Service], asks: Sequence[Ask]) -> str:
    source = f"trace {Path(options.trace).name}" if options.trace else "synthetic"
    tokens_in = sum(ask.input_tokens for ask in asks) / len(asks)
    tokens_out = sum(ask.output_tokens for ask in asks) / len(asks)
    arrivals = f"{len(asks) / asks[-1].due_s:.2f}/s" if asks[-1].due_s else "back to back"
    bound = f"{options.concurrency} at once at most" if options.concurrency else "no bound on concurrency"
    turns = f", in {options.rounds} rounds in turn" if len(services) > 1 else ""
    return (
        f"{options.route} {' against '.join(service.url for service in services)} ({services[0].model})\n"
        f"{len(asks)} requests, {source}, {arrivals}, {bound}, seed {options.seed}{turns}; "
        f"mean {tokens_in:.0f} tokens in, {tokens_out:.0f} out"
    )


def _document(options: BenchOptions, services: Sequence[_Service]) -> dict[str, object]:
    setup = {name: getattr(options, name) for name in options.__slots__ if name != "api_key"}
    rows = [{"url": service.url, "model": service.model, **service.summary.as_json()} for service in services]
    return {"bench": "pdserve bench", "version": __version__, "setup": setup, "services": rows}


def _write(path: str, document: dict[str, object]) -> None:
    try:
        Path(path).write_bytes(msgspec.json.encode(document) + b"\n")
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror or exc}") from exc
