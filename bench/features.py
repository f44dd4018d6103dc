"""What two features are worth: forecasts of answers' lengths, and loads sampled often.

Why: a feature that is on by default must add to the requests per second that are answered in time in some
set-up where it could. All rows of a scene see the same requests and seeds and differ from the first one,
"default", in one thing:

    ewma       one moving mean and deviation for each (limit, size of the prompt) in place of lengths.py
    oracle     each answer's true length: the bound
    useless    the same forecast for all
    off        ``predict_lengths = false``
    seldom     loads polled each 2 s instead of each 0.25 s

KV events and the load channel were measured so at commit 70a667f, found to add nothing, and removed;
bench/results/features.txt has their rows too.

Set-up: `pdserve.sim` (bench/policies.py says what it models, and whence rates, requests and SLOs come),
pair_cost. Scenes: 4P4D as in bench/policies.py; 6P2D with decode's KV pools cut, where room on decode is
what lacks. "long" is azure_conv with answers eight times as long (1700 tokens on average) and a limit of
16 384: reasoning, of which there is no trace.

Per seed the reference is the highest rung of bench/policies.py's ladder at which the default row has 90 % in
SLO; "beyond" is three rungs (26 %) more. Ratios and points are to the default row at the same seed and rate;
intervals: Student's t over the seeds, 95 %.

Output: set-up, a table for each scene and rate, one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec
from common import describe_setup, print_result, print_setup
from policies import BEYOND, COOL, SLOS, STEP, TARGET, WARM, Cell, rate_at, workload
from policies_report import told

from pdserve.config.balancer import BalancerConfig
from pdserve.scheduling.lengths import MIN_LEARNED, Lengths, unlearned
from pdserve.scheduling.policy import policy_of
from pdserve.sim.cost import CostModel
from pdserve.sim.forecasts import make_lengths
from pdserve.sim.profiles import PROFILES, model_of
from pdserve.sim.report import percentile
from pdserve.sim.simulator import SimOptions, Simulation
from pdserve.types import Forecast, RequestShape
from pdserve.workload import TracedRequest

LONG, LONG_LIMIT, LIMIT = 8, 16_384, 2048
FARTHEST = 40
"""Rungs from the first one within which the reference is looked for."""
SHORT = (6, 2)
ROWS = ("default", "ewma", "oracle", "useless", "off", "seldom")
SPREAD = 2.563
"""Standard deviations between the tenth and the ninetieth percentile of a normal distribution."""


@dataclass(frozen=True)
class Scene:
    """A trace on a fleet. ``decode_pool``: part of the profile's KV pool that decode workers have;
    ``stretch``: what answers are multiplied by; ``start``: the rung where the search begins."""

    name: str
    trace: str
    requests: int
    size: tuple[int, int] = (4, 4)
    decode_pool: float = 1.0
    stretch: int = 1
    start: int = 0


SCENES = (
    Scene("mooncake", "mooncake", 1000, start=8),
    Scene("mooncake decode KV/4", "mooncake", 1000, SHORT, decode_pool=1 / 4, start=4),
    Scene("azure_code", "azure_code", 1200),
    Scene("azure_code decode KV/64", "azure_code", 1200, SHORT, decode_pool=1 / 64, start=-16),
    Scene("azure_conv", "azure_conv", 2000, start=5),
    Scene("azure_conv decode KV/8", "azure_conv", 2000, SHORT, decode_pool=1 / 8, start=-8),
    Scene("long", "azure_conv", 4000, stretch=LONG, start=-21),
    Scene("long decode KV/8", "azure_conv", 1500, SHORT, decode_pool=1 / 8, start=-41, stretch=LONG),
)


class Ewma:
    """A moving mean and variance for each kind of request, by its limit and its prompt's half octave."""

    SLOWEST = 64

    def __init__(self) -> None:
        self._kinds: dict[Hashable, tuple[int, float, float]] = {}

    def forecast(self, shape: RequestShape) -> Forecast:
        """The rarest kind that has MIN_LEARNED answers; else the limit."""
        limit = float(shape.max_new_tokens)
        for key in self._keys(shape):
            num, middle, variance = self._kinds.get(key, (0, 0.0, 0.0))
            if num >= MIN_LEARNED:
                half = sqrt(variance) * SPREAD / 2
                middle = min(limit, max(0.5, middle))
                low, high = max(0.5, middle - half), min(limit, middle + half)
                return Forecast(middle, min(low, middle), max(high, middle), True)
        return unlearned(shape.max_new_tokens)

    def learn(self, shape: RequestShape, output_tokens: int, is_cut: bool) -> None:
        """An answer is over."""
        for key in self._keys(shape):
            num, middle, variance = self._kinds.get(key, (0, 0.0, 0.0))
            weight, off = 1 / min(num + 1, self.SLOWEST), output_tokens - middle
            middle += weight * off
            self._kinds[key] = num + 1, middle, (1 - weight) * (variance + weight * off * off)

    def snapshot(self) -> dict[str, object]:
        return {}

    def _keys(self, shape: RequestShape) -> tuple[Hashable, ...]:
        limit, octave = shape.max_new_tokens.bit_length(), shape.prompt_tokens.bit_length()
        return (limit, octave, shape.prompt_tokens >> max(0, octave - 2)), ()


def lengths_of(row: str) -> Lengths:
    """Who forecasts answers in that row."""
    if row == "ewma":
        return Ewma()
    return make_lengths({"oracle": "oracle", "useless": "useless", "off": "none"}.get(row, "learned"))


@dataclass(frozen=True)
class Point:
    """One run."""

    rate: float
    attainment: float
    ttft_p99: float
    retractions: int
    hit: float

    @property
    def goodput(self) -> float:
        """Requests per second in SLO."""
        return self.attainment * self.rate


class Bench:
    """Runs scenes; remembers the default row's runs."""

    def __init__(self, folder: str, model: str, seeds: int, thin: int) -> None:
        self.seeds = range(1, 1 + seeds)
        self._folder = folder
        self._model = model
        self._thin = thin
        self._known: dict[tuple[Scene, str, int, int], Point] = {}
        self.num_runs = 0

    def point(self, scene: Scene, row: str, rung: int, seed: int) -> Point:
        """One run, or what came of it before."""
        key = scene, row, rung, seed
        if key not in self._known:
            self.num_runs += 1
            self._known[key] = self._run(*key)
        return self._known[key]

    def reference(self, scene: Scene, seed: int, start: int, stride: int) -> int:
        """The highest rung near ``start`` at which the default row meets the target."""

        def is_met(rung: int) -> bool:
            return self.point(scene, "default", rung, seed).attainment >= TARGET

        rung = start
        direction = 1 if is_met(rung) else -1
        while abs(rung - start) < FARTHEST and is_met(rung + direction * stride) == (direction > 0):
            rung += direction * stride
        low = rung if direction > 0 else rung - stride
        while stride > 1:
            stride //= 2
            low += stride * is_met(low + stride)
        return low

    def _run(self, scene: Scene, row: str, rung: int, seed: int) -> Point:
        cell = Cell(scene.trace, 4, scene.requests // self._thin, (seed,), self._folder, self._model)
        rate = rate_at(cell, rung)
        trace = stretched(workload(cell, rate, seed), scene.stretch)
        poll_s = 2.0 if row == "seldom" else BalancerConfig().load_poll_s
        config = BalancerConfig(policy="pair_cost", predict_lengths=row != "off", load_poll_s=poll_s)
        options = SimOptions(max_new_tokens=LONG_LIMIT if scene.stretch > 1 else LIMIT)
        cost, policy = cost_of(scene, self._model), policy_of(config, seed)
        report = Simulation(trace, cost.check(), policy, scene.size, config, lengths_of(row), options).run()
        total, slo = len(report.records), SLOS[scene.trace]
        counted = report.records[int(total * WARM) : int(total * (1 - COOL))]
        served = [record for record in counted if not record.error]
        return Point(
            rate,
            sum(record.meets(slo) for record in counted) / len(counted),
            percentile([record.ttft_s for record in served], 0.99),
            report.use.retractions,
            report.cache_hit_rate(),
        )


def cost_of(scene: Scene, model: str) -> CostModel:
    """The profile with the scene's pools."""
    cost = model_of(model)
    return msgspec.structs.replace(
        cost,
        decode_pool_tokens=int(cost.decode_pool_tokens * scene.decode_pool),
    )


def stretched(trace: list[TracedRequest], factor: int) -> list[TracedRequest]:
    """With answers so many times as long."""
    if factor == 1:
        return trace
    return [replace(each, output_tokens=each.output_tokens * factor) for each in trace]


def run_scene(bench: Bench, scene: Scene, names: set[str]) -> dict[str, Any]:
    """All rows at both rates."""
    rungs, start = [], scene.start
    for seed in bench.seeds:
        start = bench.reference(scene, seed, start, 2 if rungs else 4)
        rungs.append(start)
    out: dict[str, Any] = {"scene": scene.name, "requests": scene.requests, "rungs": rungs}
    for name, more in (("reference", 0), ("beyond", BEYOND)):
        places = [(rung + more, seed) for rung, seed in zip(rungs, bench.seeds, strict=True)]
        plain = [bench.point(scene, "default", *place) for place in places]
        out[name] = {}
        for row in ROWS:
            if row in names or row == "default":
                own = [bench.point(scene, row, *place) for place in places]
                out[name][row] = judged(own, plain)
        print_table(scene, name, out[name])
    return out


def judged(own: list[Point], plain: list[Point]) -> dict[str, Any]:
    """Means over the seeds; ratios seed by seed."""
    pairs = list(zip(own, plain, strict=True))
    means = {name: round(mean(getattr(p, name) for p in own), 4) for name in asdict(own[0])}
    return {
        **means,
        "retractions": sum(point.retractions for point in own),
        "goodput": told([point.goodput for point in own]),
        "ratio": told([point.goodput / max(other.goodput, 1e-9) for point, other in pairs]),
        "gain": told([100 * (point.attainment - other.attainment) for point, other in pairs]),
    }


def print_table(scene: Scene, name: str, rows: dict[str, Any]) -> None:
    """One scene at one rate."""
    slo, rate = SLOS[scene.trace], rows["default"]["rate"]
    size = f"{scene.size[0]}P{scene.size[1]}D"
    print(f"{scene.name} ({size}), {name}, {rate:.2f}/s, TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s")
    heads = {"p99 TTFT": 10, "retr.": 7, "hit": 7}
    print(f"{'':<11}{'goodput':>15}{'in SLO':>8}{'x default':>16}{'points gained':>16}", end="")
    print("".join(f"{head:>{width}}" for head, width in heads.items()))
    for row, own in rows.items():
        goodput, ratio, gain = _pm(own["goodput"], 2), _pm(own["ratio"], 3), _pm(own["gain"], 1)
        print(
            f"{row:<11}{goodput:>15}{own['attainment']:>8.1%}{ratio:>16}{gain:>16}{own['ttft_p99']:>10.2f}"
            f"{own['retractions']:>7}{own['hit']:>7.1%}"
        )
    print(flush=True)


def _pm(value: dict[str, Any], digits: int) -> str:
    half = "" if value["half"] is None else f" ±{value['half']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", required=True, help="folder with the three trace files")
    parser.add_argument("--model", default=next(iter(PROFILES)), help="a published profile or a file")
    parser.add_argument("--only", default="", help="scenes whose names begin so, with semicolons between")
    parser.add_argument("--rows", default="", help="rows with commas between; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--thin", type=int, default=1, help="divide the numbers of requests by this")
    parser.add_argument("--minutes", type=float, default=25.0, help="begin no scene after so long")
    return parser.parse_args()


def main() -> None:
    args = parse()
    begun_s = time.monotonic()
    model = model_of(args.model)
    setup = describe_setup(
        model=model.name, source=model.source, seeds=args.seeds, thin=args.thin, target=TARGET, step=STEP
    )
    print_setup(setup)
    bench = Bench(args.traces, args.model, args.seeds, args.thin)
    names = set(args.rows.split(",")) if args.rows else set(ROWS)
    done, skipped = [], []
    for scene in SCENES:
        if args.only and not any(scene.name.startswith(name) for name in args.only.split(";")):
            continue
        if time.monotonic() - begun_s > args.minutes * 60:
            skipped.append(scene.name)
            continue
        done.append(run_scene(bench, scene, names))
    wall_s = round(time.monotonic() - begun_s, 1)
    print_result(
        {
            "bench": "features", "setup": setup, "scenes": done, "skipped": skipped, "runs": bench.num_runs,
            "wall_s": wall_s,
        }
    )  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
