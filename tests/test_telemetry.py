"""Stages of a request, and what the log says of it: as text, and as JSON that parses whatever is in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from pdserve.balancer.metrics.ledger import RequestLedger
from pdserve.balancer.metrics.record import Outcome
from pdserve.balancer.request.request import Route
from pdserve.balancer.request.usage import SAMPLING, StreamTally
from pdserve.telemetry import JsonFormatter, RequestTimeline
from pdserve.types import Pair
from tests.support.balancer_client import running_site
from tests.support.fleet_network import D0, P0


class Log:
    """A logger of its own whose lines are read back."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.logger = logging.Logger("test_telemetry.log")  # unknown to pytest: xdist sends no lone surrogate
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(JsonFormatter())
        self.logger.addHandler(self.handler)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was written."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log()
    yield made
    made.logger.removeHandler(made.handler)


class Clock:
    """Seconds in the test's hands."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


# -- JSON lines --------------------------------------------------------------------------------


def test_a_line_is_one_object_with_its_fields(log: Log) -> None:
    log.logger.warning("attempt failed rid=%s worker=%s: %s", "abc", "decode-0", "closed, 3 left")
    (line,) = log.lines
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "test_telemetry.log",
        "message": "attempt failed rid=abc worker=decode-0: closed, 3 left",
        "rid": "abc",
        "worker": "decode-0",
    }


def test_any_text_is_one_line_that_parses(log: Log) -> None:
    texts = [
        'new\nline "quoted" \\',
        "\x00\x1b[31m",
        "\udcff lone surrogate",
        "ünï ☃",
        "a=b=c ==",
        "time=1 level=no",
    ]
    for text in texts:
        log.logger.info("got %s", text)
    assert [line["message"] for line in log.lines] == [f"got {text}" for text in texts]
    for line in log.lines:
        assert (line["level"], line["logger"]) == ("info", "test_telemetry.log")
        assert line["time"].startswith("20")


def test_an_exception_stays_on_its_line(log: Log) -> None:
    try:
        raise ValueError("no\nway")
    except ValueError:
        log.logger.exception("request failed rid=%s", "r1")
    (line,) = log.lines
    assert (line["rid"], line["level"]) == ("r1", "error")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: no\nway")


def test_a_field_of_an_odd_kind_is_written_as_text(log: Log) -> None:
    class Odd:
        def log_fields(self) -> dict[str, object]:
            return {"event": "odd", "what": complex(1, 2), "level": "mine"}

    log.logger.info("%s", Odd())
    (line,) = log.lines
    assert (line["message"], line["what"], line["level"]) == ("odd", "(1+2j)", "info")


# -- the access log ----------------------------------------------------------------------------


def finished(clock: Clock, outcome: Outcome = Outcome.COMPLETED) -> Any:
    ledger = RequestLedger(clock)
    record = ledger.open(Route.CHAT)
    record.rid, record.request_id, record.pair, record.status = "r" * 32, "theirs", Pair(P0, D0), 200
    record.reason, record.is_stream, record.prompt_tokens = "least_load 0.1 s", True, 64
    timeline = record.timeline
    timeline.paired_s, timeline.prefill_done_s, timeline.first_token_s = 100.5, 102.0, 102.25
    timeline.completion_tokens = 5
    clock.now_s = 104.25
    ledger.close(record, outcome)
    return record


def test_the_access_log_tells_pair_reason_and_stages() -> None:
    assert str(finished(Clock())) == (
        "request rid=rrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrr request_id=theirs pair=prefill-0>decode-0 room=0"
        ' route=/v1/chat/completions stream=true status=200 reason="least_load 0.1 s" prompt_tokens=64'
        " completion_tokens=5 queued_s=0.5 prefill_s=1.5 transfer_s=0.25 ttft_s=2.25 e2e_s=4.25 tpot_s=0.5"
        " finish=completed"
    )


def test_the_access_log_as_json_has_the_same_as_fields(log: Log) -> None:
    log.logger.info("%s", finished(Clock()))
    (line,) = log.lines
    assert line["message"] == "request"
    assert (line["pair"], line["reason"], line["stream"]) == ("prefill-0>decode-0", "least_load 0.1 s", True)
    assert (line["queued_s"], line["prefill_s"], line["transfer_s"], line["e2e_s"]) == (0.5, 1.5, 0.25, 4.25)


def test_stages_that_did_not_happen_are_left_out() -> None:
    ledger = RequestLedger(Clock())
    record = ledger.open(Route.GENERATE)
    record.status, record.error = 503, "no pair\nrid=forged"
    ledger.close(record, Outcome.SHED)
    line = str(record)
    assert "prefill_s" not in line and "pair=" not in line and 'rid="' not in line
    assert line.count("\n") == 0
    assert line.endswith('error="no pair\\nrid=forged"')


async def test_a_request_with_log_requests_on_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pdserve.balancer.proxy.dispatcher")
    async with running_site(log_requests=True) as site:
        await site.generate({"text": "hello", "stream": True})
        rid = site.last["rid"]
    lines = [each.getMessage() for each in caplog.records if each.name == "pdserve.balancer.proxy.dispatcher"]
    assert len(lines) == 1
    assert lines[0].startswith(f"request rid={rid} pair=prefill-0>decode-0 ")
    assert " ttft_s=" in lines[0]


# -- stages ------------------------------------------------------------------------------------


def test_stages_of_an_attempt_that_failed_are_not_those_of_the_next() -> None:
    timeline = RequestTimeline(0.0, paired_s=5.0, prefill_done_s=3.0)
    assert (timeline.queued_s, timeline.prefill_s, timeline.transfer_s) == (5.0, None, None)


def test_a_prefill_answer_after_the_first_token_ends_its_stage_there() -> None:
    timeline = RequestTimeline(0.0, paired_s=1.0, prefill_done_s=4.0, first_token_s=3.0)
    assert (timeline.prefill_s, timeline.transfer_s) == (2.0, 0.0)


# -- the books ---------------------------------------------------------------------------------


def test_a_stream_counts_its_tokens_while_it_runs_and_once_in_all() -> None:
    clock = Clock()
    ledger = RequestLedger(clock)
    record = ledger.open(Route.CHAT)
    meter = record.timeline.meter
    assert meter is not None
    meter.passed(8, None)
    assert ledger.rolling.live.output_tokens == 8
    meter.passed(8, 0.02)
    record.timeline.completion_tokens = 20
    ledger.close(record, Outcome.COMPLETED)
    assert ledger.rolling.live.output_tokens == 20
    assert ledger.completion_tokens == 20
    assert ledger.rolling.latencies["itl_s"].totals((0.015, 0.02))[0] == [0, 1, 1]


def test_a_second_close_counts_for_nothing() -> None:
    ledger = RequestLedger(Clock())
    record = ledger.open(Route.CHAT)
    ledger.close(record, Outcome.COMPLETED)
    ledger.close(record, Outcome.FAILED)
    assert (ledger.ended(Outcome.COMPLETED), ledger.ended(Outcome.FAILED), ledger.inflight) == (1, 0, 0)


# -- gaps within streams -----------------------------------------------------------------------

EVENT, END = b'data: {"text":"a","meta_info":{}}\n\n', b"data: [DONE]\n\n"


class Meter:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.events: list[int] = []
        self.gaps: list[float] = []

    def passed(self, num_events: int, gap_s: float | None) -> None:
        self.events.append(num_events)
        if gap_s is not None:
            self.gaps.append(gap_s)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 30])
def test_of_eight_streams_in_a_row_every_gap_between_tokens_is_measured_once(length: int) -> None:
    meter = Meter()
    for phase in range(SAMPLING):
        tally = StreamTally(Route.GENERATE, meter, phase)
        for chunk in (*[EVENT] * length, END):
            tally.add(chunk)
        assert tally.usage().completion_tokens == length
    assert len(meter.gaps) == length - 1
    assert sum(meter.events) <= SAMPLING * length


def test_events_that_came_together_have_no_gap() -> None:
    meter = Meter()
    for phase in range(SAMPLING):
        tally = StreamTally(Route.GENERATE, meter, phase)
        for _ in range(10):
            tally.add(EVENT * 2)
    assert meter.gaps == []
    assert sum(meter.events) > SAMPLING * 10


def test_a_running_stream_is_told_within_eight_events() -> None:
    meter = Meter()
    tally = StreamTally(Route.GENERATE, meter)
    for _ in range(100):
        tally.add(EVENT)
    assert 100 - SAMPLING < sum(meter.events) <= 100
