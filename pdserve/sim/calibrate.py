"""A cost model of a live service: ``pdserve calibrate URL --out FILE``.

    find the servers ─► warm up ─► measure (measure.py) ─► fit (fits.py) ─► CostModel, and how far to trust it

Pass and step times are the servers' own counts of busy time; what the client sees
beyond them in an idle service is the overhead of a reply. The service must have no
other traffic meanwhile; a measurement that shows some, or that no line fits, is
refused instead of written.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pdserve.errors import ConfigError, WorkerError
from pdserve.sim.cost import CostModel
from pdserve.sim.fits import Fit, fit
from pdserve.sim.live import LiveService, LiveWorker, named_workers
from pdserve.sim.measure import DECODE_TERMS, PREFILL_TERMS, Measured, MeasureLimits, Measurer, Scale

MAX_ERROR = 0.35
"""Median relative error of a fit from which it explains nothing. On two cores shared with other programs
runs of this calibration stayed below 0.15."""
PREFILL_SHARE, DECODE_SHARE = 0.45, 0.45
"""Of the budget; the rest is for replies."""
SHARED_PROCESSOR = 1.15
"""Decode servers that are this much slower together than alone are not machines of their own."""
LINK_TERMS = ("transfer", "byte")


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What to calibrate and how far to go. ``prefill`` and ``decode`` name the servers themselves, and
    ``url`` is left alone then; ``out`` empty: write nothing."""

    url: str = ""
    out: str = ""
    prefill: tuple[tuple[str, int | None], ...] = ()
    decode: tuple[str, ...] = ()
    name: str = ""
    budget_s: float = 60.0
    max_tokens: int = 4096
    max_batch: int = 16
    api_key: str = ""
    seed: int = field(default_factory=lambda: random.SystemRandom().getrandbits(32))
    """Of the prompts' tokens; another seed every time, or prefix caches would know them."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The model, the fits it came from, and what a reader should know besides."""

    model: CostModel
    prefill: Fit
    decode: Fit
    link: Fit | None
    together: float
    """Decode step time with all decode servers busy over that of one alone; 1 if there is but one."""
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
    workers = named_workers(options.prefill, options.decode)
    async with LiveService(workers, "" if workers else options.url, options.api_key) as service:
        if not workers:
            await service.find()
        try:
            limits = await read_limits(service)
            measurer = Measurer(service, limits, Scale(options.max_tokens, options.max_batch), options.seed)
            await measurer.warm_up()
            await measurer.measure_prefill(options.budget_s * PREFILL_SHARE)
            await measurer.measure_decode(options.budget_s * DECODE_SHARE)
            await measurer.measure_reply(options.budget_s * (1 - PREFILL_SHARE - DECODE_SHARE))
            kv_bytes = await _pool_bytes_per_token(service.decodes[0], service)
        except WorkerError as exc:
            raise ConfigError(f"cannot calibrate: a request failed: {exc}") from exc
    return fit_model(options, limits, measurer.result, kv_bytes)


# -- from measurements to a model ------------------------------------------------------------------


def fit_model(
    options: CalibrationOptions, limits: MeasureLimits, measured: Measured, pool_bytes_per_token: float
) -> Calibration:
    """Pure. Raises ConfigError if the measurements do not make a model."""
    fits = _Fits(
        _fit("prefill", PREFILL_TERMS, measured.prefill),
        _fit("decode", DECODE_TERMS, [*measured.decode, *measured.alone]),
        _fit("link", LINK_TERMS, measured.link) if measured.link else None,
    )
    kv_bytes = median(measured.bytes_per_token) if measured.bytes_per_token else pool_bytes_per_token
    if kv_bytes <= 0:
        raise ConfigError("no server tells how many bytes of KV a token has (/pdserve/instance, /v1/loads)")
    name = options.name or Path(limits.model).name or "calibrated"
    model = _model(name, limits, fits, round(kv_bytes), _overheads(measured, fits.link)).check()
    together = _together(measured)
    notes = tuple(_notes(measured, together))
    return Calibration(model, fits.prefill, fits.decode, fits.link, together, notes)


@dataclass(frozen=True, slots=True)
class _Fits:
    prefill: Fit
    decode: Fit
    link: Fit | None


def _model(
    name: str, limits: MeasureLimits, fits: _Fits, kv_bytes: int, overheads: tuple[float, float]
) -> CostModel:
    prefill, decode = fits.prefill.cost, fits.decode.cost
    link = fits.link.cost if fits.link else dict.fromkeys(LINK_TERMS, 0.0)
    reply_s, balancer_s = overheads
    return CostModel(
        name=name,
        source=f"pdserve calibrate, {limits.device}, {limits.model}",
        prefill_base_s=prefill["pass"],
        prefill_token_s=prefill["token"],
        prefill_pair_s=prefill["pair"],
        prefill_reread_s=prefill["reread"],
        decode_base_s=decode["step"],
        decode_request_s=decode["request"],
        decode_token_s=decode["token"],
        kv_bytes_per_token=max(1, kv_bytes),
        prefill_pool_tokens=limits.prefill_pool_tokens,
        decode_pool_tokens=limits.decode_pool_tokens,
        max_running_requests=limits.max_running_requests,
        chunk_tokens=limits.chunk_tokens,
        link_alpha_s=link["transfer"],
        link_beta_s=link["byte"],
        # Only their sum can be seen from outside; a third each.
        request_s=reply_s / 3 + balancer_s,
        handshake_s=reply_s / 3,
        response_s=reply_s / 3,
        reload_beta_s=link["byte"],
        has_decode_cache=limits.has_decode_cache,
        fit_error=max(fits.prefill.median_error, fits.decode.median_error),
    )


def _notes(measured: Measured, together: float) -> Iterator[str]:
    if together > SHARED_PROCESSOR:
        yield (
            f"with all decode servers busy a step takes {together:.2f} times as long as alone: they share "
            "a processor; the model is the mean of both"
        )
    if not measured.link:
        yield "the servers run without pdserve's plugin: the link is taken as free, see link_beta_s"
    if not measured.bytes_per_token:
        yield "KV bytes per token are the pool's size over its tokens, rounded by SGLang"
    if measured.cached_tokens == 0:
        yield "no prompt met a cached prefix: the prefill servers' radix cache is off"


def _fit(what: str, names: tuple[str, ...], rows: list[Any]) -> Fit:
    try:
        found = fit(names, rows)
    except ValueError as exc:
        raise ConfigError(f"{what}: too little was measured ({exc}): give more time by --budget-s") from exc
    if found.median_error > MAX_ERROR and what != "link":
        raise ConfigError(
            f"{what}: no line fits: half of {found.num_rows} measurements are off by "
            f"{found.median_error:.0%} or more. Is something else running on these machines?"
        )
    if not any(found.cost.values()):
        raise ConfigError(f"{what}: all {found.num_rows} measurements say it takes no time")
    return found


def _together(measured: Measured) -> float:
    """Step times at equal counts, all servers busy over one alone: from the fit of either to the other."""
    if len(measured.alone) < len(DECODE_TERMS) or len(measured.decode) < len(DECODE_TERMS):
        return 1.0
    alone = fit(DECODE_TERMS, measured.alone)
    return median(row.seconds / max(alone.seconds(row.counts), 1e-9) for row in measured.decode)


def _overheads(measured: Measured, link: Fit | None) -> tuple[float, float]:
    """Seconds of a short request in an idle service beyond its pass and its transfer; and what the balancer
    adds to that."""
    beyond = [
        max(0.0, answer.ttft_s - busy_s - (link.cost["transfer"] if link else 0.0))
        for answer, busy_s in measured.over_pair
    ]
    reply_s = median(beyond) if beyond else 0.0
    shortest = min((answer.prompt_tokens for answer, _ in measured.over_pair), default=0)
    direct = [answer.ttft_s for answer, _ in measured.over_pair if answer.prompt_tokens <= 2 * shortest]
    if not measured.through_s or not direct:
        return reply_s, 0.0
    return reply_s, max(0.0, median(measured.through_s) - median(direct))


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


async def _pool_bytes_per_token(worker: LiveWorker, service: LiveService) -> float:
    document = await service.ask(worker.url, "/v1/loads?include=memory")
    ranks = document.get("loads") if isinstance(document, dict) else None
    memory = ranks[0].get("memory") if ranks else None
    if not memory or not memory.get("token_capacity"):
        return 0.0
    return float(memory.get("kv_cache_gb") or 0.0) * 2**30 / float(memory["token_capacity"])


# -- the report --------------------------------------------------------------------------------


def format_calibration(calibration: Calibration) -> str:
    """The model in words: each term, its standard error, and how well the lines fit."""
    model, lines = calibration.model, []
    lines.append(f"{model.name}: {model.source}")
    lines += _format_fit("prefill", calibration.prefill)
    lines += _format_fit("decode", calibration.decode)
    if calibration.link is not None:
        lines += _format_fit("link", calibration.link)
    reply_s = model.request_s + model.handshake_s + model.response_s
    lines.append(f"  reply     {reply_s * 1e3:10.3f} ms      beyond pass and transfer, in an idle service")
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
