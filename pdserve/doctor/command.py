"""``pdserve doctor``: run the checks, print what they found, return the exit code."""

from __future__ import annotations

import shutil
import sys
import time

from pdserve.config.launch import DEVICES, check_port
from pdserve.doctor.finding import Report
from pdserve.doctor.machine import MachineQuestion, machine_groups
from pdserve.doctor.report import render_json, render_text
from pdserve.doctor.runner import run_groups
from pdserve.errors import ConfigError

MAX_SERVERS = 1024


def run_doctor(
    url: str = "",
    *,
    model: str = "",
    device: str = "auto",
    prefill: int = 1,
    decode: int = 1,
    port: int = 30000,
    as_json: bool = False,
    deep: bool = False,
    api_key: str = "",
) -> int:
    """Check this machine and, with ``url``, the fleet whose balancer is there; print the report.

    Args:
        url: balancer, ``http://host:port``; empty: only this machine.
        model: as MODEL of ``pdserve launch``.
        device: auto, cpu or cuda.
        prefill, decode: servers that are to run here.
        port: of the service that is to run here.
        as_json: JSON instead of text.
        deep: import SGLang and apply the hooks too (about 30 s).
        api_key: admin key of the fleet; else PDSERVE_ADMIN_API_KEY or PDSERVE_API_KEY.

    Returns:
        0 if nothing is worse than a warning, 1 if there is an error.

    Raises:
        ConfigError: for a wrong argument.
    """
    question = MachineQuestion(model, device, prefill, decode, port, deep, is_serving=bool(url))
    _check(question)
    started_s = time.monotonic()
    groups = machine_groups(question)
    if url:
        from pdserve.doctor.fleet import fleet_groups

        groups += fleet_groups(url, api_key)
    report = Report(run_groups(groups), time.monotonic() - started_s)
    _print(report, as_json)
    return report.exit_code


def _print(report: Report, as_json: bool) -> None:
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    width = shutil.get_terminal_size((100, 24)).columns
    sys.stdout.write(render_json(report) if as_json else render_text(report, width, is_unicode=is_unicode))
    sys.stdout.flush()


def _check(question: MachineQuestion) -> None:
    check_port("--port", question.port)
    if question.device not in DEVICES:
        raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, got {question.device!r}")
    for option, count in (("-p", question.prefill), ("-d", question.decode)):
        if not 1 <= count <= MAX_SERVERS:
            raise ConfigError(f"{option} must be 1..{MAX_SERVERS}, got {count}")
