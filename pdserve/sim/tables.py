"""A run's figures as a text table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdserve.sim.report import SimReport, Slo

PERCENTILES = (0.5, 0.9, 0.99)

_COLUMNS = (
    ("policy", 20),
    ("req/s", 8),
    ("goodput", 8),
    ("in slo", 7),
    ("TTFT p50", 9),
    ("p90", 8),
    ("p99", 8),
    ("TPOT p50", 9),
    ("p99", 8),
    ("ITL p99", 8),
    ("e2e p50", 8),
    ("hit P", 6),
    ("hit D", 6),
    ("P busy", 7),
    ("D busy", 7),
    ("failed", 7),
    ("retr.", 6),
)


def summary(report: SimReport, slo: Slo) -> dict[str, Any]:
    """A run in numbers: seconds, requests per second, shares; ``inf`` and NaN are left out as None."""
    use = report.use
    spans = {
        field.removesuffix("_s"): {
            f"p{round(share * 100)}": _finite(report.percentile(field, share)) for share in PERCENTILES
        }
        for field in ("ttft_s", "tpot_s", "e2e_s", "queue_s", "transfer_s")
    }
    spans["itl"] = {f"p{round(share * 100)}": _finite(report.itl_percentile(share)) for share in PERCENTILES}
    return {
        "policy": report.policy,
        "model": report.model,
        "requests": len(report.records),
        "rate": report.rate(),
        "goodput": report.goodput(slo),
        "attainment": report.attainment(slo),
        "failed": len(report.records) - len(report.served),
        "shed": report.shed,
        "retractions": use.retractions,
        "hit_rate": {"prefill": report.cache_hit_rate(), "decode": report.decode_cache_hit_rate()},
        "busy": {
            "prefill": [round(worker.busy, 4) for worker in use.prefills],
            "decode": [round(worker.busy, 4) for worker in use.decodes],
        },
        "link_busy": {"prefill": _mean([worker.link for worker in use.prefills])},
        "seconds": spans,
        "virtual_s": report.span_s,
        "events": report.num_events,
    }


def render_table(summaries: Sequence[dict[str, Any]]) -> str:
    """One line per run, times in seconds."""
    lines = ["".join(f"{name:<{width}}" if not i else f"{name:>{width}}" for i, (name, width) in _numbered())]
    for run in summaries:
        ttft, tpot, e2e = (run["seconds"][name] for name in ("ttft", "tpot", "e2e"))
        cells = [
            run["policy"],
            f"{run['rate']:.2f}",
            f"{run['goodput']:.2f}",
            f"{run['attainment']:.1%}",
            _seconds(ttft["p50"], 3),
            _seconds(ttft["p90"], 3),
            _seconds(ttft["p99"], 3),
            _seconds(tpot["p50"], 4),
            _seconds(tpot["p99"], 4),
            _seconds(run["seconds"]["itl"]["p99"], 4),
            _seconds(e2e["p50"], 2),
            f"{run['hit_rate']['prefill']:.0%}",
            f"{run['hit_rate']['decode']:.0%}",
            f"{_mean(run['busy']['prefill']):.0%}",
            f"{_mean(run['busy']['decode']):.0%}",
            str(run["failed"]),
            str(run["retractions"]),
        ]
        widths = [width for _, width in _COLUMNS]
        lines.append(
            "".join(
                f"{cell:<{width}}" if not i else f"{cell:>{width}}"
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
        )
    return "\n".join(lines)


def _numbered() -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(_COLUMNS))


def _seconds(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
