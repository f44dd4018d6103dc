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

Output: set-up, a table for each scene and rate, one JSON object as the last line.

    python bench/reschedule.py --traces FOLDER [--only SCENE,…] [--thin N]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from heapq import heapify
from itertools import product
from math import ceil
from statistics import mean
from typing import Any

import msgspec
from common import describe_setup, print_result, print_setup
from features import LIMIT, LONG_LIMIT, Scene, cost_of, stretched
from policies import BEYOND, COOL, SLOS, TARGET, WARM, Cell, rate_at, workload
from policies_report import told

from pdserve.config.balancer import BalancerConfig
from pdserve.scheduling.policy import WorkerView, policy_of
from pdserve.scheduling.scheduler import NO_EXCLUDE
from pdserve.sim.decode_server import DecodeServer
from pdserve.sim.engine import SimRequest
from pdserve.sim.forecasts import make_lengths
from pdserve.sim.profiles import PROFILES
from pdserve.sim.report import percentile
from pdserve.sim.simulator import SimOptions, Simulation
from pdserve.workload import TracedRequest
from pdserve.workload.request import BLOCK_TOKENS

PERIOD_S, MOST, MOVES, QUEUE_S, LOOK_S, FACTOR, WORSE = 0.5, 4, 2, 1.0, 5.0, 2.0, 1.1
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


# -- the policy: pure ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A request on a decode worker, as the balancer sees it. ``left``: tokens expected to come;
    ``again``: tokens to compute for a move. ``is_silent``: retracted."""

    key: int
    worker: int
    kv: int
    left: float
    again: int
    is_silent: bool = False


def step_s(view: WorkerView, more: int = 0) -> float:
    """Seconds a token takes there with so many requests more."""
    return view.step_base_s + view.step_slope_s * max(1, view.num_reqs + more)


def lacks_kv(view: WorkerView) -> bool:
    """It has retracted requests, or its batch fills what is free within LOOK_S."""
    load = view.load
    if load is None or view.kv_capacity <= 0:
        return False
    growth = load.num_running_reqs * LOOK_S / step_s(view)
    return load.decode_retracted_queue_reqs > 0 or load.num_used_tokens + growth > view.kv_capacity


def plan(
    views: list[WorkerView], running: list[Running], rate: float, *, kv: bool, tpot: bool
) -> Iterator[tuple[Running, int]]:
    """Moves worth making, the best first: who, and to which worker."""
    rows = []
    lacking = [lacks_kv(view) for view in views]
    for each in running:
        source, gap_s = views[each.worker], each.again / rate
        for target, view in enumerate(views):
            if target == each.worker or lacking[target]:
                continue
            saved_s = each.left * (step_s(source) - step_s(view, 1))
            saved_s += each.left * (
                source.step_slope_s * (source.num_reqs - 1) - view.step_slope_s * view.num_reqs
            )
            if kv and lacking[each.worker]:
                rows.append((1 + each.is_silent, each.left / (each.again + 1), each, target))
            elif tpot and saved_s > FACTOR * gap_s and step_s(source) > WORSE * step_s(view, 1):
                rows.append((0, saved_s - FACTOR * gap_s, each, target))
    rows.sort(key=lambda row: row[:2], reverse=True)
    seen: set[int] = set()
    for _, _, each, target in rows:
        if each.key not in seen:
            seen.add(each.key)
            yield each, target


# -- the simulation with moves ------------------------------------------------------------------------


class MovingDecode(DecodeServer):
    """A decode worker from which requests may be taken at the end of a step."""

    doomed: dict[int, Any]

    def take_out(self, request: SimRequest, then: Any) -> None:
        """End it at the end of the running step; ``then(request)`` unless it is over by then."""
        self.doomed[request.index] = then
        if request in self._retracted:
            self._retracted.remove(request)
            self.doomed.pop(request.index)
            then(request)
            return
        steps = self._steps_by(self._clock.now_s, is_up=True)
        if self._running and steps < self._num_planned:
            self._schedule(steps)

    def _boundary(self, steps: int) -> None:
        super()._boundary(steps)
        if not self.doomed:
            return
        doomed, self.doomed = self.doomed, {}
        gone = [row for row in self._running if row[2].index in doomed]
        for row in gone:
            self._running.remove(row)
            request = row[2]
            request.num_generated = request.output_tokens - (row[0] - self._step)
            kept = request.prompt_tokens + request.num_generated - 1
            self._context -= kept
            self.used_tokens -= kept - request.decode_cached_tokens
        heapify(self._running)
        if gone and self._running:
            self._schedule(max(1, min(self._running[0][0] - self._step, self._free() // len(self._running))))
        elif gone:
            self._plan += 1
        for row in gone:
            doomed.pop(row[2].index)(row[2])
        if gone:
            self._give_pages()
        for then in doomed.values():
            then(None)

    def present(self) -> Iterator[tuple[SimRequest, int, bool]]:
        """Requests that run or were retracted, with the tokens that are out."""
        steps = self._steps_by(self._clock.now_s) if self._running else 0
        for finish, _, request in self._running:
            yield request, request.output_tokens - (finish - self._step) + steps, False
        for request in self._retracted:
            yield request, request.num_generated, True


class MovingSimulation(Simulation):
    """Requests that run are moved as ``row`` says."""

    def __init__(self, row: str, joins: bool, *args: Any) -> None:
        super().__init__(*args)
        self.row = row
        self.num_moves = self.under_way = 0
        self.gaps_s: list[float] = []
        self.whole: dict[int, tuple[int, int]] = {}
        self.counts: dict[int, int] = {}
        self.left_s: dict[int, float] = {}
        self.on: dict[int, SimRequest] = {}
        for server in self.decodes:
            server.__class__ = MovingDecode
            server.doomed = {}
        if joins:
            self._join_later()
        if row != "default":
            self.clock.at(self._trace[0].arrival_s + PERIOD_S, self._look, None)

    def _join_later(self) -> None:
        pairs = [(p.instance_id, d.instance_id) for p, d in self.scheduler.admission.placement.ready_pairs]
        last = self.workers[-1].instance_id
        self.scheduler.set_ready_pairs(pair for pair in pairs if pair[1] != last)
        middle_s = self._trace[len(self._trace) // 2].arrival_s
        self.clock.at(middle_s, lambda _: self.scheduler.set_ready_pairs(pairs), None)

    def _look(self, _: object) -> None:
        if self._num_open:
            self.clock.at(self.clock.now_s + PERIOD_S, self._look, None)
        slots = self.workers[len(self.prefills) :]
        prefills = [worker.view for worker in self.workers[: len(self.prefills)]]
        rate = mean(view.prefill_tokens_s for view in prefills)
        if min(view.queued_tokens for view in prefills) / rate > QUEUE_S:
            return
        views = [worker.view for worker in slots]
        steps = [step_s(view) for view in views]
        if not any(map(lacks_kv, views)) and max(steps) < WORSE * min(steps):
            return
        requests, running = {}, []
        for index, server in enumerate(self.decodes):
            for request, out, is_silent in server.present():
                if self.counts.get(request.index, 0) >= MOVES or request.index in server.doomed:
                    continue
                if request.reservation is None or request.reservation.is_prefilling:
                    continue
                requests[request.index] = request
                running.append(self._seen(request, index, out, is_silent))
        kv, tpot = self.row in ("kv", "both", "free"), self.row in ("tpot", "both", "free")
        for each, target in plan(views, running, rate, kv=kv, tpot=tpot):
            if self.under_way >= MOST:
                return
            self._move(requests[each.key], each, slots[target].instance_id)

    def _seen(self, request: SimRequest, index: int, out: int, is_silent: bool) -> Running:
        forecast = request.shape.forecast
        expected = forecast.mean if forecast is not None else float(request.shape.max_new_tokens)
        before = self.whole[request.index][0] if request.index in self.whole else request.prompt_tokens
        done = request.prompt_tokens + out - before
        left = expected - done if done < expected else float(done)  # outlived: half done, as kv_growth.py
        kv = request.prompt_tokens + out
        known = max(s.cache.match(request.block_ids)[1] for s in self.prefills) if request.block_ids else 0
        return Running(request.index, index, kv, max(1.0, left), max(1, kv - known), is_silent)

    def _move(self, request: SimRequest, each: Running, target: str) -> None:
        shape = msgspec.structs.replace(
            request.shape, prompt_tokens=each.kv, is_resumed=True,
            max_new_tokens=max(1, request.shape.max_new_tokens - (each.kv - request.prompt_tokens)),
            forecast=None if request.shape.forecast is None else msgspec.structs.replace(
                request.shape.forecast, mean=each.left, low=min(each.left, request.shape.forecast.low),
                high=max(each.left, request.shape.forecast.high)),
        )  # fmt: skip
        pairs = self.scheduler.admission.placement.ready_pairs
        others = frozenset((p.instance_id, d.instance_id) for p, d in pairs if d.instance_id != target)
        held = self.scheduler.try_now(shape, others or NO_EXCLUDE)
        if held is None:
            return
        self.under_way += 1

        def go_on(gone: SimRequest | None) -> None:
            self._go_on(request, gone, held)

        self.decodes[request.decode].take_out(request, go_on)

    def _go_on(self, request: SimRequest, gone: SimRequest | None, held: Any) -> None:
        if gone is None:  # it ended first
            self.under_way -= 1
            self.scheduler.end(held, prefill_ok=None, decode_ok=None)
            self.scheduler.serve()
            return
        self.decodes[request.decode].cache.unpin(request.pins[1])
        old, request.reservation = request.reservation, None
        self.scheduler.end(old, prefill_ok=None, decode_ok=None)
        self.whole.setdefault(request.index, (request.prompt_tokens, request.output_tokens))
        made = request.num_generated
        request.prompt_tokens += made - 1
        request.output_tokens -= made - 1
        request.num_generated = 1
        request.pins = [(), ()]
        request.cached_tokens = request.decode_cached_tokens = 0
        request.done_tokens = request.sent_tokens = request.waiting_tokens = 0
        self.num_moves += 1
        self.counts[request.index] = self.counts.get(request.index, 0) + 1
        self.left_s[request.index] = self.clock.now_s
        if self.row == "free":
            request.reservation, request.decode = held, int(held.pair.decode.instance_id[1:])
            request.prefill = int(held.pair.prefill.instance_id[1:])
            server = self.decodes[request.decode]
            server._take(request.prompt_tokens)
            server._num_travelling += 1
            server._travelling_tokens += request.prompt_tokens
            self.clock.at(self.clock.now_s, self._kv_arrived, request)
        else:
            self._start(request, held)
        self.scheduler.serve()

    def _kv_arrived(self, request: SimRequest) -> None:
        if (since_s := self.left_s.pop(request.index, None)) is not None:
            self.under_way -= 1
            self.gaps_s.append(self.clock.now_s - since_s)
        super()._kv_arrived(request)

    def _end(self, request: SimRequest) -> None:
        if (whole := self.whole.pop(request.index, None)) is not None:
            request.prompt_tokens, request.output_tokens = whole
        super()._end(request)


# -- the bench ----------------------------------------------------------------------------------------


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
