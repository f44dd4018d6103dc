"""Negative controls of resumed answers, and SGLang's own retraction: each replay is needed, on real servers.

decode-0 and decode-1 take requests out of their batch every few steps (SGLang's own switch for tests);
decode-1 replays no token into grammar and penalties.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.fleet import Fleet, launch_fleet
from tests.engine.resume_driver import Aborted, Answer, Cut, ask, assert_same, digest
from tests.engine.test_resume import CASES, FLAGS

pytestmark = pytest.mark.engine

FORGETFUL = """\
import os
import pdserve.plugin.hooks as hooks

load = hooks.load
PARTS = {":add_resumed": "replay_grammar", ":replay_penalties": "replay_row"}

def load_forgetful(reference):
    found = load(reference)
    for end, part in PARTS.items():
        if reference.endswith(end):
            replay = found.__globals__[part]
            found.__globals__[part] = lambda *given: None if is_forgetful() else replay(*given)
            return found
    return found

def is_forgetful():
    return os.environ.get("PDSERVE_WORKER_ID") == "decode-1"

hooks.load = load_forgetful
"""
"""sitecustomize of the fleet's processes."""


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """1 prefill and 2 decode servers as above."""
    folder = tmp_path_factory.mktemp("controls")
    (folder / "sitecustomize.py").write_text(FORGETFUL)
    environ = {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"}
    environ |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "15"}
    flags = ("--prefill-args", FLAGS, "--decode-args", FLAGS)
    with launch_fleet(tiny_model, folder, prefill=1, decode=2, flags=flags, environ=environ) as running:
        yield running


@pytest.mark.parametrize(
    "name", ["generate, repetition penalty", "generate, min_new_tokens", "chat, penalties", "chat, schema"]
)
def test_without_its_replay_an_answer_is_another_one(fleet: Fleet, name: str) -> None:
    whole = ask(fleet, *CASES[name])
    assert_same(whole, ask(fleet, *CASES[name], Cut(12), decodes=("decode-1", "decode-0")))
    with pytest.raises((AssertionError, Aborted)):
        assert_same(whole, ask(fleet, *CASES[name], Cut(12), decodes=("decode-0", "decode-1")))


@pytest.mark.parametrize("name", ["generate, repetition penalty", "chat, penalties"])
def test_sglangs_own_retraction_keeps_penalties(fleet: Fleet, name: str) -> None:
    """Stock SGLang starts them at zero whenever it takes a request up again."""
    expected = digest(ask(fleet, *CASES[name]))

    def two(worker: str) -> list[Answer]:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(lambda _: ask(fleet, *CASES[name], decodes=(worker,)), range(2)))

    assert [digest(answer) for answer in two("decode-0")] == [expected] * 2
    assert [digest(answer) for answer in two("decode-1")] != [expected] * 2
    assert "retracted_reqs: 1" in (fleet.logs / "decode-0.log").read_text()
    fleet.wait_empty()
