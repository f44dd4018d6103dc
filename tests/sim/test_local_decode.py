"""Decode servers of the simulator that prefill by themselves: times computed by hand, and budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdserve.config.balancer import BalancerConfig
from pdserve.sim.engine import Clock, SimRequest
from pdserve.sim.local_decode import LocalDecodeServer
from pdserve.sim.report import percentile
from pdserve.sim.simulator import simulate
from pdserve.types import RequestShape
from pdserve.workload import TracedRequest, synthetic
from tests.sim.test_simulator import BUSY, MODEL

BUDGET_S = 0.09
AUTO = BalancerConfig(deflect="auto", slo_ttft_s=1.0, slo_tpot_s=0.1)


class Rig:
    """One server; requests of (tokens, answer) come alone at their times."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.finished: list[SimRequest] = []
        self.prefilled: list[float] = []
        calls = (lambda _: None, self.finished.append, lambda _: self.prefilled.append(self.clock.now_s))
        self.server = LocalDecodeServer(0, MODEL, self.clock, calls, BUDGET_S)

    def run(self, *requests: tuple[float, int, int]) -> list[SimRequest]:
        all_requests = []
        for index, (at_s, tokens, answer) in enumerate(requests):
            traced = TracedRequest(at_s, tokens, answer, None, serial=index)
            request = SimRequest(index, traced, RequestShape(tokens, answer))
            self.clock.at(at_s, self.server.arrive_alone, request)
            all_requests.append(request)
        self.clock.run()
        assert len(self.finished) == len(requests)
        assert self.server.is_idle
        assert self.server.used_tokens == 0
        return all_requests


def test_a_prompt_on_an_idle_server_takes_what_a_prefill_pass_takes() -> None:
    (request,) = Rig().run((0.0, 500, 3))
    assert request.first_token_s == pytest.approx(MODEL.prefill_s(500))
    assert request.finished_s < 0 <= request.first_token_s


def test_beside_a_running_request_passes_keep_the_budget() -> None:
    rig = Rig()
    rig.run((0.0, 100, 200), (0.1, 3000, 3))
    longest_s = max(place / 100 for place in rig.server.gaps)
    assert 2.718281828**longest_s <= BUDGET_S * 1.02
    assert rig.server.computed_tokens == 3100


def test_prompts_are_computed_in_the_order_of_their_arrival() -> None:
    rig = Rig()
    requests = rig.run((0.0, 3000, 5), (0.001, 100, 5), (0.002, 100, 5))
    assert sorted(rig.prefilled) == [request.first_token_s for request in requests]


def test_off_nothing_changes() -> None:
    trace = synthetic(BUSY, 1)
    reports = [
        simulate(trace, MODEL, "pair_cost", 2, 2, BalancerConfig(deflect=how)) for how in ("off", "auto")
    ]
    assert reports[0].records == reports[1].records, "without limits and with pairs nobody goes alone"


def test_deflection_serves_more_in_time_within_the_limit_per_token() -> None:
    trace = synthetic(replace(BUSY, rate=40.0), 3)
    off, auto = (
        simulate(trace, MODEL, "pair_cost", 1, 2, replace(AUTO, deflect=how)) for how in ("off", "auto")
    )
    served = [sum(not record.error for record in report.records) for report in (off, auto)]
    assert served[1] > 1.1 * served[0]
    assert any(record.prefill < 0 for record in auto.records)
    tpot_s = percentile([record.tpot_s for record in auto.records if not record.error], 0.99)
    assert tpot_s <= 0.1
    again = simulate(trace, MODEL, "pair_cost", 1, 2, AUTO)
    assert again.records == auto.records
