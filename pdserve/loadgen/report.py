"""A run's figures as text for people, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.loadgen.run import RunResult
from pdserve.loadgen.summary import Spread, Summary

_ROWS = (
    ("ttft", "time to first token, ms", 1e3),
    ("tpot", "time per output token, ms", 1e3),
    ("itl", "between tokens, ms", 1e3),
    ("e2e", "whole request, s", 1.0),
)


def render_summary(name: str, summary: Summary, stages: str = "") -> str:
    """A block of lines for one service."""
    lines = [
        f"{name}",
        f"  requests           {summary.completed} whole, {summary.failed} failed, in {summary.wall_s:.1f} s:"
        f" {summary.requests_s:.2f}/s",
        f"  prompt tokens      {summary.input_tokens} ({summary.cached_tokens} from a cache): "
        f"{summary.input_tokens_s:.0f}/s",
        f"  output tokens      {summary.output_tokens}: {summary.output_tokens_s:.0f}/s",
        f"  {'':26}{'mean':>9}{'p50':>9}{'p90':>9}{'p95':>9}{'p99':>9}{'max':>9}",
    ]
    for field, title, factor in _ROWS:
        one: Spread = getattr(summary, field)
        values = (one.mean, one.p50, one.p90, one.p95, one.p99, one.max)
        lines.append(f"  {title:<26}" + "".join(f"{value * factor:9.2f}" for value in values))
    if summary.slo_ttft_s or summary.slo_tpot_s:
        limits = ", ".join(
            f"{word} <= {limit:g} s"
            for word, limit in (("TTFT", summary.slo_ttft_s), ("TPOT", summary.slo_tpot_s))
            if limit
        )
        lines.append(f"  goodput            {summary.goodput:.2f}/s ({summary.attainment:.1%} met {limits})")
    if summary.late > 0.05:
        lines.append(f"  note: requests were sent up to {summary.late:.2f} s late: this load bounds itself")
    if stages:
        lines.append(stages)
    lines += [f"  failed {count} x {error}" for error, count in summary.errors.items()]
    return "\n".join(lines)


def render_stages(document: object) -> str:
    """The balancer's own split of time, from its state document; empty if it tells none."""
    latency = document.get("latency") if isinstance(document, dict) else None
    if not isinstance(latency, dict):
        return ""
    window_s = latency.get("window_s")
    lines = [
        f"  inside pdserve, over its last {window_s:g} s, ms" if isinstance(window_s, int | float) else ""
    ]
    for field, title in (
        ("queue_s", "waiting for a pair"),
        ("prefill_s", "prefill"),
        ("transfer_s", "KV transfer"),
    ):
        one = latency.get(field)
        if isinstance(one, dict) and one.get("count"):
            values = [one.get(part) for part in ("mean", "p50", "p90", "p95", "p99")]
            cells = (
                f"{value * 1e3:9.2f}" if isinstance(value, int | float) else f"{'':9}" for value in values
            )
            lines.append(f"    {title:<24}" + "".join(cells))
    return "\n".join(lines) if len(lines) > 1 and lines[0] else ""


def render_ratio(first: Summary, second: Summary) -> str:
    """How the two services compare: the first's figure over the second's."""
    pairs = [
        ("requests/s", first.requests_s, second.requests_s),
        ("output tokens/s", first.output_tokens_s, second.output_tokens_s),
        ("goodput", first.goodput, second.goodput),
        ("TTFT p50", first.ttft.p50, second.ttft.p50),
        ("TTFT p99", first.ttft.p99, second.ttft.p99),
        ("TPOT p50", first.tpot.p50, second.tpot.p50),
        ("TPOT p99", first.tpot.p99, second.tpot.p99),
    ]
    cells = [f"{name} {a / b:.2f}x" for name, a, b in pairs if b and a == a and b == b]
    return "first over second: " + ", ".join(cells)


def draw(path: str, results: Sequence[tuple[str, RunResult]]) -> None:
    """Cumulative distributions of TTFT and TPOT of each service, as a PNG.

    Raises:
        ConfigError: if matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'pdserve[plot]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, result in results:
        whole = [outcome for outcome in result.outcomes if outcome.is_ok]
        for panel, values in zip(
            panels,
            ([o.ttft_s for o in whole], [o.tpot_s for o in whole if o.tpot_s is not None]),
            strict=True,
        ):
            ordered = sorted(values)
            shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
            panel.step([value * 1e3 for value in ordered], shares, where="post", label=name)
    for panel, title in zip(panels, ("time to first token, ms", "time per output token, ms"), strict=True):
        panel.set_xlabel(title)
        panel.set_ylabel("share of requests")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
        panel.legend()
    try:
        figure.set_canvas(FigureCanvasAgg(figure))
        figure.savefig(Path(path), format="png")
    except OSError as exc:
        raise ConfigError(f"cannot write the plot {path}: {exc.strerror or exc}") from exc
