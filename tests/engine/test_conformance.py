"""A pair of servers behind our balancer answers as one plain SGLang server does, field by field."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conformance import Case, Reply, differences, send_all
from tests.engine.conformance_cases import CASES, is_legitimate
from tests.engine.conftest import Plain
from tests.engine.fleet import Fleet

pytestmark = pytest.mark.engine

Answers = dict[str, tuple[Reply, Reply]]


@pytest.fixture(scope="module")
def answers(plain: Plain, fleet: Fleet, tiny_model: Path) -> Answers:
    """Every request's answers: a plain server's, then ours."""
    ours = send_all(fleet.url, CASES, str(tiny_model))
    return {case.name: pair for case, *pair in zip(CASES, plain.replies, ours, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_answer_is_a_plain_servers(case: Case, answers: Answers) -> None:
    found = [line for line in differences(*answers[case.name]) if not is_legitimate(case.name, line)]
    assert not found, "\n".join(found)


def test_streams_come_in_pieces(answers: Answers) -> None:
    """Guards the comparison, which joins events: an answer sent at once at its end would pass it."""
    cases = [case for case in CASES if case.name.endswith("streamed") and answers[case.name][1].status == 200]
    assert sum(len(answers[case.name][1].events) > 3 for case in cases) > len(cases) // 2


def test_nothing_stays_behind(fleet: Fleet, answers: Answers) -> None:
    fleet.wait_empty()
