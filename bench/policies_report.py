"""How bench/policies.py shows its cells: a table for each, and one picture of all."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pdserve.sim.plot import Panel, PlotLine, draw

T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}
"""Student's t by degrees of freedom, 95 %, two-sided."""


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % interval; None for one seed alone."""
    if len(values) < 2:
        return values[0], None
    return mean(values), T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def told(values: list[float]) -> dict[str, float | None]:
    """The same for JSON."""
    middle, half = interval(values)
    return {"mean": round(middle, 4), "half": None if half is None else round(half, 4)}


def print_cell(label: str, num_requests: int, num_seeds: int, judged: dict[str, Any]) -> None:
    """A table of one trace on one fleet, best knee first."""
    slo = judged["slo"]
    any_row = next(iter(judged["rows"].values()))
    at, over = any_row["reference"]["rate"], any_row["beyond"]["rate"]
    print(
        f"{label}: {num_requests} requests, {num_seeds} seeds, TTFT {slo['ttft_s']:g} s, TPOT "
        f"{slo['tpot_s']:g} s; best peer {judged['best_peer']}; reference {at:.2f}/s, beyond {over:.2f}/s"
    )
    print(
        f"{'':<22}{'knee /s':>16}{'x best peer':>15}{'goodput at ref':>17}{'p99 TTFT':>10}{'hit':>6}"
        f"{'long':>6}{'goodput beyond':>17}{'x':>14}{'p99 TTFT':>10}{'failed':>8}{'retr.':>7}"
    )
    for row, own in sorted(judged["rows"].items(), key=lambda item: -item[1]["knee"]["mean"]):
        ref, far = own["reference"], own["beyond"]
        print(
            f"{row:<22}{_pm(own['knee']):>16}{_pm(own['knee_ratio']):>15}{_pm(ref['goodput']):>17}"
            f"{ref['ttft_p99']:>10.2f}{ref['hit']:>6.0%}{ref['long']:>6.0%}{_pm(far['goodput']):>17}{_pm(far['ratio']):>14}"
            f"{far['ttft_p99']:>10.2f}{far['failed']:>8}{far['retractions']:>7}"
        )
    print(flush=True)


def _pm(told: dict[str, Any]) -> str:
    return f"{told['mean']:.2f}" + ("" if told["half"] is None else f" ±{told['half']:.2f}")


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Goodput against rate, a panel per cell."""
    panels = []
    for judged in cells:
        lines = []
        for row, own in judged["rows"].items():
            curve = own["curve"]
            y = [point["goodput"]["mean"] for point in curve]
            half = [point["goodput"]["half"] or 0.0 for point in curve]
            low = [a - b for a, b in zip(y, half, strict=True)]
            high = [a + b for a, b in zip(y, half, strict=True)]
            lines.append(PlotLine(row, [point["rate"] for point in curve], y, low, high))
        title = f"{judged['trace']} {judged['workers']}P{judged['workers']}D"
        panels.append(Panel(title, "requests per second", "goodput per second", lines))
    draw(panels, path, columns=3)
