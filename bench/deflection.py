"""What it is worth that decode servers prefill some requests themselves (--deflect auto), in simulation.

Why: prefill and decode are seldom both short of time at once; a request that a decode server takes alone
spends time per token that is to spare, and the first token comes sooner.

Set-up: fleet, traces, limits, requests, seeds and knee of bench/policies.py; ``pair_cost`` with --slo, and
the same with --deflect auto, on the same requests. The balancer decides on samples, each load_poll_s old at
most, as in production; decode servers know their own pass times (the real ones fit them). Interleaved: for
each seed one row after the other. --poll sets the period of samples; 0.001 is next to true state.

Output: set-up, a line per trace, seed and row, a summary per trace, one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import policies
from common import describe_setup, print_result, print_setup
from policies import REQUESTS, SLOS, Cell, Point, knee, search
from policies_report import told

STARTS = {"azure_code": -5, "azure_conv": 7, "shift": -1, "mooncake": 18}
"""Rungs where the search begins: near the knee of the first row (bench/results/policies_4p4d.txt)."""
ROWS = ("pair_cost slo", "pair_cost slo deflect")


def _task(task: tuple[Cell, str, int, float]) -> tuple[float, list[Point], float]:
    """Knee, points and seconds of one row of a cell with one seed."""
    cell, row, start, poll_s = task
    begun_s = time.monotonic()
    policies.POLL_S = poll_s
    points = search(cell, row, start)
    flat = [point for rung in sorted(points) for point in points[rung]]
    return knee(points, cell.seeds[0]), flat, time.monotonic() - begun_s


def _at(points: list[Point]) -> Point:
    """The last rung at which the target was met, or the lowest."""
    met = [point for point in points if point.attainment >= policies.TARGET]
    return max(met, key=lambda p: p.rate) if met else min(points, key=lambda p: p.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", required=True, help="folder with the three trace files")
    parser.add_argument("--only", default=",".join(SLOS), help="traces with commas between")
    parser.add_argument("--model", default="llama-70b-8xh100")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--thin", type=float, default=1.0, help="divides the number of requests")
    parser.add_argument("--poll", type=float, default=0.25, help="load_poll_s")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    setup = describe_setup(model=args.model, poll_s=args.poll, target=policies.TARGET, step=policies.STEP)
    print_setup(setup)
    result: dict[str, Any] = {"bench": "deflection", "setup": setup, "traces": {}}
    with ProcessPoolExecutor(args.processes) as pool:
        for trace in args.only.split(","):
            count = int(REQUESTS[trace] * args.workers / args.thin)
            cells = [Cell(trace, args.workers, count, (s,), args.traces, args.model) for s in args.seeds]
            tasks = [(cell, row, STARTS[trace], args.poll) for cell in cells for row in ROWS]
            result["traces"][trace] = _show(trace, count, tasks, list(pool.map(_task, tasks)))
    print_result(result)


def _show(trace: str, count: int, tasks: list[Any], done: list[Any]) -> dict[str, Any]:
    rows: dict[str, list[tuple[float, Point]]] = {row: [] for row in ROWS}
    print(f"{trace}: {count} requests, TTFT {SLOS[trace].ttft_s:g} s, TPOT {SLOS[trace].tpot_s:g} s")
    for (cell, row, *_), (rate, points, took_s) in zip(tasks, done, strict=True):
        at = _at(points)
        rows[row].append((rate, at))
        print(
            f"  seed {cell.seeds[0]}  {row:<22} knee {rate:7.2f}/s  alone {at.alone:4.0%}  "
            f"long {at.long:4.0%}  "
            f"p99 TTFT {at.ttft_p99:6.2f} TPOT {at.tpot_p99:.3f}  failed {at.failed:3}  "
            f"retr. {at.retractions:3}  ({took_s:.0f} s)"
        )
    base, ours = (rows[row] for row in ROWS)
    ratios = [mine / theirs for (mine, _), (theirs, _) in zip(ours, base, strict=True)]
    ratio = told(ratios)
    print(
        f"  {trace}: x {ratio['mean']} ± {ratio['half']}  ({', '.join(f'{each:.2f}' for each in ratios)})\n",
        flush=True,
    )
    return {
        "ratio": ratio,
        "ratios": ratios,
        **{row: [asdict(p) | {"knee": k} for k, p in rows[row]] for row in ROWS},
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
