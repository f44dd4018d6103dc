"""A pair of servers behind our balancer answers as one plain SGLang server does, field by field."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.conformance import Case, Reply, differences, send
from tests.engine.conformance_cases import CASES, is_legitimate
from tests.engine.fleet import Fleet, Reference

pytestmark = pytest.mark.engine
CONCURRENCY = 8

Answers = dict[str, tuple[Reply, Reply]]


def _ask_all(url: str, model: Path) -> Iterator[Reply]:
    with ThreadPoolExecutor(CONCURRENCY) as threads:
        yield from list(threads.map(lambda case: send(url, case, str(model)), CASES))


@pytest.fixture(scope="module")
def answers(fleet: Fleet, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Every request's answers: a plain server's, then ours."""
    with Reference(tiny_model, tmp_path_factory.mktemp("plain")) as plain:
        theirs = list(_ask_all(plain.url, tiny_model))
    ours = list(_ask_all(fleet.url, tiny_model))
    return {case.name: pair for case, *pair in zip(CASES, theirs, ours, strict=True)}


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
