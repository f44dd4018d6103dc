"""The data plane's counters where SGLang serves its metrics, in the multi-process form that it reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.plugin.stats import _HELP, _SECONDS, COUNTERS

pytestmark = pytest.mark.process

PROGRAM = """
from pdserve.plugin.stats import TransferMetrics, TransferStats
stats = TransferStats.create()
metrics = TransferMetrics(stats)
stats.add(0, kv_bytes=1000, transfers=1, wait_us=250_000)
metrics.refresh()
stats.add(1, kv_bytes=24, failures=2)
metrics.refresh()
metrics.refresh()
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_every_counter_has_a_metric() -> None:
    assert {*_HELP, *_SECONDS} == set(COUNTERS)


def test_growth_of_all_ranks_is_told_once(tmp_path: Path) -> None:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    values = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if line[:1] not in ("#", ""))
    assert float(values["pdserve:transfer_kv_bytes_total"]) == 1024
    assert float(values["pdserve:transfer_transfers_total"]) == 1
    assert float(values["pdserve:transfer_failures_total"]) == 2
    assert float(values["pdserve:transfer_wait_seconds_total"]) == 0.25
