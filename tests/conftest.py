"""Options and checks of every test: ``--fast``, Hypothesis profiles, and which tests may start processes.

``--fast`` leaves out what is marked with one of ``NOT_FAST``, without importing a module that holds
nothing else, and gives Hypothesis 25 examples. An unmarked test that starts a process or imports
a heavy package fails: it would make the fast run slow.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin while another test has their core

NOT_FAST = ("process", "engine", "slow", "gpu", "exhaustive")
HEAVY = {"torch", "transformers", "sglang", "anthropic", "openai"}
WHOLE_MODULE = re.compile(rf"^pytestmark = (?:\[\s*)?pytest\.mark\.({'|'.join(NOT_FAST)})\b", re.MULTILINE)

UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
"""No property depends on how busy the machine is."""
settings.register_profile("full", **UNHURRIED)
settings.register_profile("fast", max_examples=25, **UNHURRIED)
settings.load_profile("full")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of two xdist processes spin for minutes

pytest.register_assert_rewrite("tests.faults", "tests.support", "tests.engine.resume_driver")

_unmarked: list[str] = []
"""The test that runs now, if it may not start a process."""
_found: list[str] = []
"""What it did all the same."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"leave out tests marked {', '.join(NOT_FAST)}")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # under nohup: children would be deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--fast"):
        config.option.markexpr = " and ".join(f"not {mark}" for mark in NOT_FAST)
        settings.load_profile("fast")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--fast") and collection_path.suffix == ".py":
        return bool(WHOLE_MODULE.search(collection_path.read_text())) or None
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    is_marked = any(mark.name in NOT_FAST for mark in item.iter_markers())
    _unmarked[:] = [] if is_marked else [item.nodeid]
    try:
        return (yield)
    finally:
        _unmarked.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    yield
    if found := _found[:]:
        _found.clear()
        pytest.fail(f"needs pytest.mark.process: it {', '.join(found)}", pytrace=False)


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if not _unmarked:
        return
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        _found.append("starts a process")
    elif event == "import" and arguments[0] in HEAVY:
        _found.append(f"imports {arguments[0]}")


sys.addaudithook(_audit)
