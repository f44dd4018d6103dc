"""A CPU decode server that runs out of KV sets requests aside and takes them up again where they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.fleet import Fleet, join_worker
from tests.engine.test_tokens import _assert_same
from tests.engine.test_transfer import PROMPTS, _over_pair

pytestmark = pytest.mark.engine

NAME = "decode-retracting"


def test_retracted_requests_go_on_with_the_tokens_of_an_undisturbed_run(
    fleet: Fleet, expected: dict[str, list[int]], tiny_model: Path
) -> None:
    # Every third step sets a request aside (SGLang's own switch for tests); so does the small pool.
    environ = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "3"}
    flags = ("--max-total-tokens", "4096", "--num-reserved-decode-tokens", "16")
    with join_worker(fleet, "decode", tiny_model, NAME, flags, environ=environ):
        fleet.wait_ready(3)
        rows = (fleet.worker("prefill-0"), fleet.worker(NAME))
        _assert_same(_over_pair(*rows, PROMPTS), expected)
        fleet.wait_empty()
        log = (fleet.logs / f"{NAME}.log").read_text()
        assert "#retracted_reqs: " in log, "no request was set aside: nothing was tested"
    fleet.wait_ready(2)
