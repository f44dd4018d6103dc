"""The ``pdserve`` command: finds the command that is meant, parses its options, runs it, reports errors.

Only the command that is asked for imports its options, and what it needs when it runs, so that ``--help``
is quick and the balancer's process stays free of engines. SGLang's own flags follow a ``--``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

import typer

from pdserve.cli import commands
from pdserve.cli.options import Command, Given, listed_function, typer_function
from pdserve.cli.router_flags import RouterOptions
from pdserve.cli.settings import split_foreign_flags
from pdserve.errors import ConfigError, PdserveError, StartupError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
SERVE, PARTS, USE, PLAN = "Serve", "Parts of a service", "Use", "Plan and check"
LAUNCH, BALANCER = "pdserve.config.launch", "pdserve.config.balancer"
SGLANG_FLAGS = "SGLang's own flags follow a `--`."
JOIN_OPTIONS = (f"{LAUNCH}:JoinTarget", f"{LAUNCH}:JoinConfig", "pdserve.cli.commands:ForceFlag")
ROUTER_FLAGS = "The flags of `python -m sglang_router.launch_router --pd-disaggregation` are taken too."

COMMANDS = (
    Command(
        commands.launch, SERVE, (f"{LAUNCH}:LaunchConfig", "pdserve.cli.commands:LaunchFlags"), SGLANG_FLAGS,
        "sglang",
    ),
    Command(commands.prefill, SERVE, JOIN_OPTIONS, SGLANG_FLAGS, "sglang"),
    Command(commands.decode, SERVE, JOIN_OPTIONS, SGLANG_FLAGS, "sglang"),
    Command(commands.bootstrap, PARTS, (f"{LAUNCH}:BootstrapConfig", "pdserve.cli.commands:FileFlag")),
    Command(
        commands.balance, PARTS, (f"{BALANCER}:BalancerConfig", "pdserve.cli.commands:BalanceFlags"),
        ROUTER_FLAGS,
    ),
    Command(commands.chat, USE, ("pdserve.cli.commands:ChatFlags",)),
    Command(commands.version, USE, ()),
    Command(commands.monitor, USE, ("pdserve.cli.commands:MonitorFlags",)),
    Command(commands.bench, USE, ("pdserve.loadgen.options:BenchOptions", "pdserve.cli.commands:BenchFlags")),
    Command(commands.chaos, USE, ("pdserve.chaos.command:ChaosOptions",)),
    Command(commands.doctor, PLAN, ("pdserve.doctor.command:DoctorOptions",)),
    Command(
        commands.simulate, PLAN, ("pdserve.sim.command:SimulateOptions", "pdserve.cli.commands:SimulateFlags")
    ),
    Command(commands.calibrate, PLAN, ("pdserve.sim.calibrate:CalibrationOptions",)),
)  # fmt: skip

EXTRAS = {
    "sglang": "engine",
    "torch": "engine",
    "nixl": "engine",
    "gguf": "engine",
    "safetensors": "engine",
    "tokenizers": "engine",
    "matplotlib": "plot",
    "numpy": "plot",
    "opentelemetry": "otel",
    "openai": "demo",
}
"""Packages that the core does not depend on, and the extra of pdserve that has each."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 for a user's mistake, 1 for a failure, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        args, foreign = split_foreign_flags(args)
        code = _typer_app(args[0] if args else "", foreign)(args or ["--help"], standalone_mode=False)
    except PdserveError as exc:
        _fail(str(exc), exc.log_tail if isinstance(exc, StartupError) else "")
        code = 2 if isinstance(exc, ConfigError) else 1
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except Exception as exc:
        _fail(_explain(exc, args))
        code = 2
    sys.exit(code or 0)


def _typer_app(name: str, foreign: RouterOptions | tuple[str, ...]) -> typer.Typer:
    """All commands, of which only ``name`` has its options: the others are there to be listed."""
    app = typer.Typer(
        name="pdserve",
        help="Serve a model with SGLang, prefill and decode on separate servers.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in COMMANDS:
        register = app.command(command.name, rich_help_panel=command.panel, epilog=command.epilog or None)
        register(_function(command, foreign) if command.name == name else listed_function(command))
    return app


def _function(command: Command, foreign: RouterOptions | tuple[str, ...]) -> Any:
    def call(values: dict[str, Any]) -> int | None:
        if command.needs and find_spec(command.needs) is None:
            raise ConfigError(_missing(command.name, command.needs))
        if isinstance(foreign, RouterOptions):
            return command.run(Given(values, router=foreign))
        return command.run(Given(values, foreign))

    return typer_function(command, call)


def _explain(exc: Exception, args: Sequence[str]) -> str:
    """One line for typer's usage errors and for a package that is not installed; raises any other."""
    if isinstance(exc, ModuleNotFoundError) and (package := (exc.name or "").partition(".")[0]) in EXTRAS:
        return _missing(args[0], package)
    # typer's usage errors share no public base class over its versions, but this method.
    explain = getattr(exc, "format_message", None)
    if explain is None:
        raise exc
    text = explain()
    is_engine = any(command.name == args[0] and command.needs for command in COMMANDS)
    hint = " (SGLang's own flags follow a `--`)" if "No such option" in text and is_engine else ""
    command = "" if "No such command" in text else f"{args[0]} "
    return f"{text.rstrip('.')}{hint}; see pdserve {command}--help"


def _missing(command: str, package: str) -> str:
    extra = EXTRAS[package]
    return f"pdserve {command} needs {package}, of the extra {extra!r}: pip install 'pdserve[{extra}]'"


def _fail(message: str, log_tail: str = "") -> None:
    typer.echo(f"error: {message}", err=True)
    if log_tail:
        typer.echo(log_tail.rstrip("\n"), err=True)
