"""Runs ``pdserve doctor`` as its users do, in a process of its own, and reads what it prints."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LIMIT_S = 150.0


@dataclass(frozen=True)
class DoctorRun:
    """How it ended."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        assert self.out, self.err
        return dict(json.loads(self.out))

    def findings(self, *levels: str) -> list[dict[str, Any]]:
        """Those of these levels, of all without any."""
        return [f for f in self.report["findings"] if not levels or f["level"] in levels]

    def finding(self, check: str, *levels: str) -> dict[str, Any]:
        """The first one of this check, of these levels; fails with what there is instead."""
        for each in self.findings(*levels):
            if each["check"] == check:
                return dict(each)
        raise AssertionError(f"no {levels} of {check}: {self.findings('warning', 'error')}")


async def doctor(
    *args: str, env: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
) -> DoctorRun:
    """``pdserve doctor *args``; ``env`` is added to this process's, ``before`` runs in the child first."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "PDSERVE_"))}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pdserve", "doctor", *args,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**clean, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8", **(env or {})},
        preexec_fn=before,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return DoctorRun(process.returncode or 0, out.decode(), err.decode())
