"""Load table arithmetic: parsing, in-flight credit, updates of the load channel."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replace_info

from pdserve.errors import ProtocolMismatch
from pdserve.scheduling.load import LoadCredit, LoadTable
from pdserve.scheduling.load_sample import ARRIVAL_S, Sample, parse_loads
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo, WorkerLoad

P0 = InstanceId("p0")
D0 = InstanceId("d0")


def info(instance_id: InstanceId, role: Role = Role.PREFILL) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(f"{role}-{instance_id}"), instance_id=instance_id, role=role, url="", model=""
    )


def table_of(*infos: WorkerInfo) -> LoadTable:
    table = LoadTable()
    for each in infos:
        table.add(each)
    return table


def sample(covered_s: float = 0.0, **fields: object) -> Sample:
    return Sample(WorkerLoad(timestamp_s=covered_s, **fields), covered_s)  # type: ignore[arg-type]


def rank(**fields: object) -> dict[str, object]:
    return {"timestamp": 1_700_000_000.0, "dp_rank": 0, "num_running_reqs": 1, **fields}


# -- parsing ---------------------------------------------------------------------------------


def test_dp_ranks_are_summed_and_the_fullest_pool_counts() -> None:
    body = json.dumps(
        {
            "timestamp": "2023-11-14T22:13:21+00:00",
            "loads": [
                rank(token_usage=0.2, decode_moments=[1, 2, 3, 4, 5, 6], disaggregation={"mode": "decode"}),
                rank(
                    num_waiting_reqs=4,
                    token_usage=0.7,
                    decode_moments=[10, 20, 30, 40, 50, 60],
                    disaggregation={"decode_transfer_queue_reqs": 3},
                ),
            ],
        }
    ).encode()
    parsed = parse_loads(body, sent_s=100.0, received_s=100.5)
    assert parsed.load.num_running_reqs == 2
    assert parsed.load.num_waiting_reqs == 4
    assert parsed.load.token_usage == 0.7
    assert parsed.load.decode_moments == (11, 22, 33, 44, 55, 66)
    assert parsed.load.decode_transfer_queue_reqs == 3
    assert parsed.load.timestamp_s == 100.5
    # the server answered 1 s after it took the snapshot, by its own clock
    assert parsed.covered_s == pytest.approx(100.0 - 1.0 - ARRIVAL_S)


def test_missing_sections_and_null_fields_read_as_zero() -> None:
    parsed = parse_loads(
        b'{"loads":[{"num_running_reqs":null,"decode_moments":null}]}', sent_s=5.0, received_s=6.0
    )
    assert parsed.load == WorkerLoad(timestamp_s=6.0)
    assert parsed.covered_s == pytest.approx(5.0 - ARRIVAL_S)


def test_a_server_without_ranks_is_idle() -> None:
    assert parse_loads(b'{"loads":[]}', sent_s=0.0, received_s=0.0).load.is_idle


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b'{"loads": 3}', b'{"loads":[{"num_running_reqs":"x"}]}']
)
def test_anything_else_is_a_protocol_mismatch(body: bytes) -> None:
    with pytest.raises(ProtocolMismatch, match="/v1/loads"):
        parse_loads(body, sent_s=0.0, received_s=0.0)


# -- credit ----------------------------------------------------------------------------------


def test_a_burst_between_two_polls_is_credited_to_its_worker() -> None:
    table = table_of(info(P0))
    table.record(P0, sample(10.0, num_waiting_uncached_tokens=100))
    for step in range(3):
        table.dispatch(P0, 50, 10.1 + step)
    assert table.credit(P0) == LoadCredit(reqs=3, prompt_tokens=150)
    assert table.view(P0).queued_tokens == 250
    assert table.view(P0).inflight == 3


def test_a_sample_takes_over_what_it_covers() -> None:
    table = table_of(info(P0))
    table.dispatch(P0, 50, 10.0)
    table.dispatch(P0, 70, 11.0)
    table.record(P0, sample(10.5, num_waiting_reqs=1, num_waiting_uncached_tokens=50))
    assert table.credit(P0) == LoadCredit(reqs=1, prompt_tokens=70)
    assert table.view(P0).queued_tokens == 120


def test_a_running_prefill_batch_that_no_queue_lists_still_counts() -> None:
    table = table_of(info(P0))
    table.dispatch(P0, 4000, 10.0)
    table.record(P0, sample(11.0))  # SGLang: nothing waits, the batch of 4000 is being computed
    assert table.view(P0).queued_tokens == 4000


def test_requests_in_the_bootstrap_queue_count_with_the_mean_prompt() -> None:
    table = table_of(info(P0))
    table.dispatch(P0, 100, 1.0)
    table.dispatch(P0, 300, 1.0)
    table.record(P0, sample(2.0, num_waiting_reqs=2, prefill_bootstrap_queue_reqs=2))
    assert table.view(P0).queued_tokens == 400


def test_a_request_whose_kv_is_being_sent_is_no_prefill_work() -> None:
    table = table_of(info(P0))
    table.dispatch(P0, 4000, 10.0)
    table.record(P0, sample(11.0, prefill_inflight_queue_reqs=1))
    assert table.view(P0).queued_tokens == 0


def test_decode_queues_inside_num_waiting_are_not_counted_twice() -> None:
    table = table_of(info(D0, Role.DECODE))
    table.record(
        D0,
        sample(
            1.0,
            num_running_reqs=2,
            num_waiting_reqs=3,
            decode_prealloc_queue_reqs=1,
            decode_transfer_queue_reqs=2,
        ),
    )
    assert table.view(D0).num_reqs == 5


def test_num_reqs_is_never_below_our_own_open_legs() -> None:
    table = table_of(info(D0, Role.DECODE))
    for _ in range(4):
        table.dispatch(D0, 10, 1.0)
    table.record(D0, sample(2.0, num_running_reqs=1))
    assert table.view(D0).num_reqs == 4


def test_finishing_a_leg_of_a_worker_that_left_does_nothing() -> None:
    table = table_of(info(P0))
    leg = table.dispatch(P0, 10, 1.0)
    table.remove(P0)
    table.finish(P0, leg)
    table.record(P0, sample())
    assert table.inflight(P0) == 0
    assert table.load(P0) is None


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("dispatch"), st.integers(0, 5000)),
            st.tuples(st.just("finish"), st.integers(0, 30)),
            st.tuples(st.just("sample"), st.integers(0, 40)),
        ),
        max_size=60,
    )
)
def test_credit_is_exactly_the_open_legs_sent_after_the_sample(steps: list[tuple[str, int]]) -> None:
    table = table_of(info(P0))
    model: dict[int, tuple[int, float]] = {}
    covered_s, now_s = float("-inf"), 0.0
    for verb, number in steps:
        now_s += 1.0
        if verb == "dispatch":
            model[table.dispatch(P0, number, now_s)] = (number, now_s)
        elif verb == "finish":
            table.finish(P0, number)
            model.pop(number, None)
        else:
            covered_s = float(number)
            table.record(P0, sample(covered_s))
        fresh = [tokens for tokens, sent_s in model.values() if sent_s >= covered_s]
        assert table.credit(P0) == LoadCredit(len(fresh), sum(fresh))
        assert table.inflight(P0) == len(model)
        assert table.view(P0).queued_tokens >= table.credit(P0).prompt_tokens


def test_a_prefill_queue_is_time_and_not_pool_use() -> None:
    table = table_of(info(P0), info(D0, Role.DECODE))
    for instance_id in (P0, D0):
        table.record(
            instance_id, sample(num_used_tokens=100, num_total_tokens=900, max_total_num_tokens=1000)
        )
        table.dispatch(instance_id, 30, 1.0)
    assert table.view(P0).kv_tokens == 130
    assert table.view(D0).kv_tokens == 930


def test_the_view_is_one_object_kept_right_in_place() -> None:
    table = table_of(info(P0))
    view = table.view(P0)
    before = table.snapshot()[P0]
    leg = table.dispatch(P0, 10, 1.0)
    assert (view.inflight, view.queued_tokens, view.num_reqs, view.last_turn) == (1, 10, 1, leg)
    table.record(P0, sample(2.0, max_total_num_tokens=500, num_waiting_reqs=3))
    assert (view.kv_capacity, view.num_reqs) == (500, 3)
    table.add(replace_info(info(P0), url="http://moved"))
    assert view.info.url == "http://moved"
    assert table.view(P0) is view
    assert before.inflight == before.queued_tokens == 0


def test_cached_part_of_a_prompt_is_no_prefill_work_but_takes_its_pages() -> None:
    table = table_of(info(P0))
    leg = table.dispatch(P0, 1000, 1.0, cached_tokens=900)
    assert table.credit(P0) == LoadCredit(1, 100)
    assert (table.view(P0).queued_tokens, table.view(P0).kv_tokens) == (100, 1000)
    table.finish(P0, leg)
    assert (table.view(P0).queued_tokens, table.view(P0).kv_tokens) == (0, 0)


def test_leg_that_ends_after_the_sample_that_counted_it_is_taken_off() -> None:
    table = table_of(info(P0), info(D0, Role.DECODE))
    legs = [table.dispatch(worker, 400, 1.0) for worker in (P0, D0)]
    table.record(P0, sample(2.0, num_waiting_reqs=1, num_waiting_uncached_tokens=400, num_used_tokens=900))
    table.record(D0, sample(2.0, num_running_reqs=3, num_total_tokens=900))
    for worker, leg in zip((P0, D0), legs, strict=True):
        table.finish(worker, leg)
    assert (table.view(P0).num_reqs, table.view(P0).queued_tokens, table.view(P0).kv_tokens) == (0, 0, 500)
    assert (table.view(D0).num_reqs, table.view(D0).kv_tokens) == (2, 500)
