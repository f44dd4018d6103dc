"""Does the simulator answer to reality? The same trace on real servers and on the model calibrated from them.

A cluster of real SGLang servers on this CPU, a balancer with one policy at a
time before it, caches flushed between runs, policies interleaved in rounds. Before
each round ``pdserve calibrate`` measures the servers anew, for a shared machine's
speed changes; the simulator then runs the same requests at the same times under
the same policies. Two set-ups:

    cores   servers compute on the cores they share: contention is part of the machine
    sleep   every pass sleeps as well (SGLang's /slow_down), as a server waits for its GPU;
            a server then takes hardly anything from the others
    affinity  the same with two prefill servers and small chunks: what policies make of prefixes

    conv    the first Azure conversation requests, lengths divided by --shrink, own prompts
    shared  few long shared prefixes with short own ends
    turns   many prefixes, each used three times and never again
    alternate  short prompts in bursts, every second answer long: what taking turns is worst at

    out     real and simulated medians of TTFT and TPOT, their ratio, and whether the
            policies' order is the same where reality tells them apart; ``step``: decode
            steps' time in the run over the model's for the same steps, so how much of
            the error is the machine's speed and not the simulator; one JSON line

    python bench/simulator.py [--setup cores,sleep] [--rounds 2] [--requests 120]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from common import describe_setup, print_result, print_setup
from replay import Replay, Servers, balancer, replay, servers, sleep_in_forwards

from pdserve.model.tiny import TinyShape, write_tiny_model
from pdserve.sim.calibrate import CalibrationOptions, calibrate, format_calibration
from pdserve.sim.cost import CostModel
from pdserve.sim.report import SimReport
from pdserve.sim.simulator import SimOptions, simulate
from pdserve.workload import TracedRequest, cut, read_trace, rearrived, scaled

BLOCK_TOKENS = 16
"""SGLang's page on CPU: what a prefix cache can share."""
SLEEP_S = 0.05
"""Of every pass. Long against what a pass computes (5 to 10 ms), so that the cores are half idle."""
TARGET = 0.2
"""How far a simulated median may be off."""
APART = 0.05
"""Real medians closer than this, or than two rounds of one policy are, are a tie."""
SEEDS = 5
"""Simulated runs per policy; policies that draw differ between them."""
METRICS = ("ttft_s", "tpot_s", "e2e_s")


@dataclass(frozen=True)
class Setup:
    """Servers, their model, what a pass costs besides computing, and the load on them."""

    size: tuple[int, int]
    shape: dict[str, int]
    sleep_s: float
    chunk_tokens: int
    policies: tuple[str, ...]
    rate: dict[str, float]
    """Requests per second of each workload."""


TINY = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2}
LARGER = {"layers": 8, "hidden": 256, "heads": 8, "kv_heads": 4}
DECODE_POLICIES = ("round_robin", "random", "least_load", "pair_cost")
PREFILL_POLICIES = ("round_robin", "cache_aware", "least_load", "pair_cost")
SETUPS = {
    "cores": Setup((1, 2), LARGER, 0.0, 2048, DECODE_POLICIES, {"conv": 4.0, "alternate": 5.0}),
    "sleep": Setup((1, 2), TINY, SLEEP_S, 2048, DECODE_POLICIES, {"conv": 3.0, "shared": 3.0}),
    "affinity": Setup((2, 2), TINY, SLEEP_S, 128, PREFILL_POLICIES, {"turns": 3.2}),
}


@dataclass(frozen=True)
class Outcome:
    """Medians of one run, and what its servers counted. Seconds."""

    ttft_s: float
    tpot_s: float
    e2e_s: float
    cached: float
    prefill_busy_s: float
    step_s: float
    batch: float
    speed: float = 1.0
    """Time of this run's decode steps over what the calibrated model gives to these very steps."""
    failed: int = 0


def main() -> None:
    """Print tables for every set-up and the result line."""
    options = _options()
    setup = describe_setup(
        setups=options.setup, requests=options.requests, rounds=options.rounds, load=options.load,
        shrink=options.shrink, sleep_s=SLEEP_S,
    )  # fmt: skip
    print_setup(setup)
    results = {}
    for name in options.setup.split(","):
        with tempfile.TemporaryDirectory(prefix="pdserve-sim-") as folder:
            print(f"== {name} ==", flush=True)
            results[name] = _run_setup(SETUPS[name], options, Path(folder))
    print_result({"bench": "simulator", "setup": setup, "results": results})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setup", default="cores,sleep,affinity")
    parser.add_argument("--trace", default="../shared/traces/AzureLLMInferenceTrace_conv.csv")
    parser.add_argument("--requests", type=int, default=120, help="of each run (count)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=8, help="what the trace's lengths are divided by")
    parser.add_argument("--load", type=float, default=1.0, help="factor on every set-up's rates")
    parser.add_argument("--budget", type=float, default=40.0, help="of each calibration (seconds)")
    return parser.parse_args()


def _run_setup(setup: Setup, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = write_tiny_model(folder / "model", TinyShape(max_position=32768, **setup.shape))
    flags = ["--dtype", "float32", "--chunked-prefill-size", str(setup.chunk_tokens)]
    real: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    simulated: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    models: list[CostModel] = []
    with servers(str(model), *setup.size, folder, flags) as fleet:
        sleep_in_forwards(fleet, setup.sleep_s)
        for turn in range(options.rounds):
            models.append(_calibrate(fleet, options, turn))
            for workload in setup.rate:
                trace = _workload(workload, setup, options, turn)
                for policy in setup.policies if turn % 2 == 0 else setup.policies[::-1]:
                    with balancer(fleet, policy, folder) as (url, _):
                        run = replay(fleet, url, trace)
                    real[workload, policy].append(_observed(run, trace, len(fleet.prefill), models[-1]))
                    _print_run(workload, policy, run, real[workload, policy][-1])
                    simulated[workload, policy].append(_simulated(trace, models[-1], policy, setup.size))
    return _report(real, simulated, models)


def _calibrate(fleet: Servers, options: argparse.Namespace, turn: int) -> CostModel:
    calibration = asyncio.run(
        calibrate(
            CalibrationOptions(
                url=fleet.url, budget_s=options.budget, max_tokens=1024, max_batch=16, name=f"round-{turn}"
            )
        )
    )
    print(format_calibration(calibration), flush=True)
    return calibration.model


def _workload(name: str, setup: Setup, options: argparse.Namespace, turn: int) -> list[TracedRequest]:
    rate = setup.rate[name] * options.load
    if name == "conv":
        rows = cut(read_trace(options.trace)[turn * options.requests :], requests=options.requests)
        rows = [_shrunk(row, rows[0].arrival_s, options.shrink) for row in rows]
        return scaled(rows, rate)
    count = options.requests
    if name == "alternate":
        rows = [
            TracedRequest(float(i), 64, (64, 4)[i % 2], None, max_new_tokens=64, serial=i)
            for i in range(count)
        ]
        return rearrived(rows, rate, seed=turn, cv=2.0)
    return rearrived(_shared(count, turn) if name == "shared" else _turns(count, turn), rate, seed=turn)


def _shrunk(row: TracedRequest, start_s: float, factor: int) -> TracedRequest:
    out = min(128, max(2, row.output_tokens // factor))
    tokens = max(8, row.input_tokens // factor)
    return replace(
        row, arrival_s=row.arrival_s - start_s, input_tokens=tokens, output_tokens=out, max_new_tokens=out
    )


def _shared(count: int, turn: int) -> list[TracedRequest]:
    """Six prefixes of 512 tokens."""
    draw = random.Random(turn)
    return [_with_prefix(draw, turn, index, draw.randrange(6), 512) for index in range(count)]


def _turns(count: int, turn: int) -> list[TracedRequest]:
    """Prefixes of 768 tokens, eight in use at a time, each three times."""
    draw, rows, visits = random.Random(turn), [], [[prefix, 3] for prefix in range(8)]
    for index in range(count):
        chosen = draw.choice(visits)
        rows.append(_with_prefix(draw, turn, index, chosen[0], 768))
        chosen[1] -= 1
        if not chosen[1]:
            chosen[:] = [max(prefix for prefix, _ in visits) + 1, 3]
    return rows


def _with_prefix(draw: random.Random, turn: int, index: int, prefix: int, size: int) -> TracedRequest:
    """A prefix and an own end of 16 to 64 tokens; every fourth answer is long."""
    own, base = 16 * draw.randint(1, 4), (turn + 1) * 1_000_000
    blocks = [base + prefix * 1000 + block for block in range(size // BLOCK_TOKENS)]
    blocks += [base * 1000 + index * 100 + block for block in range(own // BLOCK_TOKENS)]
    out = draw.randint(40, 80) if index % 4 == 0 else draw.randint(4, 12)
    return TracedRequest(float(index), size + own, out, tuple(blocks), BLOCK_TOKENS, out, serial=index)


def _observed(run: Replay, trace: list[TracedRequest], prefill: int, model: CostModel) -> Outcome:
    answers = [answer for answer in run.answers if answer is not None]
    growth = list(zip(run.before, run.after, strict=True))
    prefills, decodes = growth[:prefill], growth[prefill:]
    busy_us = sum(new.total_prefill_busy_us - old.total_prefill_busy_us for old, new in prefills)
    steps, batches, time_us = (
        sum((new.decode_moments or [0] * 3)[i] - (old.decode_moments or [0] * 3)[i] for old, new in decodes)
        for i in range(3)
    )
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    computed = sum(
        new.total_prefill_uncached_tokens - old.total_prefill_uncached_tokens for old, new in prefills
    )
    generated = sum(row.output_tokens for row in trace)
    context = sum(row.output_tokens * (row.input_tokens + row.output_tokens / 2) for row in trace) / generated
    modelled_s = (
        model.decode_base_s * steps + (model.decode_request_s + model.decode_token_s * context) * batches
    )
    return Outcome(
        ttft_s=median(answer.ttft_s for answer in answers),
        tpot_s=median(answer.tpot_s for answer in answers if answer.output_tokens > 1),
        e2e_s=sum(answer.last_s - answer.sent_s for answer in answers) / len(answers),
        cached=1 - computed / prompt_tokens,
        prefill_busy_s=busy_us / 1e6,
        step_s=time_us / 1e6 / max(1.0, steps),
        batch=batches / max(1.0, steps),
        speed=time_us / 1e6 / modelled_s,
        failed=len(run.answers) - len(answers),
    )  # fmt: skip


def _simulated(trace: list[TracedRequest], model: CostModel, policy: str, size: tuple[int, int]) -> Outcome:
    runs = [
        _of_report(simulate(trace, model, policy, *size, options=SimOptions(seed=seed)))
        for seed in range(SEEDS)
    ]
    return Outcome(**{name: median(getattr(run, name) for run in runs) for name in asdict(runs[0])})


def _of_report(report: SimReport) -> Outcome:
    served = report.served
    return Outcome(
        ttft_s=median(record.ttft_s for record in served),
        tpot_s=median(record.tpot_s for record in served if record.output_tokens > 1),
        e2e_s=sum(record.e2e_s for record in served) / len(served),
        cached=report.cache_hit_rate(),
        prefill_busy_s=sum(use.busy for use in report.use.prefills) * report.span_s,
        step_s=0.0,
        batch=0.0,
        failed=len(report.records) - len(served),
    )


def _print_run(workload: str, policy: str, run: Replay, seen: Outcome) -> None:
    print(
        f"{workload:>8} {policy:<12} {run.span_s:5.1f} s  our cores {run.busy_cores:.2f}, others' "
        f"{run.foreign_cores:.2f}; sent at most {run.late_s * 1e3:.0f} ms late; {seen.failed} failed; "
        f"batch {seen.batch:.1f}, step {seen.step_s * 1e3:.1f} ms, {seen.speed:.2f} of the model's",
        flush=True,
    )


# -- comparison ------------------------------------------------------------------------------------


def _report(
    real: dict[tuple[str, str], list[Outcome]],
    simulated: dict[tuple[str, str], list[Outcome]],
    models: list[CostModel],
) -> dict[str, Any]:
    print("\nmedians over rounds; real -> simulated (ratio)")
    heads = (("TTFT ms", 26), ("TPOT ms", 24), ("mean E2E ms", 28), ("cached %", 16), ("P busy s", 16))
    print(" " * 21 + "".join(f"{head:>{width}}" for head, width in heads) + f"{'step':>7}")
    rows = []
    for key in real:
        workload, policy = key
        row: dict[str, Any] = {"workload": workload, "policy": policy}
        text = f"{workload:>8} {policy:<12}"
        for metric, width in (("ttft_s", 26), ("tpot_s", 24), ("e2e_s", 28)):
            seen = median(getattr(run, metric) for run in real[key])
            told = median(getattr(run, metric) for run in simulated[key])
            row[metric] = {"real": seen, "simulated": told, "ratio": round(told / seen, 3)}
            text += f"{f'{seen * 1e3:.1f} -> {told * 1e3:.1f} ({told / seen:.2f})':>{width}}"
        for metric, scale, width in (("cached", 100, 16), ("prefill_busy_s", 1, 16)):
            seen = median(getattr(run, metric) for run in real[key])
            told = median(getattr(run, metric) for run in simulated[key])
            row[metric] = {"real": seen, "simulated": told}
            text += f"{f'{seen * scale:.1f} -> {told * scale:.1f}':>{width}}"
        row["speed"] = round(median(run.speed for run in real[key]), 3)
        text += f"{row['speed']:>7.2f}"
        row["failed"] = sum(run.failed for run in real[key])
        rows.append(row)
        print(text)
    met = [row[m]["ratio"] for row in rows for m in ("ttft_s", "tpot_s")]
    within = sum(abs(ratio - 1) <= TARGET for ratio in met)
    print(f"{within} of {len(met)} medians within {TARGET:.0%}")
    order = _order(real, simulated)
    print(
        f"order of policies: {order['decided']} comparisons that reality decides, {order['agree']} the same "
        f"in the simulator; {order['ties']} ties\n"
    )
    for line in order["wrong"]:
        print(f"  other way round: {line}")
    return {
        "rows": rows, "within": within, "of": len(met), "order": order,
        "rounds": {f"{w}/{p}": [asdict(run) for run in runs] for (w, p), runs in real.items()},
        "models": [_plain(model) for model in models],
    }  # fmt: skip


def _plain(model: CostModel) -> dict[str, Any]:
    return {field: getattr(model, field) for field in model.__struct_fields__}


def _order(
    real: dict[tuple[str, str], list[Outcome]], simulated: dict[tuple[str, str], list[Outcome]]
) -> dict[str, Any]:
    """Pairs of policies on one workload, by each metric. Decided: every real round has them in one order, by
    more than APART."""
    decided = agree = ties = 0
    wrong: list[str] = []
    for (workload, first), (other, second) in itertools.combinations(real, 2):
        if workload != other:
            continue
        for metric in METRICS:
            ratios = [
                getattr(a, metric) / getattr(b, metric)
                for a, b in zip(real[workload, first], real[workload, second], strict=True)
            ]
            if not (min(ratios) > 1 + APART or max(ratios) < 1 - APART):
                ties += 1
                continue
            decided += 1
            told = [median(getattr(run, metric) for run in simulated[workload, p]) for p in (first, second)]
            if (told[0] > told[1]) == (ratios[0] > 1):
                agree += 1
            else:
                wrong.append(
                    f"{workload} {metric}: {first} over {second} is {median(ratios):.2f} in reality, "
                    f"{told[0] / told[1]:.2f} simulated"
                )
    return {"decided": decided, "agree": agree, "ties": ties, "wrong": wrong}


if __name__ == "__main__":
    main()
