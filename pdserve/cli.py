"""The ``pdserve`` command: reads options, merges them with a file, hands over to the rest of pdserve.

SGLang's own flags follow a ``--``. Commands import what they need when they
run, so ``--help`` is quick and the balancer's process stays free of engines.
An option that is not given is ``None`` here; its default lives in config.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pdserve import __version__, command_line
from pdserve.errors import ConfigError, PdserveError, StartupError
from pdserve.types import Role

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

FLEET, LISTEN, ENGINE, RUN, ROUTING = "Fleet", "Addresses", "SGLang", "Running", "Routing"
TRANSFER = "KV transfer"

app = typer.Typer(
    name="pdserve",
    help="Serve a model with SGLang, prefill and decode on separate servers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _option(*names: str, panel: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


Model = Annotated[
    str | None,
    typer.Argument(
        help="Folder or hub id; default: the embedded SmolLM2-135M-Instruct; `tiny`: a toy for tests.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None, _option("--config", panel=RUN, text="TOML file; options win over it. (path; default none)")
]
Device = Annotated[
    str | None,
    _option(
        "--device", panel=ENGINE, metavar="auto|cpu|cuda", text="Where workers run. (name; default auto)"
    ),
]
TensorParallel = Annotated[
    int | None, _option("--tp", panel=ENGINE, text="Tensor parallel size of each server. (GPUs; default 1)")
]
PolicyName = Annotated[
    str | None,
    _option(
        "--policy",
        panel=ROUTING,
        text="least_load, round_robin, random or power_of_two. (name; default least_load)",
    ),
]
LogLevel = Annotated[
    str | None, _option("--log-level", panel=RUN, text="debug, info, warning or error. (name; default info)")
]
Join = Annotated[
    str, _option("--join", panel=FLEET, metavar="HOST:PORT", text="Bootstrap service to join. (address)")
]
WorkerHost = Annotated[
    str, _option("--host", panel=LISTEN, text="Address to listen on. (address; default 127.0.0.1)")
]
WorkerPort = Annotated[
    int, _option("--port", panel=LISTEN, text="Port to listen on. (port; default 0: first free from 31000)")
]
WorkerName = Annotated[
    str, _option("--name", panel=FLEET, text="Name in the fleet. (name; default role-hostname-port)")
]
AdvertiseHost = Annotated[
    str,
    _option(
        "--advertise-host",
        panel=LISTEN,
        text="Host by which others reach this server. (address; default: the one it listens on)",
    ),
]


@app.command(rich_help_panel="Serve", epilog="SGLang's own flags follow a `--`.")
def launch(
    ctx: typer.Context,
    model: Model = None,
    prefill: Annotated[
        int | None, _option("-p", "--prefill", panel=FLEET, text="Prefill servers. (count; default 1)")
    ] = None,
    decode: Annotated[
        int | None, _option("-d", "--decode", panel=FLEET, text="Decode servers. (count; default 1)")
    ] = None,
    host: Annotated[
        str | None,
        _option("--host", panel=LISTEN, text="Address of the service. (address; default 127.0.0.1)"),
    ] = None,
    port: Annotated[
        int | None, _option("--port", panel=LISTEN, text="Port of the service. (port; default 30000)")
    ] = None,
    bootstrap_port: Annotated[
        int | None,
        _option("--bootstrap-port", panel=LISTEN, text="Bootstrap service. (port; default 0: any free one)"),
    ] = None,
    config: ConfigFile = None,
    dry_run: Annotated[
        bool, _option("--dry-run", panel=RUN, text="Print the commands, start nothing. (flag; default off)")
    ] = False,
    device: Device = None,
    tp: TensorParallel = None,
    policy: PolicyName = None,
    log_dir: Annotated[
        str | None,
        _option("--log-dir", panel=RUN, text="One log per process. (folder; default: new one in the cache)"),
    ] = None,
    start_method: Annotated[
        str | None,
        _option(
            "--start-method",
            panel=RUN,
            metavar="auto|fork|spawn",
            text="How workers start; fork is quicker, CPU only. (name; default auto)",
        ),
    ] = None,
    prefill_args: Annotated[
        str | None,
        _option(
            "--prefill-args", panel=ENGINE, text="SGLang flags of prefill only. (one string; default none)"
        ),
    ] = None,
    decode_args: Annotated[
        str | None,
        _option(
            "--decode-args", panel=ENGINE, text="SGLang flags of decode only. (one string; default none)"
        ),
    ] = None,
    data_plane: Annotated[
        str | None,
        _option(
            "--data-plane", panel=TRANSFER, metavar="on|off", text="off: SGLang's own. (name; default on)"
        ),
    ] = None,
    transfer_path: Annotated[
        str | None,
        _option(
            "--transfer-path",
            panel=TRANSFER,
            metavar="auto|direct|packed",
            text="How KV travels; auto: whatever is quicker. (name; default auto)",
        ),
    ] = None,
    slab_mb: Annotated[
        int | None,
        _option(
            "--slab-mb", panel=TRANSFER, text="Slab of each rank. (MiB; default 0: 64 on CPU, 1024 on GPU)"
        ),
    ] = None,
    ready_timeout: Annotated[
        float | None,
        _option("--ready-timeout", panel=RUN, text="Longest wait until ready. (seconds; default 600)"),
    ] = None,
) -> None:
    """Start a whole service on this machine and keep it running until Ctrl-C."""
    flags: dict[str, Any] = dict(model=model, prefill=prefill, decode=decode, device=device, tp=tp)
    flags |= dict(host=host, port=port, bootstrap_port=bootstrap_port, policy=policy, log_dir=log_dir)
    flags |= dict(start_method=start_method, ready_timeout_s=ready_timeout, sglang_args=ctx.obj or None)
    flags |= dict(prefill_args=prefill_args, decode_args=decode_args)
    flags |= dict(data_plane=data_plane, transfer_path=transfer_path, slab_mb=slab_mb)
    settings = command_line.launch_config(config, flags, _note)
    if dry_run:
        from pdserve.cluster.machine import plan_on_this_machine
        from pdserve.cluster.spec import format_plan

        typer.echo(format_plan(plan_on_this_machine(settings)), nl=False)
        return
    from pdserve.cluster.local import run_launch
    from pdserve.monitor.progress import ProgressDisplay

    raise typer.Exit(run_launch(settings, ProgressDisplay()))


@app.command(rich_help_panel="Serve", epilog="SGLang's own flags follow a `--`.")
def prefill(
    ctx: typer.Context,
    join: Join,
    model: Model = None,
    host: WorkerHost = "127.0.0.1",
    port: WorkerPort = 0,
    name: WorkerName = "",
    advertise_host: AdvertiseHost = "",
    device: Device = None,
    tp: TensorParallel = None,
) -> None:
    """Start one prefill server that joins a running service."""
    options = dict(host=host, port=port, name=name, advertise_host=advertise_host)
    _join(Role.PREFILL, join, model, device, tp, ctx.obj, options)


@app.command(rich_help_panel="Serve", epilog="SGLang's own flags follow a `--`.")
def decode(
    ctx: typer.Context,
    join: Join,
    model: Model = None,
    host: WorkerHost = "127.0.0.1",
    port: WorkerPort = 0,
    name: WorkerName = "",
    advertise_host: AdvertiseHost = "",
    device: Device = None,
    tp: TensorParallel = None,
) -> None:
    """Start one decode server that joins a running service."""
    options = dict(host=host, port=port, name=name, advertise_host=advertise_host)
    _join(Role.DECODE, join, model, device, tp, ctx.obj, options)


@app.command(rich_help_panel="Parts of a service")
def bootstrap(
    host: Annotated[
        str | None, _option("--host", panel=LISTEN, text="Address to listen on. (address; default 127.0.0.1)")
    ] = None,
    port: Annotated[
        int | None, _option("--port", panel=LISTEN, text="Port to listen on. (port; default 8997)")
    ] = None,
    port_range: Annotated[
        str | None,
        _option(
            "--port-range",
            panel=LISTEN,
            metavar="A-B",
            text="Ports for prefill servers. (ports; default 0-0: any free ones)",
        ),
    ] = None,
    advertise_host: Annotated[
        str | None,
        _option(
            "--advertise-host",
            panel=LISTEN,
            text="Host by which others reach this service. (address; default: the one it listens on)",
        ),
    ] = None,
    lease: Annotated[
        float | None, _option("--lease", panel=RUN, text="Silence that ends a server. (seconds; default 10)")
    ] = None,
    config: ConfigFile = None,
    log_level: LogLevel = None,
) -> None:
    """Run the bootstrap service: who is alive, and how decode finds prefill."""
    flags = dict(host=host, port=port, advertise_host=advertise_host, lease_s=lease, log_level=log_level)
    settings = command_line.bootstrap_config(config, flags, port_range)
    from pdserve.service_process import become_service

    become_service(settings)


@app.command(rich_help_panel="Parts of a service")
def balance(
    host: Annotated[
        str | None, _option("--host", panel=LISTEN, text="Address to listen on. (address; default 127.0.0.1)")
    ] = None,
    port: Annotated[
        int | None, _option("--port", panel=LISTEN, text="Port to listen on. (port; default 30000)")
    ] = None,
    bootstrap: Annotated[
        str | None,
        _option(
            "--bootstrap", panel=FLEET, metavar="HOST:PORT", text="Bootstrap service. (address; default none)"
        ),
    ] = None,
    prefill: Annotated[
        list[str] | None,
        _option(
            "--prefill",
            panel=FLEET,
            metavar="URL [PORT|none]",
            text="A prefill server and its bootstrap port; repeatable. (URL; default none)",
        ),
    ] = None,
    decode: Annotated[
        list[str] | None,
        _option(
            "--decode", panel=FLEET, metavar="URL", text="A decode server; repeatable. (URL; default none)"
        ),
    ] = None,
    policy: PolicyName = None,
    config: ConfigFile = None,
    log_level: LogLevel = None,
    pd_disaggregation: Annotated[bool, typer.Option("--pd-disaggregation", hidden=True)] = False,
) -> None:
    """Run the balancer alone, in front of a bootstrap service or of named servers."""
    flags: dict[str, Any] = dict(host=host, port=port, policy=policy, log_level=log_level)
    pairs = tuple(command_line.prefill_pair(text) for text in prefill or [])
    flags |= dict(decode=tuple(decode or []) or None, prefill=pairs or None)
    settings = command_line.balancer_config(config, flags, bootstrap)
    from pdserve.service_process import become_service

    become_service(settings)


@app.command(rich_help_panel="Use")
def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="Ask once and leave; default: converse.", show_default=False)
    ] = None,
    url: Annotated[
        str, _option("--url", panel=LISTEN, text="The service. (URL; default http://127.0.0.1:30000)")
    ] = "http://127.0.0.1:30000",
    system: Annotated[str, _option("--system", panel=RUN, text="System prompt. (text; default none)")] = "",
    max_tokens: Annotated[
        int, _option("--max-tokens", panel=RUN, text="Longest answer. (tokens; default 512)")
    ] = 512,
    temperature: Annotated[
        float, _option("--temperature", panel=RUN, text="0 is greedy. (number; default 0)")
    ] = 0.0,
) -> None:
    """Talk to a running service."""
    from pdserve.monitor.chat import run_chat

    options: dict[str, Any] = dict(system=system, max_tokens=max_tokens, temperature=temperature)
    raise typer.Exit(run_chat(url, prompt=prompt or "", **options))


@app.command(rich_help_panel="Use")
def version() -> None:
    """Print the version of pdserve."""
    typer.echo(f"pdserve {__version__}")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 for a user's mistake, 1 for a failure, 130 after Ctrl-C."""
    args, engine_flags = command_line.split_engine_flags(list(sys.argv[1:] if argv is None else argv))
    try:
        code = app(args or ["--help"], standalone_mode=False, obj=tuple(engine_flags))
    except PdserveError as exc:
        _fail(str(exc), exc.log_tail if isinstance(exc, StartupError) else "")
        code = 2 if isinstance(exc, ConfigError) else 1
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except Exception as exc:
        # typer's usage errors share no public base class over its versions, but this method.
        explain = getattr(exc, "format_message", None)
        if explain is None:
            raise
        is_unknown = "No such option" in explain() and args[0] in command_line.ENGINE_COMMANDS
        hint = " (SGLang's own flags follow a `--`)" if is_unknown else ""
        command = "" if "No such command" in explain() else f"{args[0]} "
        _fail(f"{explain().rstrip('.')}{hint}; see pdserve {command}--help")
        code = 2
    sys.exit(code or 0)


def _note(line: str) -> None:
    typer.echo(line, err=True)


def _fail(message: str, log_tail: str = "") -> None:
    typer.echo(f"error: {message}", err=True)
    if log_tail:
        typer.echo(log_tail.rstrip("\n"), err=True)


def _join(
    role: Role,
    address: str,
    model: str | None,
    device: str | None,
    tp: int | None,
    sglang_args: tuple[str, ...],
    options: dict[str, Any],
) -> NoReturn:
    """Become the worker process: nothing of pdserve's command stays."""
    from pdserve.cluster import machine

    bootstrap_url = machine.service_url(address, "--join")
    machine.check_bootstrap_service(bootstrap_url)
    path, served_name = command_line.resolve(model or "", "", _note)
    config = machine.JoinConfig(
        role, path, bootstrap_url, sglang_args=sglang_args, served_model_name=served_name, **options
    )
    config = replace(config, device=device or config.device, tp=tp or config.tp)
    spec = machine.plan_join_here(config)
    os.execvpe(spec.argv[0], spec.argv, machine.join_environment(config, spec))
