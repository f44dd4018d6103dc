"""What each ``pdserve`` command does with its options, and the options that are no settings.

A command imports what it needs when it runs. cli/app.py lists the commands and where their options stand.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from pdserve import __version__
from pdserve.cli import settings
from pdserve.cli.options import Given
from pdserve.cli.router_flags import ROUTER_DEFAULTS, RouterOptions
from pdserve.config.balancer import BalancerConfig
from pdserve.config.file import merge
from pdserve.config.launch import BootstrapConfig, LaunchConfig
from pdserve.config.setting import (
    KEYS,
    LISTEN,
    OUTPUT,
    ROUTING,
    RUN,
    admin_key_setting,
    same_setting,
    setting,
)
from pdserve.config.worker_env import keys_from_environment
from pdserve.types import Role

if TYPE_CHECKING:
    from pdserve.cluster.spec import ClusterSpec, ProcessSpec

SERVICE_URL = "http://127.0.0.1:30000"


@dataclass(frozen=True, slots=True)
class FileFlag:
    """The configuration file of a command that has one."""

    config: Path | None = setting(None, "TOML file; options win over it.", "path", "--config")


@dataclass(frozen=True, slots=True)
class ForceFlag:
    """The option of commands that refuse what this machine is too small for."""

    force: bool = setting(
        False,
        "Start even if this machine has too little memory or too few cores.",
        "flag",
        "--force",
        panel=RUN,
    )


@dataclass(frozen=True, slots=True)
class LaunchFlags(FileFlag):
    """Options of ``launch`` that are no settings of the fleet. The keys are the balancer's."""

    dry_run: bool = setting(False, "Print the commands, start nothing.", "flag", "--dry-run")
    monitor: bool = setting(False, "Open the live monitor when ready.", "flag", "--monitor/--no-monitor")
    force: bool = same_setting(ForceFlag, "force")
    api_key: str = same_setting(BalancerConfig, "api_key")
    admin_api_key: str = same_setting(BalancerConfig, "admin_api_key")


@dataclass(frozen=True, slots=True)
class BalanceFlags(FileFlag):
    """Options of ``balance`` that stand for several settings."""

    slo: str = same_setting(LaunchConfig, "slo")
    pd_disaggregation: bool = setting(
        False,
        "Take the defaults of sglang_router.launch_router instead: port 30000 of every address, "
        "cache_aware, 5 retries, a queue of 100.",
        "flag",
        "--pd-disaggregation",
    )


@dataclass(frozen=True, slots=True)
class ChatFlags:
    """Options of ``chat``."""

    prompt: str = setting("", "Ask once and leave.", "text", "PROMPT", empty="converse")
    url: str = setting(SERVICE_URL, "The service.", "URL", "--url", panel=LISTEN)
    system: str = setting("", "System prompt.", "text", "--system", panel=RUN)
    max_tokens: int = setting(512, "Longest answer.", "tokens", "--max-tokens")
    temperature: float = setting(0.0, "0 is greedy.", "number", "--temperature")
    api_key: str = setting("", "The service's key; or PDSERVE_API_KEY.", "text", "--api-key KEY", panel=KEYS)


@dataclass(frozen=True, slots=True)
class MonitorFlags:
    """Options of ``monitor``."""

    url: str = setting(SERVICE_URL, "The balancer.", "URL", "URL")
    once: bool = setting(False, "Print one frame and leave.", "flag", "--once/--live", panel=OUTPUT)
    as_json: bool = setting(False, "Print the state document.", "flag", "--json/--frames")
    interval_s: float = setting(0.5, "Between two polls, 0.1 to 60.", "seconds", "--interval")
    api_key: str = admin_key_setting()


@dataclass(frozen=True, slots=True)
class BenchFlags:
    """Options of ``bench`` that stand for several of its options."""

    slo: str = setting("", "What goodput asks for.", "seconds", "--slo ttft=S,tpot=S", panel=OUTPUT)


@dataclass(frozen=True, slots=True)
class SimulateFlags:
    """Options of ``simulate`` that change the balancer's settings."""

    slo_aware: bool = setting(
        False,
        "The balancer knows the SLO, too: early refusal, order of the queue.",
        "flag",
        "--slo-aware/--no-slo-aware",
        panel=ROUTING,
    )


def launch(given: Given) -> int | None:
    """Start a whole service on this machine and keep it running until Ctrl-C."""
    flags = given.make(LaunchFlags)
    config = settings.launch_config(flags.config, given.of(LaunchConfig), given.sglang_args, _note)
    settings.pass_keys_on(flags.config, dict(api_key=flags.api_key, admin_api_key=flags.admin_api_key))
    from pdserve.cluster.machine import plan_on_this_machine
    from pdserve.cluster.ports import SystemPorts

    with SystemPorts() as ports:
        spec = plan_on_this_machine(config, ports)
        if flags.dry_run:
            from pdserve.cluster.spec import format_plan

            typer.echo(format_plan(spec), nl=False)
            return None
        _check_start(config.model, spec.workers, flags.force)
        return _run_launch(config, spec, flags)


def _run_launch(config: LaunchConfig, spec: ClusterSpec, flags: LaunchFlags) -> int:
    from pdserve.cluster.local import Display, run_launch
    from pdserve.monitor.progress import ProgressDisplay

    display: Display = ProgressDisplay()
    if flags.monitor:
        from pdserve.monitor.launch_display import MonitorDisplay

        display = MonitorDisplay(display, api_key=settings.admin_key(flags.admin_api_key or flags.api_key))
    return run_launch(config, spec, display)


def prefill(given: Given) -> NoReturn:
    """Start one prefill server that joins a running service."""
    _join(Role.PREFILL, given)


def decode(given: Given) -> NoReturn:
    """Start one decode server that joins a running service."""
    _join(Role.DECODE, given)


def bootstrap(given: Given) -> NoReturn:
    """Run the bootstrap service: who is alive, and how decode finds prefill."""
    from pdserve.process.service import become_service

    config = given.make(FileFlag).config
    become_service(settings.bootstrap_config(config, given.of(BootstrapConfig)))


def balance(given: Given) -> NoReturn:
    """Run the balancer alone, in front of a bootstrap service, of named servers, or of none yet."""
    from pdserve.process.service import become_service

    flags = given.make(BalanceFlags)
    options = {**given.of(BalancerConfig), **settings.slo_settings(flags.slo)}
    router = given.router or RouterOptions()
    default = replace(BalancerConfig(), **(ROUTER_DEFAULTS if flags.pd_disaggregation else {}))
    become_service(settings.balancer_config(default, flags.config, router, options, _note))


def chat(given: Given) -> int:
    """Talk to a running service."""
    from pdserve.monitor.chat import run_chat

    return run_chat(**{"url": SERVICE_URL, "api_key": _client_key(given), **given.values})


def version(given: Given) -> None:
    """Print the version of pdserve."""
    typer.echo(f"pdserve {__version__}")


def monitor(given: Given) -> int:
    """Watch the fleet live: workers, pairs, latencies, queue, events, requests; `?` lists the keys."""
    from pdserve.monitor.command import run_monitor

    flags = given.make(MonitorFlags)
    key = settings.admin_key(flags.api_key)
    return run_monitor(
        flags.url, once=flags.once, as_json=flags.as_json, interval_s=flags.interval_s, api_key=key
    )


def bench(given: Given) -> int:
    """Put load on a service and report its latencies, throughput and goodput."""
    from pdserve.loadgen.command import run_bench
    from pdserve.loadgen.options import BenchOptions

    chosen = {**given.of(BenchOptions), **settings.slo_settings(given.make(BenchFlags).slo)}
    return run_bench(BenchOptions(**{**chosen, "api_key": _client_key(given)}), typer.echo)


def chaos(given: Given) -> int:
    """Kill and stop servers of a launched fleet under load, and report what its clients noticed."""
    from pdserve.chaos.command import ChaosOptions, run_chaos

    options = given.make(ChaosOptions)
    options = replace(options, api_key=settings.admin_key(options.api_key))
    return run_chaos(options, typer.confirm, client_key=_client_key(given))


def doctor(given: Given) -> int:
    """Check this machine and, given a URL, a running fleet: what is wrong, why it matters, what to do."""
    from pdserve.doctor.command import DoctorOptions, run_doctor

    return run_doctor(given.make(DoctorOptions))


def simulate(given: Given) -> None:
    """Run the balancer's own policies over modelled servers, in virtual time."""
    from pdserve.sim.command import SimulateOptions, run_simulation

    options = given.make(SimulateOptions)
    limits = settings.slo_settings(options.slo) if given.make(SimulateFlags).slo_aware else {}
    typer.echo(run_simulation(options, merge(BalancerConfig(), {}, limits)), nl=False)


def calibrate(given: Given) -> None:
    """Measure a live, idle service and write the cost model that `pdserve simulate` takes."""
    from pdserve.sim.calibrate import CalibrationOptions, run_calibration

    chosen: dict[str, Any] = given.of(CalibrationOptions)
    chosen["prefill"] = tuple(map(settings.prefill_pair, chosen.get("prefill", ())))
    chosen["decode"] = tuple(chosen.get("decode", ()))
    chosen["api_key"] = settings.admin_key(chosen.get("api_key", ""))
    typer.echo(run_calibration(CalibrationOptions(**{"url": SERVICE_URL, **chosen})), nl=False)


def _join(role: Role, given: Given) -> NoReturn:
    """Become the worker process: nothing of pdserve's command stays."""
    from pdserve.cluster import machine
    from pdserve.cluster.ports import SystemPorts
    from pdserve.config.launch import JoinConfig, JoinTarget

    target = given.make(JoinTarget)
    bootstrap_url = machine.service_url(target.join, "--join")
    machine.check_bootstrap_service(bootstrap_url)
    path, served_name = settings.resolve(target.model, "", _note)
    config = JoinConfig(role, path, bootstrap_url, **given.of(JoinConfig))
    config = replace(config, sglang_args=given.sglang_args, served_model_name=served_name)
    ports = SystemPorts()
    spec = machine.plan_join_here(config, ports)
    _check_start(path, (spec,), given.make(ForceFlag).force)
    ports.hand_on()
    os.execvpe(spec.argv[0], spec.argv, machine.join_environment(config, spec))


def _check_start(model: str, servers: Sequence[ProcessSpec], is_forced: bool) -> None:
    """Find out before the first process whether the model can be had and the machine is large enough."""
    from pdserve.cluster.worker_flags import flag_value
    from pdserve.doctor.machine import check_room
    from pdserve.model import check_hub_model

    check_hub_model(model, flag_value(servers[0].flags, "--revision"))
    if not is_forced:
        check_room(model, servers)


def _client_key(given: Given) -> str:
    return str(given.values.get("api_key") or keys_from_environment().get("api_key", ""))


def _note(line: str) -> None:
    typer.echo(line, err=True)
