"""The ``pdserve`` command: reads options, merges them with a file, hands over to the rest of pdserve.

SGLang's own flags follow a ``--``. Commands import what they need when they
run, so ``--help`` is quick and the balancer's process stays free of engines.
The options themselves are in cli/options.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import typer

from pdserve import __version__
from pdserve.cli import options as opt
from pdserve.cli import plan as cli_plan
from pdserve.cli import settings as command_line
from pdserve.cli import use as cli_use
from pdserve.config.worker_env import keys_from_environment
from pdserve.errors import ConfigError, PdserveError, StartupError
from pdserve.types import Role

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    name="pdserve",
    help="Serve a model with SGLang, prefill and decode on separate servers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(rich_help_panel="Serve", epilog="SGLang's own flags follow a `--`.")
def launch(
    ctx: typer.Context,
    model: opt.Model = None,
    prefill: opt.NumPrefill = None,
    decode: opt.NumDecode = None,
    host: opt.ServiceHost = None,
    port: opt.ServicePort = None,
    bootstrap_port: opt.BootstrapPort = None,
    config: opt.ConfigFile = None,
    dry_run: opt.DryRun = False,
    monitor: opt.Monitor = False,
    device: opt.Device = None,
    tp: opt.TensorParallel = None,
    policy: opt.PolicyName = None,
    slo: opt.Slo = None,
    log_dir: opt.LogDir = None,
    start_method: opt.StartMethod = None,
    prefill_args: opt.PrefillArgs = None,
    decode_args: opt.DecodeArgs = None,
    data_plane: opt.DataPlane = None,
    transfer_path: opt.TransferPath = None,
    slab_mb: opt.SlabMb = None,
    ready_timeout: opt.ReadyTimeout = None,
    api_key: opt.ApiKey = None,
    admin_api_key: opt.AdminApiKey = None,
) -> None:
    """Start a whole service on this machine and keep it running until Ctrl-C."""
    flags = _flags(ctx, "config", "dry_run", "monitor", "ready_timeout", "api_key", "admin_api_key")
    flags |= dict(ready_timeout_s=ready_timeout, sglang_args=ctx.obj or None)
    settings = command_line.launch_config(config, flags, _note)
    command_line.pass_keys_on(config, dict(api_key=api_key, admin_api_key=admin_api_key))
    if dry_run:
        from pdserve.cluster.machine import plan_on_this_machine
        from pdserve.cluster.spec import format_plan

        typer.echo(format_plan(plan_on_this_machine(settings)), nl=False)
        return
    from pdserve.cluster.local import Display, run_launch
    from pdserve.monitor.progress import ProgressDisplay

    display: Display = ProgressDisplay()
    if monitor:
        from pdserve.monitor.launch_display import MonitorDisplay

        display = MonitorDisplay(display, api_key=command_line.admin_key(admin_api_key or api_key or ""))
    raise typer.Exit(run_launch(settings, display))


@app.command(rich_help_panel="Serve", epilog="SGLang's own flags follow a `--`.")
def prefill(
    ctx: typer.Context,
    join: opt.Join,
    model: opt.Model = None,
    host: opt.WorkerHost = "127.0.0.1",
    port: opt.WorkerPort = 0,
    name: opt.WorkerName = "",
    advertise_host: opt.AdvertiseHost = "",
    device: opt.Device = None,
    tp: opt.TensorParallel = None,
) -> None:
    """Start one prefill server that joins a running service."""
    _join(Role.PREFILL, join, model, device, tp, ctx)


@app.command(rich_help_panel="Serve", epilog="SGLang's own flags follow a `--`.")
def decode(
    ctx: typer.Context,
    join: opt.Join,
    model: opt.Model = None,
    host: opt.WorkerHost = "127.0.0.1",
    port: opt.WorkerPort = 0,
    name: opt.WorkerName = "",
    advertise_host: opt.AdvertiseHost = "",
    device: opt.Device = None,
    tp: opt.TensorParallel = None,
) -> None:
    """Start one decode server that joins a running service."""
    _join(Role.DECODE, join, model, device, tp, ctx)


@app.command(rich_help_panel="Parts of a service")
def bootstrap(
    ctx: typer.Context,
    host: opt.Host = None,
    port: opt.BootstrapOwnPort = None,
    port_range: opt.PortRange = None,
    advertise_host: opt.BootstrapAdvertiseHost = None,
    lease: opt.Lease = None,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = None,
) -> None:
    """Run the bootstrap service: who is alive, and how decode finds prefill."""
    flags = {**_flags(ctx, "config", "port_range", "lease"), "lease_s": lease}
    settings = command_line.bootstrap_config(config, flags, port_range)
    from pdserve.process.service import become_service

    become_service(settings)


@app.command(
    rich_help_panel="Parts of a service",
    epilog="The flags of `python -m sglang_router.launch_router --pd-disaggregation` are taken too.",
)
def balance(
    ctx: typer.Context,
    host: opt.Host = None,
    port: opt.Port = None,
    bootstrap: opt.Bootstrap = None,
    prefill: opt.PrefillUrls = None,
    decode: opt.DecodeUrls = None,
    worker_hosts: opt.WorkerHosts = None,
    policy: opt.PolicyName = None,
    prefill_policy: opt.PrefillPolicy = None,
    decode_policy: opt.DecodePolicy = None,
    cache_threshold: opt.CacheThreshold = None,
    balance_abs_threshold: opt.BalanceAbsThreshold = None,
    balance_rel_threshold: opt.BalanceRelThreshold = None,
    slo: opt.Slo = None,
    queue_order: opt.QueueOrder = None,
    predict_lengths: opt.PredictLengths = None,
    max_retries: opt.MaxRetries = None,
    queue_size: opt.QueueSize = None,
    queue_timeout: opt.QueueTimeout = None,
    max_body_bytes: opt.MaxBodyBytes = None,
    api_key: opt.ApiKey = None,
    admin_api_key: opt.AdminApiKey = None,
    worker_api_key: opt.WorkerApiKey = None,
    tls_cert_path: opt.TlsCertPath = None,
    tls_key_path: opt.TlsKeyPath = None,
    config: opt.ConfigFile = None,
    log_level: opt.LogLevel = None,
    log_format: opt.LogFormat = None,
    log_requests: opt.LogRequests = None,
    otlp_endpoint: opt.OtlpEndpoint = None,
    otlp_sample: opt.OtlpSample = None,
    pd_disaggregation: opt.PdDisaggregation = False,
) -> None:
    """Run the balancer alone, in front of a bootstrap service, of named servers, or of none yet."""
    flags = _flags(ctx, "config", "bootstrap", "queue_timeout", "pd_disaggregation", "slo")
    flags |= dict(queue_timeout_s=queue_timeout, **command_line.slo_settings(slo))
    given = command_line.BalanceFlags(flags, ctx.obj, bootstrap, pd_disaggregation)
    settings = command_line.balancer_config(config, given, _note)
    from pdserve.process.service import become_service

    become_service(settings)


@app.command(rich_help_panel="Use")
def chat(
    prompt: opt.Question = None,
    url: opt.ServiceUrl = "http://127.0.0.1:30000",
    system: opt.SystemPrompt = "",
    max_tokens: opt.MaxTokens = 512,
    temperature: opt.Temperature = 0.0,
    api_key: opt.ChatKey = "",
) -> None:
    """Talk to a running service."""
    from pdserve.monitor.chat import run_chat

    options: dict[str, Any] = dict(system=system, max_tokens=max_tokens, temperature=temperature)
    options["api_key"] = api_key or keys_from_environment().get("api_key", "")
    raise typer.Exit(run_chat(url, prompt=prompt or "", **options))


@app.command(rich_help_panel="Use")
def version() -> None:
    """Print the version of pdserve."""
    typer.echo(f"pdserve {__version__}")


cli_use.add_commands(app)
cli_plan.add_commands(app)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 for a user's mistake, 1 for a failure, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        args, foreign = command_line.split_foreign_flags(args)
        code = app(args or ["--help"], standalone_mode=False, obj=foreign)
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


def _flags(ctx: typer.Context, *others: str) -> dict[str, Any]:
    """The options of a command by name, without those that are no settings."""
    return {name: value for name, value in ctx.params.items() if name not in others}


def _note(line: str) -> None:
    typer.echo(line, err=True)


def _fail(message: str, log_tail: str = "") -> None:
    typer.echo(f"error: {message}", err=True)
    if log_tail:
        typer.echo(log_tail.rstrip("\n"), err=True)


def _join(
    role: Role, address: str, model: str | None, device: str | None, tp: int | None, ctx: typer.Context
) -> NoReturn:
    """Become the worker process: nothing of pdserve's command stays."""
    from pdserve.cluster import machine

    bootstrap_url = machine.service_url(address, "--join")
    machine.check_bootstrap_service(bootstrap_url)
    path, served_name = command_line.resolve(model or "", "", _note)
    options = _flags(ctx, "join", "model", "device", "tp")
    config = machine.JoinConfig(
        role, path, bootstrap_url, sglang_args=ctx.obj, served_model_name=served_name, **options
    )
    config = replace(config, device=device or config.device, tp=tp or config.tp)
    spec = machine.plan_join_here(config)
    os.execvpe(spec.argv[0], spec.argv, machine.join_environment(config, spec))
