"""Commands for whoever uses or runs a service that is up: load it, and later look at it. Options included.

cli/app.py has the commands that start something. As there, what a command needs is imported when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from pdserve.cli import settings as command_line
from pdserve.cli.options import KEYS, RUN, option
from pdserve.config.worker_env import keys_from_environment

LOAD, OUTPUT = "Load", "Output"

BenchUrl = Annotated[
    str,
    typer.Argument(
        help="The service, any OpenAI or SGLang URL. (URL; default http://127.0.0.1:30000)",
        show_default=False,
    ),
]
Vs = Annotated[
    str,
    option("--vs", panel=LOAD, metavar="URL", text="A second service, asked in turn. (URL; default none)"),
]
Route = Annotated[
    str,
    option(
        "--route",
        panel=LOAD,
        metavar="generate|completions|chat",
        text="What is asked. (name; default generate)",
    ),
]
ModelName = Annotated[
    str,
    option("--model", panel=LOAD, text="Name for the OpenAI routes. (name; default: the service's first)"),
]
Requests = Annotated[int, option("--requests", "-n", panel=LOAD, text="Requests. (count; default 100)")]
Rate = Annotated[
    float,
    option("--rate", panel=LOAD, text="Arrivals. (requests/s; default 0: as --concurrency allows)"),
]
Concurrency = Annotated[
    int, option("--concurrency", "-c", panel=LOAD, text="At once at most; 0: no bound. (count; default 16)")
]
Cv = Annotated[
    float, option("--cv", panel=LOAD, text="Spread of the gaps between arrivals. (1 is Poisson; default 1)")
]
Input = Annotated[
    str,
    option("--input", panel=LOAD, text="Prompt: 256, 128-512 or 256~0.5 (lognormal). (tokens; default 256)"),
]
Output = Annotated[str, option("--output", panel=LOAD, text="Answer, likewise. (tokens; default 64)")]
Prefixes = Annotated[
    int, option("--prefixes", panel=LOAD, text="Prompts begin with one of so many. (count; default 0)")
]
PrefixTokens = Annotated[
    int, option("--prefix-tokens", panel=LOAD, text="Length of those prefixes. (tokens; default 0)")
]
Trace = Annotated[
    str,
    option("--trace", panel=LOAD, text="Replay a Mooncake .jsonl or Azure .csv trace. (path; default none)"),
]
Speed = Annotated[float, option("--speed", panel=LOAD, text="Pace of the trace. (factor; default 1)")]
Warmup = Annotated[
    int, option("--warmup", panel=LOAD, text="First requests, not counted. (count; default 4)")
]
Rounds = Annotated[
    int, option("--rounds", panel=LOAD, text="With --vs: parts sent in turn. (count; default 3)")
]
Seed = Annotated[
    int, option("--seed", panel=LOAD, text="Of prompts, lengths and arrivals. (number; default 0)")
]
Vocabulary = Annotated[
    int, option("--vocabulary", panel=LOAD, text="Token ids are drawn from 10 to this. (count; default 1000)")
]
Stream = Annotated[
    bool, option("--stream/--no-stream", panel=LOAD, text="Stream answers. (flag; default on)")
]
Flush = Annotated[
    bool, option("--flush", panel=LOAD, text="POST /flush_cache before each part. (flag; default off)")
]
Slo = Annotated[
    str | None,
    option(
        "--slo", panel=OUTPUT, metavar="ttft=S,tpot=S", text="What goodput asks for. (seconds; default none)"
    ),
]
Timeout = Annotated[
    float, option("--timeout", panel=RUN, text="Longest silence of the service. (seconds; default 600)")
]
JsonPath = Annotated[
    str, option("--json", panel=OUTPUT, metavar="FILE", text="Figures. (path; default none)")
]
PlotPath = Annotated[str, option("--plot", panel=OUTPUT, metavar="FILE", text="PNG. (path; default none)")]
Key = Annotated[
    str,
    option(
        "--api-key",
        panel=KEYS,
        metavar="KEY",
        text="The service's key; or PDSERVE_API_KEY. (text; default none)",
    ),
]
DEFAULT_URL = "http://127.0.0.1:30000"


def bench(
    url: BenchUrl = DEFAULT_URL,
    vs: Vs = "",
    route: Route = "generate",
    model: ModelName = "",
    requests: Requests = 100,
    rate: Rate = 0.0,
    concurrency: Concurrency = 16,
    cv: Cv = 1.0,
    input: Input = "256",
    output: Output = "64",
    prefixes: Prefixes = 0,
    prefix_tokens: PrefixTokens = 0,
    trace: Trace = "",
    speed: Speed = 1.0,
    slo: Slo = None,
    warmup: Warmup = 4,
    rounds: Rounds = 3,
    seed: Seed = 0,
    vocabulary: Vocabulary = 1000,
    stream: Stream = True,
    flush: Flush = False,
    timeout: Timeout = 600.0,
    json: JsonPath = "",
    plot: PlotPath = "",
    api_key: Key = "",
) -> None:
    """Put load on a service and report its latencies, throughput and goodput."""
    from pdserve.loadgen.command import run_bench
    from pdserve.loadgen.options import BenchOptions

    key = api_key or keys_from_environment().get("api_key", "")
    options = BenchOptions(
        url, vs, route, model, requests, rate, concurrency, cv, input, output, prefixes, prefix_tokens,
        trace, speed, **command_line.slo_settings(slo), warmup=warmup, rounds=rounds, seed=seed,
        vocabulary=vocabulary, stream=stream, flush=flush, timeout_s=timeout, api_key=key, json_path=json,
        plot_path=plot,
    )  # fmt: skip
    raise typer.Exit(run_bench(options, typer.echo))


MonitorUrl = Annotated[
    str,
    typer.Argument(help="The balancer. (URL; default http://127.0.0.1:30000)", show_default=False),
]
Once = Annotated[
    bool, option("--once/--live", panel=OUTPUT, text="Print one frame and leave. (flag; default live)")
]
AsJson = Annotated[
    bool, option("--json/--frames", panel=OUTPUT, text="Print the state document. (flag; default frames)")
]
Interval = Annotated[
    float, option("--interval", panel=OUTPUT, text="Between two looks, 0.1 to 60. (seconds; default 0.5)")
]
AdminKey = Annotated[
    str,
    option(
        "--api-key",
        panel=KEYS,
        metavar="KEY",
        text="Admin key of the service; or PDSERVE_ADMIN_API_KEY, PDSERVE_API_KEY. (text; default none)",
    ),
]


def monitor(
    url: MonitorUrl = DEFAULT_URL,
    once: Once = False,
    json: AsJson = False,
    interval: Interval = 0.5,
    api_key: AdminKey = "",
) -> None:
    """Watch the fleet live: workers, pairs, latencies, queue, events, requests; `?` lists the keys."""
    from pdserve.monitor.command import run_monitor

    key = command_line.admin_key(api_key)
    raise typer.Exit(run_monitor(url, once=once, as_json=json, interval_s=interval, api_key=key))


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of ``pdserve``."""
    app.command(rich_help_panel="Use")(monitor)
    app.command(rich_help_panel="Use")(bench)
