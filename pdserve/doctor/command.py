"""``pdserve doctor``: run the checks, print what they found, return the exit code."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass

from pdserve.config.launch import DEVICES, check_port
from pdserve.config.setting import FLEET, KEYS, MODEL, OUTPUT, RUN, check_choices, setting
from pdserve.doctor.finding import Report
from pdserve.doctor.machine import MachineQuestion, machine_groups
from pdserve.doctor.report import render_json, render_text
from pdserve.doctor.runner import run_groups
from pdserve.errors import ConfigError

MAX_SERVERS = 1024


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """What ``pdserve doctor`` was asked: the servers that are to run here, and a fleet that runs already."""

    url: str = setting("", "Balancer of a running fleet to check as well.", "URL", "URL")
    model: str = setting(
        "", "As MODEL of pdserve launch.", "name or path", "--model", panel=MODEL, empty="embedded"
    )
    device: str = setting("auto", "Where servers will run.", "name", "--device", panel=FLEET, choices=DEVICES)
    prefill: int = setting(1, "Prefill workers.", "count", "-p --prefill")
    decode: int = setting(1, "Decode workers.", "count", "-d --decode")
    port: int = setting(30000, "Port of the service.", "port", "--port")
    as_json: bool = setting(False, "Findings as JSON.", "flag", "--json/--text", panel=OUTPUT)
    deep: bool = setting(
        False, "Import SGLang and apply our hooks, 30 s.", "flag", "--deep/--no-deep", panel=RUN
    )
    api_key: str = setting(
        "",
        "Admin key of the fleet; or PDSERVE_ADMIN_API_KEY, PDSERVE_API_KEY.",
        "text",
        "--api-key KEY",
        panel=KEYS,
    )

    def __post_init__(self) -> None:
        check_port("--port", self.port)
        check_choices(self)
        for option, count in (("-p", self.prefill), ("-d", self.decode)):
            if not 1 <= count <= MAX_SERVERS:
                raise ConfigError(f"{option} must be 1..{MAX_SERVERS}, got {count}")


def run_doctor(options: DoctorOptions) -> int:
    """Check this machine and, with ``options.url``, the fleet whose balancer is there; print the report.

    Returns:
        0 if nothing is worse than a warning, 1 if there is an error.
    """
    started_s = time.monotonic()
    groups = machine_groups(
        MachineQuestion(
            options.model,
            options.device,
            options.prefill,
            options.decode,
            options.port,
            options.deep,
            is_serving=bool(options.url),
        )
    )
    if options.url:
        from pdserve.doctor.fleet import fleet_groups

        groups += fleet_groups(options.url, options.api_key)
    report = Report(run_groups(groups), time.monotonic() - started_s)
    _print(report, options.as_json)
    return report.exit_code


def _print(report: Report, as_json: bool) -> None:
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    width = shutil.get_terminal_size((100, 24)).columns
    sys.stdout.write(render_json(report) if as_json else render_text(report, width, is_unicode=is_unicode))
    sys.stdout.flush()
