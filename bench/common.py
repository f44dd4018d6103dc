"""What every bench prints: its set-up first, one JSON line last."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any


def describe_setup(**settings: object) -> dict[str, object]:
    """Machine, versions, commit and the bench's own settings."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "sglang": version("sglang"),
        "torch": version("torch"),
        "nixl": version("nixl"),
        "commit": commit.stdout.strip(),
        **settings,
    }


def print_setup(setup: dict[str, object]) -> None:
    """The set-up, one ``key: value`` a line."""
    for key, value in setup.items():
        print(f"{key:>12}: {value}")
    print(f"{'command':>12}: {' '.join(sys.argv)}\n", flush=True)


def print_result(result: dict[str, Any]) -> None:
    """The last line of stdout: one JSON object."""
    print(json.dumps(result))


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median, maximum and count."""
    return {
        "min": round(min(values), 3),
        "median": round(median(values), 3),
        "max": round(max(values), 3),
        "n": len(values),
    }
