"""``pdserve simulate``: options in, a table out; writes JSON and a PNG where asked."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import msgspec

from pdserve.config.balancer import BalancerConfig
from pdserve.config.setting import FLEET, LOAD, MODEL, OUTPUT, ROUTING, RUN, setting
from pdserve.errors import ConfigError
from pdserve.sim.baselines import SIMULATED_MAKERS
from pdserve.sim.cost import CostModel
from pdserve.sim.forecasts import LENGTHS
from pdserve.sim.plot import draw, run_panels
from pdserve.sim.profiles import PROFILES, model_of
from pdserve.sim.report import SimReport, Slo, parse_slo
from pdserve.sim.simulator import SimOptions, simulate
from pdserve.sim.tables import render_table, summary
from pdserve.workload import TracedRequest, cut, rate_of, read_trace, scaled, spread


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What ``pdserve simulate`` was asked, as text and numbers from the command line."""

    trace: str = setting(MISSING, "Mooncake .jsonl or Azure .csv.", "path", "--trace FILE", panel=LOAD)
    policy: str = setting("least_load", "Policies to compare.", "names", "--policy NAME,NAME", panel=ROUTING)
    prefill: int = setting(1, "Prefill workers.", "count", "-p --prefill", panel=FLEET)
    decode: int = setting(1, "Decode workers.", "count", "-d --decode")
    slo: str = setting(
        "ttft=2,tpot=0.05", "What goodput asks for.", "seconds", "--slo ttft=S,tpot=S", panel=OUTPUT
    )
    model: str = setting(
        next(iter(PROFILES)),
        "Cost model: a published one or what `pdserve calibrate` wrote.",
        "name or path",
        "--model NAME|FILE",
        panel=MODEL,
    )
    rate: float = setting(0.0, "Arrivals.", "requests/s", "--rate", panel=LOAD, empty="as traced")
    requests: int = setting(0, "At most.", "count", "-n --requests", empty="all")
    lengths: str = setting(
        "learned", "Who forecasts answers' lengths.", "name", "--lengths", panel=ROUTING, choices=LENGTHS
    )
    seed: int = setting(0, "Of whatever is random.", "number", "--seed", panel=RUN)
    json: str = setting("", "Write the figures as JSON.", "path", "--json FILE", panel=OUTPUT)
    plot: str = setting("", "Draw a PNG.", "path", "--plot FILE")


def run_simulation(options: SimulateOptions, config: BalancerConfig | None = None) -> str:
    """Simulate each policy on the trace; returns the set-up and the table as text.

    Args:
        config: the balancer's settings; its policy is replaced and its SLO limits are kept as they are.

    Raises:
        ConfigError: naming the first option that makes no sense, before anything runs.
    """
    policies = _check(options)
    slo, model = parse_slo(options.slo), model_of(options.model)
    trace = _workload(options)
    config = config or BalancerConfig()
    reports: dict[str, SimReport] = {}
    for name in policies:
        reports[name] = simulate(
            trace,
            model,
            name,
            options.prefill,
            options.decode,
            replace(config, policy=name),
            SimOptions(lengths=options.lengths, seed=options.seed),
        )
    summaries = [summary(report, slo) for report in reports.values()]
    if options.json:
        document = {"options": msgspec.to_builtins(options), "runs": summaries}
        Path(options.json).write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    if options.plot:
        title = f"{Path(options.trace).name}, {options.prefill}P{options.decode}D, {model.name}"
        draw(run_panels(reports, slo), options.plot, title=title)
    return f"{_set_up(options, trace, model, slo)}\n\n{render_table(summaries)}\n"


def _check(options: SimulateOptions) -> list[str]:
    policies = [name.strip() for name in options.policy.split(",") if name.strip()]
    for name in policies:
        if name not in SIMULATED_MAKERS:
            raise ConfigError(f"--policy: unknown policy {name!r}; known: {', '.join(SIMULATED_MAKERS)}")
    if not policies or len(set(policies)) != len(policies):
        raise ConfigError(f"--policy: expected names with commas between, each once, got {options.policy!r}")
    if not options.trace:
        raise ConfigError("--trace: expected a Mooncake .jsonl or an Azure .csv file")
    for flag, value in (("--prefill", options.prefill), ("--decode", options.decode)):
        if value < 1:
            raise ConfigError(f"{flag}: expected at least one worker, got {value}")
    for flag, number in (("--rate", options.rate), ("--requests", options.requests)):
        if not 0 <= number < float("inf"):
            raise ConfigError(f"{flag}: expected a number of at least 0, got {number}")
    if options.lengths not in LENGTHS:
        raise ConfigError(f"--lengths: expected one of {', '.join(LENGTHS)}, got {options.lengths!r}")
    for flag, name in (("--json", options.json), ("--plot", options.plot)):
        folder = Path(name).parent
        if name and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ConfigError(f"{flag} {name}: the folder {folder} is not there or not writable")
    return policies


def _workload(options: SimulateOptions) -> list[TracedRequest]:
    trace = cut(read_trace(options.trace), requests=options.requests or None)
    trace = spread(trace, options.seed)
    return scaled(trace, options.rate) if options.rate else trace


def _set_up(options: SimulateOptions, trace: list[TracedRequest], model: CostModel, slo: Slo) -> str:
    lines = {
        "trace": Path(options.trace).name,
        "requests": f"{len(trace)} at {rate_of(trace):.2f} per second, seed {options.seed}; "
        "arrivals of one time stamp spread over the step",
        "workers": f"{options.prefill}P{options.decode}D of {model.name} ({model.source})",
        "slo": f"TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s; answers' lengths: {options.lengths}",
    }
    return "\n".join(f"{key:>9}: {value}" for key, value in lines.items())
