"""What it is worth to move running requests between decode workers: for room in KV, for time per token.

Why: Llumnix (OSDI'24) and STAR move requests that run from a decode worker that lacks KV or is slow to one
that is not. A move here is a resume (docs/resume.md): prefill computes prompt and emitted tokens again, but
for what its prefix cache holds, and the KV travels. Rows, equal but for this:

    default   pair_cost, nobody is moved
    kv        a worker that has retracted a request, or will run out of KV within LOOK_S, gives one away
    tpot      a request moves where its remaining tokens, and the others', come so much sooner that this is
              worth FACTOR times the gap, and a step there takes WORSE times as long
    both      either
    free      as both, but that moved KV is computed in no time: the bound of any faster way

Policy, pure, every PERIOD_S, at most MOST moves under way, none to a worker without room by the scheduler's
own admission, none of a request that has moved MOVES times, none while prefill's queues are longer than
QUEUE_S. A move goes to the pair that the policy of the row chooses among those of the target.

"random": pairs are drawn and nothing is forecast: the control, which shows what this bench would see.
"one joins": the fourth decode worker takes requests from the middle of the trace on; before that the others
had them all, which is where a move should be worth most.

Set-up: bench/features.py's scenes, ladder and seeds (`pdserve.sim`, pair_cost). Prompts without block ids get
ids of their own, so that prefill's cache may still have the prompt of a moved request. "kv", "retr." per 1000
requests. TPOT includes the gaps of moves and the waits of retracted requests. Ratios are to the default row
at the same seed and rate; intervals: Student's t over the seeds, 95 %.

Output: set-up, a table for each scene and rate, one JSON object as the last line. Moves: bench/moves.py.

    python bench/reschedule.py --traces FOLDER [--only SCENE,…] [--thin N]
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from statistics import mean
from typing import Any

from common import describe_setup, print_result, print_setup
from features import LIMIT, LONG_LIMIT, Scene, cost_of, stretched
from moves import FACTOR, LOOK_S, MOST, MOVES, PERIOD_S, QUEUE_S, WORSE, MovingSimulation
from policies import BEYOND, COOL, SLOS, TARGET, WARM, Cell, rate_at, workload
from policies_report import told

from pdserve.config.balancer import BalancerConfig
from pdserve.scheduling.policy import policy_of
from pdserve.sim.forecasts import make_lengths
from pdserve.sim.profiles import PROFILES
from pdserve.sim.report import percentile
from pdserve.sim.simulator import SimOptions
from pdserve.workload import TracedRequest
from pdserve.workload.request import BLOCK_TOKENS

ROWS = ("default", "kv", "tpot", "both", "free")
SCENES = (
    Scene("mooncake 4P4D", "mooncake", 1000, start=8),
    Scene("azure_conv 4P4D", "azure_conv", 2000, start=5),
    Scene("long 4P4D", "azure_conv", 2000, stretch=8, start=-21),
    Scene("mooncake 6P2D KV/4", "mooncake", 1000, (6, 2), decode_pool=1 / 4, start=4),
    Scene("azure_conv 6P2D KV/8", "azure_conv", 2000, (6, 2), decode_pool=1 / 8, start=-8),
    Scene("long 6P2D KV/8", "azure_conv", 1500, (6, 2), decode_pool=1 / 8, start=-41, stretch=8),
    Scene("long 4P4D KV/16", "azure_conv", 1500, (4, 4), decode_pool=1 / 16, start=-41, stretch=8),
    Scene("long 4P4D one joins", "azure_conv", 2000, stretch=8, start=-21),
    Scene("long 4P4D KV/16 random", "azure_conv", 1500, (4, 4), decode_pool=1 / 16, start=-41, stretch=8),
)


@dataclass(frozen=True)
class Point:
    """One run."""

    rate: float
    attainment: float
    tpot_p99: float
    tpot_p50: float
    ttft_p99: float
    retractions: float
    moves: float
    gap_p99: float

    @property
    def goodput(self) -> float:
        """Requests per second in SLO."""
        return self.attainment * self.rate


def with_blocks(trace: list[TracedRequest]) -> list[TracedRequest]:
    """Prompts without block ids get some that nobody shares."""
    out, at = [], 1 << 40
    for each in trace:
        if not each.block_ids:
            num = ceil(each.input_tokens / BLOCK_TOKENS)
            each, at = (
                replace(each, block_ids=tuple(range(at, at + num)), block_tokens=BLOCK_TOKENS),
                at + num,
            )
        out.append(each)
    return out


def run(scene: Scene, row: str, rung: int, seed: int, args: argparse.Namespace) -> Point:
    """One simulation."""
    cell = Cell(scene.trace, 4, scene.requests // args.thin, (seed,), args.traces, args.model)
    rate = rate_at(cell, rung)
    trace = with_blocks(stretched(workload(cell, rate, seed), scene.stretch))
    is_random = scene.name.endswith("random")
    config = BalancerConfig(policy="random", predict_lengths=False) if is_random else BalancerConfig()
    options = SimOptions(max_new_tokens=LONG_LIMIT if scene.stretch > 1 else LIMIT)
    cost, policy = cost_of(scene, args.model), policy_of(config, seed)
    simulation = MovingSimulation(
        row,
        scene.name.endswith("joins"),
        trace,
        cost.check(),
        policy,
        scene.size,
        config,
        make_lengths("none" if is_random else "learned"),
        options,
    )
    report = simulation.run()
    total, slo = len(report.records), SLOS[scene.trace]
    counted = report.records[int(total * WARM) : int(total * (1 - COOL))]
    served = [record for record in counted if not record.error]
    tpot = [record.tpot_s for record in served]
    return Point(
        rate,
        sum(record.meets(slo) for record in counted) / len(counted),
        percentile(tpot, 0.99),
        percentile(tpot, 0.5),
        percentile([record.ttft_s for record in served], 0.99),
        1000 * report.use.retractions / total,
        1000 * simulation.num_moves / total,
        percentile(simulation.gaps_s, 0.99) if simulation.gaps_s else 0.0,
    )


def reference(scene: Scene, seed: int, args: argparse.Namespace) -> int:
    """The highest rung near the scene's start at which the default row meets the target."""

    def is_met(rung: int) -> bool:
        return run(scene, "default", rung, seed, args).attainment >= TARGET

    rung, stride = scene.start, 4
    direction = 1 if is_met(rung) else -1
    while abs(rung - scene.start) < 40 and is_met(rung + direction * stride) == (direction > 0):
        rung += direction * stride
    low = rung if direction > 0 else rung - stride
    while stride > 1:
        stride //= 2
        low += stride * is_met(low + stride)
    return low


def _reference(task: tuple[Any, ...]) -> int:
    return reference(*task)


def _run(task: tuple[Any, ...]) -> Point:
    return run(*task)


def run_scene(scene: Scene, args: argparse.Namespace, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """All rows at the reference and beyond it."""
    seeds = range(1, 1 + args.seeds)
    rungs = list(pool.map(_reference, [(scene, seed, args) for seed in seeds]))
    out: dict[str, Any] = {"scene": scene.name, "requests": scene.requests // args.thin, "rungs": rungs}
    for name, more in (("reference", 0), ("beyond", BEYOND)):
        tasks = [
            (scene, row, rung + more, seed, args)
            for row, (rung, seed) in product(ROWS, zip(rungs, seeds, strict=True))
        ]
        points = list(pool.map(_run, tasks))
        by_row = {row: points[i * len(rungs) : (i + 1) * len(rungs)] for i, row in enumerate(ROWS)}
        plain = by_row["default"]
        out[name] = {row: judged(own, plain) for row, own in by_row.items()}
        print_table(scene, name, out[name])
    return out


def judged(own: list[Point], plain: list[Point]) -> dict[str, Any]:
    """A row's figures and its ratios to the default's."""
    pairs = list(zip(own, plain, strict=True))
    return {
        "goodput": told([point.goodput for point in own]),
        "ratio": told([a.attainment / max(b.attainment, 1e-9) for a, b in pairs]),
        "tpot_p99": mean(point.tpot_p99 for point in own),
        "tpot_p99_ratio": told([a.tpot_p99 / b.tpot_p99 for a, b in pairs]),
        "tpot_p50_ratio": told([a.tpot_p50 / b.tpot_p50 for a, b in pairs]),
        "ttft_p99": mean(point.ttft_p99 for point in own),
        "retractions": mean(point.retractions for point in own),
        "moves": mean(point.moves for point in own),
        "gap_p99": mean(point.gap_p99 for point in own),
    }


def print_table(scene: Scene, where: str, rows: dict[str, Any]) -> None:
    """One rate of a scene."""
    print(f"{scene.name}, {where}: {rows['default']['goodput']['mean']:.2f}/s in SLO by default")
    print(
        f"{'':>9}{'goodput x':>14}{'p99 TPOT ms':>13}{'x':>13}{'p50 TPOT x':>14}{'p99 TTFT':>10}{'retr.':>8}"
        f"{'moves':>8}{'p99 gap s':>11}"
    )
    for row, own in rows.items():
        ratio, tail, middle = own["ratio"], own["tpot_p99_ratio"], own["tpot_p50_ratio"]
        print(
            f"{row:>9}{ratio['mean']:>8.3f} ±{ratio['half']:.2f}{1e3 * own['tpot_p99']:>12.1f}"
            f"{tail['mean']:>8.2f} ±{tail['half']:.2f}{middle['mean']:>9.3f} ±{middle['half']:.2f}"
            f"{own['ttft_p99']:>10.2f}{own['retractions']:>8.1f}{own['moves']:>8.1f}{own['gap_p99']:>11.2f}",
            flush=True,
        )
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", required=True, help="folder with the three trace files")
    parser.add_argument("--model", default=next(iter(PROFILES)), help="a published profile or a file")
    parser.add_argument("--only", default="", help="scenes with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--thin", type=int, default=1, help="so many times fewer requests")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    names = {name for name in args.only.split(",") if name}
    setup = describe_setup(
        model=args.model, seeds=args.seeds, period_s=PERIOD_S, most=MOST, moves=MOVES, queue_s=QUEUE_S,
        look_s=LOOK_S, factor=FACTOR, worse=WORSE,
    )  # fmt: skip
    print_setup(setup)
    with ProcessPoolExecutor(args.processes) as pool:
        scenes = [run_scene(scene, args, pool) for scene in SCENES if not names or scene.name in names]
    print_result({"bench": "reschedule", "setup": setup, "scenes": scenes})


if __name__ == "__main__":
    main()
