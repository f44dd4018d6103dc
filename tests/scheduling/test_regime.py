"""The fleet's state: which role is short, smoothed, with hysteresis; what it tells others."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.scheduling.policy.view import WorkerView
from pdserve.scheduling.regime import HIGH, LOW, MIN_STAY_S, NUM_CHANGES, Regime, RegimeMonitor
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo
from tests.support.examples import n_examples

POLL_S = 0.25


def view(role: Role, index: int) -> WorkerView:
    name = f"{role}-{index}"
    info = WorkerInfo(
        worker_id=WorkerId(name), instance_id=InstanceId(name), role=role, url="http://" + name, model="m"
    )
    return WorkerView(info, kv_capacity=1_000_000, max_running_requests=100)


class Watched:
    """A monitor that looks at two workers of each role four times a second."""

    def __init__(self, monitor: RegimeMonitor | None = None) -> None:
        self.monitor = monitor or RegimeMonitor()
        self.prefills = [view(Role.PREFILL, index) for index in range(2)]
        self.decodes = [view(Role.DECODE, index) for index in range(2)]
        self.now_s = 100.0
        self.seen = self.monitor.changes  # the last sixteen

    def load(self, prefill_queue_s: float, decode_share: float) -> None:
        """Queues of that many seconds, and that share of slots."""
        for each in self.prefills:
            each.queued_tokens = prefill_queue_s * each.prefill_tokens_s
            each.num_reqs = 10
        for each in self.decodes:
            each.num_reqs = int(decode_share * 100)
            each.kv_tokens = int(decode_share * 948_000)

    def run(self, seconds: float, num_waiting: int = 0) -> Regime:
        for _ in range(round(seconds / POLL_S)):
            self.now_s += POLL_S
            self.monitor.observe(self.prefills, self.decodes, num_waiting, self.now_s)
        return self.monitor.regime


def test_a_fleet_at_rest_is_normal() -> None:
    assert Watched().run(60) is Regime.NORMAL


def test_a_busy_fleet_without_a_line_is_normal() -> None:
    fleet = Watched()
    fleet.load(prefill_queue_s=1.0, decode_share=0.7)
    assert fleet.run(60) is Regime.NORMAL


def test_long_prefill_queues_make_prefill_short() -> None:
    fleet = Watched()
    fleet.load(prefill_queue_s=4.0, decode_share=0.3)
    assert fleet.run(30) is Regime.PREFILL_SHORT


def test_a_few_long_prompts_are_no_long_queue() -> None:
    fleet = Watched()
    fleet.load(prefill_queue_s=8.0, decode_share=0.3)
    for each in fleet.prefills:
        each.num_reqs = 2
    assert fleet.run(30) is Regime.NORMAL


def test_full_decode_servers_make_decode_short() -> None:
    fleet = Watched()
    fleet.load(prefill_queue_s=0.1, decode_share=0.95)
    assert fleet.run(30, num_waiting=20) is Regime.DECODE_SHORT


def test_both_short_is_overload_and_it_ends_with_the_load() -> None:
    fleet = Watched()
    fleet.load(prefill_queue_s=4.0, decode_share=0.95)
    assert fleet.run(30, num_waiting=50) is Regime.OVERLOAD
    fleet.load(prefill_queue_s=0.2, decode_share=0.2)
    assert fleet.run(30) is Regime.NORMAL
    assert {change.before for change in fleet.seen} >= {Regime.NORMAL, Regime.OVERLOAD}


def test_a_line_counts_for_the_role_that_is_full() -> None:
    fleet = Watched()
    fleet.load(prefill_queue_s=0.1, decode_share=0.7)
    assert fleet.run(30, num_waiting=100) is Regime.DECODE_SHORT
    scores = fleet.monitor.scores
    assert scores[Role.PREFILL] < 0.2


def test_a_burst_that_is_over_soon_changes_nothing() -> None:
    fleet = Watched()
    fleet.run(30)
    fleet.load(prefill_queue_s=3.0, decode_share=0.3)
    fleet.run(0.75)
    fleet.load(prefill_queue_s=0.0, decode_share=0.3)
    assert fleet.run(30) is Regime.NORMAL
    assert not fleet.seen


def test_noise_about_a_threshold_does_not_flap() -> None:
    """The queue jumps by a third around the value that scores HIGH; a state lasts."""
    fleet, rng = Watched(), random.Random(1)
    for _ in range(2400):
        fleet.load(prefill_queue_s=2.0 * rng.uniform(0.7, 1.35), decode_share=0.3)
        fleet.run(POLL_S)
    assert fleet.seen
    assert len(fleet.seen) <= 2


def test_a_score_between_the_thresholds_keeps_the_state_there_is() -> None:
    between_s = 2.0 * (HIGH + LOW) / 2 / 0.8
    fleet = Watched()
    fleet.load(prefill_queue_s=between_s, decode_share=0.3)
    assert fleet.run(60) is Regime.NORMAL
    fleet.load(prefill_queue_s=4.0, decode_share=0.3)
    assert fleet.run(20) is Regime.PREFILL_SHORT
    fleet.load(prefill_queue_s=between_s, decode_share=0.3)
    assert fleet.run(60) is Regime.PREFILL_SHORT


def test_an_objective_for_the_first_token_says_what_a_long_queue_is() -> None:
    strict, lax = Watched(RegimeMonitor(slo_ttft_s=1.0)), Watched(RegimeMonitor(slo_ttft_s=20.0))
    for fleet in (strict, lax):
        fleet.load(prefill_queue_s=1.5, decode_share=0.3)
    assert strict.run(30) is Regime.PREFILL_SHORT
    assert lax.run(30) is Regime.NORMAL


def test_an_objective_for_each_token_bounds_the_batch() -> None:
    """20 ms and 0.4 ms a request: 30 ms allow 25 requests."""
    fleet = Watched(RegimeMonitor(slo_tpot_s=0.03))
    fleet.load(prefill_queue_s=0.1, decode_share=0.25)
    fleet.run(30, num_waiting=50)
    assert fleet.monitor.regime is Regime.DECODE_SHORT


def test_nothing_is_told_of_a_fleet_without_a_role() -> None:
    fleet = Watched()
    fleet.decodes = []
    fleet.load(prefill_queue_s=9.0, decode_share=0.0)
    assert fleet.run(30, num_waiting=100) is Regime.NORMAL


def test_a_worker_that_left_is_forgotten() -> None:
    fleet = Watched()
    fleet.load(prefill_queue_s=1.0, decode_share=0.3)
    fleet.run(10)
    del fleet.prefills[1]
    fleet.run(1)
    assert fleet.monitor.snapshot()["workers"].keys() == {"prefill-0", "decode-0", "decode-1"}  # type: ignore[attr-defined]


def test_the_state_document_tells_what_changed() -> None:
    fleet = Watched()
    fleet.load(prefill_queue_s=4.0, decode_share=0.3)
    fleet.run(30)
    told = fleet.monitor.snapshot()
    assert told["state"] == "prefill_short"
    assert told["scores"]["prefill"] > HIGH > LOW > told["scores"]["decode"]  # type: ignore[index]
    (change,) = told["changes"]  # type: ignore[misc]
    assert (change["from"], change["to"]) == ("normal", "prefill_short")
    assert change["ago_s"] == told["lasted_s"] > 20


@settings(max_examples=n_examples(60))
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1), st.integers(0, 200)), max_size=200))
def test_states_last_and_changes_are_bounded(loads: list[tuple[float, float, int]]) -> None:
    fleet = Watched()
    for queue_s, share, num_waiting in loads:
        fleet.load(queue_s, share)
        fleet.run(1.0, num_waiting)
    assert len(fleet.monitor.changes) <= NUM_CHANGES
    assert all(later.at_s - first.at_s >= MIN_STAY_S for first, later in pairwise(fleet.seen))
    assert all(later.before is first.after for first, later in pairwise(fleet.seen))
    if fleet.seen:
        assert fleet.seen[-1].after is fleet.monitor.regime
