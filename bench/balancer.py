"""How fast pdserve's balancer is against the gateways, in one invocation on pinned cores.

The balancers stand in front of the same mock workers, which answer at once, so
that what is measured is the balancer alone. Each balancer has one core, whoever's
turn it is; load, workers and this script have another, whose use is printed:
a reader sees who was the bottleneck. Rounds interleave the balancers; figures are
medians. What a request costs in CPU comes from /proc, over the balancer's processes.

    python bench/balancer.py [--quick] [--parts throughput,latency,streaming,paced,memory,streams]
                             [--against pdserve,sglang-router,smg,mini_lb,smg:default,floor] [--env DIR]

sglang-router and smg are installed into an environment of their own at first use;
``floor`` is the least that any balancer has to do on this machine (proxy/floor.cpp).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import describe_setup, print_result, print_setup
from proxy.contenders import PACKAGES, Contender, Programs, Started, Unavailable, prepare_environment, running
from proxy.cores import Cores, ProcessTimes
from proxy.mock_fleet import MockFleet
from proxy.parts import Plan, compare, hold_memory, hold_streams
from proxy.processes import raise_open_files
from proxy.rounds import Bench, RoundFailed, Row
from proxy.tables import LEGEND, format_memory, format_rows, format_streams
from proxy.targets import Verdict, health, judge_memory, judge_streams
from proxy.tools import Tools, prepare_tools

from pdserve.config.worker_env import cache_dir

COMPARED = ("throughput", "latency", "streaming", "paced")
ALONE = ("memory", "streams")
AGAINST = "pdserve,sglang-router,smg,mini_lb,sglang-router:default,smg:default,floor"
IDLE_S = 2.0


def main() -> None:
    """Print the tables and the result line."""
    options = _parse()
    plan = _plan(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every child is ended on the way out
    cores, num_cores = Cores.choose(), len(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores.load})
    os.nice(options.nice)  # children inherit it
    raise_open_files()
    cache = cache_dir() / "bench"
    tools = prepare_tools(cache, use_python=options.python_tools)
    with ExitStack() as stack:
        _take_turn(stack, cache)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdserve-bench-")))
        fleet = MockFleet.start(
            tools.mock, options.prefills, options.decodes, cores.load, folder / "mock.log"
        )
        stack.enter_context(fleet.child)
        bench = Bench(cores, tools.load, fleet, folder)
        contenders = [Contender.parse(name) for name in options.against.split(",")]
        programs = _programs(contenders, Path(options.env or cache / "env"), tools, options.before)
        started, missing = _start(stack, contenders, programs, fleet, bench)
        setup = {**_setup(plan, tools, fleet, cores, started, missing), "cores": num_cores}
        print_setup(setup)
        result = _measure(options.parts.split(","), plan, bench, started, fleet)
    print_result({"bench": "balancer", "setup": setup, "missing": missing, **result})


def _take_turn(stack: ExitStack, cache: Path) -> None:
    """Two runs at once would measure each other."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((cache / "lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another run is going on: waiting for its end", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--parts", default=",".join((*COMPARED, *ALONE)), help="comma-separated (default: all)"
    )
    parser.add_argument(
        "--against", default=AGAINST, help=f"NAME[:POLICY], comma-separated (default {AGAINST})"
    )
    parser.add_argument("--before", default="", help="checkout that the balancer named before runs from")
    parser.add_argument(
        "--env", default="", help="environment of the gateways (default: in pdserve's cache folder)"
    )
    parser.add_argument("--connections", default="1,16,64,256", help="comma-separated (count)")
    parser.add_argument("--routes", default="generate,chat", help="comma-separated: generate, chat")
    parser.add_argument("--rounds", type=int, default=3, help="times each figure is measured (count)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a round (s)")
    parser.add_argument("--memory", type=int, default=1_000_000, help="requests of the memory part (count)")
    parser.add_argument(
        "--streams", type=int, default=2000, help="streams at once of the streams part (count)"
    )
    parser.add_argument("--prefills", type=int, default=2, help="mock prefill workers (count)")
    parser.add_argument("--decodes", type=int, default=2, help="mock decode workers (count)")
    parser.add_argument("--nice", type=int, default=0, help="priority of all processes; negative: needs root")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of a minute or two: figures are rough"
    )
    parser.add_argument(
        "--python-tools", action="store_true", help="Python load and workers even with a compiler"
    )
    options = parser.parse_args()
    unknown = set(options.parts.split(",")) - {*COMPARED, *ALONE}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    plan = Plan(
        connections=tuple(int(text) for text in options.connections.split(",")),
        rounds=options.rounds,
        seconds=options.seconds,
        routes=tuple(options.routes.split(",")),
        memory_requests=options.memory,
        num_streams=options.streams,
    )
    if not options.quick:
        return plan
    return replace(
        plan, connections=(1, 64), rounds=1, seconds=1.0, routes=("generate",),
        memory_requests=min(plan.memory_requests, 20_000),
    )  # fmt: skip


def _programs(contenders: list[Contender], env: Path, tools: Tools, before: str) -> Programs:
    if all(one.name in ("pdserve", "before", "floor") for one in contenders):
        return Programs(env, "not asked for", tools.floor, before)
    try:
        return Programs(prepare_environment(env), "", tools.floor, before)
    except Unavailable as exc:
        return Programs(env, str(exc), tools.floor, before)


def _start(
    stack: ExitStack, contenders: list[Contender], programs: Programs, fleet: MockFleet, bench: Bench
) -> tuple[list[Started], dict[str, str]]:
    """Those that serve, and why the others do not."""
    started: list[Started] = []
    missing: dict[str, str] = {}
    for one in contenders:
        try:
            started.append(
                stack.enter_context(running(one, programs, fleet, bench.cores.balancer, bench.folder))
            )
        except Unavailable as exc:
            missing[one.label] = str(exc)
    return started, missing


def _setup(
    plan: Plan, tools: Tools, fleet: MockFleet, cores: Cores, started: list[Started], missing: dict[str, str]
) -> dict[str, object]:
    before = [ProcessTimes.now(one.child.pids) for one in started]
    time.sleep(IDLE_S)
    idle = [
        f"{one.contender.label} {then.cpu_s_until(ProcessTimes.now(one.child.pids)) / IDLE_S:.2%}"
        for one, then in zip(started, before, strict=True)
    ]
    return describe_setup(
        pinned=cores.description,
        tools=tools.description,
        workers=f"{len(fleet.prefill)} prefill, {len(fleet.decode)} decode, answering at once",
        plan=f"{plan.rounds} rounds of {plan.seconds:g} s",
        others=" ".join(PACKAGES[:2]),
        idle_cpu=", ".join(idle),
        not_measured="; ".join(f"{label}: {why}" for label, why in missing.items()) or "none",
    )


def _alone(
    part: str, plan: Plan, bench: Bench, pdserve: Started, fleet: MockFleet
) -> tuple[Verdict, dict[str, Any]]:
    if part == "memory":
        memory = hold_memory(bench, pdserve, plan.memory_requests)
        print(format_memory(memory) + "\n", flush=True)
        return judge_memory(memory), asdict(memory)
    streams = hold_streams(bench, pdserve, fleet, plan)
    print(format_streams(streams) + "\n", flush=True)
    return judge_streams(streams), asdict(streams)


def _measure(
    parts: list[str], plan: Plan, bench: Bench, started: list[Started], fleet: MockFleet
) -> dict[str, Any]:
    tables: dict[str, list[Row]] = {}
    verdicts: list[Verdict] = []
    result: dict[str, Any] = {}
    print(LEGEND + "\n", flush=True)
    for part in (part for part in COMPARED if part in parts):
        for title, offers in plan.offers(part).items():
            tables[title] = compare(bench, started, fleet, offers, plan.rounds)
            print(format_rows(title, tables[title]) + "\n", flush=True)
    verdicts += health(tables)
    pdserve = next((one for one in started if one.contender.name == "pdserve"), None)
    for part in (part for part in ALONE if part in parts):
        if pdserve is None:
            break
        try:
            verdict, result[part] = _alone(part, plan, bench, pdserve, fleet)
        except RoundFailed as exc:
            verdict = Verdict(part, str(exc), False)
        verdicts.append(verdict)
    print("== targets\n" + "\n".join(verdict.format() for verdict in verdicts) + "\n", flush=True)
    result["rows"] = {title: [row.as_dict() for row in rows] for title, rows in tables.items()}
    result["checks"] = [asdict(verdict) for verdict in verdicts]
    return result


if __name__ == "__main__":
    main()
