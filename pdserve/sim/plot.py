"""Pictures of simulations, as PNG files. matplotlib is imported when one is drawn, and only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError
from pdserve.sim.report import SimReport, Slo

MAX_POINTS = 2000
"""Of a distribution's line."""


@dataclass(frozen=True, slots=True)
class PlotLine:
    """One line of a panel: points, and how far each may be off (empty: not drawn)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram. ``mark_x`` and ``mark_y`` draw a dashed line there."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[PlotLine]
    mark_x: float | None = None
    mark_y: float | None = None
    has_log_x: bool = False


def draw(panels: Sequence[Panel], path: str | Path, columns: int = 2, title: str = "") -> None:
    """Write the panels into one PNG.

    Raises:
        ConfigError: if matplotlib is missing or the file cannot be written.
    """
    figure_of = _figure()
    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns)
    figure = figure_of(figsize=(6.4 * columns, 4.2 * rows), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        _fill(axes, panel)
    if title:
        figure.suptitle(title)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as exc:
        raise ConfigError(f"plot {path}: cannot be written: {exc}") from exc


def run_panels(reports: Mapping[str, SimReport], slo: Slo) -> list[Panel]:
    """Distributions of TTFT and TPOT over all requests, one line per run; dashed: the SLO."""
    panels = []
    for field, label, limit in (("ttft_s", "TTFT (s)", slo.ttft_s), ("tpot_s", "TPOT (s)", slo.tpot_s)):
        lines = [_distribution(name, report, field) for name, report in reports.items()]
        panels.append(
            Panel(f"Requests served within {label}", label, "share of all requests", lines, mark_x=limit,
                  has_log_x=field == "ttft_s")
        )  # fmt: skip
    return panels


def _distribution(name: str, report: SimReport, field: str) -> PlotLine:
    values = sorted(getattr(record, field) for record in report.served)
    step = max(1, len(values) // MAX_POINTS)
    places = list(range(0, len(values), step))
    total = len(report.records)
    return PlotLine(name, [values[i] for i in places], [(i + 1) / total for i in places])


def _fill(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        (drawn,) = axes.plot(line.x, line.y, label=line.name, linewidth=1.3)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    if panel.mark_x is not None:
        axes.axvline(panel.mark_x, color="black", linestyle="--", linewidth=0.8)
    if panel.mark_y is not None:
        axes.axhline(panel.mark_y, color="black", linestyle="--", linewidth=0.8)
    if panel.has_log_x:
        axes.set_xscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _figure() -> Any:
    """matplotlib's Figure with the Agg canvas: no window, no global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigError("plots need matplotlib: pip install 'pdserve[plot]'") from exc

    def make(**settings: Any) -> Any:
        figure = Figure(**settings)
        FigureCanvasAgg(figure)
        return figure

    return make
