"""SGLang's bootstrap protocol as state: completeness, agreement, forgetting; and the real thing beside it."""

from __future__ import annotations

import itertools
import json
import random
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.bootstrap.membership import QUARANTINE_S, PortPlan
from pdserve.bootstrap.prefill_api import prefill_api
from pdserve.bootstrap.route_table import DP_RANK_TTL_S, RouteError, RouteTable
from pdserve.bootstrap.web import RouteListener
from pdserve.errors import ConfigError
from tests.support.bootstrap_parts import call, row, until_listening

TOPOLOGY = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"


def test_route_table_is_complete_when_every_tp_rank_is_there() -> None:
    table = RouteTable()
    table.put(row(tp_rank=1, tp_size=2, port=5001))
    with pytest.raises(RouteError) as error:
        table.topology()
    assert error.value.status == 503
    table.put(row(tp_rank=0, tp_size=2, port=5000))
    assert table.topology()["attn_tp_size"] == 2
    assert table.rank(0, 0, 1, 0) == {"rank_ip": "127.0.0.1", "rank_port": 5001}
    with pytest.raises(RouteError, match="tp=7"):
        table.rank(0, 0, 7, 0)


def test_rank_that_reports_twice_replaces_its_row() -> None:
    table = RouteTable()
    table.put(row(port=5000))
    table.put(row(port=6000))
    assert table.rank(0, 0, 0, 0)["rank_port"] == 6000


def test_incomplete_row_is_refused_by_name() -> None:
    with pytest.raises(RouteError, match="lacks rank_port") as error:
        RouteTable().put({**row(), "rank_port": None})
    assert error.value.status == 400


def test_dp_ranks_are_forgotten_after_their_time() -> None:
    table = RouteTable()
    table.register_dp_rank(7, 1, now=0.0)
    assert table.query_dp_ranks([7, 8], now=DP_RANK_TTL_S) == {"7": 1}
    assert table.query_dp_ranks([7], now=DP_RANK_TTL_S + 1) == {}


def test_rank_that_contradicts_the_others_is_refused() -> None:
    table = RouteTable()
    table.put(row(tp_rank=0, tp_size=2))
    with pytest.raises(RouteError, match="disagree: page_size: 32 != 16") as error:
        table.put({**row(tp_rank=1, tp_size=2), "page_size": 32})
    assert error.value.status == 400
    with pytest.raises(RouteError, match="disagree"):
        table.replace([row(tp_rank=0, tp_size=2), {**row(tp_rank=1, tp_size=2), "pp_size": 2}])
    table.put(row(tp_rank=1, tp_size=2))
    assert table.topology()["page_size"] == 16, "a refused replacement changes nothing"


def test_value_that_only_a_later_rank_knows_is_answered() -> None:
    table = RouteTable()
    table.put(row(tp_rank=0, tp_size=2))
    table.put({**row(tp_rank=1, tp_size=2), "kv_layout": "page_first"})
    assert table.topology()["kv_layout"] == "page_first"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_tp_size", 0), ("attn_tp_size", "two"), ("attn_tp_rank", -1), ("attn_tp_rank", 1),
        ("rank_port", 70_000), ("rank_port", []), ("rank_ip", ""), ("page_size", True),
        ("dsv41_spec_layout", "text"), ("system_dp_size", None), ("prefill_http_port", "http"),
    ],
)  # fmt: skip
def test_wrong_field_is_refused_when_it_is_reported_not_when_it_is_asked_for(field: str, value: Any) -> None:
    table = RouteTable()
    with pytest.raises(RouteError, match="rank") as error:
        table.put({**row(), field: value})
    assert error.value.status == 400
    assert not table.is_complete


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "2", "text", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=3),
    max_leaves=6,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(row())), json_values))
def test_no_row_makes_a_table_that_cannot_answer(changes: dict[str, Any]) -> None:
    table = RouteTable()
    try:
        table.put({**row(), **changes})
        json.dumps(table.topology())
    except RouteError as error:
        assert error.status in (400, 503)


@pytest.mark.slow
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    is_system_dp=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_table_is_complete_with_the_last_rank_in_any_order(
    sizes: tuple[int, int, int, int], is_system_dp: bool, seed: int
) -> None:
    dp, cp, tp, pp = sizes
    places = list(itertools.product(*map(range, sizes)))
    rows = []
    for port, (d, c, t, p) in enumerate(places, start=1000):
        sides = ("system", "attn") if is_system_dp and dp > 1 else ("attn", "system")
        rows.append({
            **row(port=port), "attn_cp_size": cp, "attn_cp_rank": c, "attn_tp_size": tp, "attn_tp_rank": t,
            "pp_size": pp, "pp_rank": p, f"{sides[0]}_dp_size": dp, f"{sides[0]}_dp_rank": d,
            f"{sides[1]}_dp_size": 1, f"{sides[1]}_dp_rank": 0,
        })  # fmt: skip
    table = RouteTable()
    shuffled = random.Random(seed).sample(rows, len(rows))
    for one in shuffled[:-1]:
        table.put(one)
        table.put(one)  # reporting twice does not count twice
        assert not table.is_complete
    table.put(shuffled[-1])
    info = table.topology()
    assert (info["dp_size"], info["attn_cp_size"], info["attn_tp_size"], info["pp_size"]) == sizes
    for port, place in enumerate(places, start=1000):
        assert table.rank(*place)["rank_port"] == port


async def test_health_names_the_reason_why_it_is_not_200() -> None:
    table, live = RouteTable(), [True]
    listener = RouteListener(prefill_api(table, lambda: live[0]), "127.0.0.1", 0)
    await listener.start()
    try:
        status, answer = await call(listener.port, "GET", "/health")
        assert (status, answer["code"]) == (503, "ranks_pending")
        table.put(row())
        assert await call(listener.port, "GET", "/health") == (200, "OK")
        live[0] = False
        status, answer = await call(listener.port, "GET", "/health")
        assert (status, answer["code"]) == (503, "lease_ended")
    finally:
        listener.stop()


def test_port_of_a_dead_instance_is_the_last_one_to_be_tried() -> None:
    plan = PortPlan((7000, 7002))
    assert list(plan.candidates(None, now=0.0)) == [7000, 7001, 7002]
    plan.released(7001, now=0.0)
    plan.released(7000, now=1.0)
    assert list(plan.candidates(None, now=2.0)) == [7002, 7001, 7000]
    assert next(plan.candidates(7000, now=2.0)) == 7000, "its own former port is no stranger's"
    assert list(plan.candidates(None, now=QUARANTINE_S + 0.5)) == [7001, 7002, 7000]
    assert list(plan.candidates(99_999, now=2.0)) == [7002, 7001, 7000]


@pytest.mark.parametrize("port_range", [(0, 5), (9, 8), (60_000, 70_000), (-1, 3)])
def test_impossible_port_range_is_a_config_error(port_range: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="port_range must be LOW-HIGH"):
        PortPlan(port_range)


def _without_null(answer: Any) -> Any:
    return {k: v for k, v in answer.items() if v is not None} if isinstance(answer, dict) else answer


@pytest.mark.process
async def test_answers_equal_those_of_sglangs_own_server() -> None:
    conn = pytest.importorskip("sglang.srt.disaggregation.common.conn", reason="needs sglang")
    with socket.create_server(("127.0.0.1", 0)) as free:
        stock_port = free.getsockname()[1]
    stock = conn.CommonKVBootstrapServer("127.0.0.1", stock_port)
    table = RouteTable()
    listener = RouteListener(prefill_api(table, lambda: True), "127.0.0.1", 0)
    await listener.start()
    try:
        await until_listening(stock_port)
        rank = "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank={}&target_pp_rank=0"
        exchange: list[tuple[str, str, Any]] = [
            ("PUT", "/route", row(tp_rank=0, tp_size=2, port=5000)),
            ("GET", TOPOLOGY, None),  # 503: one rank is missing
            ("GET", rank.format(0), None),
            ("PUT", "/route", {**row(tp_rank=1, tp_size=2, port=5001), "kv_layout": "page_first"}),
            ("GET", TOPOLOGY, None),
            ("GET", rank.format(1), None),
            ("GET", rank.format(7), None),
            ("GET", "/route?prefill_dp_rank=0", None),
            ("POST", "/route", {}),
            ("POST", "/register_dp_rank", {"bootstrap_room": 2**62, "dp_rank": 1}),
            ("POST", "/query_dp_ranks", {"bootstrap_rooms": [2**62, 7]}),
            ("GET", "/health", None),
        ]
        for method, path, body in exchange:
            theirs, ours = (
                await call(stock_port, method, path, body),
                await call(listener.port, method, path, body),
            )
            assert ours[0] == theirs[0], (method, path)
            if theirs[0] == 200:
                # SGLang also sends the fields that its decode side fills in later, all null.
                assert _without_null(ours[1]) == _without_null(theirs[1]), (method, path)
        info = conn.PrefillServerInfo(**(await call(listener.port, "GET", TOPOLOGY))[1])
        assert (info.attn_tp_size, info.page_size, info.kv_cache_dtype) == (2, 16, "float32")
        assert (info.follow_bootstrap_room, info.prefill_http_port) == (True, 31000)
    finally:
        listener.stop()
        stock.close()
