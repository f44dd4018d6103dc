"""Commands for whoever plans or checks a service: simulate it, measure it, find what is wrong.

As in cli/app.py, what a command needs is imported when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from pdserve.cli import settings as command_line
from pdserve.cli.options import FLEET, ROUTING, RUN, option
from pdserve.cli.use import AdminKey

LOAD, OUTPUT, MODEL = "Load", "Output", "Model"

Trace = Annotated[
    str,
    option("--trace", panel=LOAD, metavar="FILE", text="Mooncake .jsonl or Azure .csv. (path; no default)"),
]
Rate = Annotated[float, option("--rate", panel=LOAD, text="Arrivals. (requests/s; default 0: as traced)")]
Requests = Annotated[int, option("--requests", "-n", panel=LOAD, text="At most. (count; default 0: all)")]
Policies = Annotated[
    str,
    option(
        "--policy",
        panel=ROUTING,
        metavar="NAME,NAME",
        text="Policies to compare. (names; default least_load)",
    ),
]
Aware = Annotated[
    bool,
    option(
        "--slo-aware/--no-slo-aware",
        panel=ROUTING,
        text="The balancer knows the SLO, too: early refusal, order of the queue. (flag; default off)",
    ),
]
Lengths = Annotated[
    str,
    option(
        "--lengths",
        panel=ROUTING,
        metavar="learned|oracle|useless|none",
        text="Who forecasts answers' lengths. (name; default learned)",
    ),
]
Prefill = Annotated[int, option("--prefill", "-p", panel=FLEET, text="Prefill workers. (count; default 1)")]
Decode = Annotated[int, option("--decode", "-d", panel=FLEET, text="Decode workers. (count; default 1)")]
ModelName = Annotated[
    str,
    option(
        "--model",
        panel=MODEL,
        metavar="NAME|FILE",
        text="Cost model: a published one or what `pdserve calibrate` wrote. "
        "(name or path; default llama-70b-8xh100)",
    ),
]
SimSlo = Annotated[
    str,
    option(
        "--slo",
        panel=OUTPUT,
        metavar="ttft=S,tpot=S",
        text="What goodput asks for. (seconds; default ttft=2,tpot=0.05)",
    ),
]
Seed = Annotated[int, option("--seed", panel=RUN, text="Of whatever is random. (number; default 0)")]
JsonPath = Annotated[
    str, option("--json", panel=OUTPUT, metavar="FILE", text="Figures. (path; default none)")
]
PlotPath = Annotated[str, option("--plot", panel=OUTPUT, metavar="FILE", text="PNG. (path; default none)")]


def simulate(
    trace: Trace,
    policy: Policies = "least_load",
    prefill: Prefill = 1,
    decode: Decode = 1,
    model: ModelName = "llama-70b-8xh100",
    slo: SimSlo = "ttft=2,tpot=0.05",
    slo_aware: Aware = False,
    rate: Rate = 0.0,
    requests: Requests = 0,
    lengths: Lengths = "learned",
    seed: Seed = 0,
    json: JsonPath = "",
    plot: PlotPath = "",
) -> None:
    """Run the balancer's own policies over modelled servers, in virtual time."""
    from pdserve.config.balancer import BalancerConfig
    from pdserve.config.file import merge
    from pdserve.sim.command import SimulateOptions, run_simulation

    options = SimulateOptions(
        trace, policy, prefill, decode, slo, model, rate, requests, lengths, seed, json, plot
    )
    config = merge(BalancerConfig(), {}, command_line.slo_settings(slo) if slo_aware else {})
    typer.echo(run_simulation(options, config), nl=False)


MeasuredUrl = Annotated[
    str,
    typer.Argument(help="The service to measure. (URL; default http://127.0.0.1:30000)", show_default=False),
]
Out = Annotated[str, option("--out", panel=OUTPUT, metavar="FILE", text="Cost model. (path; default none)")]
PrefillUrls = Annotated[
    list[str] | None,
    option(
        "--prefill",
        panel=FLEET,
        metavar="URL,PORT",
        text="A prefill server and its bootstrap port, of a service without state document; repeatable. "
        "(URL; default none)",
    ),
]
DecodeUrls = Annotated[
    list[str] | None,
    option("--decode", panel=FLEET, metavar="URL", text="A decode server; repeatable. (URL; default none)"),
]
Name = Annotated[
    str, option("--name", panel=MODEL, text="Name of the model. (text; default: the served one)")
]
Budget = Annotated[float, option("--budget-s", panel=RUN, text="Time to measure. (seconds; default 60)")]
MaxTokens = Annotated[
    int, option("--max-tokens", panel=RUN, text="Longest prompt tried. (tokens; default 4096)")
]
MaxBatch = Annotated[int, option("--max-batch", panel=RUN, text="Largest batch tried. (count; default 16)")]


def calibrate(
    url: MeasuredUrl = "http://127.0.0.1:30000",
    out: Out = "",
    prefill: PrefillUrls = None,
    decode: DecodeUrls = None,
    name: Name = "",
    budget_s: Budget = 60.0,
    max_tokens: MaxTokens = 4096,
    max_batch: MaxBatch = 16,
    api_key: AdminKey = "",
) -> None:
    """Measure a live, idle service and write the cost model that `pdserve simulate` takes."""
    from pdserve.sim.calibrate import CalibrationOptions, run_calibration

    pairs = tuple(command_line.prefill_pair(text) for text in prefill or ())
    options = CalibrationOptions(
        url,
        out,
        pairs,
        tuple(decode or ()),
        name,
        budget_s,
        max_tokens,
        max_batch,
        command_line.admin_key(api_key),
    )
    typer.echo(run_calibration(options), nl=False)


FleetUrl = Annotated[
    str,
    typer.Argument(
        help="Balancer of a running fleet to check as well. (URL; default none)", show_default=False
    ),
]
PlannedModel = Annotated[
    str, option("--model", panel=MODEL, text="As MODEL of pdserve launch. (name or path; default embedded)")
]
Device = Annotated[
    str,
    option(
        "--device", panel=FLEET, metavar="auto|cpu|cuda", text="Where servers will run. (name; default auto)"
    ),
]
Port = Annotated[int, option("--port", panel=FLEET, text="Port of the service. (port; default 30000)")]
AsJson = Annotated[bool, option("--json/--text", panel=OUTPUT, text="Findings as JSON. (flag; default text)")]
Deep = Annotated[
    bool,
    option(
        "--deep/--no-deep", panel=RUN, text="Import SGLang and apply our hooks, 30 s. (flag; default off)"
    ),
]


def doctor(
    url: FleetUrl = "",
    model: PlannedModel = "",
    device: Device = "auto",
    prefill: Prefill = 1,
    decode: Decode = 1,
    port: Port = 30000,
    json: AsJson = False,
    deep: Deep = False,
    api_key: AdminKey = "",
) -> None:
    """Check this machine and, given a URL, a running fleet: what is wrong, why it matters, what to do."""
    from pdserve.doctor.command import run_doctor

    raise typer.Exit(
        run_doctor(
            url,
            model=model,
            device=device,
            prefill=prefill,
            decode=decode,
            port=port,
            as_json=json,
            deep=deep,
            api_key=api_key,
        )
    )


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of ``pdserve``."""
    panel = "Plan and check"
    app.command(rich_help_panel=panel)(doctor)
    app.command(rich_help_panel=panel)(simulate)
    app.command(rich_help_panel=panel)(calibrate)
