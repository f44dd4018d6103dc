"""Goodput of each policy against the rate of requests, in simulation on public traces.

Why: a policy is worth what it adds to the requests per second that are answered in time. All rows see the
same requests, load samples and seeds.

Rows: a peer's policy by its name sends each request on at once, first come first served, as its own router
does; all that holds a request back is decode's KV room. "queued" gives it this balancer's whole admission
(line, order under overload, room by forecast), so that the policy alone can be compared. pair_cost and
least_load have that admission; "plain" takes it away. "oracle" and "useless" bound what forecasts of lengths
are worth; "slo" tells the balancer the limits, so that it refuses what is too late (--slo).

Set-up: `pdserve.sim` runs the balancer's own objects over modelled workers (profile llama-70b-8xh100 unless
--model says otherwise). Per seed a run of consecutive requests is cut from the trace at a place drawn by the
seed, arrivals of one stamp spread over the step, scaled to the rate. Fleets larger than 4P4D get copies of
that run laid over each other, with prefixes of their own. The first tenth of the requests warms caches
and fits up and counts for nothing; nor does the last fifth, or what comes last would be served with nobody
behind it, which flatters a row that lets short requests pass long ones. "long": what share of the longest
tenth of prompts met the limits, so that a row that starves them is seen to.

SLOs, the same for all rows and taken from others: TPOT 0.1 s and, for Mooncake's long prompts, TTFT 30 s (the
limits in Mooncake's own evaluation, FAST'25); TTFT 2 s for the Azure traces (MLPerf Inference, Llama-2-70B,
server scenario).

Rates form a ladder of 8 % steps. A row's knee is the highest rate at which 90 % of all requests meet both
limits, told by straight lines between rungs. The reference rung is the one nearest the best peer's knee;
there, and three rungs (26 %) above, all rows are compared. Intervals: Student's t over the seeds, 95 %.

Output: set-up, a table per trace and fleet, one JSON object as the last line; --out writes JSON and PNG.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from common import describe_setup, print_result, print_setup
from policies_report import plot, print_cell, told

from pdserve.config.balancer import BalancerConfig
from pdserve.sim.baselines import SIMULATED_MAKERS
from pdserve.sim.profiles import PROFILES, model_of
from pdserve.sim.report import Slo, percentile
from pdserve.sim.simulator import SimOptions, simulate
from pdserve.workload import TracedRequest, overlaid, read_trace, sampled, scaled, shifted, spread

FILES = {
    "mooncake": "mooncake_conversation_trace.jsonl",
    "azure_code": "AzureLLMInferenceTrace_code.csv",
    "azure_conv": "AzureLLMInferenceTrace_conv.csv",
}
SLOS = {
    "mooncake": Slo(30.0, 0.1),
    "azure_code": Slo(2.0, 0.1),
    "azure_conv": Slo(2.0, 0.1),
    "shift": Slo(2.0, 0.1),
}
START = {"mooncake": 0.55, "azure_code": 4.5, "azure_conv": 7.0, "shift": 5.0}
"""Where the search begins, requests per second and prefill worker."""
REQUESTS = {"mooncake": 600, "azure_code": 700, "azure_conv": 900, "shift": 900}
"""Per prefill worker up to LARGE of them: some ten times as long as the limits on TTFT."""
LARGE = 8
LARGE_REQUESTS = {"mooncake": 12_000, "azure_code": 16_000, "azure_conv": 16_000, "shift": 16_000}
"""Of larger fleets, which run the rows in LARGE_ROWS and the three best peers of the next smaller fleet."""
LARGE_ROWS = ("pair_cost", "pair_cost slo", "least_load")
SMALL_ROWS = ("random", "round_robin", "router_power_of_two", "pair_cost oracle", "pair_cost useless")
"""Rows that only the smallest fleet runs."""
OURS = ("pair_cost", "least_load")
VARIANTS = (
    "pair_cost plain", "pair_cost oracle", "pair_cost useless", "pair_cost slo",
    "cache_aware queued", "cache_aware slo", "dynamo_kv queued",
)  # fmt: skip
POLL_S = BalancerConfig().load_poll_s
AT_ONCE_S = 1e6
"""``prefill_queue_s`` of a row that holds nothing back."""
STEP, TARGET, WARM, COOL = 1.08, 0.9, 0.1, 0.2
BEYOND = 3  # rungs above the reference, where rows are compared again


@dataclass(frozen=True)
class Cell:
    """A trace on a fleet."""

    trace: str
    workers: int
    requests: int
    seeds: tuple[int, ...]
    folder: str
    model: str

    @property
    def label(self) -> str:
        return f"{self.trace} {self.workers}P{self.workers}D"


@dataclass(frozen=True)
class Point:
    """One run: what share met the limits, and the times of those that were served."""

    rung: int
    seed: int
    rate: float
    attainment: float
    long: float
    ttft_p50: float
    ttft_p99: float
    tpot_p99: float
    hit: float
    failed: int
    retractions: int
    alone: float  # share of requests that a decode server prefilled itself


_TRACES: dict[str, list[TracedRequest]] = {}


def rate_at(cell: Cell, rung: int) -> float:
    return START[cell.trace] * cell.workers * STEP**rung


def _trace(cell: Cell, name: str) -> list[TracedRequest]:
    if name not in _TRACES:
        _TRACES[name] = spread(read_trace(Path(cell.folder) / FILES[name]), seed=0)
    return _TRACES[name]


def _cut(cell: Cell, name: str, count: int, rate: float, seed: int) -> list[TracedRequest]:
    copies = max(1, cell.workers // 4)
    run = sampled(_trace(cell, name), max(50, count // copies), seed)
    return scaled(overlaid(run, copies, seed), rate)


def workload(cell: Cell, rate: float, seed: int) -> list[TracedRequest]:
    """The same requests at every rate: only the clock runs faster."""
    if cell.trace != "shift":
        return _cut(cell, cell.trace, cell.requests, rate, seed)
    half = cell.requests // 2
    first = _cut(cell, "azure_code", half, rate, seed)
    return shifted(first, _cut(cell, "azure_conv", half, rate, seed), first[-1].arrival_s + 1.0 / rate)


def run_point(cell: Cell, row: str, rung: int, seed: int) -> Point:
    """One simulation."""
    policy, _, variant = row.partition(" ")
    slo, rate = SLOS[cell.trace], rate_at(cell, rung)
    config = BalancerConfig(policy=policy, load_poll_s=POLL_S)
    if variant.startswith("slo"):
        deflect = "auto" if variant.endswith("deflect") else "off"
        config = replace(config, slo_ttft_s=slo.ttft_s, slo_tpot_s=slo.tpot_s, deflect=deflect)
    elif variant == "plain" or (policy not in OURS and variant != "queued"):
        config = replace(config, queue_order="fcfs", prefill_queue_s=AT_ONCE_S)
    lengths = variant if variant in ("oracle", "useless") else "learned"
    report = simulate(
        workload(cell, rate, seed), model_of(cell.model), policy, cell.workers, cell.workers, config,
        SimOptions(lengths=lengths, seed=seed),
    )  # fmt: skip
    total = len(report.records)
    counted = report.records[int(total * WARM) : int(total * (1 - COOL))]
    longest = sorted(counted, key=lambda record: -record.prompt_tokens)[: len(counted) // 10]
    served = [record for record in counted if not record.error]
    ttft = [record.ttft_s for record in served]
    return Point(
        rung,
        seed,
        rate,
        sum(record.meets(slo) for record in counted) / len(counted),
        sum(record.meets(slo) for record in longest) / len(longest),
        percentile(ttft, 0.5),
        percentile(ttft, 0.99),
        percentile([record.tpot_s for record in served], 0.99),
        report.cache_hit_rate(),
        len(counted) - len(served),
        report.use.retractions,
        sum(record.prefill < 0 and not record.error for record in counted) / len(counted),
    )


def search(cell: Cell, row: str, start: int) -> dict[int, list[Point]]:
    """Rungs around the knee for each seed: walk up while the target is met, down while it is not."""
    points: dict[int, list[Point]] = {}
    for seed in cell.seeds:
        seen: dict[int, Point] = {}

        def at(rung: int, seen: dict[int, Point] = seen, seed: int = seed) -> bool:
            if rung not in seen:
                seen[rung] = run_point(cell, row, rung, seed)
            return seen[rung].attainment >= TARGET

        rung, stride = start, 4 if not points else 2
        direction = 1 if at(rung) else -1
        while at(rung + direction * stride) == (direction > 0) and abs(rung - start) < 40:
            rung += direction * stride
        low = rung if direction > 0 else rung - stride
        while stride > 1:
            stride //= 2
            if at(low + stride):
                low += stride
        start = low
        for point in seen.values():
            points.setdefault(point.rung, []).append(point)
    return points


def knee(points: dict[int, list[Point]], seed: int) -> float:
    """The highest rate at which the target is met, between rungs by straight lines; 0: at none."""
    own = sorted((p.rate, p.attainment) for row in points.values() for p in row if p.seed == seed)
    for (low, a), (high, b) in reversed(list(itertools.pairwise(own))):
        if a >= TARGET > b:
            return low + (high - low) * (a - TARGET) / (a - b)
    return own[-1][0] if own[-1][1] >= TARGET else 0.0


def _search_task(task: tuple[Cell, str, int]) -> dict[int, list[Point]]:
    return search(*task)


def _point_task(task: tuple[Cell, str, int, int]) -> Point:
    return run_point(*task)


def run_cell(
    cell: Cell, rows: list[str], pool: ProcessPoolExecutor, before: dict[str, Any] | None
) -> dict[str, Any]:
    """All rows of a cell: knees first, then the rungs where all are compared. ``before``: the same trace on a
    smaller fleet, where the search begins."""
    tasks = [(cell, row, _start(before, row)) for row in rows]
    found = dict(zip(rows, pool.map(_search_task, tasks), strict=True))
    knees = {row: [knee(points, seed) for seed in cell.seeds] for row, points in found.items()}
    peers = [row for row in rows if is_peer(row)]
    best = max(peers, key=lambda row: mean(knees[row]))
    per_worker = max(mean(knees[best]), 1e-9) / (START[cell.trace] * cell.workers)
    reference = round(math.log(per_worker, STEP))
    missing = [
        (cell, row, rung, seed)
        for row in rows
        for rung in (reference, reference + BEYOND)
        for seed in cell.seeds
        if all(point.seed != seed for point in found[row].get(rung, []))
    ]
    for (_, row, rung, _), point in zip(missing, pool.map(_point_task, missing), strict=True):
        found[row].setdefault(rung, []).append(point)
    return _judged(cell, rows, found, knees, best, reference)


def is_peer(row: str) -> bool:
    """True for a peer's policy as its own router runs it."""
    return " " not in row and row not in OURS


def _start(before: dict[str, Any] | None, row: str) -> int:
    if before is None or row not in before["rows"]:
        return 0
    per_worker = before["rows"][row]["knee"]["mean"] / before["workers"]
    return math.floor(math.log(max(per_worker, 1e-3) / START[before["trace"]], STEP))


def _judged(
    cell: Cell,
    rows: list[str],
    found: dict[str, dict[int, list[Point]]],
    knees: dict[str, list[float]],
    best: str,
    reference: int,
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for row in rows:
        own: dict[str, Any] = {"knee": told(knees[row])}
        pairs = zip(knees[row], knees[best], strict=True)
        own["knee_ratio"] = told([ours / max(peer, 1e-9) for ours, peer in pairs])
        for name, rung in (("reference", reference), ("beyond", reference + BEYOND)):
            here, there = _by_seed(found[row][rung]), _by_seed(found[best][rung])
            own[name] = {
                "rate": rate_at(cell, rung),
                "goodput": told([p.attainment * p.rate for p in here]),
                "ratio": told(
                    [a.attainment / max(b.attainment, 1e-9) for a, b in zip(here, there, strict=True)]
                ),
                "long": mean(p.long for p in here),
                "ttft_p50": mean(p.ttft_p50 for p in here),
                "ttft_p99": mean(p.ttft_p99 for p in here),
                "tpot_p99": mean(p.tpot_p99 for p in here),
                "hit": mean(p.hit for p in here),
                "failed": sum(p.failed for p in here),
                "retractions": sum(p.retractions for p in here),
            }
        own["curve"] = [
            {"rate": rate_at(cell, rung), "goodput": told([p.attainment * p.rate for p in found[row][rung]])}
            for rung in sorted(found[row])
        ]
        out[row] = own
    slo = SLOS[cell.trace]
    return {
        "trace": cell.trace,
        "workers": cell.workers,
        "requests": cell.requests,
        "seeds": list(cell.seeds),
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "best_peer": best,
        "rows": out,
    }


def _by_seed(points: list[Point]) -> list[Point]:
    return sorted(points, key=lambda point: point.seed)


def plan(args: argparse.Namespace) -> list[Cell]:
    """What to run, small fleets first."""
    cells = []
    for workers, trace in itertools.product(args.workers, args.traces_named):
        count = REQUESTS[trace] * workers if workers <= LARGE else LARGE_REQUESTS[trace]
        seeds = tuple(range(1, 1 + (args.seeds if workers <= LARGE else min(args.seeds, 2))))
        cells.append(Cell(trace, workers, count // args.thin, seeds, args.traces, args.model))
    return cells


def rows_of(cell: Cell, args: argparse.Namespace, before: dict[str, Any] | None) -> list[str]:
    """Which rows a cell runs."""
    rows = [*SIMULATED_MAKERS, *VARIANTS]
    if args.rows:
        return [row for row in rows if row in args.rows.split(",")]
    if before is None:
        return rows
    if cell.workers <= LARGE:
        return [row for row in rows if row not in SMALL_ROWS]
    knees = {row: own["knee"]["mean"] for row, own in before["rows"].items() if is_peer(row)}
    best = sorted(knees, key=lambda row: -knees[row])[:3]
    return [row for row in rows if row in LARGE_ROWS or row in best]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", required=True, help="folder with the three trace files")
    parser.add_argument("--quick", action="store_true", help="4P4D only, half of the requests")
    parser.add_argument("--model", default=next(iter(PROFILES)), help="a published profile or a file")
    parser.add_argument("--workers", type=int, nargs="+", default=None, help="prefill = decode workers")
    parser.add_argument("--only", default="", help="traces with commas between: " + ",".join(SLOS))
    parser.add_argument("--rows", default="", help="rows with commas between; all by default")
    parser.add_argument("--seeds", type=int, default=0, help="default 3")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=35.0, help="begin no cell after so long")
    parser.add_argument("--out", default="", help="folder for policies.json and policies.png")
    args = parser.parse_args()
    args.workers = args.workers or ([4] if args.quick else [4, 8, 64])
    args.seeds = args.seeds or 3
    args.thin = 2 if args.quick else 1
    args.traces_named = [name for name in SLOS if not args.only or name in args.only.split(",")]
    return args


def main() -> None:
    args = parse()
    begun_s = time.monotonic()
    model = model_of(args.model)
    setup = describe_setup(
        model=model.name,
        source=model.source,
        fit_error=model.fit_error,
        target=TARGET,
        step=STEP,
        warm=WARM,
        cool=COOL,
    )
    print_setup(setup)
    done: list[dict[str, Any]] = []
    skipped: list[str] = []
    with ProcessPoolExecutor(args.processes) as pool:
        for cell in plan(args):
            if time.monotonic() - begun_s > args.minutes * 60:
                skipped.append(cell.label)
                continue
            smaller = [told for told in done if told["trace"] == cell.trace]
            before = smaller[-1] if smaller else None
            judged = run_cell(cell, rows_of(cell, args, before), pool, before)
            print_cell(cell.label, cell.requests, len(cell.seeds), judged)
            done.append(judged)
    if skipped:
        print(f"not run, out of time: {', '.join(skipped)}\n")
    result = {"bench": "policies", "setup": setup, "cells": done, "skipped": skipped}
    result["wall_s"] = round(time.monotonic() - begun_s, 1)
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "policies.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(done, folder / "policies.png")
    print_result(result)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
