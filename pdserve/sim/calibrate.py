"""A cost model of a live service: ``pdserve calibrate URL --out FILE``.

    find the servers ─► measure (measure.py) ─► fit (fits.py) ─► CostModel, and how far to trust it

Pass and step times are the servers' own counts of busy time. What the client sees beyond the pass in an
idle service is the overhead of a reply; the KV transfer is part of it, and the model's link is free. The
service must have no other traffic meanwhile; measurements that no line fits are refused.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pdserve.config.setting import FLEET, MODEL, OUTPUT, RUN, admin_key_setting, setting
from pdserve.errors import ConfigError, WorkerError
from pdserve.sim.cost import CostModel
from pdserve.sim.fits import Fit, Row, fit
from pdserve.sim.live import LiveService, LiveWorker, named_workers
from pdserve.sim.measure import DECODE_TERMS, PREFILL_TERMS, Measured, MeasureLimits, Measurer

MAX_ERROR = 0.35
"""Median relative error of a fit from which it explains nothing. On two cores shared with other programs
runs of this calibration stayed below 0.15."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What to calibrate and how far to go. ``prefill`` and ``decode`` name the servers themselves, and
    ``url`` is left alone then; ``out`` empty: write nothing."""

    url: str = setting("", "The service to measure.", "URL", "URL", empty="http://127.0.0.1:30000")
    out: str = setting("", "Write the cost model.", "path", "--out FILE", panel=OUTPUT)
    prefill: tuple[tuple[str, int | None], ...] = setting(
        (),
        "A prefill server and its bootstrap port, of a service without state document; repeatable.",
        "URL",
        "--prefill URL,PORT",
        panel=FLEET,
    )
    decode: tuple[str, ...] = setting((), "A decode server; repeatable.", "URL", "--decode URL")
    name: str = setting("", "Name of the model.", "text", "--name", panel=MODEL, empty="the served one")
    budget_s: float = setting(60.0, "Time to measure.", "seconds", "--budget-s", panel=RUN)
    max_tokens: int = setting(4096, "Longest prompt tried.", "tokens", "--max-tokens")
    max_batch: int = setting(16, "Largest batch tried.", "count", "--max-batch")
    api_key: str = admin_key_setting()
    seed: int = field(default_factory=lambda: random.SystemRandom().getrandbits(32))
    """Of the prompts' tokens; another seed every time, or prefix caches would know them."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The model, the fits it came from, and what a reader should know besides."""

    model: CostModel
    prefill: Fit
    decode: Fit
    notes: tuple[str, ...]


def run_calibration(options: CalibrationOptions) -> str:
    """Measure, fit, write ``options.out``; returns the report to print.

    Raises:
        ConfigError: if the service cannot be measured; the message says what to do.
    """
    calibration = asyncio.run(calibrate(options))
    report = format_calibration(calibration)
    if options.out:
        calibration.model.save(Path(options.out))
        report += f"written to {options.out}\n"
    return report


async def calibrate(options: CalibrationOptions) -> Calibration:
    """The same without writing."""
    if bool(options.prefill) != bool(options.decode) or not (options.url or options.prefill):
        raise ConfigError("name a service by its URL, or servers by --prefill URL PORT and --decode URL")
    async with LiveService(named_workers(options.prefill, options.decode), options.api_key) as service:
        if not options.prefill:
            await service.find(options.url)
        try:
            limits = await read_limits(service)
            measurer = Measurer(service, limits, options.max_tokens, options.max_batch, options.seed)
            measured = await measurer.measure(options.budget_s)
            kv_bytes = await _pool_bytes_per_token(service.decodes[0], service)
        except WorkerError as exc:
            raise ConfigError(f"cannot calibrate: a request failed: {exc}") from exc
    return fit_model(options.name, limits, measured, kv_bytes)


# -- from measurements to a model ------------------------------------------------------------------


def fit_model(name: str, limits: MeasureLimits, measured: Measured, kv_bytes_per_token: int) -> Calibration:
    """Pure. Raises ConfigError if the measurements do not make a model."""
    prefill = _fit("prefill", PREFILL_TERMS, measured.prefill)
    decode = _fit("decode", DECODE_TERMS, measured.decode)
    reply_s = median(measured.reply_s) if measured.reply_s else 0.0
    model = CostModel(
        name=name or Path(limits.model).name or "calibrated",
        source=f"pdserve calibrate, {limits.device}, {limits.model}",
        prefill_base_s=prefill.cost["pass"],
        prefill_token_s=prefill.cost["token"],
        prefill_pair_s=prefill.cost["pair"],
        prefill_reread_s=prefill.cost["reread"],
        decode_base_s=decode.cost["step"],
        decode_request_s=decode.cost["request"],
        decode_token_s=decode.cost["token"],
        kv_bytes_per_token=max(1, kv_bytes_per_token),
        prefill_pool_tokens=limits.prefill_pool_tokens,
        decode_pool_tokens=limits.decode_pool_tokens,
        max_running_requests=limits.max_running_requests,
        chunk_tokens=limits.chunk_tokens,
        # Only their sum can be seen from outside; a third each.
        request_s=reply_s / 3,
        handshake_s=reply_s / 3,
        response_s=reply_s / 3,
        has_decode_cache=limits.has_decode_cache,
        fit_error=max(prefill.median_error, decode.median_error),
    )
    return Calibration(model.check(), prefill, decode, tuple(_notes(measured)))


def _notes(measured: Measured) -> Iterator[str]:
    yield "the link is taken as free: set link_alpha_s and link_beta_s where KV travels over a network"
    if measured.cached_tokens == 0:
        yield "no prompt met a cached prefix: the prefill servers' radix cache is off"


def _fit(what: str, names: tuple[str, ...], rows: Sequence[Row]) -> Fit:
    try:
        found = fit(names, rows)
    except ValueError as exc:
        raise ConfigError(f"{what}: too little was measured ({exc}): give more time by --budget-s") from exc
    if found.median_error > MAX_ERROR:
        raise ConfigError(
            f"{what}: no line fits: half of {found.num_rows} measurements are off by "
            f"{found.median_error:.0%} or more. Is something else running on these machines?"
        )
    if not any(found.cost.values()):
        raise ConfigError(f"{what}: all {found.num_rows} measurements say it takes no time")
    return found


# -- what the servers say of themselves --------------------------------------------------------


async def read_limits(service: LiveService) -> MeasureLimits:
    """Sizes the model needs, from ``/server_info``; the smallest of all workers of a role.

    Raises:
        ConfigError: if a server does not tell, or serves both phases.
    """
    prefills = [await _info(service, worker) for worker in service.prefills]
    decodes = [await _info(service, worker) for worker in service.decodes]
    first = prefills[0]
    chunk = int(first.get("chunked_prefill_size") or 0)
    most = int(first.get("max_prefill_tokens") or 16384)
    loads = [await service.load(worker) for worker in service.decodes]
    return MeasureLimits(
        chunk_tokens=chunk if chunk > 0 else most,
        page_tokens=max(1, int(first.get("page_size") or 1)),
        prefill_pool_tokens=min(int(info["max_total_num_tokens"]) for info in prefills),
        decode_pool_tokens=min(int(info["max_total_num_tokens"]) for info in decodes),
        max_running_requests=min(load.max_running_requests for load in loads) or 256,
        has_decode_cache=all(info.get("disaggregation_decode_enable_radix_cache") for info in decodes),
        device=str(first.get("device") or "?"),
        model=str(first.get("served_model_name") or first.get("model_path") or ""),
    )


async def _info(service: LiveService, worker: LiveWorker) -> dict[str, Any]:
    info = await service.ask(worker.url, "/server_info")
    if not isinstance(info, dict) or not info.get("max_total_num_tokens"):
        raise ConfigError(
            f"{worker.name} at {worker.url} does not tell its KV pool's size by /server_info: is it an "
            "SGLang 0.5.23 server?"
        )
    mode = info.get("disaggregation_mode", str(worker.role))
    if mode != str(worker.role):
        raise ConfigError(f"{worker.url} was named as a {worker.role} server but its mode is {mode!r}")
    return info


async def _pool_bytes_per_token(worker: LiveWorker, service: LiveService) -> int:
    """Its KV pool's size over its tokens, as far as SGLang's rounding tells; 0 if it does not."""
    document = await service.ask(worker.url, "/v1/loads?include=memory")
    ranks = document.get("loads") if isinstance(document, dict) else None
    memory = ranks[0].get("memory") if ranks else None
    if not memory or not memory.get("token_capacity"):
        return 0
    return round(float(memory.get("kv_cache_gb") or 0.0) * 2**30 / float(memory["token_capacity"]))


# -- the report --------------------------------------------------------------------------------


def format_calibration(calibration: Calibration) -> str:
    """The model in words: each term, its standard error, and how well the lines fit."""
    model, lines = calibration.model, []
    lines.append(f"{model.name}: {model.source}")
    lines += _format_fit("prefill", calibration.prefill)
    lines += _format_fit("decode", calibration.decode)
    reply_s = model.request_s + model.handshake_s + model.response_s
    lines.append(f"  reply     {reply_s * 1e3:10.3f} ms      beyond the pass, in an idle service")
    lines.append(
        f"  KV        {model.kv_bytes_per_token} bytes a token; pools {model.prefill_pool_tokens} and "
        f"{model.decode_pool_tokens} tokens; chunks of {model.chunk_tokens}"
    )
    lines += [f"  note: {note}" for note in calibration.notes]
    return "\n".join(lines) + "\n"


def _format_fit(what: str, found: Fit) -> list[str]:
    lines = [
        f"  {what}: {found.num_rows} measurements; off by {found.median_error:.1%} (median), "
        f"{found.worst_error:.1%} (worst)"
    ]
    for name, cost in found.cost.items():
        error = found.error[name]
        certainty = f"± {error / cost:.0%}" if cost > 0 else "not seen"
        lines.append(f"    {name:<9} {_format_s(cost):>14}  {certainty}")
    return lines


def _format_s(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds / 1e-12:.4g} ps"
